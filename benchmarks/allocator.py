"""Processor time, page faults and memory of a training step with glibc's allocator, and with that of a run."""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from dataclasses import replace

import psutil
import torch

from benchmarks.activation_memory import wave
from benchmarks.results import machine, write_section
from benchmarks.scaling import DOCUMENT, SETTINGS, zero
from sci_gpt.model.inputs import to_inputs
from sci_gpt.parallel.world import World
from sci_gpt.train.feed import empty_payloads
from sci_gpt.train.signals import Requests
from sci_launch.allocator import preload
from sci_tokenizers.packing import collate

CASES = (("300k", 2048), ("3M", 4096), ("30M", 1024))
WARM, STEPS = 3, 4


def work(size: str, tokens: int) -> dict[str, float]:
    """In this process: of a step, processor seconds and pages that were cleared; resident MB after the last."""
    with Requests().listening():
        world = World.start()
        batch = collate([[wave(DOCUMENT)] * (tokens // DOCUMENT)], tokens)
        step = zero(world, size, to_inputs(replace(batch, payloads=empty_payloads(SETTINGS) | batch.payloads)))
        for _ in range(WARM):
            step()
        before = resource.getrusage(resource.RUSAGE_SELF)
        for _ in range(STEPS):
            step()
        after = resource.getrusage(resource.RUSAGE_SELF)
        world.stop()
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "seconds": seconds / STEPS,
        "faults": (after.ru_minflt - before.ru_minflt) / STEPS,
        "resident": psutil.Process().memory_info().rss / 1e6,
    }


def measure(size: str, tokens: int, *, ours: bool) -> dict[str, float]:
    """`work` in a process of its own.

    Raises:
        RuntimeError: a run here would have glibc's, too.
    """
    command = [sys.executable, "-m", "benchmarks.allocator", "--worker", size, str(tokens)]
    chosen = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(chosen)}
    if ours and not preload(environment):
        raise RuntimeError("jemalloc is not installed here, or this is a GPU's host")
    environment |= preload(environment) if ours else {}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(arguments: list[str]) -> int:
    """Prints the table; with --write also into RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help="put the table into RESULTS.md")
    parsed = parser.parse_args(arguments)
    if parsed.worker:
        size, tokens = parsed.worker
        print(json.dumps(work(size, int(tokens))))
        return 0
    lines = [
        "| model | tokens | processor, s a step: glibc | jemalloc | ratio | pages cleared a step | resident, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for size, tokens in CASES:
        theirs, ours = (measure(size, tokens, ours=mine) for mine in (False, True))
        lines.append(
            f"| {size} | {tokens:,} | {theirs['seconds']:.3f} | {ours['seconds']:.3f} | "
            f"{ours['seconds'] / theirs['seconds']:.2f} | {theirs['faults']:,.0f}, {ours['faults']:,.0f} | "
            f"{theirs['resident']:.0f}, {ours['resident']:.0f} |"
        )
        print(lines[-1], flush=True)
    lines += [
        "",
        f"{STEPS} steps after {WARM}, one thread, all batches of one size. Made by",
        f"`python -m benchmarks.allocator --write` ({machine()}, torch {torch.__version__}).",
    ]
    if parsed.write:
        write_section("allocator", lines, title="The allocator of a training process")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
