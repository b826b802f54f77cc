"""A small CF Zarr of known values: two levels of packed temperature and a rain field, with missing values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from sci_gpt.config import DataConfig
from sci_gpt.config_file import parse_config
from sci_gpt.data.faults import Patience
from sci_gpt.data.in_place import ZarrSample
from sci_gpt.data.source import SourceSettings
from sci_gpt.data.source_zarr import ZarrGrid
from sci_gpt.data.store import Store
from sci_gpt.recipes.build import build

TIMES, LEVELS, ROWS, COLUMNS = 400, 2, 4, 6
SCALE, OFFSET, FILL = 0.01, 250.0, -32768
CHUNKS = {"t": (5, 2, 2, 3), "pr": (10, 4, 3)}
TILE = [2, 3]
STRETCH_BYTES = 60 * 3 * 2 * 3 * 4  # blocks of 60 times of one tile of three channels


def raw_values(tail: float = 0.0, *, altered_from: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """Stored int16 temperatures (time, level, row, column) and float32 rain in mm day-1 (time, row, column)."""
    random = np.random.default_rng(5)
    packed = random.integers(-3000, 3000, (TIMES, LEVELS, ROWS, COLUMNS)).astype(np.int16)
    rain = random.gamma(1.0, 4.0, (TIMES, ROWS, COLUMNS)).astype(np.float32)
    packed[7, 0, 0, 0], packed[9, 1, 0, 0], rain[8, 0, 0] = 1500, 2500, 86.4
    packed[5, 1, 2, 3] = FILL
    rain[6, 3, 5] = 1e20
    packed[altered_from:] += np.int16(tail)
    rain[altered_from:] += np.float32(tail)
    return packed, rain


def dataset(tail: float = 0.0, *, calendar: str = "360_day", gap: int | None = None) -> xr.Dataset:
    """The Zarr's content; `gap`: the number of the time before which five days are skipped."""
    packed, rain = raw_values(tail)
    days = np.arange(TIMES, dtype=np.float64)
    if gap is not None:
        days[gap:] += 5
    kelvin = {"standard_name": "air_temperature", "units": "K", "scale_factor": SCALE, "add_offset": OFFSET}
    water = {"standard_name": "precipitation_flux", "units": "mm day-1", "_FillValue": np.float32(1e20)}
    return xr.Dataset(
        {
            "t": (("time", "level", "lat", "lon"), packed, kelvin | {"_FillValue": np.int16(FILL)}),
            "pr": (("time", "lat", "lon"), rain, water),
        },
        coords={
            "time": ("time", days, {"units": "days since 2001-01-01", "calendar": calendar}),
            "level": ("level", [850.0, 500.0], {"units": "hPa", "positive": "down"}),
            "lat": ("lat", [60.0, 50.0, 40.0, 30.0], {"units": "degrees_north"}),
            "lon": ("lon", np.arange(6.0) * 10, {"units": "degrees_east"}),
        },
    )


def write_zarr(
    path: Path | str, content: xr.Dataset, *, version: int = 3, encoding: dict[str, dict[str, Any]] | None = None
) -> str:
    """Write it in chunks of CHUNKS, every chunk there; returns the path or URL."""
    chosen = {name: {"chunks": CHUNKS[name], **(encoding or {}).get(name, {})} for name in CHUNKS if name in content}
    content.to_zarr(str(path), zarr_format=version, consolidated=False, encoding=chosen, write_empty_chunks=True)
    return str(path)


def settings(*places: str, **options: Any) -> SourceSettings:
    """To read it with: temperature on two levels and rain."""
    return SourceSettings(
        name="fields",
        reader="zarr_grid",
        modality="grid",
        files=places,
        options={"variables": ["t", "pr"], "levels": [500, 850], **options},
    )


def config(output: Path, archive: Path | str, **options: Any) -> DataConfig:
    source = {
        "name": "fields",
        "reader": "zarr_grid",
        "modality": "grid",
        "nature": "simulation",
        "files": [str(archive)],
        "options": {"variables": ["t", "pr"], "levels": [500, 850], "tile": TILE, **options},
        "licence": "none",
        "citation": "made up",
        "split": {"by": "time", "era": "one"},
    }
    era = {"name": "one", "start": "2001-01-01", "train_until": "2001-09-30", "valid_until": "2001-12-01"}
    calendar = {"gap_days": 10, "eras": [{**era, "end": "2002-12-31"}]}
    tree: dict[str, Any] = {"name": "small", "output": str(output), "calendar": calendar, "sources": [source]}
    tree |= {"stretch_megabytes": STRETCH_BYTES / 1e6, "shard_megabytes": 0.02, "build": {"workers": 0}}
    return parse_config(tree, DataConfig, where="test")


def built(output: Path, archive: Path | str, said: list[str] | None = None, **options: Any) -> Store:
    """The store that the recipe builds, in blocks of 60 times; its lines go to `said`."""
    lines: list[str] = [] if said is None else said
    report = build(config(output, archive, **options), say=lines.append)
    return Store.open(report.path, Patience(attempts=2, wait_seconds=0.01))


def read_all(wanted: SourceSettings, reader: ZarrGrid | None = None) -> list[ZarrSample]:
    """The samples of all parts, in order."""
    reader = reader or ZarrGrid()
    return [sample for part in reader.parts(wanted) for sample in reader.read(wanted, part)]
