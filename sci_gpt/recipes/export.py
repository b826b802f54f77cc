"""Export a checkpoint as a model folder: safetensors, model.json and a model card; no pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from sci_gpt.config import PretrainConfig
from sci_gpt.recipes.load import EXPORT_FORMAT, MODEL_JSON, WEIGHTS, assemble
from sci_gpt.train.checkpoint import file_sha256, read_state, read_weights
from sci_tokenizers.variables import VARIABLES

CARD = "card.md"


def export_model(checkpoint: Path, folder: Path, *, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Write `folder` (new) with weights, what they mean, and the card.

    Args:
        checkpoint: a committed checkpoint folder.
        folder: is made; must not exist.
        manifest: of the data store, for the card's licences and citations.

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
    (folder / CARD).write_text(card(config, description, manifest=manifest), encoding="utf-8")
    return description


def card(config: PretrainConfig, description: Mapping[str, Any], *, manifest: Mapping[str, Any]) -> str:
    """The model card in Markdown: what it is, its data with licences, intended use, limits."""
    lines = [
        f"# {config.tracking.registered_model or config.name}",
        "",
        f"SciGPT, {description['num_parameters']:,} parameters, {_steps(config, description['step'])} tokens, "
        f"seed {config.seed}, code {description['code_version']}, data fingerprint `{description['fingerprint']}`.",
        "",
        "## Data",
        "",
        "| source | modality | nature | step, s | leads, frames | licence | citation |",
        "|---|---|---|---|---|---|---|",
    ]
    for entry in config.mixture:
        row, facts = manifest["sources"][entry.source], description["sources"][entry.source]
        leads = ", ".join(str(lead) for lead in entry.leads)
        lines.append(
            f"| {entry.source} | {facts['modality']} | {row['nature']} | {facts['step_seconds']:g} | {leads} "
            f"| {row['licence']} | {' '.join(str(row['citation']).split())} |"
        )
    lines += [
        "",
        "## Intended use",
        "",
        "Research on pretraining for Earth data: forecasts with quantiles of grids, series and seismic traces like",
        "those above, and adaptation to others. Scores against named baselines stand in the run's evaluation report.",
        "",
        "## Limits",
        "",
        "- Not for warnings, operations or any decision on safety; it forecasts waveforms, never earthquakes.",
        "- Quantiles are marginal, per value and lead: no trajectories, no intervals of sums over time or space.",
        "- Nothing is forecast beyond the largest lead that the nearest source was trained for.",
        "- A source never seen is scaled by its own context; where the table above has nothing like it, expect little.",
        "- Statistics come from the training split alone; the climate of other years is not in them.",
        "",
    ]
    return "\n".join(lines)


def _steps(config: PretrainConfig, step: int) -> str:
    """What the steps were made of: "100 steps of 3,584, then 50 of 8,192"."""
    taken: list[str] = []
    start = 0
    for phase in config.phases:
        if start < step or not taken:
            steps = f"{min(phase.until_step, step) - start}{'' if taken else ' steps'}"
            taken.append(f"{steps} of {phase.row_length * phase.rows_per_step:,}")
        start = phase.until_step
    return ", then ".join(taken)
