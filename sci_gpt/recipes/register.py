"""Register a run's newest checkpoint with MLflow, from code: safetensors and JSON among the artifacts, no pickle."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

from sci_gpt.config import PretrainConfig, TrackingConfig
from sci_gpt.data.store import Store
from sci_gpt.errors import CheckpointError, ConfigError
from sci_gpt.recipes import served
from sci_gpt.recipes.export import CARD, export_model
from sci_gpt.recipes.load import MODEL_JSON, tracking_address
from sci_gpt.train.checkpoint import latest, read_state
from sci_gpt.train.run_folder import TRACKING
from sci_tokenizers import sample

ALIAS = "candidate"
REGISTERED = "registered.json"
# What loading the model in another environment needs, at the versions that it was registered with.
_REQUIREMENTS = (
    "cftime",
    "mlflow",
    "netCDF4",
    "numpy",
    "obspy",
    "pandas",
    "pydantic",
    "PyYAML",
    "safetensors",
    "scipy",
    "torch",
    "xarray",
)


def register_model(config: PretrainConfig, run_folder: Path) -> str:
    """Export the newest checkpoint, log it into the training run and register it with the alias `candidate`.

    A checkpoint is registered once: `registered.json` in the run folder remembers it.

    Returns:
        The version of `tracking.registered_model`.

    Raises:
        ConfigError: the run has no `tracking.registered_model`.
        CheckpointError: no finished checkpoint, a data store that is another one by now, or a registry that refuses.
    """
    name = config.tracking.registered_model
    if name is None:
        raise ConfigError(f"run {config.name!r} has tracking.registered_model null; name a model to register it")
    checkpoint = latest(run_folder)
    if checkpoint is None:
        raise CheckpointError(
            f"run folder {str(run_folder)!r} holds no finished checkpoint; let `sci-gpt pretrain` run on"
        )
    before = _registered(run_folder, name, checkpoint=checkpoint)
    if before is not None:
        return before
    state, store = read_state(checkpoint), Store.open(config.data)
    if store.fingerprint != state["fingerprint"]:
        raise CheckpointError(
            f"{checkpoint} was trained on data {state['fingerprint']!r}, and {str(config.data)!r} is "
            f"{store.fingerprint!r} by now; build the old store again, or train again"
        )
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "model"
        description = export_model(checkpoint, folder, manifest=store.manifest)
        try:
            version = _log(config.tracking, folder, description=description, run_id=_training_run(run_folder))
        except MlflowException as error:
            raise CheckpointError(
                f"registry {config.tracking.uri!r} refused {name!r}: {error.message}; the run is saved; mend the "
                "registry and call pretrain again to register it"
            ) from error
    marker = {"model": name, "version": version, "alias": ALIAS, "checkpoint": checkpoint.name}
    (run_folder / REGISTERED).write_text(json.dumps(marker, indent=1) + "\n", encoding="utf-8")
    return version


def _registered(run_folder: Path, name: str, *, checkpoint: Path) -> str | None:
    """The version that this checkpoint has under this name already."""
    path = run_folder / REGISTERED
    marker = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return (
        str(marker["version"]) if (marker.get("model"), marker.get("checkpoint")) == (name, checkpoint.name) else None
    )


def _training_run(run_folder: Path) -> str | None:
    """Id of the tracked run that trained this; None (a run of its own is made) where tracking had failed."""
    path = run_folder / TRACKING
    return str(json.loads(path.read_text(encoding="utf-8"))["run_id"]) if path.exists() else None


def _experiment(client: mlflow.MlflowClient, tracking: TrackingConfig) -> str:
    """Id of the run's experiment, whose artifacts lie where the configuration says."""
    if tracking.uri.startswith("sqlite:///"):
        Path(tracking.uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    found = client.get_experiment_by_name(tracking.experiment)
    if found is not None:
        return str(found.experiment_id)
    return str(client.create_experiment(tracking.experiment, Path(tracking.artifacts).absolute().as_uri()))


def track_finetuning(
    folder: Path, *, params: Mapping[str, Any], metrics: Mapping[str, float], register: str | None
) -> str | None:
    """Log a finetuning as a run of the experiment "finetune"; with `register` its model, under that name.

    Args:
        folder: holds model.json and what else belongs to the run; its files become artifacts.
        params, metrics: of the run.
        register: name of the registered model; None: the run alone.

    Returns:
        The version of the registered model, where there is one.

    Raises:
        CheckpointError: a tracking server that refuses; the folder is saved all the same.
    """
    address = tracking_address(None)
    tracking = TrackingConfig(uri=address, experiment="finetune", registered_model=register)
    description = json.loads((folder / MODEL_JSON).read_text(encoding="utf-8"))
    try:
        for noisy in ("mlflow", "alembic"):
            logging.getLogger(noisy).setLevel(logging.ERROR)
        mlflow.set_tracking_uri(address)
        client = mlflow.MlflowClient()
        run = client.create_run(_experiment(client, tracking), run_name=folder.name)
        for name, value in params.items():
            client.log_param(run.info.run_id, name, value)
        for name, metric in metrics.items():
            client.log_metric(run.info.run_id, name, metric)
        for path in sorted(folder.glob("finetune.*")):
            client.log_artifact(run.info.run_id, str(path))
        version = _log(tracking, folder, description=description, run_id=run.info.run_id) if register else None
        client.set_terminated(run.info.run_id)
    except MlflowException as error:
        raise CheckpointError(
            f"tracking server {address!r} refused the finetuning: {error.message}; {str(folder)!r} is saved; mend the "
            "server, or name another in MLFLOW_TRACKING_URI"
        ) from error
    return version


def _log(tracking: TrackingConfig, folder: Path, *, description: Mapping[str, Any], run_id: str | None) -> str:
    """Log the exported folder into the training run, register it, move the alias; returns the version."""
    for noisy in ("mlflow", "alembic"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    name = str(tracking.registered_model)
    mlflow.set_tracking_uri(tracking.uri)
    client = mlflow.MlflowClient()
    with mlflow.start_run(run_id=run_id, experiment_id=_experiment(client, tracking), log_system_metrics=False):
        info = mlflow.pyfunc.log_model(
            name="model",
            python_model=served.__file__,
            artifacts={"model": str(folder)},
            signature=signature(),
            pip_requirements=requirements(),
            code_paths=[str(Path(str(module.__file__)).parents[up]) for module, up in ((served, 1), (sample, 0))],
            metadata={key: description[key] for key in ("step", "fingerprint", "code_version", "num_parameters")},
        )
    tags = {key: str(description[key]) for key in ("step", "fingerprint", "code_version")}
    version = str(mlflow.register_model(info.model_uri, name, tags=tags).version)
    client.update_model_version(name, version, description=(folder / CARD).read_text(encoding="utf-8"))
    client.set_registered_model_alias(name, ALIAS, version)
    return version


def signature() -> ModelSignature:
    """kind: string, payload: binary, horizon: long -> kind, payload; parameters are words, empty where left out."""
    kind, payload = ColSpec("string", "kind"), ColSpec("binary", "payload")
    words = [ParamSpec("quantiles", "string", "0.1,0.5,0.9")]
    words += [ParamSpec(name, "string", "") for name in ("source", "place", "time", "columns")]
    return ModelSignature(
        inputs=Schema([kind, payload, ColSpec("long", "horizon")]),
        outputs=Schema([kind, payload]),
        params=ParamSchema(words),
    )


def requirements() -> list[str]:
    """Exact versions of what the model needs; a build's local part (2.13.0+cpu) is no version that an index knows."""
    return [f"{package}=={importlib.metadata.version(package).partition('+')[0]}" for package in _REQUIREMENTS]
