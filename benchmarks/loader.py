"""Reading speed of our store beside webdataset, mosaicml-streaming, litdata and a plain tarfile loop, in one run."""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from benchmarks.loader_peers import PEERS, python_of, versions
from benchmarks.loader_profile import describe, split
from benchmarks.loader_systems import FRAMES, SHARD_BYTES, STRETCH_BYTES, SYSTEMS
from benchmarks.results import machine, write_section

ROOT = Path(__file__).resolve().parents[1]
SIDES = {4: 8, 64: 32, 1024: 128}  # KiB of a window: rows and columns of its 16 frames of float32
MOST_WINDOWS = 8192
MOST_RESIDENT = 0.05  # share of the files that may still be in the page cache when a cold epoch begins
WORKERS = (1, 2)
PLAIN = "plain tarfile loop"


class Reader:
    """A loader in a process of its own, that reads an epoch each time it is asked to."""

    def __init__(self, name: str, python: Path, *, folder: Path, workers: int, window_bytes: int) -> None:
        script = ["benchmarks/loader_systems.py", "read", name, str(folder), str(workers), str(window_bytes)]
        self.name, self.folder, self.workers = name, folder, workers
        self._command = [str(python), *script]
        self._process = self._start()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end()

    def cold(self) -> dict[str, Any]:
        """Read an epoch from the disk. A loader that keeps its files mapped, which keeps their pages, is started anew.

        Raises:
            RuntimeError: the pages stay.
        """
        question = "time"
        if drop_cache(self.folder) > MOST_RESIDENT:
            self._end()
            self._process = self._start()
            self.ask("start")
            question = "time" if self.workers == 1 else "time after the first"  # its workers start with the epoch
            if (left := drop_cache(self.folder)) > MOST_RESIDENT:
                raise RuntimeError(f"{self.folder}: {left:.0%} stay in the page cache: no cold read")
        return self.ask(question)

    def ask(self, question: str) -> dict[str, Any]:
        """Read an epoch: "check" or "time" (`loader_systems.answer`).

        Raises:
            RuntimeError: the process ended; its last lines are told.
        """
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        if process.poll() is None:
            process.stdin.write(question + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
            if line:
                found: dict[str, Any] = json.loads(line)
                return found
        said = process.communicate()[1]
        raise RuntimeError(f"{self.name} ended with {process.returncode} when asked to {question}:\n{said[-2000:]}")

    def _start(self) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        environment = _environment(self.folder)
        return subprocess.Popen(
            self._command,
            cwd=ROOT,
            env=environment,
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            text=True,
            start_new_session=True,
        )

    def _end(self) -> None:
        """It ends at the end of its questions, and its workers with it; killed, it would leave them."""
        try:
            self._process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.communicate()


def write_all(names: list[str], pythons: dict[str, Path], *, kilobytes: int, count: int, scratch: Path) -> None:
    """Write the same windows in the format of every system into `scratch`/SYSTEM, and bring them to the disk."""
    side = SIDES[kilobytes]
    source = scratch / "windows.npy"
    random = np.random.default_rng(kilobytes)
    windows = np.lib.format.open_memmap(source, "w+", np.float32, (count, FRAMES, 1, side, side))
    for number in range(count):
        windows[number] = 280.0 + random.standard_normal(windows.shape[1:], np.float32)
    windows.flush()
    for name in names:
        folder = scratch / name
        folder.mkdir()
        command = [str(pythons[name]), "benchmarks/loader_systems.py", "write", name, str(source), str(folder)]
        done = subprocess.run(command, cwd=ROOT, env=_environment(folder), capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{name} could not write its data set:\n{done.stderr[-2000:]}")
        for path in _files(folder):
            with path.open("rb") as file:
                os.fsync(file.fileno())
    source.unlink()


def drop_cache(folder: Path) -> float:
    """Ask the system to forget the folder's pages (they are on the disk); the share that is still there."""
    for path in _files(folder):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return resident(folder)


def resident(folder: Path) -> float:
    """Share of the pages of a folder's files that are in memory."""
    flags = np.concatenate([_resident_pages(path) for path in _files(folder)])
    return np.count_nonzero(flags & 1) / len(flags)


def measure(
    names: list[str], pythons: dict[str, Path], *, kilobytes: int, rounds: int, scratch: Path
) -> tuple[dict[tuple[str, int, str], list[float]], set[tuple[int, str]]]:
    """Samples per second of {(system, workers, "warm" or "cold"): rounds}, and what each system's epoch held.

    Rounds are interleaved: every system reads once warm and once cold in each. The epoch before the first is not
    counted: it warms the page cache and starts the workers.
    """
    rates: dict[tuple[str, int, str], list[float]] = {}
    held: set[tuple[int, str]] = set()
    for workers in WORKERS:
        with ExitStack() as stack:
            readers = [
                stack.enter_context(
                    Reader(
                        name,
                        pythons[name],
                        folder=scratch / name,
                        workers=workers,
                        window_bytes=kilobytes << 10,
                    )
                )
                for name in names
                if workers == 1 or name != PLAIN
            ]
            for reader in readers:
                first = reader.ask("check" if workers == 1 else "time")
                held |= {(first["samples"], first["digest"])} if workers == 1 else set()
            for _ in range(rounds):
                for reader in readers:
                    for state in ("warm", "cold"):
                        found = reader.cold() if state == "cold" else reader.ask("time")
                        rates.setdefault((reader.name, workers, state), []).append(found["samples"] / found["seconds"])
    return rates, held


def table(rates: dict[tuple[str, int, str], list[float]], names: list[str], *, kilobytes: int) -> list[str]:
    """Lines of Markdown: median samples per second (least to most), MB/s of values, and ours over this one's."""
    states = [(workers, state) for workers in WORKERS for state in ("warm", "cold")]
    heads = [f"{state}, {'one reader' if workers == 1 else f'{workers} workers'}" for workers, state in states]
    lines = ["| loader | " + " | ".join(heads) + " |", "|---" * (len(states) + 1) + "|"]
    for name in names:
        cells = []
        for workers, state in states:
            found = rates.get((name, workers, state))
            if not found:
                cells.append("-")
                continue
            middle = statistics.median(found)
            ratio = statistics.median(rates["ours", workers, state]) / middle
            megabytes = middle * kilobytes * 1024 / 1e6
            cells.append(
                f"{middle:,.0f} ({min(found):,.0f}-{max(found):,.0f}), {megabytes:,.0f} MB/s"
                + ("" if name == "ours" else f", ours x {ratio:.2f}")
            )
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def compare(
    sizes: list[int], *, megabytes: int, rounds: int, names: list[str], scratch: Path, environments: Path
) -> list[str]:
    """Lines of Markdown: a table per size, and what bounds ours.

    Raises:
        RuntimeError: a loader failed, or loaders did not return equal windows.
    """
    pythons = {name: python_of(name, environments) if name in PEERS else Path(sys.executable) for name in names}
    lines: list[str] = []
    for kilobytes in sizes:
        count = min(MOST_WINDOWS, max(1, (megabytes << 10) // kilobytes))
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            data = Path(folder)
            print(f"{kilobytes} KiB: writing {count} windows for {', '.join(names)}", file=sys.stderr, flush=True)
            write_all(names, pythons, kilobytes=kilobytes, count=count, scratch=data)
            rates, held = measure(names, pythons, kilobytes=kilobytes, rounds=rounds, scratch=data)
            if len(held) != 1:
                raise RuntimeError(f"{kilobytes} KiB: the loaders did not return equal windows: {sorted(held)}")
            bound = describe(split(data / "ours", window_bytes=kilobytes << 10))
        lines += [f"### Windows of {kilobytes} KiB", "", f"{count:,} windows, {rounds} rounds.", ""]
        lines += [*table(rates, names, kilobytes=kilobytes), "", f"Ours, warm, one reader: {bound}.", ""]
    return lines


def main(arguments: list[str]) -> int:
    """Measure, print the tables and write them into RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-megabytes", type=int, default=256, help="of each data set (at most 8,192 windows)")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIDES), choices=list(SIDES), help="KiB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=list(SYSTEMS))
    parser.add_argument("--scratch", type=Path, help="where the data sets are written and removed")
    parser.add_argument("--environments", type=Path, help="where peers' environments are kept; default: removed too")
    parser.add_argument("--note", default="", help="a line for RESULTS.md about the machine's other work")
    parser.add_argument("--print-only", action="store_true", help="leave RESULTS.md as it is")
    parsed = parser.parse_args(arguments)
    names, begun = list(dict.fromkeys(["ours", *parsed.systems])), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="loader-", dir=parsed.scratch) as scratch:
        lines = compare(
            parsed.sizes,
            megabytes=parsed.data_megabytes,
            rounds=parsed.rounds,
            names=names,
            scratch=Path(scratch),
            environments=(parsed.environments or Path(scratch) / "environments").absolute(),
        )
    lines += [
        "Samples per second (MB/s: of float32 values alone): the median of interleaved rounds, least and most in "
        "brackets. Every loader returned the same windows (compared by digest). Ours also returns mask, times and "
        "places, with checksums compared and the sample's rules checked; the loop returns bytes, the others an array "
        "(litdata's a view of a mapped file, without a checksum). Of each array one value per page is looked at. "
        f"Shards and chunks have {SHARD_BYTES >> 20} MiB, our stretches {STRETCH_BYTES >> 20} MiB. All but the loop "
        "shuffle: ours in the run's order, webdataset shards and a buffer, the others by shuffle=True.",
        "Warm: the epoch after one that read all. Cold: the files' pages were dropped (fsync when written, then "
        f"posix_fadvise DONTNEED; at most {MOST_RESIDENT:.0%} resident by mincore); the disk's own cache is not ours "
        "to drop. One reader: in process, no workers. 2 workers: ours reads with 2 threads, as `train/feed.py` does; "
        "the others with 2 worker processes of a DataLoader, started before the clock (litdata keeps its files mapped "
        "and is started anew for a cold epoch; with workers its clock starts at its first batch, not counted, when up "
        "to three more may be ready: an upper bound).",
        f"Made by `python -m benchmarks.loader --data-megabytes {parsed.data_megabytes} --rounds {parsed.rounds}` in "
        f"{time.monotonic() - begun:.0f} s ({machine()}; {versions()}). {parsed.note}".rstrip(),
    ]
    print("\n".join(lines))
    if not parsed.print_only:
        write_section("loader", lines, title="Reading samples")
    return 0


def _environment(folder: Path) -> dict[str, str]:
    """One thread per process; what libraries cache goes beside the data; ours is importable."""
    paths = [str(ROOT), *(str(ROOT / name) for name in ("tokenizers", "evals", "launch"))]
    own = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HOME": str(folder.parent), "PYTHONPATH": ":".join(paths)}
    return {**os.environ, **own, "TMPDIR": str(folder.parent), "PYTHONWARNINGS": "ignore"}


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size]


def _resident_pages(path: Path) -> np.ndarray:
    """A byte per page of a file, its lowest bit set where the page is in memory (mincore)."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        whole = np.frombuffer(mapped, np.uint8)
        flags = np.zeros(-(-len(whole) // mmap.PAGESIZE), np.uint8)
        library = ctypes.CDLL(None, use_errno=True)
        address, length = ctypes.c_void_p(whole.ctypes.data), ctypes.c_size_t(len(whole))
        failed = library.mincore(address, length, ctypes.c_void_p(flags.ctypes.data))
        del whole  # or the map could not be closed
    if failed:
        raise OSError(ctypes.get_errno(), "mincore")
    return flags


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
