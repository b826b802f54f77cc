"""Build and train at ZeRO 3 what one process cannot hold: memory of each process, under a limit that one breaks."""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.activation_memory import wave
from benchmarks.results import machine, write_section
from sci_gpt.model.inputs import to_inputs
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
from sci_launch.local import WorkerFailure, run_workers
from sci_tokenizers.packing import collate
from sci_tokenizers.tokenizer import TokenizerSettings

PAGE = Path(__file__).resolve().parents[1] / "docs" / "parallel.md"
ADAMW = AdamWSettings(learning_rate=1e-4, betas=(0.9, 0.95), epsilon=1e-8, weight_decay=0.1, clip=1.0)
STATES = 20  # bytes per parameter in fp32: weight, gradient, master weight, two moments
TOKENS = 64
# By default DeepSpeed's buffers hold 500 million elements, and it keeps what it gathered until it has 1,000 million: a
# model of this size whole.
BUCKETS = {
    "zero_optimization": {
        "reduce_bucket_size": 10**6,
        "stage3_prefetch_bucket_size": 10**6,
        "stage3_max_live_parameters": 10**6,
        "stage3_max_reuse_distance": 0,
    }
}


def status(name: str) -> int:
    """Bytes of a line of /proc/self/status (VmRSS, VmHWM, VmData)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (value,) = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return int(value) * 1024


def work(size: str, limit: float, folder: Path) -> None:
    """One process: build, one step; peak memory above what stood before the model, after each part."""
    with leaving(), Requests().listening():
        world = World.start(timeout_seconds=300.0)
        settings = TokenizerSettings()
        one = collate([[wave(TOKENS)]], TOKENS)
        inputs = to_inputs(replace(one, payloads=empty_payloads(settings) | one.payloads))
        before = status("VmRSS")
        held = status("VmData") + int(limit)
        resource.setrlimit(resource.RLIMIT_DATA, (held, held))
        seen: dict[str, Any] = {"rank": world.rank}

        def peak(name: str) -> None:
            seen[name] = status("VmHWM") - before

        plan = ParallelPlan(data_parallel=world.size, zero_stage=3, extra_deepspeed=BUCKETS)
        model = build_model(SHAPES[size], ModelSettings(tokenizer=settings), device="meta")
        seen["parameters"] = model.num_parameters
        groups = Groups.join(plan, world)
        place(model, groups, world=world, seed=0)
        peak("built")
        engine = Engine(model, plan=plan, optimizer=ADAMW, world=world, groups=groups)
        peak("engine")
        loss = torch.stack(list(weighted_sums(engine(inputs), inputs, settings=settings).values())).sum()
        engine.backward(loss / TOKENS)
        seen["applied"] = engine.step().applied
        peak("step")
        (folder / f"seen-{world.rank}.json").write_text(json.dumps(seen))
        world.stop()


def train(size: str, *, processes: int, limit: float) -> list[dict[str, Any]] | None:
    """What each process saw; None where one could not have the memory that it asked for."""
    with tempfile.TemporaryDirectory(prefix="sci-gpt-") as folder:
        command = ["benchmarks.zero3_memory", "--worker", folder, "--size", size, "--limit", str(limit)]
        before = os.environ.get("MALLOC_MMAP_THRESHOLD_")
        os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # glibc: freed memory goes back to the system
        try:
            run_workers(command, processes=processes, threads=1, meeting_place=Path(folder) / "meet")
        except WorkerFailure as error:
            if "DefaultCPUAllocator" in str(error) or "MemoryError" in str(error) or "allocate memory" in str(error):
                return None
            raise
        finally:
            del os.environ["MALLOC_MMAP_THRESHOLD_"]
            os.environ |= {} if before is None else {"MALLOC_MMAP_THRESHOLD_": before}
        return [json.loads((Path(folder) / f"seen-{rank}.json").read_text()) for rank in range(processes)]


def main() -> int:
    """Exit code 1 where one process can hold the model, or four cannot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="125M", choices=sorted(SHAPES))
    parser.add_argument("--limit", type=float, default=1.5e9, help="bytes that a process may take for the model")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.name}")
    parsed = parser.parse_args()
    if parsed.worker:
        work(parsed.size, parsed.limit, parsed.worker)
        return 0
    alone = train(parsed.size, processes=1, limit=parsed.limit)
    four = train(parsed.size, processes=4, limit=parsed.limit)
    if four is None or alone is not None:
        print(f"one process: {alone}; four: {four}", file=sys.stderr)
        return 1
    states = four[0]["parameters"] * STATES
    out = [
        f"Weights, gradients and optimizer state of {four[0]['parameters'] / 1e6:.0f} million parameters are",
        f"{states / 1e9:.2f} GB in fp32. Where the system lets a process take {parsed.limit / 1e9:.2f} GB, one of them",
        "ends for want of memory; four build the model and take a step. Peak of each, GB above what stood before:",
        "",
        "| process | when the weights are drawn | with the optimizer | after a step |",
        "|---|---|---|---|",
        *(f"| {s['rank']} | {s['built'] / 1e9:.2f} | {s['engine'] / 1e9:.2f} | {s['step'] / 1e9:.2f} |" for s in four),
        "",
        f"Made by `python -m benchmarks.zero3_memory --write` ({machine()}).",
    ]
    print("\n".join(out))
    if parsed.write:
        write_section("zero3_memory", out, title="What one process cannot hold", path=PAGE)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
