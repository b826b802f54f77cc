"""The linear priors of a run: fitted once by rank 0, or read from the checkpoint that the run goes on from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from sci_gpt.config import PretrainConfig
from sci_gpt.data.prior import with_priors
from sci_gpt.data.store import Store
from sci_gpt.data.windows import Windows
from sci_gpt.parallel.world import World
from sci_gpt.recipes import parts
from sci_gpt.train.checkpoint import read_state
from sci_tokenizers.statistics import SourceStatistics, statistics_from_json, statistics_to_json
from sci_tokenizers.table import make_tokenizer


def store_with_priors(store: Store, config: PretrainConfig, *, checkpoint: Path | None, world: World) -> Store:
    """The store, its statistics completed by the run's priors, the same to the bit on every rank and after a resume."""
    if checkpoint is not None:
        return replace(store, statistics=statistics_from_json(read_state(checkpoint)["statistics"]))
    text = json.dumps(statistics_to_json(fit_priors(store, config))) if world.rank == 0 else ""
    return replace(store, statistics=statistics_from_json(json.loads(world.share(text))))


def fit_priors(store: Store, config: PretrainConfig) -> dict[str, SourceStatistics]:
    """The store's statistics with the priors of the run's sources and leads, from the training split."""
    settings = parts.tokenizer_settings(config)
    found = dict(store.statistics)
    for spec in parts.window_specs(config):
        tokenizer = make_tokenizer(store.modality(spec.source), settings)
        windows = Windows(
            store,
            spec,
            split="train",
            frame_times=tokenizer.frame_times,
            shuffle_time=config.shuffle_time,
            seed=config.seed,
        )
        found[spec.source] = with_priors(windows, tokenizer, statistics=found[spec.source])
    return found
