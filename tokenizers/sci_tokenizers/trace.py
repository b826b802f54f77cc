"""Trace tokenizer: a frame is a stretch of samples, a slot is a receiver, a token holds every component's samples."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from sci_tokenizers.autoregression import HORIZONS, own_forecast
from sci_tokenizers.ongoing import OwnSettings
from sci_tokenizers.sample import Sample
from sci_tokenizers.statistics import ChannelStatistics
from sci_tokenizers.tokenizer import Tokenizer, frame_features, log_scales, variable_rows
from sci_tokenizers.tokens import SLOT_FEATURES, Tokens
from sci_tokenizers.variables import VARIABLES

_MAD_TO_STD = 1.4826
_ORDERS = (8, 16, 24, 32, 48, 64, 96)
_MANY = 256  # waveforms (receivers x components): a document of more, as of a fibre, takes fewer orders
_ORDERS_OF_MANY = (8, 16, 32)
_AT_ONCE = 128  # waveforms whose autoregressions are held at once
_REFIT = 32  # frames
_SPREAD_FLOOR = 1e-4  # of a context's spread: a record that its own past foretells exactly


class TraceTokenizer(Tokenizer):
    """minus the context's median -> divided by the context's MAD (a floor of one count).

    The payload stays linear in the waveform, so that superposition holds and a forecast's spread means the same
    before and
    after an onset; the embedding compresses what the model sees, and the loss counts errors in spreads of the anchor.
    A value x comes back within (|x| + |x - offset|) / 2^24, float32's own rounding.
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
        """See `Tokenizer.encode`; payload (F, receivers, components, samples). Statistics are not used: gains
        differ.
        """
        frames = self._check(sample, num_context, leads=leads)
        n = self.settings.trace_samples
        values, valid = sample.values[..., 0].astype(np.float64), sample.valid[..., 0]  # t c r
        context, seen = values[: num_context * n], valid[: num_context * n]
        blanked = np.where(seen, context, np.nan)
        empty = ~seen.any(axis=0)
        blanked[:, empty] = 0.0
        # Offset and scale are numbers of float32, as the tokens hold them: decoding adds just what encoding took off.
        offset = _as_held(np.nanmedian(blanked, axis=0))  # c r
        spread = _MAD_TO_STD * np.nanmedian(np.abs(blanked - offset), axis=0)
        calibrated = np.array([VARIABLES[name].calibrated for name in sample.variables])[:, None]
        scale = _as_held(np.maximum(spread, np.where(calibrated, 1e-12, 1.0)))
        scaled = np.where(valid, (values - offset) / scale, 0.0)
        payload = scaled.reshape(frames, n, *scaled.shape[1:]).transpose(0, 3, 2, 1).astype(np.float32)  # f r c n
        mask = valid.reshape(frames, n, *valid.shape[1:]).transpose(0, 3, 2, 1)
        receivers, components = payload.shape[1:3]
        own = _own_forecast((values - offset) / scale, valid, n=n, num_context=num_context, leads=leads)
        features, time = frame_features(sample, n)
        features[:, :2] = np.nan  # the season and hour of an event say nothing of its waves, but would name the record
        return Tokens(
            key=sample.key,
            source=sample.source,
            modality="trace",
            payload=payload,
            valid=mask,
            ids=None,
            last=np.zeros_like(payload),
            anchor=own["anchor"],
            anchor_spread=own["anchor_spread"],
            volatility=own["volatility"],
            memory=np.zeros((*payload.shape, 0), np.float32),
            importance=_importance(payload, mask, own=own, leads=leads, num_context=num_context),
            weight=np.ones((receivers, components, n), np.float32),
            variable=np.tile(variable_rows(sample), (receivers, 1)),
            row=np.zeros(receivers, np.int16),
            column=np.zeros(receivers, np.int16),
            frame_features=features,
            slot_features=_slot_features(sample),
            log_scale=log_scales(scale.T, sample),
            pile=np.full(scale.T.shape, np.nan, np.float32),
            offset=np.broadcast_to(offset.T.astype(np.float32)[None, :, :, None], payload.shape),
            scale=scale.T.astype(np.float32),
            time=time,
            num_context=num_context,
            leads=leads,
        )

    def own_settings(self) -> OwnSettings:
        """See `Tokenizer.own_settings`."""
        return OwnSettings(orders=_ORDERS, refit=_REFIT, steps=self.frame_times, floor=_SPREAD_FLOOR)

    def arrange(self, values: np.ndarray) -> np.ndarray:
        """See `Tokenizer.arrange`."""
        return values[..., 0].transpose(0, 3, 2, 1)  # b r c n

    def cells(self, tokens: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """See `Tokenizer.cells`."""
        return np.broadcast_to(np.repeat(tokens, self.frame_times, axis=0)[:, None, :, None], shape)

    def rescaled(self, tokens: Tokens, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
        """See `Tokenizer.rescaled`."""
        frames, n = tokens.num_frames, self.frame_times
        values, valid = (
            x[..., 0].reshape(frames, n, *x.shape[1:3]).transpose(0, 3, 2, 1)  # f r c n
            for x in (sample.values.astype(np.float64), sample.valid)
        )
        payload = (values - tokens.offset) / tokens.scale[:, :, None]
        return np.where(valid, payload, 0.0).astype(np.float32), valid

    def decode(self, tokens: Tokens, payload: np.ndarray) -> np.ndarray:
        """Scaled samples (..., F, receivers, components, n) to physical (..., time, component, receiver, 1)."""
        physical = payload.astype(np.float64) * tokens.scale[:, :, None] + tokens.offset
        moved = np.moveaxis(physical, -1, -3)  # .. f n r c
        moved = np.swapaxes(moved, -1, -2)  # .. f n c r
        *lead, frames, n, components, receivers = moved.shape
        return moved.reshape(*lead, frames * n, components, receivers, 1).astype(np.float32)


def _as_held(array: np.ndarray) -> np.ndarray:
    """float64 of what float32 holds."""
    return array.astype(np.float32).astype(np.float64)


def _own_forecast(
    scaled: np.ndarray, valid: np.ndarray, *, n: int, num_context: int, leads: tuple[int, ...]
) -> dict[str, np.ndarray]:
    """What each frame's own past says of the frames it is asked for, in payload units (see
    `autoregression.own_forecast`).

    The first fit is at the context's end; earlier frames are asked nothing and hold 0, as do components never seen
    there. A document of more than `_MANY` waveforms takes the lower orders alone, which costs less.
    """
    times, components, receivers = scaled.shape
    frames = times // n
    flat = np.where(valid, scaled, 0.0).transpose(2, 1, 0).reshape(receivers * components, times)
    known = valid.transpose(2, 1, 0).reshape(flat.shape)
    steps = (np.asarray(leads)[:, None] - 1) * n + 1 + np.arange(n)  # lead n
    live = np.flatnonzero(known[:, : num_context * n].any(axis=1))
    origins = np.arange(num_context, frames + 1) * n - 1
    orders = _ORDERS if len(live) <= _MANY else _ORDERS_OF_MANY
    tails = {"anchor": steps.shape, "anchor_spread": steps.shape, "volatility": (len(HORIZONS),)}
    whole = {name: np.zeros((len(flat), frames, math.prod(tail)), np.float32) for name, tail in tails.items()}
    for first in range(0, len(live), _AT_ONCE):
        some = live[first : first + _AT_ONCE]
        own = own_forecast(flat[some], known[some], origins=origins, steps=steps.ravel(), orders=orders, refit=_REFIT)
        whole["anchor"][some, num_context - 1 :] = own.mean
        whole["anchor_spread"][some, num_context - 1 :] = np.log(np.maximum(own.spread, _SPREAD_FLOOR))
        whole["volatility"][some, num_context - 1 :] = own.volatility
    split = {name: array.reshape(receivers, components, frames, *tails[name]) for name, array in whole.items()}
    return {
        "anchor": split["anchor"].transpose(2, 0, 1, 4, 3),
        "anchor_spread": split["anchor_spread"].transpose(2, 0, 1, 4, 3),
        "volatility": split["volatility"].transpose(2, 0, 1, 3),
    }


def _importance(
    payload: np.ndarray, valid: np.ndarray, *, own: dict[str, np.ndarray], leads: tuple[int, ...], num_context: int
) -> float:
    """1, or less where an onset stands far outside what the past foretells: 1 / root mean square of the first lead's
    errors.

    Errors are counted in spreads of the anchor; an onset is a thousand of them high, and without this one document
    would
    outweigh a thousand others.
    """
    first, start = leads[0], num_context - 1
    ahead, seen = payload[start + first :], valid[start + first :]
    count = len(ahead)
    spread = np.exp(own["anchor_spread"][start : start + count, ..., 0].astype(np.float64))
    errors = (ahead - own["anchor"][start : start + count, ..., 0]) / spread
    mean_square = float((errors**2)[seen].mean()) if seen.any() else 1.0
    return 1.0 / max(1.0, mean_square) ** 0.5


def _slot_features(sample: Sample) -> np.ndarray:
    """(S, 5): each receiver's place within its array: latitude, longitude and elevation less the array's mean.

    Absolute places would name the record: with few stations a model learns them by heart and fails at the next one.
    """
    out = np.full((sample.values.shape[2], len(SLOT_FEATURES)), np.nan, np.float32)
    for column, place in enumerate((sample.latitude[:, 0], sample.longitude[:, 0], sample.elevation[:, 0])):
        known = np.isfinite(place)
        if known.any():
            out[:, column] = place - place[known].mean()
    return out
