"""Time and memory of the n-th sample on an index of 1e9 samples, and how well rows are packed and dealt."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
import zlib
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.results import machine, write_section
from sci_gpt.data.index import INDEX, RECORD, records_name, shard_name
from sci_gpt.data.loader import Corpus, packing_report, plan_step
from sci_gpt.data.order import keyed
from sci_gpt.data.store import FORMAT_VERSION, Store
from sci_gpt.data.store_writer import seal
from sci_gpt.data.windows import WindowSpec
from sci_tokenizers.sample import Modality
from sci_tokenizers.tokenizer import TokenizerSettings

# Windows in all, and at most so many in a stretch: an archive of long ones, and one of a million short ones.
SIZES = ((1_000_000, 1_000_000), (1_000_000_000, 1_000_000), (1_000_000_000, 900))
ROW_LENGTH = 2048
LAYOUTS = ((8, 2), (16, 2), (16, 4), (32, 4), (64, 8), (64, 16))  # rows per step, ranks
STEPS = 50
EPOCHS = 10  # the numbers asked for lie in so many times the corpus
SHARD_STRETCHES = 64


@dataclass(frozen=True, kw_only=True)
class Source:
    """A source of the synthetic corpus.

    Attributes:
        modality, shape, frames: of its documents; shape is (variables, rows, columns).
        share: of the corpus' windows.
        windows_per_stretch: how long its stretches are.
        weight: share of the mixture's tokens.
    """

    modality: Modality
    shape: tuple[int, int, int]
    frames: int
    share: float
    windows_per_stretch: int
    weight: float


SOURCES = {
    # 80 years of hours of a tile of 64 x 64 cells; months of a simulation; hours of a station; days of a seismograph.
    "reanalysis": Source(
        modality="grid", shape=(5, 64, 64), frames=8, share=0.6, windows_per_stretch=700_000, weight=0.4
    ),
    "simulation": Source(
        modality="grid", shape=(2, 24, 24), frames=12, share=0.05, windows_per_stretch=20_000, weight=0.2
    ),
    "stations": Source(
        modality="series", shape=(4, 1, 1), frames=48, share=0.3, windows_per_stretch=300_000, weight=0.2
    ),
    "seismographs": Source(
        modality="trace", shape=(3, 1, 1), frames=128, share=0.05, windows_per_stretch=100_000, weight=0.2
    ),
}
SETTINGS = TokenizerSettings(grid_patch=8, trace_samples=5)


def write_index(folder: Path, total: int, *, most: int) -> tuple[int, int]:
    """Write manifest and index of a store with `total` training windows, at most `most` in a stretch, and no data;
    returns its stretches and shards."""
    manifest, num_stretches, num_shards = {}, 0, 0
    for name, source in SOURCES.items():
        windows, per_stretch = round(source.share * total), min(source.windows_per_stretch, most)
        records = np.zeros(-(-windows // per_stretch), RECORD)
        own = np.full(len(records), per_stretch)
        own[-1] = windows - per_stretch * (len(records) - 1)
        records["key"] = [f"{name}/{number}".encode() for number in range(len(records))]
        frame_times = SETTINGS.trace_samples if source.modality == "trace" else 1
        records["num_times"] = (own - 1 + source.frames) * frame_times
        split = folder / name / "train"
        split.mkdir(parents=True)
        shards = []
        for number, first in enumerate(range(0, len(records), SHARD_STRETCHES)):
            part = records[first : first + SHARD_STRETCHES]
            np.save(split / records_name(number), part, allow_pickle=False)
            row = dict.fromkeys(("num_spans", "bytes", "sums_crc32", "quality_crc32"), 0)
            row |= {"num_stretches": len(part), "num_times": int(part["num_times"].sum())}
            shards.append(row | {"shard": shard_name(number), "records_crc32": zlib.crc32(part.tobytes())})
        (split / INDEX).write_text(json.dumps({"shards": shards}), encoding="utf-8")
        manifest[name] = {"modality": source.modality, "shape": source.shape}
        num_stretches += len(records)
        num_shards += len(shards)
    (folder / "statistics.json").write_text("{}", encoding="utf-8")
    seal(folder, {"format_version": FORMAT_VERSION, "fingerprint": "synthetic", "sources": manifest})
    return num_stretches, num_shards


def open_corpus(folder: Path) -> Corpus:
    """The mixture over a written index."""
    specs = [
        WindowSpec(source=name, frames=one.frames, stride=1, context_frames=(2, 4), leads=(1,), weight=one.weight)
        for name, one in SOURCES.items()
    ]
    return Corpus(Store.open(folder), specs, seed=0, settings=SETTINGS)


def peak_bytes() -> int:
    """Largest resident size of this process so far (Linux), since its program was loaded."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM: this script measures memory on Linux only")


