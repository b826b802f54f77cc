"""A small store of made-up grids, series and traces with gaps, and a configuration that trains on it in seconds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sci_gpt.config import PretrainConfig
from sci_gpt.config_file import parse_config
from sci_gpt.data.store import FORMAT_VERSION
from sci_gpt.data.store_writer import SplitWriter, seal
from sci_tokenizers.sample import Sample
from sci_tokenizers.statistics import ChannelStatistics

SOURCES: dict[str, dict[str, Any]] = {
    "field": {"modality": "grid", "step_seconds": 86400.0, "variables": ["air_temperature"], "shape": [1, 8, 12]},
    "station": {
        "modality": "series",
        "step_seconds": 3600.0,
        "variables": ["air_temperature", "wind_speed"],
        "shape": [2, 1, 1],
    },
    "quake": {"modality": "trace", "step_seconds": 0.1, "variables": ["digitizer_counts_vertical"], "shape": [1, 1, 1]},
}
TIMES = {"field": 120, "station": 400, "quake": 900}


def write_store(path: Path, *, times: Mapping[str, Sequence[int]] | None = None, shard_bytes: int = 1 << 20) -> Path:
    """Write the store; values are smooth waves plus noise, some of them missing. Returns `path`.

    Args:
        path: where.
        times: lengths of a source's stretches in each split, by default three of TIMES.
        shard_bytes: a shard ends where it has reached this size.
    """
    random = np.random.default_rng(7)
    statistics: dict[str, Any] = {}
    for name, facts in SOURCES.items():
        for split in ("train", "valid", "test"):
            with SplitWriter(folder=path / name / split, shard_bytes=shard_bytes) as writer:
                for part, length in enumerate((times or {}).get(name, [TIMES[name]] * 3)):
                    writer.add(_sample(name, split, part=part, times=length, random=random))
        statistics[name] = {channel: _statistics(name).to_json() for channel in facts["variables"]}
    manifest = {
        "format_version": FORMAT_VERSION,
        "fingerprint": "0123456789abcdef",
        "sources": {
            name: facts | {"levels": [None] * len(facts["variables"]), "gap_days": None}
            for name, facts in SOURCES.items()
        },
    }
    (path / "statistics.json").write_text(json.dumps(statistics))
    seal(path, manifest)
    return path


def change_manifest(path: Path, changes: Mapping[str, Any]) -> None:
    """Let a store say something else, and seal it again."""
    seal(path, json.loads((path / "manifest.json").read_text(encoding="utf-8")) | dict(changes))


def _sample(name: str, split: str, *, part: int, times: int, random: np.random.Generator) -> Sample:
    facts = SOURCES[name]
    shape = (times, *facts["shape"])
    start = {"train": 0, "valid": 10, "test": 20}[split] * 4e8 + part * 1e8
    seconds = start + np.arange(times) * facts["step_seconds"]
    wave = np.sin(np.arange(times) / 5.0 + part)[:, None, None, None]
    level, spread = (0.0, 50.0) if name == "quake" else (280.0, 5.0)
    values = level + spread * (wave + 0.3 * random.standard_normal(shape))
    if name == "station":
        values[:, 1] = np.abs(values[:, 1] - 280.0)
    valid = random.random(shape) > (0.0 if name == "quake" else 0.1)
    rows, columns = facts["shape"][1:]
    latitude = np.broadcast_to(np.linspace(30, 40, rows, dtype=np.float32)[:, None], (rows, columns)).copy()
    return Sample(
        key=f"{name}/{split}-{part}",
        source=name,
        modality=facts["modality"],
        variables=tuple(facts["variables"]),
        levels=tuple([np.nan] * len(facts["variables"])),
        values=np.where(valid, values, 0.0).astype(np.float32),
        valid=valid,
        time=seconds,
        year_phase=((seconds / 31556952.0) % 1.0).astype(np.float32),
        day_phase=((seconds / 86400.0) % 1.0).astype(np.float32),
        step_seconds=facts["step_seconds"],
        latitude=latitude,
        longitude=np.full((rows, columns), 10.0, np.float32),
        elevation=np.zeros((rows, columns), np.float32),
    )


def _statistics(name: str) -> ChannelStatistics:
    level, spread = (0.0, 40.0) if name == "quake" else (280.0, 4.0)
    return ChannelStatistics(
        count=1000,
        mean=level,
        std=spread,
        step_std=spread / 2,
        num_year=1,
        num_day=1,
        climatology=(level, 0.0, 0.0, 0.0, 0.0),
        minimum=level - 100.0,
        maximum=level + 100.0,
    )


def toy_config(store: Path | str, run: Path, **changes: Any) -> PretrainConfig:
    """A run of 24 steps of mixed rows on two processes, in one phase.

    `changes` replace top-level keys; `row_length`, `rows_per_step` and `mixture` are those of the phase.
    """
    phase: dict[str, Any] = {
        "row_length": 160,
        "rows_per_step": 3,
        "mixture": [
            {"source": "field", "weight": 1, "frames": 16, "stride": 2, "context_frames": [2, 6]},
            {"source": "station", "weight": 1, "frames": 24, "stride": 3, "context_frames": [3, 12], "leads": [1, 2]},
            {"source": "quake", "weight": 1, "frames": 30, "stride": 4, "context_frames": [4, 15]},
        ],
    }
    phase |= {key: changes.pop(key) for key in phase if key in changes}
    tree: dict[str, Any] = {
        "name": "toy",
        "output": str(run),
        "data": str(store),
        "seed": 3,
        "loss_factor": {"grid": 1.0, "series": 0.5, "trace": 2.0},
        "tokenizer": {"grid_patch": 4},
        "model": {"size": "tiny"},
        "optimizer": {"learning_rate": 3e-3, "clip": 0.1},
        "schedule": {"steps": 24, "warmup_steps": 4, "cooldown_steps": 6},
        "parallel": {"processes": 2},
        "checkpoint": {"every": 8},
        "validation": {"every": 12, "windows": 2},
        "tracking": {
            "uri": f"sqlite:///{run.parent}/mlflow/mlflow.db",
            "artifacts": f"{run.parent}/mlflow/artifacts",
            "experiment": "toy",
            "registered_model": None,
        },
        "evaluate": {},
    }
    tree |= changes
    tree.setdefault("phases", [{"until_step": tree["schedule"]["steps"]} | phase])
    return parse_config(tree, PretrainConfig, where="the toy configuration")
