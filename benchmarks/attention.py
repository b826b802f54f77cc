"""Cost of attention over one global field of 90 x 180 patches: a neighbourhood against all, time and peak memory."""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import psutil
import torch

from benchmarks.results import machine, write_section
from sci_gpt.model.attention import Reach, attend
from sci_gpt.model.flops import document_pairs
from sci_gpt.model.inputs import DocumentGroup, ModelInputs

ROWS, COLUMNS = 90, 180  # 0.25 degree in patches of 8 x 8
RADII = (None, 4, 6, 8)
HEADS, HEAD_WIDTH = 4, 32


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one layer's attention: multiplied pairs, seconds and megabytes above what stood before."""

    pairs: int
    forward: float
    backward: float
    megabytes: float


def field() -> ModelInputs:
    """One frame around the globe."""
    slots = ROWS * COLUMNS
    column = torch.arange(slots) % COLUMNS
    return ModelInputs(
        frame=torch.zeros(slots, dtype=torch.int64),
        row=torch.arange(slots) // COLUMNS,
        column=column,
        period=torch.full_like(column, COLUMNS),
        periods=(COLUMNS,),
        features=torch.zeros(slots, 1),
        payloads={},
        groups=(DocumentGroup(index=torch.arange(slots)[None], frames=1, slots=slots),),
    )


class Peak(threading.Thread):
    """Watches this process's memory every 2 ms."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.process, self.most, self.done = psutil.Process(), 0, threading.Event()

    def run(self) -> None:
        """Until `done`."""
        while not self.done.wait(0.002):
            self.most = max(self.most, self.process.memory_info().rss)


def measure(radius: int | None, repeats: int) -> Cost:
    """In a process of its own: the best of `repeats` times, and the peak of the first."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    inputs = field()
    reach = Reach.of(inputs, radius=radius)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(len(inputs.frame), HEADS, HEAD_WIDTH, generator=generator, requires_grad=True) for _ in range(3)
    )
    before, peak = psutil.Process().memory_info().rss, Peak()
    peak.start()
    forward, backward = [], []
    for _ in range(repeats):
        begun = time.perf_counter()
        mixed = attend(q, k, v=v, reach=reach)
        between = time.perf_counter()
        mixed.sum().backward()
        forward.append(between - begun)
        backward.append(time.perf_counter() - between)
        del mixed
        peak.done.set()
    peak.join()
    tiles = reach.near[0].tiles if reach.near else None
    return Cost(
        pairs=document_pairs(1, ROWS * COLUMNS, tiles=tiles),
        forward=min(forward),
        backward=min(backward),
        megabytes=(peak.most - before) / 1e6,
    )


def main(arguments: list[str]) -> int:
    """Measure and write the section of RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parsed = parser.parse_args(arguments)
    costs: dict[int | None, Cost] = {}
    for radius in RADII:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            costs[radius] = pool.submit(measure, radius, parsed.repeats).result()
    whole = costs[None]
    lines = [
        "| radius, patches | pairs multiplied, M | forward, s | backward, s | both, of global | peak memory, MB |",
        "|---|---|---|---|---|---|",
    ]
    for radius, cost in costs.items():
        share = (cost.forward + cost.backward) / (whole.forward + whole.backward)
        lines.append(
            f"| {'global' if radius is None else radius} | {cost.pairs / 1e6:.1f} | {cost.forward:.3f} | "
            f"{cost.backward:.3f} | {share:.3f} | {cost.megabytes:.0f} |"
        )
    lines += [
        "",
        f"One layer's attention, {HEADS} heads of {HEAD_WIDTH}, float32, one thread, over one frame of {ROWS} x "
        f"{COLUMNS} = {ROWS * COLUMNS:,} patches around the globe; no mask of patches x patches in any row. Best of "
        f"{parsed.repeats}; memory above what the queries, keys and values take, in a process of its own.",
        f"Made by `python -m benchmarks.attention` ({machine()}, torch {torch.__version__}).",
    ]
    print("\n".join(lines))
    write_section("attention", lines, title="Attention within a radius")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
