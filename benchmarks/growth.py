"""Memory of a run's processes over 2,000 steps: exit code 1 where one grows by 2 % or more after its warm-up."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import psutil

from benchmarks.results import machine, write_section
from sci_gpt.config import PretrainConfig
from sci_gpt.config_file import load_config, show_config
from sci_gpt.train.run_folder import LOG
from sci_launch.local import WORKER, run_workers

LIMIT = 0.02
WARM_UP = 0.1  # of the steps: pools, caches and the tracker's libraries are filled by then
_PARTS = 10  # rows of the table
_LOOK_SECONDS = 0.2  # several in the 20 steps after which a run gives memory back
_TAIL_BYTES = 65536  # of the log, in which the last line is

Looks = dict[int, list[tuple[int, float]]]  # rank -> (completed steps, resident MB), in time


def growth(looks: Sequence[tuple[int, float]], *, steps: int) -> tuple[float, float, float]:
    """Median memory in the first tenth of the steps after the warm-up, in the last tenth, and its growth.

    Raises:
        ValueError: one of them was not looked at.
    """
    first = [memory for step, memory in looks if WARM_UP * steps <= step < 2 * WARM_UP * steps]
    last = [memory for step, memory in looks if step >= (1 - WARM_UP) * steps]
    if not first or not last:
        raise ValueError(f"{len(first)} looks after the warm-up and {len(last)} at the end: give more --steps")
    before, after = median(first), median(last)
    return before, after, after / before - 1


def last_step(log: Path) -> int:
    """Of the last whole line; 0 before the first."""
    if not log.exists():
        return 0
    begin = max(0, log.stat().st_size - _TAIL_BYTES)
    with log.open("rb") as file:
        file.seek(begin)
        whole = file.read().split(b"\n")[bool(begin) : -1]
    return int(json.loads(whole[-1])["step"]) if whole else 0


class Watcher(threading.Thread):
    """Looks at the resident memory of this process' workers."""

    def __init__(self, run: Path) -> None:
        super().__init__(daemon=True)
        self.run_folder, self.looks = run, Looks()
        self.done = threading.Event()

    def run(self) -> None:
        """Look until `done`."""
        while not self.done.wait(_LOOK_SECONDS):
            step = last_step(self.run_folder / LOG)
            for child in psutil.Process().children():
                try:
                    rank, memory = int(child.environ()["RANK"]), child.memory_info().rss / 1e6
                except (psutil.Error, KeyError):
                    continue
                self.looks.setdefault(rank, []).append((step, memory))


def measure(config: PretrainConfig) -> Looks:
    """Train, and look."""
    watcher = Watcher(config.output)
    watcher.start()
    with tempfile.TemporaryDirectory(prefix="sci-gpt-") as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(show_config(config), encoding="utf-8")
        run_workers(
            [WORKER, str(path)],
            processes=config.parallel.processes,
            threads=config.parallel.threads_per_process,
            meeting_place=Path(folder) / "rendezvous",
        )
    watcher.done.set()
    watcher.join()
    return watcher.looks


def table(looks: Looks, *, steps: int) -> list[str]:
    """Median resident MB of each rank in each tenth of the steps, and the growth."""
    at = [round(steps * part / _PARTS) for part in range(1, _PARTS + 1)]
    lines = ["| rank | " + " | ".join(f"step {step}" for step in at) + " | growth |", "|---" * (len(at) + 2) + "|"]
    for rank, row in sorted(looks.items()):
        width = steps / _PARTS
        cells = [[memory for step, memory in row if until - width < step <= until] for until in at]
        shown = [f"{median(cell):.0f}" if cell else "-" for cell in cells]
        lines.append(f"| {rank} | {' | '.join(shown)} | {100 * growth(row, steps=steps)[2]:+.2f} % |")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print the table, say whether it holds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("configs/pretrain/quickstart.yaml"))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--write", action="store_true", help="write the section of RESULTS.md")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    asked = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="growth-") as folder:
        changes = {
            "output": f"{folder}/run",
            "schedule.steps": asked.steps,
            "phases.0.until_step": asked.steps,
            "checkpoint.every": max(1, asked.steps // 10),
            "validation.every": max(1, asked.steps // 10),
            "tracking.uri": f"sqlite:///{folder}/mlflow.db",
            "tracking.artifacts": f"{folder}/artifacts",
            "tracking.registered_model": "null",
        }
        words = [f"{key}={value}" for key, value in changes.items()]
        config = load_config(asked.config, PretrainConfig, overrides=(*words, *asked.overrides))
        begun = time.monotonic()
        looks = measure(config)
    lines = [
        f"{asked.config}, {asked.steps} steps, {machine()}: resident MB, median of each tenth",
        "",
        *table(looks, steps=asked.steps),
    ]
    print("\n".join(lines))
    print(f"{time.monotonic() - begun:.0f} s")
    if asked.write:
        write_section("growth", lines, title="Memory of a long run")
    worst = max(growth(row, steps=asked.steps)[2] for row in looks.values())
    print(f"largest growth {100 * worst:+.2f} % ({'below' if worst < LIMIT else 'NOT below'} {100 * LIMIT:g} %)")
    return 0 if worst < LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
