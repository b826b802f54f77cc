"""Seconds of a step on one and two processes with a core each: ZeRO 1 beside torch's DDP, and what overlap changes."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.activation_memory import wave
from benchmarks.results import machine, write_section
from sci_gpt.model.init import initialize
from sci_gpt.model.inputs import ModelInputs, to_inputs
from sci_gpt.model.loss import weighted_sums
from sci_gpt.model.shapes import SHAPES
from sci_gpt.model.transformer import ModelSettings, build_model
from sci_gpt.parallel.engine import AdamWSettings, Engine
from sci_gpt.parallel.groups import Groups
from sci_gpt.parallel.plan import ParallelPlan
from sci_gpt.parallel.weights import place
from sci_gpt.parallel.worker import leaving
from sci_gpt.parallel.world import World
from sci_gpt.train.feed import empty_payloads
from sci_gpt.train.signals import Requests
from sci_launch.local import run_workers
from sci_tokenizers.packing import collate
from sci_tokenizers.tokenizer import TokenizerSettings

ADAMW = AdamWSettings(learning_rate=1e-4, betas=(0.9, 0.95), epsilon=1e-8, weight_decay=0.1, clip=1.0)
SETTINGS = TokenizerSettings()
DOCUMENT = 512


def zero(
    world: World, size: str, inputs: ModelInputs, *, stage: int = 1, overlap: bool | None = None
) -> Callable[[], None]:
    """A step of our engine at a ZeRO stage; `overlap`: DeepSpeed's `overlap_comm`, its default where None."""
    extra = {} if overlap is None else {"zero_optimization": {"overlap_comm": overlap}}
    plan = ParallelPlan(data_parallel=world.size, zero_stage=stage, extra_deepspeed=extra)
    model = build_model(SHAPES[size], ModelSettings(tokenizer=SETTINGS), device="meta")
    groups = Groups.join(plan, world)
    place(model, groups, world=world, seed=0)
    engine = Engine(model, plan=plan, optimizer=ADAMW, world=world, groups=groups)

    def step() -> None:
        engine.backward(_loss(engine, inputs))
        engine.step()

    return step


def ddp(world: World, size: str, inputs: ModelInputs) -> Callable[[], None]:
    """A step of torch's DistributedDataParallel with the same optimizer and clipping; alone without it."""
    model = build_model(SHAPES[size], ModelSettings(tokenizer=SETTINGS))
    initialize(model, 0)
    wrapped: nn.Module = DistributedDataParallel(model) if world.size > 1 else model
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": ADAMW.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=ADAMW.learning_rate, betas=ADAMW.betas, eps=ADAMW.epsilon)

    def step() -> None:
        _loss(wrapped, inputs).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), ADAMW.clip)
        adam.step()
        adam.zero_grad()

    return step


ENGINES: dict[str, Callable[[World, str, ModelInputs], Callable[[], None]]] = {"ZeRO 1": zero, "torch DDP": ddp}
STAGES = (1, 2, 3)


def overlapping(stage: int) -> dict[str, Callable[[World, str, ModelInputs], Callable[[], None]]]:
    """A stage without and with overlap. Stages are not measured in one process: ZeRO 3 brings a linear function of its
    own for all of its process."""
    return {
        f"ZeRO {stage}, overlap_comm {overlap}": partial(zero, stage=stage, overlap=overlap)
        for overlap in (False, True)
    }


def _loss(model: Callable[..., object], inputs: ModelInputs) -> torch.Tensor:
    sums = weighted_sums(model(inputs), inputs, settings=SETTINGS)  # type: ignore[arg-type]
    return torch.stack(list(sums.values())).sum() / DOCUMENT


