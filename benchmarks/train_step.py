"""Our training step on series beside Hugging Face's GPT-2 and T5: tokens a second, share of the matrix-product rate."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from benchmarks.results import machine, write_section
from sci_gpt.model.flops import training_flops, work_of
from sci_gpt.model.init import initialize
from sci_gpt.model.inputs import to_inputs
from sci_gpt.model.loss import weighted_sums
from sci_gpt.model.shapes import SHAPES, ModelShape
from sci_gpt.model.transformer import ModelSettings, build_model
from sci_tokenizers.packing import collate, pack_rows
from sci_tokenizers.sample import Sample
from sci_tokenizers.series import SeriesTokenizer
from sci_tokenizers.tokenizer import TokenizerSettings
from sci_tokenizers.tokens import Tokens

SIZES = ("1M", "3M")
ROWS, ROW_LENGTH, CONTEXT = 4, 512, 8
VOCABULARY = 4096
STEPS = 5  # of each model in turn, after one that warms up; the median counts
EQUAL = 0.02  # parameters may differ by this share
TOP = 10  # operations of the profile
CPU = torch.device("cpu")

# What the configurations' signatures do not name.
_GPT2: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 1, "attn_implementation": "sdpa"}
_T5: dict[str, Any] = {"decoder_start_token_id": 0, "attn_implementation": "eager"}

Step = Callable[[], float]


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A model with a batch of its own: what one step does, and what it takes."""

    name: str
    step: Step
    tokens: int
    parameters: int
    flops: float


def series(frames: int, seed: int) -> Sample:
    """A station's temperature: a year's cycle, weather and noise, without gaps."""
    drawn = np.random.default_rng(seed)
    weather = np.zeros(frames)
    for t in range(1, frames):
        weather[t] = 0.9 * weather[t - 1] + drawn.normal()
    phase = (np.arange(frames) / 365.25) % 1.0
    place = np.full((1, 1), 45.0, np.float32)
    return Sample(
        key=f"station-{seed}",
        source="stations",
        modality="series",
        variables=("air_temperature",),
        levels=(float("nan"),),
        values=(285.0 + 8.0 * np.sin(2 * np.pi * phase) + weather)[:, None, None, None].astype(np.float32),
        valid=np.ones((frames, 1, 1, 1), bool),
        time=np.arange(frames) * 86400.0,
        year_phase=phase.astype(np.float32),
        day_phase=np.zeros(frames, np.float32),
        step_seconds=86400.0,
        latitude=place,
        longitude=place,
        elevation=place,
    )


def document(frames: int, seed: int, *, num_context: int) -> Tokens:
    """The series as a document that asks each frame after its context for the next."""
    return SeriesTokenizer(TokenizerSettings()).encode(series(frames, seed), num_context=num_context, leads=(1,))


def used_parameters(model: nn.Module, step: Step) -> int:
    """Parameters that get a gradient which is not 0 throughout: those of absent modalities have none. The last layers
    start at 0, so it takes a step before the others have one.
    """
    step()
    step()
    return sum(p.numel() for p in model.parameters() if p.grad is not None and bool(p.grad.any()))


def training_step(model: nn.Module, loss: Callable[[], Tensor], *, fused: bool = False) -> Step:
    """Forward, backward and AdamW (in one kernel where `fused`), as a call that returns the loss, and with it waits for
    a GPU.
    """
    adam = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=fused)

    def step() -> float:
        adam.zero_grad()
        value = loss()
        value.backward()
        adam.step()
        return float(value.detach())

    return step


def ours(
    shape: ModelShape, rows: Sequence[Sequence[Tokens]], *, row_length: int, compiled: bool = False, table: bool = True
) -> Contestant:
    """Our model on rows of series documents, with a table of ids beside the embedding of values or without."""
    model = build_model(shape, ModelSettings(tokenizer=TokenizerSettings(), id_table=table))
    initialize(model, 0)
    inputs = to_inputs(collate(rows, row_length))
    weight = float(inputs.payloads["series"].unit_weight.sum())
    forward = torch.compile(model) if compiled else model

    def loss() -> Tensor:
        return weighted_sums(forward(inputs), inputs, settings=model.settings.tokenizer)["series"] / weight

    step = training_step(model, loss)
    flops = sum(training_flops(model, work_of(inputs)).values())
    tokens = sum(one.num_tokens for row in rows for one in row)
    return Contestant(name="ours", step=step, tokens=tokens, parameters=used_parameters(model, step), flops=flops)


