"""Peak memory and time of a training step against row length, by activation checkpointing; draws docs/images."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import psutil
import torch

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from benchmarks.results import machine, write_section
from sci_gpt.model.checkpointing import Checkpointing
from sci_gpt.model.init import initialize
from sci_gpt.model.inputs import ModelInputs, to_inputs
from sci_gpt.model.loss import weighted_sums
from sci_gpt.model.shapes import SHAPES
from sci_gpt.model.transformer import ModelSettings, build_model
from sci_gpt.parallel.memory import activation_bytes
from sci_tokenizers.packing import collate
from sci_tokenizers.sample import Sample
from sci_tokenizers.table import make_tokenizer
from sci_tokenizers.tokenizer import TokenizerSettings
from sci_tokenizers.tokens import Tokens

IMAGE = Path(__file__).resolve().parents[1] / "docs" / "images" / "activation_memory.png"
SIZE = "3M"
MODES: tuple[Checkpointing, ...] = ("none", "selective", "full")
LENGTHS = (1024, 2048, 4096)
DOCUMENT = 512
COLOURS = {"none": "#aa3377", "selective": "#4477aa", "full": "#228833"}


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Megabytes above what stood before the step, and seconds of another one."""

    megabytes: float
    seconds: float


def wave(times: int) -> Tokens:
    """An hourly series of `times` values."""
    seconds = np.arange(times) * 3600.0
    shape = (times, 1, 1, 1)
    sample = Sample(
        key="wave",
        source="wave",
        modality="series",
        variables=("air_temperature",),
        levels=(float("nan"),),
        values=(280.0 + np.random.default_rng(0).standard_normal(shape)).astype(np.float32),
        valid=np.ones(shape, bool),
        time=seconds,
        year_phase=(seconds / 31556952.0 % 1.0).astype(np.float32),
        day_phase=(seconds / 86400.0 % 1.0).astype(np.float32),
        step_seconds=3600.0,
        latitude=np.full((1, 1), 50.0, np.float32),
        longitude=np.full((1, 1), 10.0, np.float32),
        elevation=np.full((1, 1), 100.0, np.float32),
    )
    return make_tokenizer("series", TokenizerSettings()).encode(sample, num_context=times // 4, leads=(1,))


def row(length: int) -> ModelInputs:
    """One row of hourly series of DOCUMENT values each, all alike."""
    return to_inputs(collate([[wave(DOCUMENT)] * (length // DOCUMENT)], length))


def ready(mode: Checkpointing, length: int) -> Callable[[], None]:
    """A step to be run, in a process whose libraries and buffers are all there."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    settings = TokenizerSettings()
    model = build_model(SHAPES[SIZE], ModelSettings(tokenizer=settings))
    initialize(model, 0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    model.checkpointing = mode
    _step(model, row(DOCUMENT), settings=settings)
    return partial(_step, model, row(length), settings=settings)


def megabytes(mode: Checkpointing, length: int) -> float:
    """What a step adds to the process's memory at its peak."""
    step = ready(mode, length)
    before = psutil.Process().memory_info().rss
    step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / 1e6


def seconds(mode: Checkpointing, length: int) -> float:
    """The better of two steps."""
    step, taken = ready(mode, length), []
    for _ in range(2):
        begun = time.perf_counter()
        step()
        taken.append(time.perf_counter() - begun)
    return min(taken)


def alone(work: Callable[[Checkpointing, int], float], mode: Checkpointing, *, length: int, returned: bool) -> float:
    """In a process of its own; with `returned` freed memory goes back to the system (glibc), so that a peak is one."""
    name = "MALLOC_MMAP_THRESHOLD_"
    if returned:
        os.environ[name] = "65536"
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(work, mode, length).result()
    finally:
        os.environ.pop(name, None)


def _step(model: torch.nn.Module, inputs: ModelInputs, *, settings: TokenizerSettings) -> None:
    torch.stack(list(weighted_sums(model(inputs), inputs, settings=settings).values())).sum().backward()


def draw(costs: dict[tuple[str, int], Cost]) -> None:
    """Measured peaks and the plan's estimates over row length."""
    figure, axes = plt.subplots(figsize=(6, 3.8))
    for mode in MODES:
        estimates = [activation_bytes(SHAPES[SIZE], length, checkpointing=mode) / 1e6 for length in LENGTHS]
        measured = [costs[mode, length].megabytes for length in LENGTHS]
        axes.plot(LENGTHS, measured, "o-", color=COLOURS[mode], label=f"{mode}, measured")
        axes.plot(LENGTHS, estimates, "--", color=COLOURS[mode], label=f"{mode}, estimate of `plan`")
    axes.set_xlabel("tokens in the row")
    axes.set_ylabel("peak of the step, MB")
    axes.set_xticks(LENGTHS, [f"{length:,}" for length in LENGTHS])
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False)
    IMAGE.parent.mkdir(exist_ok=True)
    figure.savefig(IMAGE, dpi=110, bbox_inches="tight", metadata={"Software": None})


def main(arguments: list[str]) -> int:
    """Measure, draw, and write the section of RESULTS.md."""
    argparse.ArgumentParser(description=__doc__).parse_args(arguments)
    costs: dict[tuple[str, int], Cost] = {}
    for length in LENGTHS:
        for mode in MODES:
            costs[mode, length] = Cost(
                megabytes=alone(megabytes, mode, length=length, returned=True),
                seconds=alone(seconds, mode, length=length, returned=False),
            )
    lines = [
        "| tokens in the row | none | selective | full |",
        "|---|---|---|---|",
    ]
    for length in LENGTHS:
        cells = [
            f"{costs[mode, length].megabytes:.0f} MB "
            f"({activation_bytes(SHAPES[SIZE], length, checkpointing=mode) / 1e6:.0f}), "
            f"{costs[mode, length].seconds / costs['none', length].seconds:.2f}"
            for mode in MODES
        ]
        lines.append(f"| {length:,} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"Size {SIZE}, float32, one thread, rows of series of {DOCUMENT} values: peak memory that a step adds, with "
        "the gradients of activations on their way (in brackets what `sci-gpt plan` estimates to be kept), and the "
        "time of forward and backward pass as a multiple of none's.",
        f"Made by `python -m benchmarks.activation_memory` ({machine()}, torch {torch.__version__}).",
    ]
    print("\n".join(lines))
    draw(costs)
    write_section("activation_memory", lines, title="Activation checkpointing")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