def work(folder: Path, size: str, *, tokens: int, steps: int, stage: int | None) -> None:
    """One process: steps of the engines in turns; seconds of each."""
    with leaving(), Requests().listening():
        world = World.start(timeout_seconds=600.0)
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[world.rank % len(cores)]})
        batch = collate([[wave(DOCUMENT)] * (tokens // DOCUMENT)], tokens)
        inputs = to_inputs(replace(batch, payloads=empty_payloads(SETTINGS) | batch.payloads))
        engines = overlapping(stage) if stage else ENGINES
        ready = {name: make(world, size, inputs) for name, make in engines.items()}
        taken: dict[str, list[float]] = {name: [] for name in ready}
        for number in range(steps + 1):
            for name, step in ready.items():
                world.barrier()
                begun = time.perf_counter()
                step()
                if number:  # the first warms up
                    taken[name].append(time.perf_counter() - begun)
        if world.rank == 0:
            (folder / "seconds.json").write_text(json.dumps(taken))
        world.stop()


def measure(size: str, *, processes: int, tokens: int, steps: int, stage: int | None = None) -> dict[str, float]:
    """Median seconds of a step by engine: of ENGINES, or of a stage without and with overlap."""
    with tempfile.TemporaryDirectory(prefix="sci-gpt-") as folder:
        command = ["benchmarks.scaling", "--worker", folder, "--size", size]
        command += ["--tokens", str(tokens), "--steps", str(steps), *(["--stage", str(stage)] if stage else [])]
        run_workers(command, processes=processes, threads=1, meeting_place=Path(folder) / "meet")
        taken = json.loads((Path(folder) / "seconds.json").read_text())
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def compared(size: str, tokens: int, *, steps: int) -> list[str]:
    """Rows of the first table, and its ratio."""
    found = {count: measure(size, processes=count, tokens=tokens, steps=steps) for count in (1, 2)}
    lines = []
    for name in ENGINES:
        one, two = found[1][name], found[2][name]
        lines.append(
            f"| {tokens:,} | {name} | {one:.2f} | {two:.2f} | {tokens / one:,.0f} -> {2 * tokens / two:,.0f} | "
            f"{100 * one / two:.0f} % |"
        )
    ratios = [found[count]["ZeRO 1"] / found[count]["torch DDP"] for count in (1, 2)]
    return [*lines, f"| {tokens:,} | ZeRO 1 / torch DDP | {ratios[0]:.3f} | {ratios[1]:.3f} | | |"]


def main() -> int:
    """Prints the tables; with --write also into RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="30M", choices=sorted(SHAPES))
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[1024, 4096], help="of a process and step, multiples of 512"
    )
    parser.add_argument("--steps", type=int, default=5, help="timed ones, of which the median is taken")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--stage", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help="put the tables into RESULTS.md")
    parsed = parser.parse_args()
    size, steps = parsed.size, parsed.steps
    if parsed.worker:
        work(parsed.worker, size, tokens=parsed.tokens[0], steps=steps, stage=parsed.stage)
        return 0
    lines = [
        f"{size}, fp32, weak scaling, a core for each process, median of {steps} steps taken in turns. On one process",
        "torch DDP is plain torch.",
        "",
        "| tokens of a process and step | engine | 1 process, s | 2 processes, s | tokens/s, 1 -> 2 | efficiency |",
        "|---|---|---|---|---|---|",
    ]
    for tokens in parsed.tokens:
        lines += compared(size, tokens, steps=steps)
    found = {}
    for stage in STAGES:
        found |= measure(size, processes=2, tokens=parsed.tokens[0], steps=steps, stage=stage)
    lines += [
        "",
        f"DeepSpeed's overlap of computing and communication, two processes, {parsed.tokens[0]:,} tokens each:",
        "",
        "| engine | s |",
        "|---|---|",
        *(f"| {name} | {seconds:.2f} |" for name, seconds in found.items()),
    ]
    lines += ["", f"Made by `python -m benchmarks.scaling --write` ({machine()})."]
    print("\n".join(lines))
    if parsed.write:
        write_section("scaling", lines, title="One and two processes, ZeRO 1 beside DDP")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
