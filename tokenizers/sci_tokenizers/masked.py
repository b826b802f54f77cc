"""Masked documents: tubes of slots and frames are hidden before a sample is encoded, then asked for themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from sci_tokenizers.sample import Sample
from sci_tokenizers.statistics import ChannelStatistics
from sci_tokenizers.tokenizer import Tokenizer
from sci_tokenizers.tokens import Masked, Tokens

HIDDEN_SHARE = 0.3  # of a document's tokens, about
_TUBE_SHARE = 8  # a tube is at most 1 / this of the document's frames long
_SPREAD_FLOOR = {"grid": 0.05, "series": 0.1, "trace": 1e-4}  # of the context's scale


def tubes(frames: int, slots: int, *, num_context: int, key: int) -> np.ndarray:
    """Which tokens are hidden, bool (F, S): some slots over a stretch of frames, again and again up to HIDDEN_SHARE.

    One frame of the context stays visible in every slot. A pure function of its arguments; `key` has 64 bits.
    """
    random = np.random.Generator(np.random.Philox(key=key))
    hidden = np.zeros((frames, slots), bool)
    kept = random.integers(num_context, size=slots)
    for _ in range(4 * _TUBE_SHARE * slots):  # an end for documents that are too short for the share
        length = int(random.integers(1, max(frames // _TUBE_SHARE, 1) + 1))
        start = int(random.integers(frames - length + 1))
        taken = random.permutation(slots)[: int(random.integers(1, slots + 1))]
        hidden[start : start + length, taken] = True
        hidden[kept, np.arange(slots)] = False
        if hidden.mean() >= HIDDEN_SHARE:
            break
    return hidden


def masked_tokens(
    tokenizer: Tokenizer,
    sample: Sample,
    *,
    key: int,
    num_context: int,
    leads: tuple[int, ...],
    statistics: Mapping[str, ChannelStatistics] | None = None,
) -> Tokens:
    """A masked document of a window: what is hidden is blanked before anything is computed from the window.

    The anchor of a hidden value lies on the line between the nearest visible values of its cell before and after (the
    nearest one at the ends); 0 for waveforms. Its spread is that of a random walk with the visible one-step
    differences, tied at both of them; for waveforms the root mean square of the frames beside it.

    Raises:
        TokenizerError: as `Tokenizer.encode`.
    """
    frames, slots = sample.num_times // tokenizer.frame_times, tokenizer.num_slots(sample.values.shape[1:])
    hidden = tubes(frames, slots, num_context=num_context, key=key)
    cells = tokenizer.cells(hidden, sample.values.shape)
    visible = replace(
        sample, values=np.where(cells, np.float32(0.0), sample.values), valid=np.asarray(sample.valid & ~cells)
    )
    tokens = tokenizer.encode(visible, num_context=num_context, leads=leads, statistics=statistics)
    truth, valid = tokenizer.rescaled(tokens, sample)
    valid = valid & hidden[:, :, None, None]
    truth = np.where(valid, truth, 0.0).astype(np.float32)
    return _asked(tokens, Masked(hidden=hidden, truth=truth, valid=valid))


def _asked(tokens: Tokens, masked: Masked) -> Tokens:
    """The document with the anchors of its hidden tokens; what a head leans on is counted from them."""
    floor = _SPREAD_FLOOR[tokens.modality]
    if tokens.modality == "trace":
        seen = np.asarray(tokens.valid.any(axis=-1, keepdims=True))
        power = (tokens.payload**2 * tokens.valid).sum(-1, keepdims=True) / np.maximum(
            tokens.valid.sum(-1)[..., None], 1
        )
        rms, _ = interpolated(np.sqrt(power), seen)
        anchor = np.zeros_like(tokens.payload)
        spread = np.broadcast_to(np.maximum(rms, floor), anchor.shape)
    else:
        anchor, steps = interpolated(tokens.payload, tokens.valid)
        spread = np.maximum(_one_step(tokens)[None, :, :, None] * np.sqrt(steps), floor)
    here = masked.hidden[:, :, None, None]
    last = np.where(here, anchor, tokens.last).astype(np.float32)
    importance = 1.0
    if tokens.modality == "trace" and masked.valid.any():
        errors = ((masked.truth - anchor) / spread)[masked.valid]
        importance = 1.0 / max(1.0, float((errors**2).mean())) ** 0.5
    return replace(
        tokens,
        last=last,
        memory=tokens.memory + (tokens.last - last)[..., None],
        anchor=anchor[..., None].astype(np.float32),
        anchor_spread=np.log(spread)[..., None].astype(np.float32),
        importance=importance,
        masked=masked,
    )


def interpolated(values: np.ndarray, valid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values (F, ...) on the line between the nearest valid ones before and after, and the variance there of a random
    walk of unit steps tied at both, in frames; valid ones are themselves, with variance 0. Nothing valid: 0 and F.
    """
    frames = len(values)
    number = np.arange(frames).reshape(-1, *[1] * (values.ndim - 1))
    before = np.maximum.accumulate(np.where(valid, number, -1), axis=0)
    after = np.minimum.accumulate(np.where(valid, number, frames)[::-1], axis=0)[::-1]
    lone_before, lone_after = after == frames, before < 0
    first, second = np.where(lone_after, after, before), np.where(lone_before, before, after)
    none = lone_before & lone_after
    first, second = np.where(none, 0, first), np.where(none, 0, second)
    gap = np.maximum(second - first, 1)
    share = (number - first) / gap * (second > first)
    low, high = (np.take_along_axis(values, at, axis=0) for at in (first, second))
    line = np.where(none, 0.0, low + share * (high - low))
    tied = (number - first) * (second - number) / gap
    steps = np.where(second > first, tied, np.abs(number - first))
    return line, np.where(none, frames, steps).astype(np.float64)


def _one_step(tokens: Tokens) -> np.ndarray:
    """Root mean square of the differences of neighbouring frames, (S, V), over what is visible; 1 where none is."""
    both = tokens.valid[1:] & tokens.valid[:-1]
    squares = np.where(both, np.diff(tokens.payload.astype(np.float64), axis=0) ** 2, 0.0).sum(axis=(0, 3))
    count = both.sum(axis=(0, 3))
    return np.where(count > 0, np.sqrt(squares / np.maximum(count, 1)), 1.0)
