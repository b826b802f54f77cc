"""Export a model as a folder: safetensors, model.json and a model card; loads without DeepSpeed, holds no pickle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from sci_gpt.config import PretrainConfig
from sci_gpt.config_file import parse_config
from sci_gpt.data.store import Store
from sci_gpt.errors import CheckpointError, ConfigError, DataError
from sci_gpt.model.calibration import CALIBRATION, Calibration
from sci_gpt.recipes.calibrated import calibration_path
from sci_gpt.recipes.card import Evaluation, card
from sci_gpt.recipes.load import EXPORT_FORMAT, MODEL_JSON, WEIGHTS, LoadedModel, assemble, load_model, model_folder
from sci_gpt.train.checkpoint import file_sha256, read_state, read_weights
from sci_gpt.train.resume import with_old_model
from sci_tokenizers.variables import VARIABLES

CARD = "card.md"
EVALUATION = Path("report") / "evaluation.json"


def export(model: str, out: Path, *, data: Path | str | None = None) -> dict[str, Any]:
    """`sci-gpt export`: a run, a checkpoint, or what was exported or registered before, as a folder that stands alone.

    Args:
        model: a run or checkpoint folder (exported), an exported folder or models:/NAME@ALIAS (copied, verified).
        out: is made; must not exist. It is there whole or not at all.
        data: the store that the model was trained on, for licences and citations; left out: where its configuration
            says.

    Returns:
        {"model", "out", "files": {name: bytes}, "num_parameters", "step", "fingerprint", "code_version", "sources",
        "evaluation": rows of the card's table, "evaluation_missing": why it has none}.

    Raises:
        ConfigError: `out` exists.
        CheckpointError: no model, a damaged one, or a store that is another one by now.
        DataError: no store.
    """
    if out.exists():
        raise ConfigError(f"{str(out)!r} exists; an export is never mixed with other files: name a new folder")
    source, partial = model_folder(model), out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
    try:
        if (source / MODEL_JSON).exists():
            evaluation = _copy(source, partial)
        else:
            evaluation = _export_checkpoint(source, partial, data=data)
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.replace(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    loaded = load_model(out)
    return _report(model, out, loaded=loaded, evaluation=evaluation)


def export_model(
    checkpoint: Path, folder: Path, *, manifest: Mapping[str, Any], evaluation: Evaluation | None = None
) -> dict[str, Any]:
    """Write `folder` (new) with weights, what they mean, and the card.

    Args:
        checkpoint: a committed checkpoint folder.
        folder: is made; must not exist.
        manifest: of the data store, for the card's licences and citations.
        evaluation: for the card.

    Returns:
        The content of model.json.

    Raises:
        CheckpointError: the checkpoint is damaged or its weights are not those of its configuration.
    """
    state, weights = read_state(checkpoint), read_weights(checkpoint)
    loaded = assemble(state, weights, where=str(checkpoint))  # refuses here what could not be loaded later
    folder.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / WEIGHTS)
    (folder / WEIGHTS).chmod(0o644)  # safetensors makes files that only their owner can read
    config = loaded.config
    description = {
        "format": EXPORT_FORMAT,
        "weights_sha256": file_sha256(folder / WEIGHTS),
        "num_parameters": loaded.model.num_parameters,
        "shape": vars(loaded.model.shape),
        "tokenizer": config.tokenizer.model_dump(),
        "leads": {entry.source: list(entry.leads) for entry in config.mixture},
        "variables": list(VARIABLES)[: loaded.model.settings.num_variables],
        **{key: state[key] for key in ("step", "fingerprint", "code_version", "sources", "statistics", "config")},
    }
    (folder / MODEL_JSON).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    text = card(config, description, manifest=manifest, evaluation=evaluation)
    (folder / CARD).write_text(text, encoding="utf-8")
    return description


def _export_checkpoint(checkpoint: Path, folder: Path, *, data: Path | str | None) -> Evaluation:
    """Export a checkpoint with the licences of its store and the scores of its run; what is known of the scores."""
    state = read_state(checkpoint)
    config = parse_config(with_old_model(state["config"]), PretrainConfig, where=str(checkpoint))
    where = data or config.data
    try:
        store = Store.open(where)
    except DataError as error:
        raise DataError(
            f"{checkpoint}: its licences and citations are in the store that it was trained on: {error}; or name "
            "that store, as --data FOLDER"
        ) from error
    if store.fingerprint != state["fingerprint"]:
        raise CheckpointError(
            f"{checkpoint} was trained on data {state['fingerprint']!r}, and {str(where)!r} is {store.fingerprint!r}; "
            "name the store that it was trained on, as --data FOLDER"
        )
    evaluation = read_evaluation(checkpoint.resolve().parents[1], state)
    export_model(checkpoint, folder, manifest=store.manifest, evaluation=evaluation)
    fitted = calibration_path(checkpoint)
    if fitted.exists() and Calibration.read(fitted).belongs_to(state["step"], state["fingerprint"]):
        shutil.copyfile(fitted, folder / CALIBRATION)
    return evaluation


def read_evaluation(run: Path, state: Mapping[str, Any]) -> Evaluation:
    """The scores of a checkpoint's weights, from its run's report.

    Raises:
        CheckpointError: a report that cannot be read.
    """
    path = run / EVALUATION
    if not path.exists():
        return Evaluation(missing="These weights were not evaluated (`sci-gpt evaluate`).")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        scored = (content.get("step"), content["data_fingerprint"])
        rows = [row for row in content["rows"] if row["model"] == "trained"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({type(error).__name__}: {error}); run `sci-gpt evaluate` again, or remove it"
        ) from error
    if scored != (state["step"], state["fingerprint"]):
        of = f"step {scored[0]}" if scored[0] is not None else "a step that it does not name"
        return Evaluation(missing=f"These weights were not evaluated: the run's report is of {of}, data `{scored[1]}`.")
    return Evaluation(rows=rows, interval=float(content["interval"]), missing="")


def _copy(source: Path, folder: Path) -> Evaluation:
    """Copy an exported folder after its weights have been verified; its card says what was known of its scores."""
    load_model(source)
    shutil.copytree(source, folder)
    return Evaluation(missing="a copy of an exported model: its card says what was known then")


def _report(model: str, out: Path, *, loaded: LoadedModel, evaluation: Evaluation) -> dict[str, Any]:
    return {
        "model": model,
        "out": str(out),
        "files": {path.name: path.stat().st_size for path in sorted(out.iterdir())},
        "num_parameters": loaded.model.num_parameters,
        "step": loaded.step,
        "fingerprint": loaded.fingerprint,
        "code_version": loaded.code_version,
        "sources": [entry.source for entry in loaded.config.mixture],
        "evaluation": len(evaluation.rows),
        "evaluation_missing": evaluation.missing,
    }
