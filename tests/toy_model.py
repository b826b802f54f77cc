"""A run folder with a committed checkpoint of a small model on the toy store, made without training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from sci_gpt.config import PretrainConfig
from sci_gpt.data.store import Store
from sci_gpt.model.init import initialize, standard_normal
from sci_gpt.model.transformer import SciGPT, build_model
from sci_gpt.recipes import parts
from sci_gpt.train.checkpoint import MOMENTS, WEIGHT, tensor_key
from sci_gpt.train.commit import CheckpointWriter
from sci_gpt.train.fragments import Holding
from sci_gpt.train.run_folder import COMPLETE, write_marker
from sci_tokenizers.variables import VARIABLES
from toy_store import change_manifest, toy_config, write_store

LICENCES = {"nature": "simulation", "licence": "CC0", "citation": "made up for tests"}


def toy_data(path: Path) -> Path:
    """The toy store with what a model card says of its sources."""
    sources = json.loads((write_store(path) / "manifest.json").read_text(encoding="utf-8"))["sources"]
    change_manifest(path, {"sources": {name: row | LICENCES for name, row in sources.items()}})
    return path


def make_run(folder: Path, **changes: Any) -> PretrainConfig:
    """A store, a configuration and one checkpoint under `folder`; the weights are the initial ones, moved a little."""
    store = Store.open(toy_data(folder / "store"))
    config = toy_config(folder / "store", folder / "run", **changes)
    write_checkpoint(config, store, moved_model(config), step=24)
    return config


def moved_model(config: PretrainConfig) -> SciGPT:
    """Initial weights plus noise: at the initial ones every forecast is its anchor, which would hide mistakes."""
    model = build_model(parts.model_shape(config), parts.model_settings(config))
    initialize(model, config.seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = standard_normal(1, name, start=0, stop=parameter.numel())
            parameter.add_(0.02 * noise.view_as(parameter))
    return model.eval()


def write_checkpoint(config: PretrainConfig, store: Store, model: SciGPT, *, step: int) -> Path:
    """A checkpoint as one rank writes it, with moments of zero, from which training can go on, and the end marker."""
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    holding = Holding(
        tensors={
            tensor_key(name, kind, offset=0, start=0): tensor.reshape(-1) * (kind == WEIGHT)
            for name, tensor in weights.items()
            for kind in (WEIGHT, *MOMENTS)
        },
        fragments=[[name, 0, tensor.shape[0], 0, tensor.numel()] for name, tensor in weights.items()],
        parameters={
            name: {"shape": list(tensor.shape), "tp_dim": None, "trainable": True} for name, tensor in weights.items()
        },
        adam_step=float(step),
    )
    tree = config.model_dump(mode="json")
    state = {
        "step": step,
        "next_sample": 100,
        "phase_starts": [0],
        "config": tree,
        "identity": parts.identity(config, store),
        "fingerprint": store.fingerprint,
        "code_version": "0.1.0+test",
        "mlflow_run": None,
        "variables": list(VARIABLES),
        "statistics": {
            source: {channel: row.to_json() for channel, row in channels.items()}
            for source, channels in store.statistics.items()
        },
        "sources": {
            source: {
                "modality": store.modality(source),
                "step_seconds": store.step_seconds(source),
                "shape": list(store.shape(source)),
                "options": store.manifest["sources"][source].get("options", {}),
            }
            for source in store.sources
        },
    }
    writer = CheckpointWriter(config.output, rank=0, size=1, session="toy")
    path = writer.save(step, holding, state=state)
    write_marker(config.output, COMPLETE, content={"step": step, "checkpoint": str(path.relative_to(config.output))})
    return path
