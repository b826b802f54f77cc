"""Seconds of a step on one and two processes with a core each, and ZeRO 1 beside torch's own DDP in one run."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
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
from sci_gpt.parallel.world import World
from sci_gpt.train.feed import empty_payloads
from sci_gpt.train.signals import Requests
from sci_launch.local import run_workers
from sci_tokenizers.packing import collate
from sci_tokenizers.tokenizer import TokenizerSettings

ADAMW = AdamWSettings(learning_rate=1e-4, betas=(0.9, 0.95), epsilon=1e-8, weight_decay=0.1, clip=1.0)
SETTINGS = TokenizerSettings()
DOCUMENT = 512


def zero1(world: World, size: str, inputs: ModelInputs) -> Callable[[], None]:
    """A step of our engine at ZeRO 1."""
    plan = ParallelPlan(data_parallel=world.size)
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


ENGINES = {"ZeRO 1": zero1, "torch DDP": ddp}


def _loss(model: Callable[..., object], inputs: ModelInputs) -> torch.Tensor:
    sums = weighted_sums(model(inputs), inputs, settings=SETTINGS)  # type: ignore[arg-type]
    return torch.stack(list(sums.values())).sum() / DOCUMENT


def work(folder: Path, size: str, *, tokens: int, steps: int) -> None:
    """One process: steps of both engines in turns; seconds of each."""
    with Requests().listening():
        world = World.start(timeout_seconds=600.0)
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[world.rank % len(cores)]})
        batch = collate([[wave(DOCUMENT)] * (tokens // DOCUMENT)], tokens)
        inputs = to_inputs(replace(batch, payloads=empty_payloads(SETTINGS) | batch.payloads))
        ready = {name: make(world, size, inputs) for name, make in ENGINES.items()}
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


def measure(size: str, *, processes: int, tokens: int, steps: int) -> dict[str, float]:
    """Median seconds of a step by engine."""
    with tempfile.TemporaryDirectory(prefix="sci-gpt-") as folder:
        command = ["benchmarks.scaling", "--worker", folder, "--size", size]
        command += ["--tokens", str(tokens), "--steps", str(steps)]
        run_workers(command, processes=processes, threads=1, meeting_place=Path(folder) / "meet")
        taken = json.loads((Path(folder) / "seconds.json").read_text())
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def main() -> int:
    """Prints the table; with --write also into RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="30M", choices=sorted(SHAPES))
    parser.add_argument("--tokens", type=int, default=1024, help="of a process and step, a multiple of 512")
    parser.add_argument("--steps", type=int, default=7, help="timed ones, of which the median is taken")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help="put the table into RESULTS.md")
    parsed = parser.parse_args()
    if parsed.worker:
        work(parsed.worker, parsed.size, tokens=parsed.tokens, steps=parsed.steps)
        return 0
    found = {count: measure(parsed.size, processes=count, tokens=parsed.tokens, steps=parsed.steps) for count in (1, 2)}
    lines = [
        f"{parsed.size}, fp32, {parsed.tokens} tokens a process and step (weak scaling), a core for each, median of",
        f"{parsed.steps} steps taken in turns.",
        "",
        "| engine | 1 process, s | 2 processes, s | tokens/s, 1 -> 2 | efficiency |",
        "|---|---|---|---|---|",
    ]
    for name in ENGINES:
        one, two = found[1][name], found[2][name]
        lines.append(
            f"| {name} | {one:.2f} | {two:.2f} | {parsed.tokens / one:,.0f} -> {2 * parsed.tokens / two:,.0f} | "
            f"{100 * one / two:.0f} % |"
        )
    ratios = ", ".join(f"{found[n]['ZeRO 1'] / found[n]['torch DDP']:.3f} on {n}" for n in (1, 2))
    lines += ["", f"A step at ZeRO 1 takes {ratios} processes of what one with torch's DDP takes (alone: plain torch)."]
    lines += [f"Made by `python -m benchmarks.scaling --write` ({machine()})."]
    print("\n".join(lines))
    if parsed.write:
        write_section("scaling", lines, title="One and two processes, ZeRO 1 beside DDP")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