def gpt2(shape: ModelShape, ids: Tensor, *, parameters: int, compiled: bool = False) -> Contestant:
    """Hugging Face's GPT-2 of as many parameters, its MLP's width chosen for that.

    Raises:
        ValueError: no width comes within EQUAL.
    """

    def made(inner: int) -> GPT2LMHeadModel:
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCABULARY,
                n_positions=ids.shape[1],
                n_embd=shape.width,
                n_layer=shape.layers,
                n_head=shape.heads,
                n_inner=inner,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                use_cache=False,
                **_GPT2,
            )
        )

    base, more = (sum(p.numel() for p in made(inner).parameters()) for inner in (8, 16))
    inner = 8 + round(8 * (parameters - base) / (more - base))
    model = made(max(8, inner))
    count = sum(p.numel() for p in model.parameters())
    if abs(count / parameters - 1) > EQUAL:
        raise ValueError(
            f"GPT-2 with {count} parameters is not within {EQUAL:.0%} of our {parameters}: its table and attention "
            "alone take more; choose a larger size"
        )
    flops = counted(training_step(model, lambda: model(input_ids=ids, labels=ids).loss))
    # what the counter does not see: attention's two products forward and five backward, as in `training_flops`
    flops += (2 + 5) * 2.0 * ids.shape[0] * ids.shape[1] ** 2 * shape.width * shape.layers
    forward = torch.compile(model) if compiled else model
    step = training_step(model, lambda: forward(input_ids=ids, labels=ids).loss)
    return Contestant(name="GPT-2", step=step, tokens=ids.numel(), parameters=count, flops=flops)


def t5(shape: ModelShape, ids: Tensor, *, flops: float) -> Contestant:
    """T5 (Chronos' own architecture) of about the same FLOPs a step: half of each row read, the other half answered."""
    half = ids.shape[1] // 2
    read, answered = ids[:, :half].contiguous(), ids[:, half:].contiguous()

    def made(inner: int) -> Contestant:
        model = T5ForConditionalGeneration(
            T5Config(
                vocab_size=VOCABULARY,
                d_model=shape.width,
                d_kv=shape.head_width,
                d_ff=inner,
                num_layers=shape.layers,
                num_heads=shape.heads,
                dropout_rate=0.0,
                use_cache=False,
                **_T5,
            )
        )
        step = training_step(model, lambda: model(input_ids=read, labels=answered).loss)
        count = sum(p.numel() for p in model.parameters())
        return Contestant(name="T5", step=step, tokens=ids.numel(), parameters=count, flops=counted(step))

    low, high = made(64).flops, made(128).flops
    return made(max(8, 64 + round(64 * (flops - low) / (high - low))))


def counted(step: Step) -> float:
    """FLOPs of a step by torch's counter; attention's kernel on a CPU, which it does not know, is left out."""
    with FlopCounterMode(display=False) as counter:
        step()
    return float(counter.get_total_flops())


def seconds_of(contestants: Sequence[Contestant], *, steps: int = STEPS) -> list[float]:
    """Median seconds of a step of each, taken in turn after two steps that warm up."""
    taken: list[list[float]] = [[] for _ in contestants]
    for number in range(steps + 2):
        for place, one in enumerate(contestants):
            begun = time.perf_counter()
            one.step()
            if number > 1:
                taken[place].append(time.perf_counter() - begun)
    return [float(np.median(row)) for row in taken]


