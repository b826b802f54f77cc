"""Predicted and measured memory of three training steps at three sizes; exits 1 where they differ by more than 10 %."""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil
import torch

from benchmarks.activation_memory import row
from benchmarks.results import machine, write_section
from sci_gpt.model.checkpointing import Checkpointing
from sci_gpt.model.shapes import SHAPES, ModelShape
from sci_gpt.model.transformer import ModelSettings, SciGPT, build_model
from sci_gpt.parallel.device_memory import DeviceMemory, device_memory
from sci_gpt.parallel.engine import AdamWSettings, Engine
from sci_gpt.parallel.groups import Groups
from sci_gpt.parallel.plan import Dtype, Offload, ParallelPlan
from sci_gpt.parallel.weights import place
from sci_gpt.parallel.worker import RENDEZVOUS_VARIABLE, leaving
from sci_gpt.parallel.world import World
from sci_gpt.recipes.remedies import params_on_device
from sci_gpt.train import fragments
from sci_gpt.train.objective import NextFrame
from sci_gpt.train.staging import Staging
from sci_tokenizers.tokenizer import TokenizerSettings

WITHIN = 0.1
STEPS = 3
ADAMW = AdamWSettings(learning_rate=1e-4, betas=(0.9, 0.95), epsilon=1e-8, weight_decay=0.1, clip=1.0)


@dataclass(frozen=True, kw_only=True)
class Case:
    """STEPS steps: `layers` of the size (None: all), `tokens` of a micro-batch of a data group, `staged` saves.

    Processes that neither the tensor nor the sequence axis takes are data groups.
    """

    size: str
    layers: int | None = None
    dtype: Dtype = "fp32"
    zero_stage: int = 1
    processes: int = 1
    tensor_parallel: int = 1
    sequence_parallel: int = 1
    offload: Offload = "none"
    accumulation: int = 1
    checkpointing: Checkpointing = "none"
    tokens: int = 512
    staged: bool = False

    @property
    def shape(self) -> ModelShape:
        """The trunk."""
        shape = SHAPES[self.size]
        return shape if self.layers is None else replace(shape, layers=self.layers)

    @property
    def plan(self) -> ParallelPlan:
        """The layout."""
        return ParallelPlan(
            data_parallel=self.processes // (self.tensor_parallel * self.sequence_parallel),
            tensor_parallel=self.tensor_parallel,
            sequence_parallel=self.sequence_parallel,
            offload=self.offload,
            zero_stage=self.zero_stage,
            dtype=self.dtype,
            accumulation=self.accumulation,
        )


CASES = (
    Case(size="30M", tokens=1024),
    Case(size="30M", processes=2, zero_stage=2, dtype="bf16"),
    Case(size="30M", processes=2, zero_stage=3),
    Case(size="125M", layers=4, checkpointing="full", accumulation=2),
    Case(size="125M", dtype="bf16"),
    Case(size="30M", processes=2, staged=True),
    Case(size="30M", processes=2, tensor_parallel=2, tokens=1024),
    Case(size="30M", processes=2, sequence_parallel=2, tokens=1024),
    Case(size="30M", processes=2, offload="optimizer", dtype="bf16"),
    Case(size="30M", processes=2, zero_stage=2, offload="optimizer", dtype="bf16", accumulation=2),
    Case(size="30M", processes=2, offload="optimizer", accumulation=2),
    Case(size="30M", processes=2, zero_stage=2, offload="optimizer"),
    Case(size="30M", processes=2, zero_stage=2, offload="optimizer", accumulation=2),
    Case(size="30M", processes=2, zero_stage=3, offload="optimizer", dtype="bf16"),
    Case(size="30M", processes=2, zero_stage=3, offload="all"),
)


def _model(case: Case) -> SciGPT:
    return build_model(case.shape, ModelSettings(tokenizer=TokenizerSettings()), device="meta")


def predicted(case: Case) -> DeviceMemory:
    """What `sci-gpt plan` says of it."""
    found = device_memory(
        case.shape,
        case.plan,
        num_params=params_on_device(_model(case), tensor_parallel=case.tensor_parallel),
        num_tokens=case.tokens,
        checkpointing=case.checkpointing,
        accelerator=False,
        staged=case.staged,
    )
    return found.with_host()


def rss() -> int:
    """Bytes of this process."""
    return int(psutil.Process().memory_info().rss)


