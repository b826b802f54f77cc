"""Rollout: trajectories sampled frame by frame; each frame is fed back, and only its own tokens are computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from sci_gpt.model.cache import KeyValueCache
from sci_gpt.model.heads import SamplePrediction
from sci_gpt.model.inputs import ModelInputs, Noise, to_inputs
from sci_gpt.model.noise import frame_noise, together_of
from sci_gpt.model.transformer import SciGPT
from sci_tokenizers.growth import Growth
from sci_tokenizers.packing import collate
from sci_tokenizers.tokens import Tokens

Bounded = Callable[[Tokens, np.ndarray], np.ndarray]


class Rollout:
    """Trajectories of documents that are alike in frames, context, slots and values.

    Args:
        model: conditioned on noise.
        growths: a document each, at the end of its context, `members` ways.
        members: numbers of the members that the ways are: with the seed, the document's key and the frame they key the
            noise.
        seed: of the forecast.
        bounded: cuts physical values (members, frame_times, V, Y, X) of a document at their variables' bounds.
    """

    def __init__(
        self, model: SciGPT, growths: Sequence[Growth], *, members: Sequence[int], seed: int, bounded: Bounded
    ) -> None:
        self._model, self._growths, self._members = model.eval(), growths, members
        self._seed, self._bounded = seed, bounded
        tokens = growths[0].tokens
        self._slots, self._context = tokens.num_slots, tokens.num_context
        self._cache = KeyValueCache(
            model.shape, documents=len(members) * len(growths), capacity=tokens.num_frames * self._slots
        )

    @torch.no_grad()
    def run(self, num_frames: int) -> list[np.ndarray]:
        """Per document physical values (members, num_frames, frame_times, V, Y, X) of the frames after its context."""
        out: list[list[np.ndarray]] = [[] for _ in self._growths]
        scaled = self._first()
        for number in range(num_frames):
            ways: list[list[Tokens]] = []
            for document, growth in enumerate(self._growths):
                physical = self._bounded(growth.tokens, growth.physical(scaled[:, document]))
                out[document].append(physical)
                if number + 1 < num_frames:
                    ways.append(growth.extend(physical))
            if ways:
                scaled = self._next([one for member in zip(*ways, strict=True) for one in member])
        return [np.stack(frames, axis=1) for frames in out]

    def _first(self) -> np.ndarray:
        """Scaled values (members, documents, S, V, K) of the first frame after the contexts."""
        documents = [[growth.tokens] for growth in self._growths]
        batch = collate(documents, self._context * self._slots, context_only=True)
        inputs = to_inputs(batch)
        values = torch.stack([self._noise(member, (0, self._context)) for member in self._members])
        return self._sampled(replace(inputs, noise=Noise(values=values, together=together_of(batch))), last_frames=True)

    def _next(self, documents: list[Tokens]) -> np.ndarray:
        """Scaled values of the frame after the one that the documents hold, member by member."""
        frame = self._growths[0].frame
        batch = collate([[one] for one in documents], self._slots, context_only=True)
        inputs = to_inputs(batch)
        values = torch.cat([self._noise(member, (frame, frame + 1)) for member in self._members])[None]
        noise = Noise(values=values, together=together_of(batch))
        return self._sampled(replace(inputs, frame=inputs.frame + frame, noise=noise), last_frames=False)

    def _noise(self, member: int, frames: tuple[int, int]) -> Tensor:
        """(documents * frames * S, width)."""
        width = self._model.settings.noise.drawn
        drawn = [
            frame_noise(growth.tokens.key, seed=self._seed, member=member, frames=frames, width=width)
            for growth in self._growths
        ]
        return torch.cat(drawn).repeat_interleave(self._slots, dim=0)

    def _sampled(self, inputs: ModelInputs, *, last_frames: bool) -> np.ndarray:
        (prediction,) = self._model(inputs, last_frames=last_frames, cache=self._cache).values()
        assert isinstance(prediction, SamplePrediction)
        shape = (len(self._members), len(self._growths), self._slots)
        return prediction.values.numpy().reshape(*shape, *prediction.values.shape[2:])
