"""`sci-gpt drill`: a straight run, then one for each fault; whether all end with the same losses, weights, samples."""

from __future__ import annotations

import shutil
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sci_gpt.config import PretrainConfig
from sci_gpt.config_file import parse_config, show_config
from sci_gpt.errors import ConfigError, SciGptError
from sci_gpt.train.run_folder import CONFIG, LOG, read_complete, read_lines, write_whole
from sci_launch.drill_faults import FAULTS, Bench
from sci_launch.drill_place import DrillError, find_place
from sci_launch.drill_run import Start

MARK = "drill.txt"  # in an output folder that is a drill's own, which the next drill may empty
_FEWEST_STEPS, _KEPT = 8, 4
_COLUMNS = ("steps_lost", "recovery_seconds", "max_loss_difference", "max_weight_difference", "keys_differ")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What was asked for.

    Attributes:
        output: folder of the drill; None: runs/NAME-drill.
        steps: of every run.
        processes: None: the configuration's.
        faults: names, in the order of FAULTS.
        keep_straight: take the straight run that an earlier drill left in `output`.
        patience_seconds: for every start of a run.
        hang_seconds: the watchdog's limit for the rank that is stopped.
    """

    output: Path | None = None
    steps: int = 24
    processes: int | None = None
    faults: tuple[str, ...] = tuple(FAULTS)
    keep_straight: bool = False
    patience_seconds: float = 900.0
    hang_seconds: float = 20.0


def short(config: PretrainConfig, options: Options) -> PretrainConfig:
    """The straight run: the configuration with few steps, a checkpoint every quarter, tracked in a file of its own.

    Raises:
        ConfigError: too few steps or processes, or a fault that does not exist.
    """
    if unknown := [name for name in options.faults if name not in FAULTS]:
        raise ConfigError(f"--faults: there is no {unknown[0]!r}; there are {', '.join(FAULTS)}")
    processes = options.processes or config.parallel.processes
    if processes < 2:
        raise ConfigError("a drill kills one of several processes: give --processes 2 or more")
    if options.steps < max(_FEWEST_STEPS, len(config.phases)) or options.steps % 4:
        raise ConfigError(
            f"--steps is a multiple of 4, at least {max(_FEWEST_STEPS, len(config.phases))}: checkpoints every quarter "
            f"of them, and a step for every phase; got {options.steps}"
        )
    output = options.output or config.output.parent / f"{config.output.name}-drill"
    steps, whole = options.steps, config.schedule.steps
    tree = config.model_dump(mode="json")
    ends = [max(1, round(phase.until_step * steps / whole)) for phase in config.phases]
    for number in range(len(ends)):
        first, last = (ends[number - 1] + 1 if number else 1), steps - (len(ends) - 1 - number)
        ends[number] = min(max(ends[number], first), last)
    tree["phases"] = [phase | {"until_step": end} for phase, end in zip(tree["phases"], ends, strict=True)]
    tree |= {
        "output": str(output / "straight"),
        "schedule": {
            "steps": steps,
            "warmup_steps": min(config.schedule.warmup_steps, steps // 6),
            "cooldown_steps": min(config.schedule.cooldown_steps, steps // 4),
        },
        "checkpoint": tree["checkpoint"] | {"every": steps // 4, "keep": _KEPT, "keep_every": None, "keep_best": 0},
        "validation": {"every": steps, "windows": 1},
        "parallel": tree["parallel"] | {"processes": processes},
        "tracking": {
            "uri": f"sqlite:///{output.absolute()}/mlflow/mlflow.db",
            "artifacts": str(output.absolute() / "mlflow" / "artifacts"),
            "experiment": "drill",
            "registered_model": None,
        },
    }
    return parse_config(tree, PretrainConfig, where="the drill's configuration")


def drill(config: PretrainConfig, options: Options) -> dict[str, Any]:
    """Run the straight run and the faults; prints a line for each and a table.

    Returns:
        {"faults": [{"fault", "passed", "steps_lost", "recovery_seconds", "max_loss_difference",
        "max_weight_difference", "keys_differ", "why"}]}; None where a number could not be had.

    Raises:
        ConfigError: see `short` and `find_place`, or a folder that is not a drill's.
        DrillError: the straight run failed.
    """
    began = time.monotonic()
    straight, place = short(config, options), find_place()
    _prepare(straight, keep=options.keep_straight)
    print(
        f"drill of {config.name}: {straight.parallel.processes} processes, {straight.schedule.steps} steps a run, "
        f"a checkpoint every {straight.checkpoint.every}; all of it in {straight.output.parent}",
        flush=True,
    )
    if not options.keep_straight:
        start = Start.begin(straight, place=place, patience_seconds=options.patience_seconds)
        code = start.wait()
        if code == 2:
            raise ConfigError(f"the straight run was refused: {start.refusal()}")
        if code != 0:
            raise DrillError(f"the straight run ended with exit code {code}: {start.last_lines()}")
        print(f"straight run: {time.monotonic() - began:.0f} s", flush=True)
    slowest = max(row["seconds"] for row in read_lines(straight.output / LOG) if "seconds" in row)
    limit = max(options.hang_seconds, 10 * slowest)
    bench = Bench(config=straight, patience_seconds=options.patience_seconds, hang_seconds=limit, place=place)
    rows = [_row(name, bench) for name in FAULTS if name in options.faults]
    print(f"{table(rows)}\n{time.monotonic() - began:.0f} s in all", flush=True)
    return {"faults": rows}


def failed(result: Mapping[str, Any]) -> list[str]:
    """A line for each fault of a result that did not pass, with its name and why."""
    return [f"drill: {row['fault']} failed: {row['why']}" for row in result["faults"] if not row["passed"]]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The result for a person."""
    lines = [f"{'fault':<12}{'passed':<8}" + "".join(f"{name.replace('max_', ''):>20}" for name in _COLUMNS)]
    for row in rows:
        values = ["-" if row[name] is None else f"{row[name]:.3g}" for name in _COLUMNS]
        why = "" if row["passed"] else f"  {row['why']}"
        lines.append(
            f"{row['fault']:<12}{'yes' if row['passed'] else 'NO':<8}" + "".join(f"{v:>20}" for v in values) + why
        )
    return "\n".join(lines)


