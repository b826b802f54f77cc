"""Time and memory of the n-th sample on an index of 1e9 samples, and how well rows are packed and dealt."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
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

from sci_gpt.data.loader import Corpus, packing_report, plan_step
from sci_gpt.data.order import keyed
from sci_gpt.data.quality import SPAN
from sci_gpt.data.store import FORMAT_VERSION, QUALITY, RECORD, Store, records_name, shard_name
from sci_gpt.data.windows import WindowSpec
from sci_tokenizers.sample import Modality
from sci_tokenizers.tokenizer import TokenizerSettings

RESULTS = Path(__file__).resolve().parent / "RESULTS.md"
BEGIN, END = "<!-- order: begin -->", "<!-- order: end -->"
SIZES = (1_000_000, 1_000_000_000)
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


def write_index(folder: Path, total: int) -> int:
    """Write manifest and index of a store with `total` training windows, and no data; returns its stretches."""
    manifest, stretches = {}, 0
    for name, source in SOURCES.items():
        left = round(source.share * total)
        rows: list[np.ndarray] = []
        frame_times = SETTINGS.trace_samples if source.modality == "trace" else 1
        while left > 0:
            windows = min(left, source.windows_per_stretch)
            left -= windows
            row = np.zeros((), RECORD)
            row["key"] = f"{name}/{len(rows)}".encode()
            row["shard"] = len(rows) // SHARD_STRETCHES
            row["num_times"] = (windows - 1 + source.frames) * frame_times
            rows.append(row)
        shards = []
        (folder / name / "train").mkdir(parents=True)
        for number, first in enumerate(range(0, len(rows), SHARD_STRETCHES)):
            part = np.stack(rows[first : first + SHARD_STRETCHES])
            np.save(folder / name / "train" / records_name(number), part, allow_pickle=False)
            shards.append(
                {"shard": shard_name(number), "num_stretches": len(part), "records_crc32": zlib.crc32(part.tobytes())}
            )
        np.save(folder / name / "train" / QUALITY, np.zeros(0, SPAN), allow_pickle=False)
        (folder / name / "train" / "index.json").write_text(json.dumps({"shards": shards}), encoding="utf-8")
        manifest[name] = {"modality": source.modality, "shape": source.shape}
        stretches += len(rows)
    content = {"format_version": FORMAT_VERSION, "fingerprint": "synthetic", "sources": manifest}
    (folder / "manifest.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "statistics.json").write_text("{}", encoding="utf-8")
    return stretches


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
    shards = [-(-len(corpus.store.stretches(name, "train")) // SHARD_STRETCHES) for name in names]
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
        "| samples | stretches | n-th sample, ms (mean, 99 %) | memory gained, MB | opening, s |",
        "|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory(prefix="order-") as scratch:
        for total in SIZES:
            folder = Path(scratch) / str(total)
            stretches = write_index(folder, total)
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                found: dict[str, Any] = pool.submit(measure, folder, total, accesses=parsed.accesses).result()
            lines.append(
                f"| {total:.0e} | {stretches:,} | {found['milliseconds']:.3f}, {found['milliseconds_99']:.3f} | "
                f"{found['megabytes']:.1f} | {found['opened_seconds']:.2f} |"
            )
        corpus = open_corpus(Path(scratch) / str(SIZES[-1]))
        lines += ["", *packing(corpus), ""]
        lines.append(f"Shards read by 50,000 consecutive samples, of all: {', '.join(locality(corpus))}.")
    lengths = ", ".join(f"{name} {length}" for name, length in zip(SOURCES, corpus.lengths, strict=True))
    lines += [
        f"{parsed.accesses:,} random numbers within {EPOCHS} times the corpus, each to its stretch and times. "
        f"Every rank holds the index, {RECORD.itemsize} bytes per stretch, however long. "
        f"Documents have {lengths} tokens, rows {ROW_LENGTH}; fill and spread are means over {STEPS} steps.",
        f"Made by `python benchmarks/order.py` ({_processor()}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}, NumPy {np.__version__}). {parsed.note}".rstrip(),
    ]
    print("\n".join(lines))
    _write(lines)
    return 0


def _processor() -> str:
    """The processor's name where the system tells it (Linux), else its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _write(lines: list[str]) -> None:
    """Replace what stands between the marks in RESULTS.md, or append it."""
    text = RESULTS.read_text(encoding="utf-8")
    section = "\n".join([BEGIN, "## The n-th sample, packing and dealing", "", *lines, END])
    if BEGIN in text:
        text = text[: text.index(BEGIN)] + section + text[text.index(END) + len(END) :]
    else:
        text = text.rstrip("\n") + "\n\n" + section + "\n"
    RESULTS.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
