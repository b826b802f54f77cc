"""Trace tokenizer: a frame is a stretch of samples, a slot is a receiver, a token holds every component's samples."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from sci_tokenizers.autoregression import burg, error_spread, newest, step_coefficients
from sci_tokenizers.sample import Sample
from sci_tokenizers.statistics import ChannelStatistics
from sci_tokenizers.tokenizer import Tokenizer, frame_features, log_scales, variable_rows
from sci_tokenizers.tokens import SLOT_FEATURES, Tokens
from sci_tokenizers.variables import VARIABLES

_MAD_TO_STD = 1.4826
_ORDER = 32
_REFIT = 24


class TraceTokenizer(Tokenizer):
    """minus the context's median -> divided by the context's MAD (a floor of one count).

    The payload stays linear in the waveform, so that superposition holds and a forecast's spread means the same before and
    after an onset; the embedding compresses what the model sees, and the loss counts errors in spreads of the anchor.
    """

    modality = "trace"

    @property
    def frame_times(self) -> int:
        """Samples of the waveform in a frame."""
        return self.settings.trace_samples

    def num_slots(self, shape: tuple[int, int, int]) -> int:
        """One slot per receiver."""
        return shape[1]

    def encode(
        self,
        sample: Sample,
        *,
        num_context: int,
        leads: tuple[int, ...],
        statistics: Mapping[str, ChannelStatistics] | None = None,
    ) -> Tokens:
        """See `Tokenizer.encode`; payload (F, receivers, components, samples). Statistics are not used: gains differ."""
        frames = self._check(sample, num_context)
        n = self.settings.trace_samples
        values, valid = sample.values[..., 0].astype(np.float64), sample.valid[..., 0]  # t c r
        context, seen = values[: num_context * n], valid[: num_context * n]
        blanked = np.where(seen, context, np.nan)
        empty = ~seen.any(axis=0)
        blanked[:, empty] = 0.0
        offset = np.nanmedian(blanked, axis=0)  # c r
        spread = _MAD_TO_STD * np.nanmedian(np.abs(blanked - offset), axis=0)
        calibrated = np.array([VARIABLES[name].calibrated for name in sample.variables])[:, None]
        scale = np.maximum(spread, np.where(calibrated, 1e-12, 1.0))
        scaled = np.where(valid, (values - offset) / scale, 0.0)
        payload = scaled.reshape(frames, n, *scaled.shape[1:]).transpose(0, 3, 2, 1).astype(np.float32)  # f r c n
        mask = valid.reshape(frames, n, *valid.shape[1:]).transpose(0, 3, 2, 1)
        receivers, components = payload.shape[1:3]
        anchor, spread_at = _autoregression((values - offset) / scale, valid, n=n, num_context=num_context, leads=leads)
        features, time = frame_features(sample, n)
        return Tokens(
            key=sample.key,
            source=sample.source,
            modality="trace",
            payload=payload,
            valid=mask,
            ids=None,
            anchor=anchor,
            anchor_spread=spread_at,
            memory=np.zeros((*payload.shape, 0), np.float32),
            weight=np.ones((receivers, components, n), np.float32),
            variable=np.tile(variable_rows(sample), (receivers, 1)),
            row=np.zeros(receivers, np.int16),
            column=np.zeros(receivers, np.int16),
            frame_features=features,
            slot_features=_slot_features(sample),
            log_scale=log_scales(scale.T, sample),
            offset=np.broadcast_to(offset.T.astype(np.float32)[None, :, :, None], payload.shape),
            scale=scale.T.astype(np.float32),
            time=time,
            num_context=num_context,
            leads=leads,
        )

    def decode(self, tokens: Tokens, payload: np.ndarray) -> np.ndarray:
        """Scaled samples (..., F, receivers, components, n) to physical (..., time, component, receiver, 1)."""
        physical = payload.astype(np.float64) * tokens.scale[:, :, None] + tokens.offset
        moved = np.moveaxis(physical, -1, -3)  # .. f n r c
        moved = np.swapaxes(moved, -1, -2)  # .. f n c r
        *lead, frames, n, components, receivers = moved.shape
        return moved.reshape(*lead, frames * n, components, receivers, 1).astype(np.float32)


def _autoregression(
    scaled: np.ndarray, valid: np.ndarray, *, n: int, num_context: int, leads: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Each frame's own forecast of the frames it is asked for, and the logarithm of its errors' spread so far, in payload units.

    An AR(32) is fitted to the samples up to a frame, the first time at the context's end and then every _REFIT frames, so
    nothing after a frame enters its forecast. Frames before the context's end are asked nothing and hold 0.

    Returns:
        float32 (F, receivers, components, n, len(leads)) each.
    """
    times, components, receivers = scaled.shape
    frames = times // n
    flat = np.where(valid, scaled, 0.0).transpose(2, 1, 0).reshape(receivers * components, times)
    known = valid.transpose(2, 1, 0).reshape(flat.shape)
    steps = (np.asarray(leads)[:, None] - 1) * n + np.arange(n)  # lead n
    mean = np.zeros((len(flat), frames, *steps.shape))
    spread = np.ones_like(mean)
    live = np.flatnonzero(known[:, : num_context * n].any(axis=1))  # components that the context never saw stay at 0
    for first in range(num_context - 1, frames, _REFIT):
        past = (first + 1) * n
        order = max(1, min(_ORDER, past // 4))
        weights = step_coefficients(burg(flat[live, :past], order), int(steps.max()) + 1)
        asking = np.arange(first, min(first + _REFIT, frames))
        states = newest(flat[live], (asking + 1) * n - 1, order)
        mean[np.ix_(live, asking)] = (states @ weights.transpose(0, 2, 1))[:, :, steps]
        errors = error_spread(flat[live, :past], known[live, :past], weights)
        spread[np.ix_(live, asking)] = errors[:, None, steps]
    log_spread = np.log(np.maximum(spread, 1e-4))
    shape = (receivers, components, frames, len(leads), n)
    arranged = [x.reshape(shape).transpose(2, 0, 1, 4, 3).astype(np.float32) for x in (mean, log_spread)]
    return arranged[0], arranged[1]


def _slot_features(sample: Sample) -> np.ndarray:
    """(S, 5): each receiver's place."""
    out = np.full((sample.values.shape[2], len(SLOT_FEATURES)), np.nan, np.float32)
    out[:, 0], out[:, 1], out[:, 2] = sample.latitude[:, 0], sample.longitude[:, 0], sample.elevation[:, 0]
    return out
