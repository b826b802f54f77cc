"""Journal: where a run's records go: the step log, each rank's consumed keys, the progress line, the tracker."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from sci_gpt.train.commit import Saved
from sci_gpt.train.feed import StepRows
from sci_gpt.train.run_folder import LOG, LineLog, keys_log, read_lines
from sci_gpt.train.tracker import Tracker

_FEWEST = 5  # steps that tell something about a rank
_NOTABLY = 1.2  # times the mean of the ranks: then the progress line names the slowest
_TAIL_BYTES = 1 << 18  # of a log that may be long


class Progress:
    """The progress line: step, tokens/s, time left, loss, validation skill, share of time waited for data.

    Args:
        steps: of the whole run.
        every_seconds: between lines.
        stream: where lines go.
    """

    def __init__(self, steps: int, *, every_seconds: float = 2.0, stream: TextIO | None = None) -> None:
        self.steps, self.every_seconds = steps, every_seconds
        self.stream = stream or sys.stdout
        self.skill: dict[str, float] = {}
        self._restart(time.monotonic())

    def step(self, record: Mapping[str, Any]) -> None:
        """Count a completed step, and print when it is time to."""
        now = time.monotonic()
        self._tokens += record["tokens"]
        self._wait += record["wait_seconds"]
        self._counted += 1
        self._slow.append(record.get("step_seconds"))
        if now - self._since >= self.every_seconds or record["step"] == self.steps:
            print(self.line(record, now - self._since), file=self.stream, flush=True)
            self._restart(now)

    def validation(self, step: int, scores: Mapping[str, Mapping[str, float]]) -> None:
        """Print the scores of a validation, and keep its skills for the lines that follow."""
        self.skill = {name: score["skill"] for name, score in scores.items()}
        listed = ", ".join(
            f"{name} loss {row['loss']:.4f} skill {row['skill']:+.3f}" for name, row in sorted(scores.items())
        )
        print(
            f"step {step}/{self.steps} | validation: {listed or 'no source has a validation split'}",
            file=self.stream,
            flush=True,
        )

    def saved(self, saved: Saved) -> None:
        """Print how long a checkpoint held up training, and how long it took; called from the thread that wrote it."""
        line = f"step {saved.step}/{self.steps} | checkpoint: training waited {saved.blocked_seconds:.2f} s"
        self.stream.write(f"{line}, committed after {saved.seconds:.2f} s\n")  # in one piece, beside the other lines
        self.stream.flush()

    def end(self, wait_seconds: float, seconds: float) -> None:
        """Print the share of the run's steps that was waiting for data."""
        share = 100 * wait_seconds / seconds
        print(f"waits for data {share:.2f} % of {seconds:.1f} s of steps", file=self.stream, flush=True)

    def line(self, record: Mapping[str, Any], seconds: float) -> str:
        """The line for the steps counted in the last `seconds`."""
        left = (self.steps - record["step"]) * seconds / self._counted
        loss = "not finite" if record["loss"] is None else f"{record['loss']:.4f}"
        parts = [
            f"step {record['step']}/{self.steps}",
            f"{self._tokens / seconds:,.0f} tokens/s",
            f"ETA {int(left) // 60}:{int(left) % 60:02d}",
            f"loss {loss}",
            f"waits for data {100 * self._wait / seconds:.1f} %",
        ]
        if slow := _slow_rank(self._slow):
            parts.append(slow)
        if self.skill:
            parts.insert(4, "skill " + " ".join(f"{name} {value:+.3f}" for name, value in sorted(self.skill.items())))
        return " | ".join(parts)

    def _restart(self, now: float) -> None:
        self._since, self._tokens, self._wait, self._counted = now, 0, 0.0, 0
        self._slow: list[Mapping[str, float] | None] = []


def _slow_rank(steps: Sequence[Mapping[str, float] | None]) -> str | None:
    """The rank that was slowest in most of the steps, where the slowest took notably longer than the mean."""
    known = [step for step in steps if step is not None]
    mean, most = sum(step["mean"] for step in known), sum(step["max"] for step in known)
    if len(known) < _FEWEST or most <= _NOTABLY * mean:
        return None
    (rank, count), *_ = Counter(int(step["slowest"]) for step in known).most_common(1)
    return f"slowest rank {rank} ({most / mean:.1f} x the mean)" if 2 * count > len(known) else None