def _row(name: str, bench: Bench) -> dict[str, Any]:
    """One fault: run, judged, and said in a line."""
    began, fault = time.monotonic(), FAULTS[name]
    print(f"{name}: {fault.summary} ..", flush=True)
    row: dict[str, Any] = {"fault": name, "passed": False, **dict.fromkeys(_COLUMNS)}
    try:
        result = fault.run(bench)
    except (DrillError, SciGptError) as error:
        row["why"] = "; ".join([str(error), *Start.end_all()])
    else:
        failures = fault.failures(result, every=bench.every, asynchronous=bench.config.checkpoint.asynchronous)
        difference = result.difference
        numbers = (result.steps_lost, round(result.recovery_seconds, 2), difference.loss, difference.weight)
        row |= dict(zip(_COLUMNS, (*numbers, difference.keys), strict=True))
        row |= {"passed": not failures, "why": "; ".join(failures)}
    verdict = "passed" if row["passed"] else f"FAILED: {row['why']}"
    print(f"{name}: {verdict} ({time.monotonic() - began:.0f} s)", flush=True)
    return row


def _prepare(straight: PretrainConfig, *, keep: bool) -> None:
    """Empty the drill's folder, or all of it but the straight run where that is of this configuration."""
    folder = straight.output.parent
    if folder.exists() and any(folder.iterdir()) and not (folder / MARK).exists():
        raise ConfigError(f"{folder} is not a drill's folder, and a drill empties its own: give another --output")
    if keep:
        path = straight.output / CONFIG
        if read_complete(straight.output) is None or path.read_text(encoding="utf-8") != show_config(straight):
            raise ConfigError(
                f"--keep-straight: {straight.output} holds no complete run of this very configuration; leave it out"
            )
    for path in folder.iterdir() if folder.exists() else ():
        if keep and path.name in (straight.output.name, "mlflow"):
            continue
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / MARK, "Made by `sci-gpt drill`, which empties this folder when it is called again.\n")


def run(config: PretrainConfig, options: Options) -> tuple[dict[str, Any], int]:
    """The result, and the exit code: 0 where every fault passed, else 1 and a line on stderr for each other."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the runs are ended, too
    try:
        result = drill(config, options)
    except DrillError as error:
        print(f"sci-gpt: drill: {' '.join(str(error).split())}", file=sys.stderr)
        return {"faults": []}, 1
    finally:
        for line in Start.end_all():
            print(f"sci-gpt: drill: {line}", file=sys.stderr, flush=True)
        signal.signal(signal.SIGTERM, before)
    lines = failed(result)
    for line in lines:
        print(f"sci-gpt: {line}", file=sys.stderr, flush=True)
    return result, 1 if lines or not result["faults"] else 0
