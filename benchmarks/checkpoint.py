"""What a save costs a run: how long it holds training up beside a copy of its bytes, and the wall time that it adds."""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.results import machine, write_section
from sci_gpt.train.checkpoint import MOMENTS, WEIGHT, damage, tensor_key
from sci_gpt.train.commit import CheckpointWriter, Saved
from sci_gpt.train.fragments import Holding

_GOAL = 2.0  # copies of the same bytes
_WIDTH, _LENGTH, _ROWS = 256, 128, 4  # of the model that trains beside the saves


@dataclass(frozen=True, kw_only=True)
class Round:
    """Seconds of one round: a copy of the bytes, the save's hold on training, its whole length, steps with and without.

    Attributes:
        copy: of as many bytes into memory that is there.
        blocked, seconds: of the save (see `Saved`).
        alone, beside: of equally many steps without a save, and with one among them until it is committed.
    """

    copy: float
    blocked: float
    seconds: float
    alone: float
    beside: float

    @property
    def added(self) -> float:
        """Wall time that the save added."""
        return self.beside - self.alone


def held(num_parameters: int) -> Holding:
    """Weights and both moments of a model of 12 layers with so many parameters, as one rank alone holds them."""
    layer = num_parameters // 12
    names = [f"layer.{number}.{part}" for number in range(12) for part in ("attention", "mlp")]
    sizes = [size for _ in range(12) for size in (layer // 3, layer - layer // 3)]
    tensors: dict[str, Tensor] = {}
    for name, size in zip(names, sizes, strict=True):
        for kind in (WEIGHT, *MOMENTS):
            tensors[tensor_key(name, kind, offset=0, start=0)] = torch.randn(size)
    return Holding(
        tensors=tensors,
        fragments=[[name, 0, size, 0, size] for name, size in zip(names, sizes, strict=True)],
        parameters={
            name: {"shape": [size], "tp_dim": None, "trainable": True} for name, size in zip(names, sizes, strict=True)
        },
        adam_step=1.0,
    )


def training() -> Callable[[], None]:
    """A step of a small transformer with AdamW."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(_WIDTH, 4, 4 * _WIDTH, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    rows = torch.randn(_ROWS, _LENGTH, _WIDTH)

    def step() -> None:
        loss = (model(rows) - rows).square().mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def seconds_of(work: Callable[[], object]) -> float:
    """Wall seconds of a call."""
    begun = time.monotonic()
    work()
    return time.monotonic() - begun


def copy_seconds(holding: Holding) -> float:
    """Of one copy of the holding's bytes, tensor by tensor, into memory whose pages are there."""
    places = [torch.zeros_like(tensor).add_(0.0) for tensor in holding.tensors.values()]

    def copy() -> None:
        for place, tensor in zip(places, holding.tensors.values(), strict=True):
            place.copy_(tensor)

    return min(seconds_of(copy) for _ in range(3))


def measure(folder: Path, holding: Holding, *, asynchronous: bool, steps: int, step: Callable[[], None]) -> Round:
    """One round: steps alone, then as many with a save before the first of them; its end is waited for."""
    told: list[Saved] = []
    run = folder / ("asynchronous" if asynchronous else "synchronous")
    writer = CheckpointWriter(run, rank=0, size=1, session="b", asynchronous=asynchronous, told=told.append)
    writer.prepare(holding)
    copy = copy_seconds(holding)

    def train() -> None:
        for _ in range(steps):
            step()

    def train_and_save() -> None:
        writer.save(1, holding, state={"step": 1})
        train()
        writer.finish()

    alone = seconds_of(train)
    beside = seconds_of(train_and_save)
    shutil.rmtree(run)
    return Round(copy=copy, blocked=told[0].blocked_seconds, seconds=told[0].seconds, alone=alone, beside=beside)


def reading(folder: Path, holding: Holding) -> float:
    """Seconds to verify a checkpoint of the holding before a run goes on from it, in one process."""
    path = CheckpointWriter(folder / "read", rank=0, size=1, session="b").save(1, holding, state={"step": 1})
    seconds = seconds_of(lambda: damage(path))
    shutil.rmtree(folder / "read")
    return seconds


def main() -> None:
    """Measure, print and, if asked, write the section of RESULTS.md; exit code 1 where the goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parameters", type=float, default=125e6, help="of the model that is saved (default 125e6)")
    parser.add_argument("--rounds", type=int, default=5, help="of each kind, in turn (default 5)")
    parser.add_argument("--seconds", type=float, default=20.0, help="of training in a round, about (default 20)")
    parser.add_argument("--threads", type=int, default=1, help="that train (default 1)")
    parser.add_argument("--folder", type=Path, help="where checkpoints are written (default: a temporary folder)")
    parser.add_argument("--write", action="store_true", help="write benchmarks/RESULTS.md")
    parser.add_argument("--note", default="", help="a sentence on what else the machine did")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    torch.set_flush_denormal(True)
    holding, step = held(int(asked.parameters)), training()
    megabytes = sum(tensor.numel() for tensor in holding.tensors.values()) * 4 / 1e6
    step()
    per_step = min(seconds_of(step) for _ in range(5))
    steps = max(1, round(asked.seconds / per_step))
    rounds: dict[bool, list[Round]] = {True: [], False: []}
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        for _ in range(asked.rounds):
            for asynchronous in (True, False):
                rounds[asynchronous].append(
                    measure(Path(folder), holding, asynchronous=asynchronous, steps=steps, step=step)
                )
                print(asynchronous, rounds[asynchronous][-1], flush=True)
        verify = reading(Path(folder), holding)
    lines = table(rounds, megabytes=megabytes, steps=steps, threads=asked.threads, verify=verify)
    lines.append(
        f"Made by `python -m benchmarks.checkpoint` ({machine()}, torch {torch.__version__}). {asked.note}".rstrip()
    )
    print("\n".join(lines))
    if asked.write:
        write_section("checkpoint", lines, title="What a save costs a run")
    ratio = statistics.median(row.blocked / row.copy for row in rounds[True])
    if ratio > _GOAL:
        raise SystemExit(f"training was held up for {ratio:.2f} copies of the same bytes, the goal is {_GOAL:g}")


def table(rounds: dict[bool, list[Round]], *, megabytes: float, steps: int, threads: int, verify: float) -> list[str]:
    """The section's lines."""
    lines = [
        "| save | training waits, s | one copy of the bytes, s | ratio | committed after, s | wall time added, s |",
        "|---|---|---|---|---|---|",
    ]
    for asynchronous, rows in rounds.items():
        cells = [
            _middle([row.blocked for row in rows]),
            _middle([row.copy for row in rows]),
            _middle([row.blocked / row.copy for row in rows]),
            _middle([row.seconds for row in rows]),
            _middle([row.added for row in rows]),
        ]
        lines.append(f"| {'asynchronous' if asynchronous else 'synchronous'} | {' | '.join(cells)} |")
    alone = statistics.median(row.alone for rows in rounds.values() for row in rows)
    return [
        *lines,
        "",
        f"One save of {megabytes:,.0f} MB (weights and two moments of Adam of {megabytes / 12:.0f} M parameters, fp32) "
        f"by one process into a file system of this machine, beside {steps} training steps of a small transformer on "
        f"{threads} thread(s), {alone:.1f} s without a save. Medians of {len(rounds[True])} rounds of each kind in "
        "turn, in brackets the least and the greatest. Added: the steps and the save until it is committed, less as "
        "many steps without one just before. To verify the checkpoint before a run goes on from it takes "
        f"{verify:.1f} s ({megabytes / verify:,.0f} MB/s) in one process; the processes of a run share it.",
    ]


def _middle(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
