"""The faults of a drill: what is done to a run, what must happen then, and how the run goes on."""

from __future__ import annotations

import json
import shutil
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sci_gpt.config import PretrainConfig
from sci_gpt.config_file import parse_config
from sci_gpt.recipes.parts import model_shape
from sci_gpt.train.checkpoint import committed, read_weights, step_folder, step_of
from sci_gpt.train.run_folder import COMPLETE, LOG, REQUEUE, TRACKING, cut_back, read_lines
from sci_gpt.train.watchdog import FOLDER, PAGE
from sci_launch.drill_compare import Difference, compare, eaten, loss_difference, weight_difference
from sci_launch.drill_place import DrillError, Here, Place
from sci_launch.drill_run import Start, TrackingServer, completed

_GONE_SECONDS = 5.0  # that the tracking server is away


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What the faults of one drill share.

    Attributes:
        config: of the straight run, which is complete.
        patience_seconds: for every start.
        hang_seconds: the watchdog's limit in the run that is stopped.
        place: where runs are started.
    """

    config: PretrainConfig
    patience_seconds: float
    hang_seconds: float
    place: Place = field(default_factory=Here)

    @property
    def steps(self) -> int:
        """Of a run."""
        return self.config.schedule.steps

    @property
    def every(self) -> int:
        """Steps between checkpoints."""
        return self.config.checkpoint.every

    @property
    def moment(self) -> int:
        """The step that a fault waits for: past the second checkpoint, and not the next one."""
        return 2 * self.every + max(1, self.every // 3)

    def variant(self, name: str, changes: Mapping[str, Mapping[str, Any]] | None = None) -> PretrainConfig:
        """The straight run's configuration with an output of its own, and `changes` in its sections."""
        tree = self.config.model_dump(mode="json") | {"output": str(self.config.output.parent / name)}
        for section, values in (changes or {}).items():
            tree[section] = tree[section] | dict(values)
        return parse_config(tree, PretrainConfig, where=f"the drill's configuration {name!r}")

    def start(self, config: PretrainConfig, *, poisoned: int | None = None) -> Start:
        """Start a run, or go on with it: the same command; `poisoned`: the sample of infinities."""
        return Start.begin(config, place=self.place, patience_seconds=self.patience_seconds, poisoned=poisoned)


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came of a fault: steps done twice, seconds from the fault to the first step beyond it, differences, and
    what did not happen that must."""

    steps_lost: int
    recovery_seconds: float
    difference: Difference
    failures: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A fault, its limits, and what it does. Losses and weights: relative. At most the steps of `lost` checkpoints are
    done twice, of one more where the newest may be `unfinished`, as saves are asynchronous."""

    summary: str
    run: Callable[[Bench], Result]
    loss: float = 0.0
    weight: float = 0.0
    lost: int = 0
    unfinished: bool = False

    def failures(self, result: Result, *, every: int, asynchronous: bool) -> list[str]:
        """What is beyond its limits; empty where the fault passed."""
        limits = {
            "max_loss_difference": (result.difference.loss, self.loss),
            "max_weight_difference": (result.difference.weight, self.weight),
            "keys_differ": (result.difference.keys, 0),
            "steps_lost": (result.steps_lost, every * (self.lost + (self.unfinished and asynchronous))),
        }
        beyond = [f"{name} {found:g} > {limit:g}" for name, (found, limit) in limits.items() if not found <= limit]
        return [*result.failures, *beyond, *(result.difference.why if beyond else ())]


