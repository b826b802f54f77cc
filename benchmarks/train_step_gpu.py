"""Our training step on a GPU: share of the measured bf16 matrix-product rate (MFU), memory, the largest kernels."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from benchmarks.results import machine, write_section
from benchmarks.train_step import Contestant, document, matmul_rate, profiled, seconds_of, training_step
from sci_gpt.model.checkpointing import Checkpointing
from sci_gpt.model.flex import BLOCK, FlexReach
from sci_gpt.model.flops import training_flops, work_of
from sci_gpt.model.init import initialize
from sci_gpt.model.inputs import ModelInputs, to_inputs
from sci_gpt.model.loss import weighted_sums
from sci_gpt.model.shapes import SHAPES, ModelShape
from sci_gpt.model.transformer import ModelSettings, SciGPT, build_model
from sci_tokenizers.packing import collate
from sci_tokenizers.tokenizer import TokenizerSettings

KERNELS = 5
STEPS = 10  # timed, after two that compile and warm up; the median counts
EDGE = 8192  # of the square matrices whose product says what the device can do; a CPU's are of TINY_EDGE
TINY_EDGE = 256
DOCUMENTS = 4  # a row, of unequal length
GIB = 2.0**30


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is trained: a model, rows of a length, how many, and what its layers keep for the backward pass."""

    name: str
    shape: ModelShape
    row_length: int
    rows: int
    checkpointing: Checkpointing = "none"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A step of what was trained: median seconds, peak bytes (None on a CPU), the shares of its kernels."""

    case: Case
    trained: Contestant
    seconds: float
    peak: int | None
    kernels: list[tuple[str, float]]


CASES = {
    "350M": Case(name="350M", shape=SHAPES["350M"], row_length=4096, rows=8),
    "1.3B": Case(name="1.3B", shape=SHAPES["1.3B"], row_length=4096, rows=4),
}
TINY = Case(name="tiny", shape=SHAPES["tiny"], row_length=128, rows=2)


def packed_inputs(case: Case, device: torch.device) -> tuple[ModelInputs, int]:
    """Rows full of series documents of unequal length, and how many tokens they hold."""
    drawn = np.random.default_rng(0)
    rows = []
    for row in range(case.rows):
        ends = np.floor(drawn.dirichlet([4.0] * DOCUMENTS).cumsum() * case.row_length).astype(int)
        lengths = np.diff([0, *ends[:-1], case.row_length]).tolist()
        seeds = range(row * DOCUMENTS, (row + 1) * DOCUMENTS)
        rows.append([document(n, seed, num_context=n // 4) for n, seed in zip(lengths, seeds, strict=True)])
    return to_inputs(collate(rows, case.row_length), device), sum(one.num_tokens for row in rows for one in row)


def flops_of(model: SciGPT, inputs: ModelInputs) -> float:
    """FLOPs of a step; of attention those of the blocks that FlexAttention's kernel visits, not of all pairs."""
    mask = FlexReach.of(inputs).mask
    full = 0 if mask.full_kv_num_blocks is None else int(mask.full_kv_num_blocks.sum())
    pairs = float(BLOCK**2 * (int(mask.kv_num_blocks.sum()) + full))
    return sum(training_flops(model, replace(work_of(inputs), wide_pairs=pairs)).values())


def measure(case: Case, device: torch.device, *, steps: int = STEPS) -> Measured:
    """Train some steps: float32 weights and AdamW's moments, matrix products in bf16 by autocast, compiled on a GPU."""
    with torch.device(device):
        model = build_model(case.shape, ModelSettings(tokenizer=TokenizerSettings()))
    initialize(model, 0)
    model.checkpointing = case.checkpointing
    inputs, tokens = packed_inputs(case, device)
    weight = float(inputs.payloads["series"].unit_weight.sum())
    on_gpu = device.type == "cuda"
    forward = torch.compile(model) if on_gpu else model

    def loss() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            predictions = forward(inputs)
        return weighted_sums(predictions, inputs, settings=model.settings.tokenizer)["series"] / weight

    step = training_step(model, loss, fused=on_gpu)
    trained = Contestant(
        name=case.name, step=step, tokens=tokens, parameters=model.num_parameters, flops=flops_of(model, inputs)
    )
    (seconds,) = seconds_of([trained], steps=steps)
    if not np.isfinite(value := step()):
        raise RuntimeError(f"the loss of {case.name} is {value} after {steps + 2} steps: what was timed is no training")
    return Measured(
        case=case,
        trained=trained,
        seconds=seconds,
        peak=torch.cuda.max_memory_allocated(device) if on_gpu else None,
        kernels=profiled(step, device=device, top=KERNELS),
    )