def measure(folder: Path, total: int, *, accesses: int) -> dict[str, float]:
    """In a process of its own: open the index, ask for random samples; milliseconds each, and memory gained."""
    before = psutil.Process().memory_info().rss
    began = time.perf_counter()
    corpus = open_corpus(folder)
    opened = time.perf_counter() - began
    numbers = [keyed(1, i) % (EPOCHS * total) for i in range(accesses)]
    seconds = np.empty(accesses)
    for i, n in enumerate(numbers):
        began = time.perf_counter()
        source, window, _ = corpus.order.sample(n)
        corpus.windows[source].locate(window)
        seconds[i] = time.perf_counter() - began
    return {
        "opened_seconds": opened,
        "milliseconds": 1e3 * float(seconds.mean()),
        "milliseconds_99": 1e3 * float(np.quantile(seconds, 0.99)),
        "megabytes": (peak_bytes() - before) / 1e6,
    }


def locality(corpus: Corpus, samples: int = 50_000) -> list[str]:
    """How many of each source's shards `samples` consecutive samples of the mixture read from."""
    touched: dict[int, set[int]] = {}
    first = EPOCHS * sum(corpus.order.sizes) // 3
    for n in range(first, first + samples):
        source, window, _ = corpus.order.sample(n)
        stretch, _, _ = corpus.windows[source].locate(window)
        touched.setdefault(source, set()).add(stretch // SHARD_STRETCHES)
    names = [spec.source for spec in corpus.specs]
    shards = [-(-corpus.store.num_stretches(name, "train") // SHARD_STRETCHES) for name in names]
    return [f"{names[source]} {len(found)} of {shards[source]}" for source, found in sorted(touched.items())]


def packing(corpus: Corpus) -> list[str]:
    """Lines of Markdown: fill, spread of attention cost and seconds of planning a step, per layout."""
    lines = [
        "| rows per step | ranks | fill | spread of attention cost over ranks | planning a step, ms |",
        "|---|---|---|---|---|",
    ]
    for rows, ranks in LAYOUTS:
        report = packing_report(corpus, rows=rows, row_length=ROW_LENGTH, ranks=ranks, steps=STEPS)
        began, n = time.perf_counter(), 0
        for _ in range(STEPS):
            n = plan_step(corpus, n, rows=rows, row_length=ROW_LENGTH).next_sample
        planning = 1e3 * (time.perf_counter() - began) / STEPS
        fill, spread = 100 * report["fill"], 100 * report["cost_spread"]
        lines.append(f"| {rows} | {ranks} | {fill:.1f} % | {spread:.1f} % | {planning:.1f} |")
    return lines


def main(arguments: list[str]) -> int:
    """Measure both sizes, print the tables and write them into RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--accesses", type=int, default=20_000)
    parser.add_argument("--note", default="", help="a line for RESULTS.md about the machine's other work")
    parsed = parser.parse_args(arguments)
    lines = [
        "| samples | stretches | shards | n-th sample, ms (mean, 99 %) | memory gained, MB | opening, s |",
        "|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory(prefix="order-") as scratch:
        for number, (total, most) in enumerate(SIZES):
            folder = Path(scratch) / str(number)
            stretches, shards = write_index(folder, total, most=most)
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                found: dict[str, Any] = pool.submit(measure, folder, total, accesses=parsed.accesses).result()
            lines.append(
                f"| {total:.0e} | {stretches:,} | {shards:,} | {found['milliseconds']:.3f}, "
                f"{found['milliseconds_99']:.3f} | {found['megabytes']:.1f} | {found['opened_seconds']:.2f} |"
            )
        corpus = open_corpus(Path(scratch) / "1")
        lines += ["", *packing(corpus), ""]
        lines.append(f"Shards read by 50,000 consecutive samples, of all: {', '.join(locality(corpus))}.")
    lengths = ", ".join(f"{name} {length}" for name, length in zip(SOURCES, corpus.lengths, strict=True))
    lines += [
        f"{parsed.accesses:,} random numbers within {EPOCHS} times the corpus, each to its stretch and times. "
        f"A rank holds a row per shard; of the records, {RECORD.itemsize} bytes per stretch, those of the shards read "
        f"last. Random numbers are the worst case: each opens the records of another shard ({SHARD_STRETCHES} "
        "stretches). "
        f"Documents have {lengths} tokens, rows {ROW_LENGTH}; fill and spread are means over {STEPS} steps.",
        f"Made by `python -m benchmarks.order` ({machine()}). {parsed.note}".rstrip(),
    ]
    print("\n".join(lines))
    write_section("order", lines, title="The n-th sample, packing and dealing")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