def go_on(
    bench: Bench,
    config: PretrainConfig,
    *,
    at: float,
    done: int,
    failures: tuple[str, ...] = (),
    intact: bool = True,
) -> Result:
    """The same command again, to the end, and the comparison with the straight run.

    Args:
        bench: what the faults share.
        config: of the run that suffered.
        at: when it did (monotonic seconds).
        done: steps that were completed then.
        failures: what went wrong before.
        intact: the newest checkpoint can be read, and must be the one from which the run goes on.

    Raises:
        DrillError: the run did not go on from a checkpoint, or not to the end.
    """
    if done >= bench.steps:
        raise DrillError(f"all {done} steps were done before the fault came: give more --steps")
    newest = max((step_of(path) or 0 for path in committed(config.output)), default=0)
    start = bench.start(config)
    began = start.wait_for_new_step(done)
    start.wait(code=0)
    origin = start.resumed_from
    if origin is None:
        raise DrillError(f"it began anew instead of going on from a checkpoint; see {start.output}")
    return Result(
        steps_lost=done - origin,
        recovery_seconds=began - at,
        difference=compare(bench.config.output, config.output),
        failures=(*failures, *passed_over(newest, origin=origin, intact=intact)),
    )


def passed_over(newest: int, *, origin: int, intact: bool = True) -> tuple[str, ...]:
    """What is wrong where a run went on from another checkpoint than the newest that is there and intact."""
    if origin == newest or not intact:
        return ()
    return (f"it went on from step {origin}, and passed over the checkpoint of step {newest}",)


def sigterm(bench: Bench) -> Result:
    """SIGTERM to the launcher, as a scheduler sends it: the step ends, all is saved, a marker is left."""
    config = bench.variant("sigterm")
    start = bench.start(config)
    start.wait_for_step(bench.moment)
    at = time.monotonic()
    start.terminate()
    start.wait(code=0)
    failures = () if (config.output / REQUEUE).exists() else (f"no {REQUEUE!r} marker was left",)
    return go_on(bench, config, at=at, done=completed(config.output), failures=failures)


def kill_rank(bench: Bench) -> Result:
    """SIGKILL of one worker: the launcher ends the others and says which it was."""
    config = bench.variant("kill-rank")
    start = bench.start(config)
    start.wait_for_step(bench.moment)
    victim, at = start.workers()[-1], time.monotonic()
    victim.kill()
    start.wait_for_failure()
    size = bench.config.parallel.processes
    said = bench.place.told_of_kill(start.text, rank=size - 1, size=size)
    failures = () if said else (f"the launcher does not say which rank was killed: {start.last_lines()}",)
    return go_on(bench, config, at=at, done=completed(config.output), failures=failures)


def kill_all(bench: Bench) -> Result:
    """SIGKILL of the launcher and of every worker, as a node that goes down."""
    config = bench.variant("kill-all")
    start = bench.start(config)
    start.wait_for_step(bench.moment)
    at = time.monotonic()
    start.kill()
    return go_on(bench, config, at=at, done=completed(config.output))


