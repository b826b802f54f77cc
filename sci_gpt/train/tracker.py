"""Tracker: the run in MLflow, written by a background thread; what a lost server missed is sent when it is back."""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from sci_gpt.train.run_folder import TRACKING, write_marker

# No usage reports from a training run to anybody.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")
# A server that is gone is given up after half a minute, not after MLflow's ten: the metrics are in the run's own log.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")

_FLUSH_SECONDS = 3.0
_BATCH = 900  # MLflow takes at most 1000 metrics in one call
_CLOSE_SECONDS = 60.0
_LAST_TRIES = 4  # at the end of a run whose server is gone, a few seconds apart
_MOST_UNSENT = 20_000  # records kept for a server that is gone; the run's own log has all of them
_LONGEST_VALUE = 500


@dataclass(frozen=True, kw_only=True)
class TrackingTarget:
    """Where and as what a run is tracked: MLflow's uri, the folder of artifacts, experiment and run name."""

    uri: str
    artifacts: str
    experiment: str
    run_name: str


@dataclass(frozen=True, kw_only=True)
class _Metrics:
    step: int
    time: int
    values: dict[str, float]


class Tracker:
    """A run in MLflow (rank 0 only). Opening, logging and closing happen in a thread.

    Args:
        target: where to.
        run: the run folder; the MLflow run's id is kept there, so that a resumed run goes on in the same MLflow run.
        parameters: the configuration as a tree; logged flattened (`optimizer.learning_rate`).
        tags: fingerprint, code version.
        artifacts: files to keep with the run (the resolved configuration).
        history: (step, metrics) of before this start, from the run's own log: what of them MLflow lacks (a kill or a
            lost server cost it) is written again.
    """

    def __init__(
        self,
        target: TrackingTarget,
        run: Path,
        *,
        parameters: Mapping[str, Any],
        tags: Mapping[str, str],
        artifacts: tuple[Path, ...] = (),
        history: Sequence[tuple[int, dict[str, float]]] = (),
    ) -> None:
        self.target, self.run = target, run
        self.parameters, self.tags, self.artifacts = flatten(parameters), dict(tags), artifacts
        self._history = tuple(history)
        self.failures = 0
        self._queue: queue.Queue[_Metrics | str] = queue.Queue()
        self._client: Any = None
        self._run_id: str | None = None
        self._parameters_due = False
        self._unsent: list[_Metrics] = []
        self._lost = False
        self._process = psutil.Process()
        self._thread = threading.Thread(target=self._work, name="tracker", daemon=True)
        self._thread.start()

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None while the thread has not opened it, or could not."""
        return self._run_id

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Queue metrics of a step; returns at once."""
        self._queue.put(_Metrics(step=step, time=int(time.time() * 1000), values=dict(values)))

    def close(self, status: str = "FINISHED") -> None:
        """Write what is queued and set the run's status (MLflow's words), within a bounded time."""
        self._queue.put(status)
        self._thread.join(_CLOSE_SECONDS)
        if self._thread.is_alive():
            self._failed(TimeoutError(f"MLflow did not answer within {_CLOSE_SECONDS:g} s"))

    def _work(self) -> None:
        with self._guarded():
            self._open()
        status = None
        while status is None:
            waiting, status = self._collect()
            self._unsent = (self._unsent + waiting)[-_MOST_UNSENT:]
            self._send()
        for _ in range(_LAST_TRIES):
            if self._send(status):
                break
            time.sleep(_FLUSH_SECONDS)

    def _send(self, status: str | None = None) -> bool:
        """Open the run where it is not yet open, log what is unsent, end the run with `status`; whether all that went
        through."""
        done = False
        with self._guarded():
            if self._run_id is None:
                self._open()
            count = self._log()
            if status is not None:
                self._client.set_terminated(self._run_id, status)
            if self._lost:
                self._lost = False
                print(
                    f"tracking at {self.target.uri} is back; {count} records of the time without it are written",
                    flush=True,
                )
            done = True
        return done

    def _collect(self) -> tuple[list[_Metrics], str | None]:
        """What comes within a few seconds, and the status where the run has ended."""
        waiting: list[_Metrics] = []
        deadline = time.monotonic() + _FLUSH_SECONDS
        while (left := deadline - time.monotonic()) > 0:
            try:
                item = self._queue.get(timeout=left)
            except queue.Empty:
                break
            if isinstance(item, str):
                return waiting, item
            waiting.append(item)
        return waiting, None

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001  servers fail in many ways, and none of them may end a training
            self._failed(error)

    def _open(self) -> None:
        # Imported here: MLflow takes 2 s to import, which the first steps need not wait for.
        from mlflow.entities import Param, RunTag
        from mlflow.tracking import MlflowClient

        if self.target.uri.startswith("sqlite:///"):
            Path(self.target.uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        client = MlflowClient(tracking_uri=self.target.uri)
        experiment = client.get_experiment_by_name(self.target.experiment)
        artifacts = Path(self.target.artifacts).absolute().as_uri()
        identifier = (
            experiment.experiment_id
            if experiment is not None
            else client.create_experiment(self.target.experiment, artifact_location=artifacts)
        )
        run_id = self._earlier_run(client)
        if run_id is None:
            run_id = client.create_run(identifier, run_name=self.target.run_name).info.run_id
            # At once: where the server is lost now, the next try must not make another run of it.
            content = {"run_id": run_id, "experiment_id": identifier, "uri": self.target.uri}
            write_marker(self.run, TRACKING, content=content)
            self._parameters_due = True
        else:
            client.update_run(run_id, status="RUNNING")
        if self._parameters_due:
            parameters = [Param(key, value[:_LONGEST_VALUE]) for key, value in self.parameters.items()]
            for start in range(0, len(parameters), 100):  # MLflow takes at most 100 parameters in one call
                client.log_batch(run_id, params=parameters[start : start + 100])
            self._parameters_due = False
        client.log_batch(run_id, tags=[RunTag(key, value) for key, value in self.tags.items()])
        for path in self.artifacts:
            client.log_artifact(run_id, str(path))
        missing = self._missing(client, run_id)
        self._client, self._run_id = client, run_id
        self._unsent[:0] = missing

    def _missing(self, client: Any, run_id: str) -> list[_Metrics]:
        """What of the history MLflow does not hold."""
        names = {name for _, values in self._history for name in values}
        known = {name: {metric.step for metric in client.get_metric_history(run_id, name)} for name in names}
        now = int(time.time() * 1000)
        lacking = [(step, {n: v for n, v in values.items() if step not in known[n]}) for step, values in self._history]
        return [_Metrics(step=step, time=now, values=values) for step, values in lacking if values]

    def _earlier_run(self, client: Any) -> str | None:
        """The MLflow run that this run folder was tracked as before, None where there is none on this server."""
        path = self.run / TRACKING
        if not path.exists():
            return None
        known = json.loads(path.read_text(encoding="utf-8"))
        if known["uri"] != self.target.uri:
            return None
        run_id: str = client.get_run(known["run_id"]).info.run_id
        return run_id

    def _log(self) -> int:
        """Send what is unsent, and how this process is doing; how many records went."""
        # Imported here, as in _open.
        from mlflow.entities import Metric

        count = 0
        while self._unsent:
            part, size = list[_Metrics](), 0
            for one in self._unsent:
                size += len(one.values)
                if part and size > _BATCH:
                    break
                part.append(one)
            metrics = [Metric(name, value, one.time, one.step) for one in part for name, value in one.values.items()]
            now = int(time.time() * 1000)
            if len(part) == len(self._unsent):
                metrics += [Metric(name, value, now, part[-1].step) for name, value in self._system().items()]
            self._client.log_batch(self._run_id, metrics=metrics)
            del self._unsent[: len(part)]  # only what went through: nothing is lost, nothing sent twice
            count += len(part)
        return count

    def _system(self) -> dict[str, float]:
        """This process and the machine: resident megabytes, CPU percent, free memory."""
        return {
            "system/rank0_resident_megabytes": self._process.memory_info().rss / 1e6,
            "system/rank0_cpu_percent": self._process.cpu_percent(),
            "system/machine_cpu_percent": psutil.cpu_percent(),
            "system/machine_available_megabytes": psutil.virtual_memory().available / 1e6,
        }

    def _failed(self, error: Exception) -> None:
        self.failures += 1
        if not self._lost:
            self._lost = True
            rest = f"training goes on, all metrics are in {self.run / 'log.jsonl'}, and are sent where it comes back"
            warn_untracked(self.target.uri, error, rest=rest)


def warn_untracked(uri: str, error: Exception, *, rest: str) -> None:
    """Say on standard error that MLflow at `uri` failed, why, and what becomes of the work."""
    cause = " ".join(str(error).split())[:300]
    print(f"warning: tracking at {uri} failed ({type(error).__name__}: {cause}); {rest}", file=sys.stderr, flush=True)


def flatten(tree: Any, prefix: str = "") -> dict[str, str]:
    """A tree of mappings and lists as dotted names and texts: {"seed": "0", "phases.0.rows_per_step": "4"}."""
    if isinstance(tree, Mapping):
        items = list(tree.items())
    elif isinstance(tree, (list, tuple)) and any(isinstance(item, (Mapping, list, tuple)) for item in tree):
        items = list(enumerate(tree))
    else:
        return {prefix: str(tree)}
    flat: dict[str, str] = {}
    for key, value in items:
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat
