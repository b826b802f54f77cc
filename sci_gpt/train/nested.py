"""Nested MLflow runs of a study: one parent, a child per training; a failure of tracking never ends the study."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sci_gpt.train.run_folder import TRACKING, write_marker
from sci_gpt.train.tracker import TrackingTarget, flatten, warn_untracked

_LONGEST_VALUE = 500
PARENT_TAG = "mlflow.parentRunId"


class Study:
    """The parent run of a study. Its id is kept in the study's folder: called again, the study goes on in it.

    Args:
        target: where and as what the study is tracked.
        folder: of the study; is made.
        parameters: the configuration as a tree.
    """

    def __init__(self, target: TrackingTarget, folder: Path, *, parameters: Mapping[str, Any]) -> None:
        self.target, self.folder = target, folder
        self.run_id: str | None = None
        self.failures = 0
        self._client: Any = None
        self._experiment: str | None = None
        folder.mkdir(parents=True, exist_ok=True)
        with self._guarded():
            self._open(parameters)

    def child(self, name: str, *, parameters: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """A finished child run with what it was and what came of it."""
        if self.run_id is None:
            return
        with self._guarded():
            run_id = self._create(name, tags={PARENT_TAG: self.run_id}, parameters=parameters)
            for key, value in metrics.items():
                self._client.log_metric(run_id, key, value)
            self._client.set_terminated(run_id, "FINISHED")

    def close(self, *, metrics: Mapping[str, float], artifacts: Sequence[Path]) -> None:
        """The study's results, and its end."""
        if self.run_id is None:
            return
        with self._guarded():
            for key, value in metrics.items():
                self._client.log_metric(self.run_id, key, value)
            for path in artifacts:
                self._client.log_artifact(self.run_id, str(path))
            self._client.set_terminated(self.run_id, "FINISHED")

    def _open(self, parameters: Mapping[str, Any]) -> None:
        # Imported here: MLflow takes 2 s to import.
        from mlflow.tracking import MlflowClient

        if self.target.uri.startswith("sqlite:///"):
            Path(self.target.uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        self._client = MlflowClient(tracking_uri=self.target.uri)
        found = self._client.get_experiment_by_name(self.target.experiment)
        place = Path(self.target.artifacts).absolute().as_uri()
        self._experiment = (
            found.experiment_id
            if found is not None
            else self._client.create_experiment(self.target.experiment, artifact_location=place)
        )
        marker = self.folder / TRACKING
        known = json.loads(marker.read_text(encoding="utf-8")) if marker.exists() else {}
        if known.get("uri") == self.target.uri:
            self.run_id = str(self._client.get_run(known["run_id"]).info.run_id)
            self._client.update_run(self.run_id, status="RUNNING")
            return
        self.run_id = self._create(self.target.run_name, tags={}, parameters=parameters)
        write_marker(self.folder, TRACKING, content={"run_id": self.run_id, "uri": self.target.uri})

    def _create(self, name: str, *, tags: Mapping[str, str], parameters: Mapping[str, Any]) -> str:
        run_id: str = self._client.create_run(self._experiment, run_name=name, tags=dict(tags)).info.run_id
        for key, value in flatten(parameters).items():
            self._client.log_param(run_id, key, value[:_LONGEST_VALUE])
        return run_id

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001  servers fail in many ways, and none of them may end a study
            self.failures += 1
            if self.failures == 1:
                warn_untracked(self.target.uri, error, rest=f"the study goes on, its results are in {self.folder}")
