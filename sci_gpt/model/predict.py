"""Predictor: quantiles in physical units from samples of context, for every modality; the future is blanked here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from sci_gpt.model.inputs import to_inputs
from sci_gpt.model.noise import ENSEMBLE, noisy_inputs
from sci_gpt.model.quantiles import prediction_quantiles
from sci_gpt.model.rollout import Rollout
from sci_gpt.model.transformer import SciGPT
from sci_tokenizers.growth import Growth, frames_of
from sci_tokenizers.packing import collate
from sci_tokenizers.sample import Sample
from sci_tokenizers.statistics import ChannelStatistics, known_priors
from sci_tokenizers.table import make_tokenizer
from sci_tokenizers.tokenizer import TokenizerSettings
from sci_tokenizers.tokens import Tokens
from sci_tokenizers.variables import VARIABLE_NAMES, VARIABLES, inverse_transform

_BATCH_TOKENS = 4096  # the arrays of a layer stay near the processor: 8192 took longer for each token
_CACHE_TOKENS = 2**16  # of all documents of a rollout: keys and values of 1M parameters take 330 MB
_BEYOND = 1.5


class Predictor:
    """A model with what it needs to turn samples into forecasts.

    Args:
        model: at any weights.
        settings: sizes of tokens (the model's own).
        statistics: {source: {channel: ChannelStatistics}} of the training split; a source not in it is met zero-shot.
    """

    def __init__(
        self, model: SciGPT, settings: TokenizerSettings, *, statistics: Mapping[str, Mapping[str, ChannelStatistics]]
    ) -> None:
        self.model, self.settings, self.statistics = model, settings, statistics
        self.tokenizers = {m: make_tokenizer(m, settings) for m in ("grid", "series", "trace")}

    def quantiles(
        self, samples: Sequence[Sample], *, num_context: int, leads: tuple[int, ...], levels: tuple[float, ...]
    ) -> list[np.ndarray]:
        """Forecast quantiles from the end of each sample's context.

        Args:
            samples: of (num_context + max(leads)) frames each; what lies after the context is blanked here, its
                times are used.
            num_context: frames of context.
            leads: frames ahead, ascending; lead k is the frame num_context - 1 + k.
            levels: of the quantiles, in (0, 1).

        Returns:
            Per sample float32 (levels, leads, frame_times, variable, row, column) in the variables' units.
        """
        return self.answers(self.documents(samples, num_context=num_context, leads=leads), levels=levels)

    def documents(self, samples: Sequence[Sample], *, num_context: int, leads: tuple[int, ...]) -> list[Tokens]:
        """The samples as documents that ask for `leads` (see `quantiles`).

        Every predictor with these settings and statistics reads them alike: encode once, let each answer.
        """
        return [self._document(sample, num_context, leads=leads) for sample in samples]

    def answers(self, documents: Sequence[Tokens], *, levels: tuple[float, ...]) -> list[np.ndarray]:
        """Forecast quantiles of `documents` (see `quantiles`)."""
        out: list[np.ndarray] = []
        start = 0
        while start < len(documents):
            stop, length = start, 0
            while stop < len(documents) and (stop == start or length * (stop + 1 - start) <= _BATCH_TOKENS):
                length = max(length, documents[stop].num_context * documents[stop].num_slots)
                stop += 1
            out += self._predict(documents[start:stop], row_length=length, levels=levels)
            start = stop
        return out

    def trajectories(
        self, samples: Sequence[Sample], *, num_context: int, num_frames: int, num_samples: int, seed: int
    ) -> list[np.ndarray]:
        """Sampled trajectories from the end of each sample's context, frame by frame, coherent within a sample.

        Args:
            samples: of (num_context + num_frames) frames each; of what lies after the context only times are used.
            num_context: frames of context, which alone fix the scales.
            num_frames: frames ahead.
            num_samples: trajectories of each sample.
            seed: with the sample's key and the trajectory's number it decides a trajectory.

        Returns:
            Per sample float32 (num_samples, num_frames, frame_times, variable, row, column) in the variables' units.

        Raises:
            ValueError: the model is not conditioned on noise.
        """
        if not self.model.settings.noise.width:
            raise ValueError("trajectories need a model that is conditioned on noise (model.noise.width above 0)")
        documents = [self._document(sample, num_context, leads=(1,), ahead=num_frames) for sample in samples]
        alike: dict[tuple[object, ...], list[int]] = {}
        for number, tokens in enumerate(documents):
            alike.setdefault((tokens.modality, tokens.payload.shape), []).append(number)
        found: list[list[np.ndarray]] = [[] for _ in samples]
        for numbers in alike.values():
            most = max(1, _CACHE_TOKENS // documents[numbers[0]].num_tokens)  # ways at a time
            for first in range(0, num_samples, most):
                members = range(first, min(first + most, num_samples))
                together = max(1, most // len(members))
                for start in range(0, len(numbers), together):
                    part = numbers[start : start + together]
                    growths = [self._growth(documents[number], samples[number], ways=len(members)) for number in part]
                    rollout = Rollout(self.model, growths, members=members, seed=seed, bounded=self.bounded)
                    for number, values in zip(part, rollout.run(num_frames), strict=True):
                        found[number].append(values)
        return [np.concatenate(parts) for parts in found]

    def _growth(self, tokens: Tokens, sample: Sample, *, ways: int) -> Growth:
        priors = known_priors(self.statistics.get(sample.source), sample.channels, leads=(1,))
        return Growth(tokens, batch=ways, tokenizer=self.tokenizers[tokens.modality], priors=priors)

    def bounded(self, tokens: Tokens, physical: np.ndarray) -> np.ndarray:
        """Values (.., variable, row, column) cut at their variables' bounds."""
        names = tokens.variable[:, 0] if tokens.modality == "series" else tokens.variable[0]
        for v, row in enumerate(names):
            low, high = self._range(VARIABLE_NAMES[row], tokens.source)
            np.clip(physical[..., v, :, :], low, high, out=physical[..., v, :, :])
        return physical

    @torch.no_grad()
    def embed(self, samples: Sequence[Sample], *, num_context: int) -> list[np.ndarray]:
        """What the trunk knows at the end of each sample's context, before any question is put to a head.

        Args:
            samples: of num_context + 1 frames each; of the last one only its time is used.
            num_context: frames of context.

        Returns:
            Per sample float32 (slots, width).
        """
        self.model.eval()
        out = []
        for sample in samples:
            tokens = self._document(sample, num_context, leads=(1,))
            batch = collate([[tokens]], num_context * tokens.num_slots, context_only=True)
            out.append(self.model.trunk(to_inputs(batch), last_frames=True)[-tokens.num_slots :].float().numpy())
        return out

    def _document(
        self, sample: Sample, num_context: int, *, leads: tuple[int, ...], ahead: int | None = None
    ) -> Tokens:
        """The context and, blanked, as many frames `ahead` as given, else as the leads ask for."""
        tokenizer = self.tokenizers[sample.modality]
        known = num_context * tokenizer.frame_times
        valid, values = sample.valid.copy(), sample.values.copy()
        valid[known:], values[known:] = False, 0.0
        end = (num_context + (ahead or max(leads))) * tokenizer.frame_times
        blanked = replace(sample, values=values, valid=valid).window(0, end)
        return tokenizer.encode(
            blanked, num_context=num_context, leads=leads, statistics=self.statistics.get(sample.source)
        )

    @torch.no_grad()
    def _predict(self, documents: Sequence[Tokens], *, row_length: int, levels: tuple[float, ...]) -> list[np.ndarray]:
        batch = collate([[tokens] for tokens in documents], row_length, context_only=True)
        inputs = noisy_inputs(batch, noise=self.model.settings.noise, seed=0, members=ENSEMBLE)
        self.model.eval()
        predictions = self.model(inputs, last_frames=True)
        wanted = torch.tensor(levels, dtype=torch.float32)
        arrays = {m: prediction_quantiles(p, wanted, settings=self.settings).numpy() for m, p in predictions.items()}
        taken = dict.fromkeys(arrays, 0)
        out = []
        for tokens in documents:
            units = len(tokens.leads) * tokens.num_slots
            first = taken[tokens.modality]
            taken[tokens.modality] += units
            scaled = arrays[tokens.modality][:, first : first + units, : tokens.variable.shape[1]]
            out.append(
                self._physical(
                    tokens, scaled.reshape(len(levels), len(tokens.leads), tokens.num_slots, *scaled.shape[2:])
                )
            )
        return out

    def _physical(self, tokens: Tokens, scaled: np.ndarray) -> np.ndarray:
        """(levels, leads, S, V, K) scaled -> (levels, leads, frame_times, variable, row, column)."""
        at = [tokens.num_context - 1 + lead for lead in tokens.leads]
        asked = frames_of(tokens, at)
        tokenizer = self.tokenizers[tokens.modality]
        physical = self.bounded(tokens, tokenizer.decode(asked, scaled))  # levels, leads * frame_times, v, y, x
        return physical.reshape(len(scaled), len(at), tokenizer.frame_times, *physical.shape[2:])

    def _range(self, variable: str, source: str) -> tuple[float, float]:
        """Where quantiles of a variable may lie: its valid range, and for one that is transformed (a tail grows
        exponentially there) no more than _BEYOND times what the training split of its source ever saw.
        """
        row = VARIABLES[variable]
        seen = [c.maximum for name, c in self.statistics.get(source, {}).items() if name.split("@")[0] == variable]
        if row.transform == "none" or not seen:
            return row.minimum, row.maximum
        largest = float(inverse_transform(np.asarray(max(seen)), variable))
        return row.minimum, min(row.maximum, _BEYOND * largest)