class RunJournal:
    """One rank's journal. Every rank writes what it consumed; rank 0 also the step log, the progress and the tracker.

    Args:
        run: the run folder.
        rank: in the world.
        progress, tracker: rank 0's.
    """

    def __init__(self, run: Path, *, rank: int, progress: Progress, tracker: Tracker | None) -> None:
        self.rank, self.progress, self.tracker = rank, progress, tracker
        self.validated: tuple[int, dict[str, dict[str, float]]] | None = None  # the last: step and scores
        self._run = run
        self._keys = LineLog(keys_log(run, rank))
        self._log = LineLog(run / LOG) if rank == 0 else None

    def consumed(self, step: int, rows: StepRows) -> None:
        """This rank's samples of a step."""
        self._keys.append({"step": step, "first": rows.first, "samples": rows.samples, "keys": rows.keys})

    def step(self, record: dict[str, Any]) -> None:
        """A completed step."""
        if self._log is None:
            return
        self._log.append(record)
        self.progress.step(record)
        if self.tracker is not None:
            self.tracker.metrics(record["step"], step_metrics(record))

    def validation(self, step: int, scores: dict[str, dict[str, float]]) -> None:
        """Scores of the validation split after a step."""
        self.validated = (step, scores)
        if self._log is None:
            return
        self._log.append({"step": step, "validation": scores})
        self.progress.validation(step, scores)
        if self.tracker is not None:
            self.tracker.metrics(step, validation_metrics(scores))

    def sync(self) -> None:
        """Bring the logs to the disk: with a checkpoint, also a machine that fails keeps what led to it."""
        self._keys.sync()
        if self._log is not None:
            self._log.sync()

    def close(self) -> None:
        """Bring the logs to the disk; say how long the run's steps, earlier sessions' too, waited for data."""
        self._keys.close()
        if self._log is None:
            return
        self._log.close()
        steps = [row for row in read_lines(self._run / LOG) if "validation" not in row]
        if steps:
            self.progress.end(sum(row["wait_seconds"] for row in steps), sum(row["seconds"] for row in steps))


def history(run: Path) -> list[tuple[int, dict[str, float]]]:
    """(step, metrics) of every record in a run's log."""
    return [
        (row["step"], validation_metrics(row["validation"]) if "validation" in row else step_metrics(row))
        for row in read_lines(run / LOG)
    ]


def recent_losses(run: Path, count: int) -> list[float | None]:
    """Losses of the last steps in a run's log, oldest first; only the log's end is read."""
    path = run / LOG
    if not path.exists():
        return []
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _TAIL_BYTES))
        lines = file.read().split(b"\n")[size > _TAIL_BYTES : -1]
    rows = [row for row in map(json.loads, lines) if "validation" not in row]
    return [row["loss"] for row in rows[-count:]]


def validation_metrics(scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Scores of a validation under one flat name each."""
    return {f"validation/{name}/{key}": value for name, score in scores.items() for key, value in score.items()}


def step_metrics(record: Mapping[str, Any]) -> dict[str, float]:
    """What of a step's record is a number worth a curve."""
    metrics = {
        "loss": record["loss"],
        "gradient_norm": record["gradient_norm"],
        "learning_rate": record["learning_rate"],
        "tokens_per_second": record["tokens"] / record["seconds"],
        "wait_seconds": record["wait_seconds"],
        "wait_share": record["wait_seconds"] / record["seconds"],
        "passed_over": record["passed_over"],
        "passed_over_so_far": record.get("passed_over_so_far"),  # absent in logs of older runs
        "skipped": float(not record["applied"]),
    }
    metrics |= {f"loss/{name}": value for name, value in record["losses"].items()}
    metrics |= {f"step_seconds/{name}": value for name, value in record.get("step_seconds", {}).items()}
    return {name: float(value) for name, value in metrics.items() if value is not None}