def other_layout(config: PretrainConfig) -> dict[str, Any]:
    """Another ZeRO stage, more micro-batches, and a tensor axis in place of a sequence axis or of half the data groups,
    where the model can have one; else half the data groups without axes."""
    parallel, shape = config.parallel, model_shape(config)
    axes = parallel.tensor_parallel * parallel.sequence_parallel
    tensor = parallel.sequence_parallel if axes > 1 else 2
    fits = parallel.tensor_parallel == 1 and shape.heads % tensor == shape.hidden % tensor == 0
    fits = fits and parallel.processes % tensor == 0
    return {
        "processes": parallel.processes if fits else max(1, parallel.processes // (2 * axes)),
        "tensor_parallel": tensor if fits else 1,
        "sequence_parallel": 1,
        "accumulation": 2 * parallel.accumulation + 1,
        "zero_stage": {0: 1, 1: 2, 2: 3, 3: 1}[parallel.zero_stage],
    }


def layout(bench: Bench) -> Result:
    """A checkpoint of the straight run goes on over other axes, ZeRO stage and accumulation."""
    config = bench.variant("layout", {"parallel": other_layout(bench.config)})
    cut_copy(bench.config.output, config.output, step=2 * bench.every)
    return go_on(bench, config, at=time.monotonic(), done=2 * bench.every)


def corrupt(bench: Bench) -> Result:
    """One bit of the newest checkpoint is flipped: the one before it is taken, and it is said."""
    config, newest = bench.variant("corrupt"), 3 * bench.every
    cut_copy(bench.config.output, config.output, step=newest)
    flip_a_bit(step_folder(config.output, newest) / "rank-00000.safetensors")
    result = go_on(bench, config, at=time.monotonic(), done=newest, intact=False)
    origin = newest - result.steps_lost
    failures = [] if origin == 2 * bench.every else [f"it went on from step {origin}, not from {2 * bench.every}"]
    starts = sorted(config.output.parent.glob("corrupt-start-*.txt"))
    if step_folder(config.output, newest).name not in starts[-1].read_text(encoding="utf-8"):
        failures.append("it does not name the checkpoint that it passed over")
    return replace(result, failures=tuple(failures))


def hang(bench: Bench) -> Result:
    """SIGSTOP of one worker: the others say so, name it, and end; nobody presses a key."""
    config = bench.variant("hang", {"watch": {"hang_seconds": bench.hang_seconds}})
    start = bench.start(config)
    start.wait_for_step(bench.moment)
    workers = start.workers()
    at = time.monotonic()
    workers[-1].suspend()
    start.wait_for_failure()
    failures = [] if not any(worker.is_running() for worker in workers) else ["a worker is still there"]
    page = config.output / FOLDER / PAGE
    text = page.read_text(encoding="utf-8") if page.exists() else "no page"
    if not text.startswith(f"behind: rank {len(workers) - 1}:"):
        failures.append(f"{page} does not name rank {len(workers) - 1}: {text.splitlines()[0]}")
    files = {path.name for path in (config.output / FOLDER).glob("rank-*.txt")}
    # A scheduler that ends the job lets the stopped rank go on for that, and then it may write as well.
    if not files >= {f"rank-{rank}.txt" for rank in range(len(workers) - 1)}:
        failures.append(f"files of the other ranks: {sorted(files)}")
    return go_on(bench, config, at=at, done=completed(config.output), failures=tuple(failures))


def non_finite(bench: Bench) -> Result:
    """A sample of infinities in the step before the last: the step is skipped on all ranks and its rows are named.

    The straight run here is one with the same sample in it; it must equal the common straight run up to that step, and
    its weights must be the same before and after it. The run that goes on does so from the checkpoint before the step.
    """
    step = bench.steps - 1
    changes = {"checkpoint": {"every": 1, "keep": 3}}
    config, again = bench.variant("non-finite", changes), bench.variant("non-finite-again", changes)
    number = min(eaten(bench.config.output)[step])[0]
    first = bench.start(config, poisoned=number)
    first.wait(code=0)
    cut_copy(config.output, again.output, step=step - 1)
    at = time.monotonic()
    second = bench.start(again, poisoned=number)
    began = second.wait_for_new_step(step)
    second.wait(code=0)
    if second.resumed_from != step - 1:
        raise DrillError(f"it went on from {second.resumed_from}, not from step {step - 1}; see {second.output}")
    difference = compare(config.output, again.output)
    against, why = compare(bench.config.output, config.output), list[str]()
    logs = [
        [row for row in read_lines(run / LOG) if row["step"] < step] for run in (bench.config.output, config.output)
    ]
    before = loss_difference(logs[0], logs[1], why=why)
    weights = [read_weights(step_folder(config.output, at_step)) for at_step in (step - 1, step)]
    moved = weight_difference(weights[0], weights[1])
    (record,) = [row for row in read_lines(config.output / LOG) if row["step"] == step and "loss" in row]
    named = any(f"sample {number} " in name for name in record.get("broken_rows", []))
    checks = {
        "the step of the infinities was not skipped": not record["applied"] and record["loss"] is None,
        f"its rows are not named: sample {number} is missing": named,
        f"nothing on stderr says that step {step} is skipped": f"step {step} is skipped on all ranks" in first.text,
        f"the weights moved by {moved:g} in the skipped step": moved == 0.0,
        f"losses before it differ from the straight run's by {before:g}": before == 0.0,
        "the step after it was not taken": completed(config.output) == bench.steps and _applied(config.output),
    }
    failures = tuple(text for text, kept in checks.items() if not kept)
    return Result(
        steps_lost=0,
        recovery_seconds=began - at,
        difference=replace(difference, keys=difference.keys + against.keys),
        failures=failures,
    )


def tracking(bench: Bench) -> Result:
    """The MLflow server is killed as soon as the run is open in it, and is away for some seconds; the run goes on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = TrackingServer(bench.config.output.parent / "tracking-server", port)
    config = bench.variant("tracking", {"tracking": {"uri": server.uri}})
    server.start()
    try:
        start = bench.start(config)
        start.wait_for_file(config.output / TRACKING)
        server.kill()
        at, done = time.monotonic(), completed(config.output)
        if done < bench.steps:
            began = start.wait_for_step(done + 1)
        else:
            began = at  # all steps were completed when the tracker had only opened the run
        time.sleep(_GONE_SECONDS)
        server.start()
        start.wait(code=0)
        missing = lacking(server.uri, config.output)
    finally:
        server.kill()
    failures = [f"metrics that did not arrive: {missing}"] if missing else []
    return Result(
        steps_lost=0,
        recovery_seconds=began - at,
        difference=compare(bench.config.output, config.output),
        failures=tuple(failures),
    )


def lacking(uri: str, run: Path) -> str:
    """Steps whose loss a server does not hold, or holds otherwise than the log; "" where it is all there."""
    from mlflow.tracking import MlflowClient  # takes seconds, and only this fault needs it

    client = MlflowClient(uri)
    run_id = json.loads((run / TRACKING).read_text(encoding="utf-8"))["run_id"]
    there = {metric.step: metric.value for metric in client.get_metric_history(run_id, "loss")}
    here = {row["step"]: row["loss"] for row in read_lines(run / LOG) if row.get("loss") is not None}
    wrong = [step for step, loss in here.items() if step not in there or abs(there[step] - loss) > 1e-6 * abs(loss)]
    status = client.get_run(run_id).info.status
    words = [f"losses of {len(wrong)} steps, the first {min(wrong)}"] if wrong else []
    words += [f"the end of the run: its status is {status}"] if status != "FINISHED" else []
    return "; ".join(words)


def cut_copy(run: Path, copy: Path, *, step: int) -> None:
    """Copy a run's folder as it stood after the checkpoint of `step`: nothing of what came later is in it."""
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns(TRACKING, COMPLETE, "lock"))
    for checkpoint in committed(copy):
        if (step_of(checkpoint) or 0) > step:
            shutil.rmtree(checkpoint)
    cut_back(copy, step)
    if not (step_folder(copy, step) / "manifest.json").exists():
        raise DrillError(f"{run} has no checkpoint of step {step}; raise checkpoint.keep")


