"""Time and memory of encoding a fibre: traces of one receiver up to thousands, with the orders each number takes."""

from __future__ import annotations

import argparse
import sys
import time
import tracemalloc

import numpy as np

from benchmarks.results import machine, write_section
from sci_tokenizers.sample import Sample
from sci_tokenizers.tokenizer import TokenizerSettings
from sci_tokenizers.trace import TraceTokenizer

RECEIVERS = (1, 16, 256, 512, 2048, 8192)
FRAMES, CONTEXT, SAMPLES, RATE_HZ, LEADS, REPEATS = 120, 60, 5, 100.0, (1, 2), 3


def fibre(receivers: int) -> Sample:
    """A wave that travels along a fibre, and noise: one component, FRAMES frames."""
    times = FRAMES * SAMPLES
    random = np.random.default_rng(0)
    phase = 0.4 * np.arange(times)[:, None] - 0.02 * np.arange(receivers)
    values = 300.0 * np.sin(phase) + 50.0 * random.standard_normal(phase.shape)
    line = np.linspace(0.0, 0.1, receivers, dtype=np.float32)[:, None]
    return Sample(
        key=f"fibre-{receivers}",
        source="fibre",
        modality="trace",
        variables=("ground_velocity_east",),
        levels=(float("nan"),),
        values=(1e-6 * values).astype(np.float32)[:, None, :, None],
        valid=np.ones((times, 1, receivers, 1), bool),
        time=np.arange(times) / RATE_HZ,
        year_phase=np.zeros(times, np.float32),
        day_phase=np.zeros(times, np.float32),
        step_seconds=1.0 / RATE_HZ,
        latitude=line,
        longitude=line,
        elevation=np.zeros_like(line),
    )


def measure(receivers: int) -> tuple[float, float, float]:
    """Seconds of one encoding (the best of REPEATS), its peak memory in MB, and the MB that its tokens hold."""
    tokenizer, sample = TraceTokenizer(TokenizerSettings(trace_samples=SAMPLES)), fibre(receivers)
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        tokenizer.encode(sample, num_context=CONTEXT, leads=LEADS)
        seconds.append(time.perf_counter() - began)
    tracemalloc.start()
    tokens = tokenizer.encode(sample, num_context=CONTEXT, leads=LEADS)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    held = sum(array.nbytes for array in vars(tokens).values() if isinstance(array, np.ndarray))
    return min(seconds), peak / 1e6, held / 1e6


def main(arguments: list[str]) -> int:
    """Measure each number of receivers, print the table and write it into RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--note", default="", help="a line for RESULTS.md about the machine's other work")
    parsed = parser.parse_args(arguments)
    lines = ["| receivers | seconds | values/s | peak memory, MB | of it tokens, MB |", "|---|---|---|---|---|"]
    for receivers in RECEIVERS:
        seconds, peak, held = measure(receivers)
        rate = receivers * FRAMES * SAMPLES / seconds
        lines.append(f"| {receivers:,} | {seconds:.3f} | {rate:,.0f} | {peak:.1f} | {held:.1f} |")
    lines += [
        "",
        f"One component at {RATE_HZ:g} Hz, {FRAMES} frames of {SAMPLES} samples, {CONTEXT} of them context, leads "
        f"{' and '.join(map(str, LEADS))}; the best of {REPEATS} encodings. Nearly all of the time is the averaged "
        "autoregression, which takes fewer orders above 256 waveforms.",
        f"Made by `python -m benchmarks.fibre` ({machine()}). {parsed.note}".rstrip(),
    ]
    print("\n".join(lines))
    write_section("fibre", lines, title="Encoding a fibre")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