def table(measured: Sequence[Measured], *, product: float) -> list[str]:
    """The section's lines: a row for each model, its kernels below.

    Args:
        measured: of the same device.
        product: FLOPs a second of a square bf16 matrix product there.
    """
    lines = [
        "| model | parameters | rows x length | checkpointing | tokens/s | TFLOP/s | MFU | peak memory, GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in measured:
        case, trained = one.case, one.trained
        rate = trained.flops / one.seconds
        peak = "no device: CPU" if one.peak is None else f"{one.peak / GIB:.1f}"
        lines.append(
            f"| {case.name} | {trained.parameters:,} | {case.rows} x {case.row_length:,} | {case.checkpointing} | "
            f"{trained.tokens / one.seconds:,.0f} | {rate / 1e12:.4g} | {rate / product:.2%} | {peak} |"
        )
    lines.append("")
    for one in measured:
        shares = ", ".join(f"`{name}` {share:.0%}" for name, share in one.kernels)
        lines.append(f"- Largest of {one.case.name}: {shares}.")
    return lines


def chosen(arguments: Sequence[str]) -> tuple[list[Case], torch.device, int]:
    """Cases, device and timed steps that the arguments ask for.

    Raises:
        SystemExit: there is no GPU and `--tiny` was not given.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_step_gpu", description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=list(CASES), default=list(CASES), help="models to train")
    parser.add_argument("--rows", type=int, help="rows a step (default: 8 of 350M, 4 of 1.3B)")
    parser.add_argument("--checkpointing", choices=("none", "selective", "full"), default="none")
    parser.add_argument("--steps", type=int, default=STEPS, help="timed steps (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on this CPU: does the script work?")
    asked = parser.parse_args(arguments)
    for name in ("rows", "steps"):
        if (value := getattr(asked, name)) is not None and value < 1:
            parser.error(f"--{name} is 1 or more, got {value}")
    if not asked.tiny and not torch.cuda.is_available():
        parser.error(
            "a GPU is needed and torch sees none here: run it where torch.cuda.is_available() is true, or give --tiny "
            "to try the script on this CPU"
        )
    cases = [TINY] if asked.tiny else [CASES[size] for size in asked.sizes]
    cases = [replace(one, rows=asked.rows or one.rows, checkpointing=asked.checkpointing) for one in cases]
    return cases, torch.device("cpu" if asked.tiny else "cuda"), asked.steps


def main(arguments: Sequence[str]) -> None:
    """Measure and print; on a GPU write the section."""
    cases, device, steps = chosen(arguments)
    on_gpu = device.type == "cuda"
    product = matmul_rate(EDGE if on_gpu else TINY_EDGE, device=device, dtype=torch.bfloat16)
    found = []
    for case in cases:
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        found.append(measure(case, device, steps=steps))
    lines = table(found, product=product)
    where = f"one {torch.cuda.get_device_name(device)}" if on_gpu else "no device: CPU"
    lines += [
        "",
        f"Series only, {DOCUMENTS} documents of unequal length a row; products in bf16 ({product / 1e12:.4g} TFLOP/s "
        f"measured, square of {EDGE if on_gpu else TINY_EDGE:,}), weights and AdamW's moments in float32. MFU: FLOPs "
        "of the step's matrix products, of attention those of the blocks that are visited, by its time, as a share of "
        "that rate; what checkpointing computes again is not counted.",
        f"Made by `python -m benchmarks.train_step_gpu` ({where}; {machine()}, torch {torch.__version__}).",
    ]
    if on_gpu:
        write_section("train_step_gpu", lines, title="A training step on a GPU")
    print("\n".join(lines))


if __name__ == "__main__":
    main(sys.argv[1:])