def forget_peak() -> None:
    """From now on `peak` is of what follows (Linux, proc(5): clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak() -> int:
    """The most bytes that this process had."""
    (line,) = (x for x in Path("/proc/self/status").read_text(encoding="ascii").splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def train(case: Case, *, world: World, steps: int) -> dict[str, int]:
    """Bytes from before the model is made: the most of them in `steps` steps, and those after the last."""
    gc.collect()
    before = rss()
    forget_peak()
    settings = TokenizerSettings()
    model, groups = _model(case), Groups.join(case.plan, world)
    model.checkpointing = case.checkpointing
    place(model, groups, world=world, seed=0)
    engine = Engine(model, plan=case.plan, optimizer=ADAMW, world=world, groups=groups)
    del model
    staging = Staging()
    if case.staged:
        staging.reserve(fragments.hold(engine))
    objective = NextFrame(settings=settings, device=world.device)
    for _ in range(steps):
        for _ in range(case.accumulation):
            inputs = row(case.tokens)
            sums = objective.sums(engine(inputs), inputs)
            loss = torch.stack(list(sums.values())).sum() * (engine.plan.loss_multiplier / case.tokens)
            engine.backward(loss)
            del inputs, sums, loss
            engine.step()
    found = {"peak": peak() - before, "after": rss() - before}
    engine.close()
    return found


def worker(case: Case) -> None:
    """One process of a case: a small model first, so that libraries and their buffers are there."""
    with leaving():
        world = World.start(threads=1)
        small = Case(**{**asdict(case), "size": "tiny", "layers": None, "tokens": 512, "accumulation": 1})
        train(small, world=world, steps=1)
        print(json.dumps(train(case, world=world, steps=STEPS)), flush=True)
        world.stop()


def measured(case: Case) -> dict[str, int]:
    """The most of any process. Freed memory goes back to the system (glibc), so that a peak is one."""
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for rank in range(case.processes):
            places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": case.processes}
            environment = os.environ | {name: str(value) for name, value in places.items()}
            environment |= {RENDEZVOUS_VARIABLE: f"{folder}/meeting", "MALLOC_MMAP_THRESHOLD_": "65536"}
            command = [sys.executable, "-m", "benchmarks.memory", "--worker", json.dumps(asdict(case))]
            started.append(
                subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            )
        found = []
        for process in started:
            out, err = process.communicate()
            if process.returncode:
                raise RuntimeError(f"{case}: a process failed\n{err[-2000:]}")
            found.append(json.loads(out.splitlines()[-1]))
    return {name: max(one[name] for one in found) for name in found[0]}


def _zero(case: Case) -> str:
    return str(case.zero_stage) + ("" if case.offload == "none" else f", {case.offload} offloaded")


def _layout(case: Case) -> str:
    axes = {"TP": case.tensor_parallel, "SP": case.sequence_parallel, "DP": case.plan.data_parallel}
    return " x ".join(f"{name}{count}" for name, count in axes.items() if count > 1) or "one process"


def main(arguments: list[str]) -> int:
    """Print the table, write it to RESULTS.md; 1 where a prediction is more than 10 % off."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker", metavar="CASE", help=argparse.SUPPRESS)
    parser.add_argument("--size", choices=sorted({case.size for case in CASES}), help="the cases of one size alone")
    parsed = parser.parse_args(arguments)
    if parsed.worker:
        worker(Case(**json.loads(parsed.worker)))
        return 0
    lines = [
        "| parameters | type | ZeRO | layout | checkpointing | saves | tokens x micro-batches | "
        "peak predicted, MB | measured | error | after predicted, MB | measured | error |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    worst = 0.0
    for case in CASES:
        if parsed.size not in (None, case.size):
            continue
        ours, theirs = predicted(case), measured(case)
        pairs = ((ours.total, theirs["peak"]), (ours.between_steps, theirs["after"]))
        errors = [mine / real - 1 for mine, real in pairs]
        worst = max([worst, *map(abs, errors)])
        count = _model(case).num_parameters
        numbers = [
            f"{mine / 1e6:,.0f} | {real / 1e6:,.0f} | {100 * error:+.1f} %"
            for (mine, real), error in zip(pairs, errors, strict=True)
        ]
        lines.append(
            f"| {count / 1e6:.0f} M | {case.dtype} | {_zero(case)} | {_layout(case)} | {case.checkpointing} | "
            f"{'asynchronous' if case.staged else 'none'} | "
            f"{case.tokens:,} x {case.accumulation} | {' | '.join(numbers)} |"
        )
        print(lines[-1], flush=True)
    lines += [
        "",
        f"Memory of a process (the largest) from before the model is made to after step {STEPS}: the most in between, "
        f"and what is left. The worst prediction is {100 * worst:.1f} % off. Made by `python -m benchmarks.memory` "
        f"({machine()}, torch {torch.__version__}), which exits with 1 beyond {100 * WITHIN:.0f} %.",
    ]
    print("\n".join(lines[-2:]))
    if parsed.size is None:
        write_section("memory", lines, title="Memory of a training step")
    return 1 if worst > WITHIN else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
