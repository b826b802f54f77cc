"""A linear forecast fitted once on the training split: what a head corrects where the source is known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from sci_tokenizers.autoregression import HORIZONS, recent_errors
from sci_tokenizers.memory import MEMORIES

# Of a channel's own memories; its kin are channels of their own here.
_USED = tuple(number for number, name in enumerate(MEMORIES) if not name.startswith("kin_"))
PRIOR_FEATURES = 1 + len(_USED)  # per channel: the last value and what the memories add to it
# A document's own errors count against the training split's as if that had been seen this many times.
PRIOR_COUNT = 16.0


@dataclass(frozen=True, kw_only=True)
class LinearPrior:
    """Direct forecasts of one channel from the recent past of all channels of its source, in transformed units.

    Attributes:
        leads: frames ahead, ascending.
        weights: (lead, channels x PRIOR_FEATURES + 1), of `Past.features`.
        spread: (lead,), root mean square of the errors on folds of the training split that were left out of the fit.
        limits: (channels x PRIOR_FEATURES + 1,), the largest magnitude of each feature in training: a line is not
            followed beyond (a level far from the climatology's would foretell a fall towards it at any speed).
    """

    leads: tuple[int, ...]
    weights: tuple[tuple[float, ...], ...]
    spread: tuple[float, ...]
    limits: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain numbers."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LinearPrior:
        """The inverse of `to_json`."""
        return cls(
            leads=tuple(data["leads"]),
            weights=tuple(tuple(row) for row in data["weights"]),
            spread=tuple(data["spread"]),
            limits=tuple(data["limits"]),
        )


@dataclass(frozen=True, kw_only=True)
class Past:
    """What a document's linear forecasts are made of and judged by, as it lies in tokens.

    Attributes:
        payload, valid, last: (F, S, V, K), scaled.
        memory: (F, S, V, K, len(MEMORIES)).
        scale: (S, V).
        slots_are_channels: a channel is a slot (series), else a variable (grids, whose slots and values are cells).
    """

    payload: np.ndarray
    valid: np.ndarray
    last: np.ndarray
    memory: np.ndarray
    scale: np.ndarray
    slots_are_channels: bool

    def features(self) -> np.ndarray:
        """Last value and memories of every channel, and 1, unscaled: float64 (F, N, C * PRIOR_FEATURES + 1)."""
        own = np.concatenate([self.last[..., None], self.memory[..., _USED]], axis=-1).astype(np.float64)
        unscaled = self.by_channel(own * self.scale[:, :, None, None]).swapaxes(1, 2)  # F N C feature
        flat = unscaled.reshape(*unscaled.shape[:2], -1)
        return np.concatenate([flat, np.ones((*flat.shape[:2], 1))], axis=-1)

    def truth(self) -> np.ndarray:
        """Unscaled payload, NaN where missing: float64 (F, N, C)."""
        unscaled = np.where(self.valid, self.payload.astype(np.float64) * self.scale[:, :, None], np.nan)
        return self.by_channel(unscaled).swapaxes(1, 2)

    def forecast(self, priors: list[LinearPrior], leads: tuple[int, ...]) -> dict[str, np.ndarray]:
        """Anchors, their log-spreads and volatility (see `Tokens`) of the priors, one per channel.

        The spread at frame f is that of training, drawn to the errors of the document's forecasts that have come due by
        f.
        """
        payload, valid = self.by_channel(self.payload), self.by_channel(self.valid)
        mean, spread = self.means(priors, leads)
        variance = np.empty_like(mean)
        recent = np.zeros((*payload.shape, len(HORIZONS)))
        for number, lead in enumerate(leads):
            squares, known = _come_due(payload, valid, mean=mean[..., number], lead=lead)
            trained = PRIOR_COUNT * spread[..., number] ** 2
            variance[..., number] = (trained + squares.cumsum(axis=0)) / (PRIOR_COUNT + known.cumsum(axis=0))
            if number == 0:
                flat = recent_errors(
                    squares.reshape(len(squares), -1).T,
                    known.reshape(len(known), -1).T,
                    origins=np.arange(len(squares)),
                )
                recent = flat.transpose(1, 0, 2).reshape(recent.shape)
        return self.anchored(mean, variance=variance, recent=recent, ever=np.maximum.accumulate(self.valid, axis=0))

    def means(self, priors: list[LinearPrior], leads: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Forecasts of the priors, (F, C, N, leads), and their spread in training, (C, N, leads), both scaled."""
        scale = self.by_channel(np.broadcast_to(self.scale[:, :, None], self.payload.shape))[0]  # C N
        asked = [[prior.leads.index(lead) for lead in leads] for prior in priors]
        weights = np.stack(
            [np.asarray(prior.weights)[rows] for prior, rows in zip(priors, asked, strict=True)]
        )  # C L P
        spread = np.stack([np.asarray(prior.spread)[rows] for prior, rows in zip(priors, asked, strict=True)])  # C L
        limits = np.asarray(priors[0].limits)  # all priors of a source saw the same features
        features = np.clip(self.features(), -limits, limits)
        mean = np.einsum("fnp,clp->fcnl", features, weights, optimize=True) / scale[..., None]
        return mean, spread[:, None] / scale[..., None]

    def anchored(
        self, mean: np.ndarray, *, variance: np.ndarray, recent: np.ndarray, ever: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Anchors, log-spreads and volatility as tokens have them.

        Args:
            mean, variance: (F, C, N, leads), scaled.
            recent: (F, C, N, HORIZONS), logarithm of recent errors over all of them.
            ever: bool (F, S, V, K): the value was seen up to the frame.
        """
        share = ever[..., None] / np.maximum(ever[..., None].sum(axis=3, keepdims=True), 1)
        return {
            "anchor": self._slotted(mean).astype(np.float32),
            "anchor_spread": self._slotted(0.5 * np.log(np.maximum(variance, 1e-12))).astype(np.float32),
            "volatility": (self._slotted(recent) * share).sum(axis=3).astype(np.float32),
        }

    def by_channel(self, part: np.ndarray) -> np.ndarray:
        """(F, S, V, K, ..) -> (F, C, N, ..), N cells of each channel."""
        frames, slots, variables, values = part.shape[:4]
        if self.slots_are_channels:
            return part.reshape(frames, slots * variables, values, *part.shape[4:])
        return np.moveaxis(part, 2, 1).reshape(frames, variables, slots * values, *part.shape[4:])

    def _slotted(self, part: np.ndarray) -> np.ndarray:
        """The inverse of `by_channel`."""
        frames, slots, variables, values = self.payload.shape
        if self.slots_are_channels:
            return part.reshape(frames, slots, variables, values, *part.shape[3:])
        return np.moveaxis(part.reshape(frames, variables, slots, values, *part.shape[3:]), 1, 2)


def _come_due(payload: np.ndarray, valid: np.ndarray, *, mean: np.ndarray, lead: int) -> tuple[np.ndarray, np.ndarray]:
    """Squared errors (F, C, N) of the forecasts made `lead` frames before each frame, 0 where there are none; and which
    there are.
    """
    squares, known = np.zeros(payload.shape), np.zeros(payload.shape, bool)
    if lead < len(payload):
        known[lead:] = valid[lead:]
        squares[lead:] = np.where(valid[lead:], (payload[lead:] - mean[:-lead]) ** 2, 0.0)
    return squares, known