def wait(device: torch.device) -> None:
    """Until the device has done what it was given; a CPU has at once."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_rate(
    edge: int = 1024, *, repeats: int = 10, device: torch.device = CPU, dtype: torch.dtype = torch.float32
) -> float:
    """FLOPs a second of a square matrix product."""
    a, b = (torch.randn(edge, edge, device=device, dtype=dtype) for _ in range(2))
    a @ b
    wait(device)
    begun = time.perf_counter()
    for _ in range(repeats):
        a @ b
    wait(device)
    return 2.0 * edge**3 * repeats / (time.perf_counter() - begun)


def profiled(step: Step, *, device: torch.device = CPU, top: int = TOP) -> list[tuple[str, float]]:
    """The operations (on a GPU: kernels) that take most of a step themselves, with their shares of all."""
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as found:
        step()
    rows = [
        (event.key, float(event.self_device_time_total if on_gpu else event.self_cpu_time_total))
        for event in found.key_averages()
    ]
    whole = sum(taken for _, taken in rows)
    return [(name, taken / whole) for name, taken in sorted(rows, key=lambda row: -row[1])[:top]]


def packed_and_padded(shape: ModelShape, *, row_length: int) -> tuple[Contestant, Contestant]:
    """Documents of unequal length, packed best fit into rows, and one to a row."""
    lengths = [int(x) for x in np.random.default_rng(0).integers(row_length // 8, row_length // 2, 16)]
    documents = [document(length, seed, num_context=length // 4) for seed, length in enumerate(lengths)]
    rows = next(
        placed for count in range(1, len(lengths) + 1) if (placed := pack_rows(lengths, count, row_length=row_length))
    )
    packed = ours(shape, [[documents[i] for i in row] for row in rows], row_length=row_length)
    return packed, ours(shape, [[one] for one in documents], row_length=row_length)


def compare(
    size: str,
    *,
    rows: int = ROWS,
    row_length: int = ROW_LENGTH,
    compiled: bool,
    table: bool = True,
    steps: int = STEPS,
) -> str:
    """A row of the table: our step and GPT-2's, in turn."""
    shape = SHAPES[size]
    documents = [[document(row_length, seed, num_context=CONTEXT)] for seed in range(rows)]
    ids = torch.from_numpy(np.stack([row[0].ids[:, 0] for row in documents if row[0].ids is not None])).long()
    mine = ours(shape, documents, row_length=row_length, compiled=compiled, table=table)
    theirs = gpt2(shape, ids, parameters=mine.parameters, compiled=compiled)
    own, other = seconds_of((mine, theirs), steps=steps)
    rate, peer, product = mine.tokens / own, theirs.tokens / other, matmul_rate()
    name = f"{size}{'' if table else ' without ids'}, {'compiled' if compiled else 'eager'}"
    return (
        f"| {name} | {mine.parameters:,} / {theirs.parameters:,} | {mine.flops / 1e9:.3g} / {theirs.flops / 1e9:.3g} | "
        f"{rate:,.0f} | {peer:,.0f} | {rate / peer:.2f} | {mine.flops / own / product:.0%} / "
        f"{theirs.flops / other / product:.0%} |"
    )


def beside(size: str, *, row_length: int = ROW_LENGTH, steps: int = STEPS) -> list[str]:
    """What is reported beside the pair: T5 at equal FLOPs, packed against padded rows, the profile."""
    shape = SHAPES[size]
    documents = [[document(row_length, seed, num_context=CONTEXT)] for seed in range(ROWS)]
    ids = torch.from_numpy(np.stack([row[0].ids[:, 0] for row in documents if row[0].ids is not None])).long()
    mine = ours(shape, documents, row_length=row_length)
    other = t5(shape, ids, flops=mine.flops)
    own, theirs = seconds_of((mine, other), steps=steps)
    packed, padded = packed_and_padded(shape, row_length=row_length)
    close, wide = seconds_of((packed, padded), steps=steps)
    shares = ", ".join(f"`{name}` {share:.0%}" for name, share in profiled(mine.step))
    rate, peer = mine.tokens / own, other.tokens / theirs
    return [
        f"- T5 of {other.flops / mine.flops:.2f} times our FLOPs a step ({other.parameters:,} parameters): "
        f"{peer:,.0f} tokens/s, ours {rate:,.0f} (x {rate / peer:.2f}).",
        f"- The same 16 documents packed: {packed.tokens / close:,.0f} tokens/s; one to a row: "
        f"{padded.tokens / wide:,.0f} (x {wide / close:.2f}): the layers leave empty positions out.",
        f"- Where a step of ours goes, size {size}, eager: {shares}.",
    ]


def main(arguments: Sequence[str]) -> None:
    """Measure and write the section; `--eager` leaves the compiled pair out."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    modes = (False,) if "--eager" in arguments else (False, True)
    lines = [
        "| size | parameters, ours / GPT-2 | GFLOP a step | ours, tokens/s | GPT-2, tokens/s | ratio | of products |",
        "|---|---|---|---|---|---|---|",
        *(compare(size, compiled=compiled) for size in SIZES for compiled in modes),
        compare(SIZES[1], compiled=False, table=False),
        "",
        *beside(SIZES[0]),
        "",
        f"Series only: {ROWS} rows of {ROW_LENGTH} tokens, a document each, asked after {CONTEXT} frames (GPT-2: all "
        "but one); float32, one thread, torch's AdamW, no dropout, no cache, tokens encoded before. Equal parameters "
        "are not equal work: GPT-2's table of ids is a matrix product and a softmax over 4,096 at its output, ours is "
        "looked up at the input, and our head is a mixture of a few logistics. GPT-2's MLP is as wide as equal "
        "parameters ask; of ours the parameters count that get a gradient. Without ids our table is left out. The last "
        "column: FLOPs of the step by its time, as a share of the rate of a square matrix product of 1,024, ours / "
        "GPT-2's.",
        f"Made by `python -m benchmarks.train_step` ({machine()}, torch {torch.__version__}).",
    ]
    write_section("train_step", lines, title="A training step beside GPT-2 and T5")
    print("\n".join(lines))


if __name__ == "__main__":
    main(sys.argv[1:])
