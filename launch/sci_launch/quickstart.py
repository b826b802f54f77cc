"""`make quickstart`: the stages one after the other, each timed, with the peak memory of all its processes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

DATA = "configs/data/quickstart.yaml"
RUN = "configs/pretrain/quickstart.yaml"
CONTROL = "configs/pretrain/quickstart-shuffled.yaml"
SECONDS_BETWEEN_SAMPLES = 0.25
# Progress appears as it is made, into a pipe too; nothing is reported to anyone.
ENVIRONMENT = {"PYTHONUNBUFFERED": "1", "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage: its name in the table, its command, and where its output is to be found."""

    name: str
    command: tuple[str, ...]
    output: str


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a stage took: seconds, the peak of the memory summed over its processes (bytes), and its exit code."""

    seconds: float
    peak_bytes: int
    code: int


def stages() -> tuple[Stage, ...]:
    """The quickstart, in order; each stage keeps what an earlier call has already made."""
    sci_gpt = str(Path(sys.executable).with_name("sci-gpt"))
    unseen = (sys.executable, "-m", "sci_launch.unseen", "--config", RUN, "--out", "runs/quickstart-forecast")
    return (
        Stage(name="build", command=(sci_gpt, "build", DATA), output="data/quickstart"),
        Stage(name="pretrain", command=(sci_gpt, "pretrain", RUN), output="runs/quickstart"),
        Stage(name="control", command=(sci_gpt, "pretrain", CONTROL), output="runs/quickstart-shuffled"),
        Stage(name="evaluate", command=(sci_gpt, "evaluate", RUN), output="runs/quickstart/report"),
        Stage(name="forecast", command=unseen, output="runs/quickstart-forecast"),
    )


def run_stage(stage: Stage) -> Cost:
    """Run one stage with its output on ours, and sample the memory of it and all its descendants meanwhile."""
    print(f"\n=== {stage.name}: {' '.join([Path(stage.command[0]).name, *stage.command[1:]])}", flush=True)
    began, peak, done = time.monotonic(), [0], threading.Event()
    child = subprocess.Popen(stage.command, env=os.environ | ENVIRONMENT)
    sampler = threading.Thread(target=_sample, args=(child.pid, peak), kwargs={"done": done}, daemon=True)
    sampler.start()
    try:
        code = child.wait()
    except KeyboardInterrupt:
        code = child.wait()  # the terminal has sent the child the same signal: it saves and stops
    done.set()
    sampler.join()
    # a negative code is the signal that ended the child; a shell says 128 + signal
    return Cost(seconds=time.monotonic() - began, peak_bytes=peak[0], code=code if code >= 0 else 128 - code)


def run(todo: Sequence[Stage]) -> int:
    """Run the stages, stop at the first that fails, and print the table. Returns the failed stage's exit code, or 0."""
    costs: dict[str, Cost] = {}
    for stage in todo:
        costs[stage.name] = run_stage(stage)
        if costs[stage.name].code:
            break
    print(table(todo, costs), flush=True)
    return next((cost.code for cost in costs.values() if cost.code), 0)


def table(todo: Sequence[Stage], costs: dict[str, Cost]) -> str:
    """The closing table: seconds and peak memory (MiB, summed over processes) per stage, and where its output is."""
    lines = [f"\n{'stage':<10} {'seconds':>8} {'peak MiB':>9}  output"]
    for stage in todo:
        cost = costs.get(stage.name)
        if cost is None:
            lines.append(f"{stage.name:<10} {'-':>8} {'-':>9}  not run")
            continue
        where = stage.output if not cost.code else f"failed with exit code {cost.code}"
        lines.append(f"{stage.name:<10} {cost.seconds:>8.1f} {cost.peak_bytes / 2**20:>9.0f}  {where}")
    total = sum(cost.seconds for cost in costs.values())
    peak = max((cost.peak_bytes for cost in costs.values()), default=0)
    lines.append(f"{'all':<10} {total:>8.1f} {peak / 2**20:>9.0f}  peak memory: {_measure()} summed over all processes")
    return "\n".join(lines)


def memory_of(pid: int) -> int:
    """Bytes held by a process and its descendants; shared pages count once where the system can tell (PSS)."""
    total = 0
    try:
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            total += _process_bytes(process)
    except psutil.NoSuchProcess:
        return total
    return total


def _process_bytes(process: psutil.Process) -> int:
    try:
        info = process.memory_full_info()
        return int(getattr(info, "pss", 0) or info.rss)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0  # it ended between the listing and the look


def _measure() -> str:
    return "proportional set size" if hasattr(psutil.Process().memory_full_info(), "pss") else "resident set size"


def _sample(pid: int, peak: list[int], *, done: threading.Event) -> None:
    while not done.wait(SECONDS_BETWEEN_SAMPLES):
        peak[0] = max(peak[0], memory_of(pid))


if __name__ == "__main__":
    sys.exit(run(stages()))