def flip_a_bit(path: Path) -> None:
    """Change one bit in the middle of a file."""
    with path.open("r+b") as file:
        middle = path.stat().st_size // 2
        file.seek(middle)
        byte = file.read(1)[0]
        file.seek(middle)
        file.write(bytes([byte ^ 1]))


def _applied(run: Path) -> bool:
    rows = [row for row in read_lines(run / LOG) if "applied" in row]
    return bool(rows) and bool(rows[-1]["applied"])


FAULTS: dict[str, Fault] = {
    "sigterm": Fault(summary="SIGTERM to the launcher", run=sigterm),
    "kill-rank": Fault(summary="SIGKILL of one rank", run=kill_rank, lost=1, unfinished=True),
    "kill-all": Fault(summary="SIGKILL of the launcher and all ranks", run=kill_all, lost=1, unfinished=True),
    "layout": Fault(
        summary="resume with other processes, ZeRO stage and accumulation", run=layout, loss=1e-5, weight=1e-4
    ),
    "corrupt": Fault(summary="one bit of the newest checkpoint is flipped", run=corrupt, lost=1),
    "hang": Fault(summary="SIGSTOP of one rank", run=hang, lost=1, unfinished=True),
    "non-finite": Fault(summary="a sample of infinities", run=non_finite),
    "tracking": Fault(summary="the tracking server is gone and comes back", run=tracking),
}
