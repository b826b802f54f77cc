"""Validation during training: a few windows of each source's validation split, their loss and skill per modality."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from sci_gpt.config import PretrainConfig
from sci_gpt.data.store import Store
from sci_gpt.data.windows import Windows, WindowSpec
from sci_gpt.model.noise import ENSEMBLE, noisy_inputs
from sci_gpt.model.skill import batch_scores, skill_lines
from sci_gpt.parallel.world import World
from sci_gpt.recipes.parts import model_settings, parallel_plan, tokenizer_settings, window_specs
from sci_tokenizers.packing import Batch, collate
from sci_tokenizers.table import make_tokenizer

_NUMBERS = 6  # of batch_scores


class Validation:
    """Scores a model on fixed windows; each rank takes a share of the sources, and all get the same scores.

    Args:
        config: windows per source, mixture, tokenizers.
        store: the built store; sources with nothing in their validation split are left out (see `absent`).
        world: the ranks among which sources are dealt.
    """

    def __init__(self, config: PretrainConfig, store: Store, *, world: World) -> None:
        self.config, self.store, self.world, self.plan = config, store, world, parallel_plan(config)
        self.settings, self.noise = tokenizer_settings(config), model_settings(config).noise
        specs = window_specs(config)
        self.absent = tuple(spec.source for spec in specs if not store.num_stretches(spec.source, "valid"))
        if self.absent and world.rank == 0:  # so that nobody reads their modality's skill as theirs
            print(f"no validation windows: {', '.join(self.absent)} (empty by the data configuration)", flush=True)
        present = [spec for spec in specs if spec.source not in self.absent]
        self.batches = [self._batch(spec) for spec in present]

    def __call__(self, model: nn.Module) -> dict[str, dict[str, float]]:
        """{modality: {"loss", "crps", "skill"}}: a collective, called by every rank."""
        sums: dict[str, torch.Tensor] = {}
        for number, batch in enumerate(self.batches):
            # Every rank runs every batch only where ZeRO 3 makes a forward pass a collective of all.
            mine = number % self.plan.data_parallel == self.plan.position(self.world.rank).data
            if mine or self.plan.zero_stage == 3:
                inputs = noisy_inputs(
                    batch, self.world.device, noise=self.noise, seed=self.config.seed, members=ENSEMBLE
                )
                scores = batch_scores(model, inputs, settings=self.settings)  # type: ignore[arg-type]
                for modality, score in scores.items():
                    if mine and self.plan.is_lead(self.world.rank):
                        sums[modality] = sums.get(modality, torch.zeros_like(score)) + score
        modalities = sorted({name for batch in self.batches for name in batch.payloads})
        flat = [value for name in modalities for value in sums.get(name, torch.zeros(_NUMBERS)).tolist()]
        table = torch.tensor(self.world.sum(flat), dtype=torch.float64).view(len(modalities), _NUMBERS)
        return skill_lines(dict(zip(modalities, table, strict=True)))

    def _batch(self, spec: WindowSpec) -> Batch:
        """Windows spread evenly over the split, each with the longest context of training."""
        tokenizer = make_tokenizer(self.store.modality(spec.source), self.settings)
        windows = Windows(
            self.store,
            spec,
            split="valid",
            frame_times=tokenizer.frame_times,
            shuffle_time=self.config.shuffle_time,
            seed=self.config.seed,
        )
        count = min(self.config.validation.windows, windows.num_windows)
        documents = [
            tokenizer.encode(
                windows.read(int(number)),
                num_context=spec.context_frames[1],
                leads=spec.leads,
                statistics=self.store.statistics[spec.source],
            )
            for number in np.linspace(0, windows.num_windows - 1, count)
        ]
        return collate([documents], sum(tokens.num_tokens for tokens in documents))
