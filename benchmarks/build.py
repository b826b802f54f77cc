"""Memory and rate of `sci-gpt build` on a packed file of 4 GB: the peak of all its processes beside the bound."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import netCDF4
import numpy as np
import psutil
import yaml

from benchmarks.results import machine, write_section

ROWS, COLUMNS, TILE = 90, 180, (30, 60)
BLOCK = 400  # times that are drawn; the file repeats them with another mean each time


def write_field(path: Path, megabytes: int) -> int:
    """Write hourly int16 fields of about that size; the number of times."""
    block = (1000 * np.random.default_rng(0).standard_normal((BLOCK, ROWS, COLUMNS))).astype(np.int16)
    times = int(megabytes * 1e6 / block[0].nbytes)
    axes = {
        "time": ("hours since 1950-01-01", np.arange(float(times))),
        "lat": ("degrees_north", np.linspace(89, -89, ROWS)),
        "lon": ("degrees_east", np.arange(COLUMNS) * 360.0 / COLUMNS),
    }
    draw = np.random.default_rng(1)
    with netCDF4.Dataset(path, "w") as file:
        for name, (units, values) in axes.items():
            file.createDimension(name, len(values))
            file.createVariable(name, "f8", (name,))[:] = values
            file[name].units = units
        variable = file.createVariable("t2", "i2", tuple(axes), fill_value=np.int16(-32768))
        variable.set_auto_maskandscale(False)
        variable.setncatts({"units": "K", "scale_factor": 0.01, "add_offset": 280.0})
        for start in range(0, times, BLOCK):
            rows = min(BLOCK, times - start)
            # Another order of times and another mean: no two blocks are copies of each other.
            shifted = block[draw.permutation(BLOCK)[:rows]] + draw.integers(-500, 500, (rows, 1, 1), np.int16)
            variable[start : start + rows] = shifted
    return times


def configuration(folder: Path, times: int) -> Path:
    """A build of the file in tiles of TILE, split in time at eight and nine tenths."""
    days = [str(np.datetime64("1950-01-01") + int(share * times / 24)) for share in (0.8, 0.9, 1.1)]
    era = {"name": "all", "start": "1950-01-01", "train_until": days[0], "valid_until": days[1], "end": days[2]}
    source = {
        "name": "field",
        "reader": "netcdf_grid",
        "modality": "grid",
        "nature": "analysis",
        "files": [str(folder / "field.nc")],
        "options": {"variable": "t2", "name": "air_temperature", "tile": list(TILE)},
        "licence": "none",
        "citation": "random numbers",
        "split": {"by": "time", "era": "all"},
    }
    calendar = {"gap_days": 7, "eras": [era]}
    tree = {"name": "field", "output": str(folder / "store"), "calendar": calendar, "sources": [source]}
    path = folder / "build.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def measure(config: Path, *, workers: int, megabytes: float) -> tuple[float, float, int]:
    """Seconds, peak bytes (resident, summed over all processes, every 20 ms), and processes of one build.

    Raises:
        RuntimeError: it failed.
    """
    line = [sys.executable, "-m", "sci_launch.cli", "build", str(config)]
    line += ["--set", f"build.workers={workers}", "--set", f"build.memory_megabytes={megabytes:g}"]
    began = time.monotonic()
    process = psutil.Popen(line, stdout=subprocess.DEVNULL)
    peak = most = 0
    while process.poll() is None:
        sizes = []
        for one in [process, *process.children(recursive=True)]:
            try:
                sizes.append(one.memory_info().rss)
            except psutil.NoSuchProcess:
                continue
        peak, most = max(peak, sum(sizes)), max(most, len(sizes))
        time.sleep(0.02)
    if process.returncode:
        raise RuntimeError(f"{' '.join(line)} ended with {process.returncode}")
    return time.monotonic() - began, peak, most


def main(arguments: list[str]) -> int:
    """Build once per number of workers, print the table and write it into RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=4000, help="of the file")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--bound", type=float, default=1500, help="MB for all processes of a build")
    parser.add_argument("--folder", type=Path, help="where the file and the stores go (default: a temporary folder)")
    parser.add_argument("--note", default="", help="a line for RESULTS.md about the machine's other work")
    parsed = parser.parse_args(arguments)
    lines = ["| workers | processes | bound, MB | peak, MB | seconds | MB of file per s |", "|---|---|---|---|---|---|"]
    over = False
    with tempfile.TemporaryDirectory(prefix="build-", dir=parsed.folder) as scratch:
        folder = Path(scratch)
        times = write_field(folder / "field.nc", parsed.megabytes)
        size = (folder / "field.nc").stat().st_size
        for workers in parsed.workers:
            config = configuration(folder, times)
            seconds, peak, most = measure(config, workers=workers, megabytes=parsed.bound)
            over |= peak > parsed.bound * 1e6
            lines.append(
                f"| {workers} | {most} | {parsed.bound:,.0f} | {peak / 1e6:,.0f} | {seconds:.0f} | "
                f"{size / 1e6 / seconds:.0f} |"
            )
            shutil.rmtree(folder / "store")
    lines += [
        "",
        f"A netCDF file of {size / 1e9:.2f} GB (int16 with scale and offset; {2 * size / 1e9:.2f} GB as float32), "
        f"{times:,} fields of {ROWS} x {COLUMNS} in tiles of {TILE[0]} x {TILE[1]}: hashed, read, split, compared, its "
        "statistics made, written as shards. Peak: resident size summed over the build's processes, every 20 ms.",
        f"Made by `python -m benchmarks.build` ({machine()}). {parsed.note}".rstrip(),
    ]
    print("\n".join(lines))
    write_section("build", lines, title="Memory and rate of a build")
    return int(over)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
