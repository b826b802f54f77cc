"""Values per second of ChronosQuantizer beside the package whose tokenizer it is, and beside a copy of the memory."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from importlib import metadata

import numpy as np
import torch
from chronos.chronos import ChronosConfig, MeanScaleUniformBins

from benchmarks.results import machine, write_section
from sci_tokenizers.series import ChronosQuantizer

ROWS, LENGTH, MISSING = 256, 512, 0.01
GOAL, IN_A_ROW = 10.0, 10


def batch(rows: int, length: int) -> np.ndarray:
    """Random walks of many sizes, float32 (rows, length), 1 % of them missing."""
    random = np.random.default_rng(0)
    values = random.standard_normal((rows, length)).cumsum(axis=1) * 10.0 ** random.uniform(-3, 3, (rows, 1))
    values[random.random(values.shape) < MISSING] = np.nan
    return values.astype(np.float32)


def package(ours: ChronosQuantizer) -> MeanScaleUniformBins:
    """The package's tokenizer of the same sizes."""
    limit, count = ours.bins.limit, ours.bins.num_ids
    config = ChronosConfig(
        tokenizer_class="MeanScaleUniformBins",
        tokenizer_kwargs={"low_limit": -limit, "high_limit": limit},
        context_length=ours.context_length,
        prediction_length=ours.prediction_length,
        n_tokens=count,
        n_special_tokens=2,
        pad_token_id=0,
        eos_token_id=1,
        use_eos_token=ours.use_eos,
        model_type="seq2seq",
        num_samples=20,
        temperature=1.0,
        top_k=50,
        top_p=1.0,
    )
    return MeanScaleUniformBins(-limit, limit, config)


def calls(values: np.ndarray) -> dict[str, Callable[[], object]]:
    """What is timed, by name: encode and decode of both on the same input, a copy of its memory, and of decode the
    look-up alone, without check, product and new memory.

    Raises:
        RuntimeError: ids, masks or scales differ, or decoded values by more than rounding.
    """
    ours = ChronosQuantizer(context_length=values.shape[1])
    theirs = package(ours)
    tensor = torch.from_numpy(values)
    ids, mask, scale = (part.numpy() for part in theirs.context_input_transform(tensor))
    mine = ours.encode_context(values)
    for name, left, right in zip(("ids", "masks", "scales"), mine, (ids, mask, scale), strict=True):
        if not np.array_equal(left, right):
            raise RuntimeError(f"{name} differ in {(left != right).sum()} places; rates of unequal work mean nothing")
    held = np.ascontiguousarray(ids[:, None, : values.shape[1]])  # (batch, one sample, time)
    samples, scales = torch.from_numpy(held), torch.from_numpy(scale)
    if not np.allclose(ours.decode(held, scale), theirs.output_transform(samples, scales).numpy(), rtol=1e-6):
        raise RuntimeError("decoded values differ; rates of unequal work mean nothing")
    room, centres = np.empty_like(values), ours.bins.centres(np.arange(ours.bins.num_ids))
    return {
        "encode, ours": lambda: ours.encode_context(values),
        "encode, package": lambda: theirs.context_input_transform(tensor),
        "decode, ours": lambda: ours.decode(held, scale),
        "decode, package": lambda: theirs.output_transform(samples, scales),
        "copy": lambda: np.copyto(room, values),
        "look-up": lambda: centres.take(held[:, 0], mode="wrap", out=room),
    }


def measure(timed: dict[str, Callable[[], object]], rounds: int, *, in_a_row: int = 1) -> dict[str, np.ndarray]:
    """Seconds of a call of each in turn, `in_a_row` calls at a time (their mean), `rounds` times; one thread.

    A first round does not count.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = {name: np.empty(rounds + 1) for name in timed}
        for number in range(rounds + 1):
            for name, call in timed.items():
                begun = time.perf_counter()
                for _ in range(in_a_row):
                    call()
                seconds[name][number] = (time.perf_counter() - begun) / in_a_row
    finally:
        torch.set_num_threads(before)
    return {name: row[1:] for name, row in seconds.items()}


def table(seconds: dict[str, np.ndarray], num_values: int) -> list[str]:
    """Lines of Markdown: millions of values per second (medians), ours by the package's, and the share of a copy."""
    middle = {name: float(np.median(row)) for name, row in seconds.items()}
    lines = [
        "| | ours, million values/s | package, million values/s | ratio (10 to 90 % of rounds) | share of a copy |",
        "|---|---|---|---|---|",
    ]
    rows = {part: (seconds[f"{part}, ours"], seconds[f"{part}, package"]) for part in ("encode", "decode")}
    rows["both"] = (rows["encode"][0] + rows["decode"][0], rows["encode"][1] + rows["decode"][1])
    for part, (ours, theirs) in rows.items():
        low, high = np.quantile(theirs / ours, (0.1, 0.9))
        own, other = float(np.median(ours)), float(np.median(theirs))
        copies = 2 if part == "both" else 1
        lines.append(
            f"| {part} | {num_values / own / 1e6:,.0f} | {num_values / other / 1e6:,.0f} | "
            f"{other / own:.1f} ({low:.1f}-{high:.1f}) | {copies * middle['copy'] / own:.1%} |"
        )
    return lines


def main(arguments: list[str]) -> int:
    """Measure, print the table and write it into RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--note", default="", help="a line for RESULTS.md about the machine's other work")
    parsed = parser.parse_args(arguments)
    values = batch(ROWS, LENGTH)
    timed = calls(values)
    seconds = measure(timed, parsed.rounds, in_a_row=IN_A_ROW)
    rate = values.nbytes / float(np.median(seconds["copy"])) / 1e9
    look_up = float(np.median(seconds["decode, package"] / seconds["look-up"]))
    lines = [
        f"{IN_A_ROW} calls in a row, in turn:",
        "",
        *table(seconds, values.size),
        "",
        "Call by call, each after the other's memory went through the cache:",
        "",
        *table(measure(timed, parsed.rounds * IN_A_ROW), values.size),
        "",
        f"The package is chronos-forecasting {metadata.version('chronos-forecasting')} (MeanScaleUniformBins, torch "
        f"{torch.__version__}). Public calls of both on the same float32 batch of {ROWS} x {LENGTH}, {MISSING:.0%} "
        f"missing, one thread, {parsed.rounds * IN_A_ROW} calls each, medians; ids, masks and scales were equal "
        f"to the bit first. A copy of the input's {values.nbytes:,} bytes, which the cache holds, runs at {rate:.0f} "
        f"GB/s. The goal is {GOAL:g} times the package. To encode, the package searches 4,094 boundaries, ours works "
        "out the bin from its width and looks up one where a value is near it. To decode is a look-up and a product in "
        f"both: numpy's look-up alone, of ids not checked and into memory that is there, runs at {look_up:.1f} "
        "times the package's decode.",
        f"Made by `python -m benchmarks.tokenizers` ({machine()}). {parsed.note}".rstrip(),
    ]
    print("\n".join(lines))
    write_section("tokenizers", lines, title="Series: values to ids and back")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
