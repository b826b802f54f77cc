"""Save an adapted model in the format of an export: safetensors, model.json and a card, loaded by every command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from sci_gpt.errors import ConfigError
from sci_gpt.recipes.load import EXPORT_FORMAT, MODEL_JSON, WEIGHTS, LoadedModel
from sci_gpt.recipes.rows import for_saving, own_table
from sci_gpt.train.checkpoint import file_sha256
from sci_tokenizers.statistics import statistics_to_json

CARD = "card.md"


def refuse_existing(folder: Path) -> None:
    """Raise where something lies already.

    Raises:
        ConfigError: the folder exists.
    """
    if folder.exists():
        raise ConfigError(f"{str(folder)!r} exists; name a folder that is not there yet, as --out runs/finetune-2")


def save_model(model: LoadedModel, folder: Path, *, origin: Mapping[str, Any], card: str) -> dict[str, Any]:
    """Write `folder`, whole or not at all.

    Args:
        model: with the statistics and sources that it knows.
        folder: is made; must not exist.
        origin: where its weights come from (the model it was adapted from, steps, settings, data).
        card: the model card, Markdown.

    Returns:
        The content of model.json.

    Raises:
        ConfigError: the folder exists.
    """
    refuse_existing(folder)
    used = [channel.partition("@")[0] for rows in model.statistics.values() for channel in rows]
    num_variables = model.model.settings.num_variables
    table = own_table(num_variables, used)
    weights = for_saving(model.model.state_dict(), num_variables, names=table["variables"])
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, partial / WEIGHTS)
        (partial / WEIGHTS).chmod(0o644)  # safetensors makes files that only their owner can read
        description = {
            "format": EXPORT_FORMAT,
            "weights_sha256": file_sha256(partial / WEIGHTS),
            "num_parameters": sum(tensor.numel() for tensor in weights.values()),
            "shape": vars(model.model.shape),
            "tokenizer": model.config.tokenizer.model_dump(),
            "leads": {entry.source: list(entry.leads) for entry in model.config.mixture},
            **table,
            "step": model.step,
            "fingerprint": model.fingerprint,
            "code_version": model.code_version,
            "sources": {name: {**vars(facts), "shape": list(facts.shape)} for name, facts in model.sources.items()},
            "statistics": statistics_to_json({name: dict(rows) for name, rows in model.statistics.items()}),
            "config": model.config.model_dump(mode="json"),
            "origin": dict(origin),
        }
        (partial / MODEL_JSON).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
        (partial / CARD).write_text(card, encoding="utf-8")
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return description
