"""Memories: what of a slot's past a head may lean on beside its anchor."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_MEMORY_LAGS = (1, 2, 3)
_KIN_LAGS = (0, 1, 2)
_MEMORY_HALF_LIVES = (2.0, 8.0, 32.0, float("inf"))
MEMORIES = (
    *(f"lag_{lag}" for lag in _MEMORY_LAGS),
    *(f"kin_lag_{lag}" for lag in _KIN_LAGS),
    "kin_since",
    *(f"mean_{half_life:g}" for half_life in _MEMORY_HALF_LIVES),
    "home",
)


def last_valid(payload: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """The newest valid payload at or before each frame, 0 before the first: the anchor of grids and series."""
    frames = np.arange(len(payload)).reshape(-1, *([1] * (payload.ndim - 1)))
    newest = np.maximum.accumulate(np.where(valid, frames, -1), axis=0)
    picked = np.take_along_axis(payload, np.maximum(newest, 0), axis=0)
    return np.where(newest >= 0, picked, 0.0).astype(np.float32)


def memories(
    payload: np.ndarray, valid: np.ndarray, *, last: np.ndarray, home: np.ndarray, kin: np.ndarray
) -> np.ndarray:
    """What a head may lean on beside the anchor, as differences from `last`, float32 (F, S, V, K, len(MEMORIES)).

    The last valid value some frames ago, of the slot and of its kin; the last value moved as its kin moved since;
    running means over the past with different half-lives;
    the plain mean of all frames so far; and `home`, where the climatology lies. Only frames up to the token's own
    enter.

    Args:
        payload, valid: (F, S, V, K).
        last: of `last_valid`.
        home: (S, V, K) or broadcast to it, scaled.
        kin: (S, S), weights of other slots in a slot's kin; a slot without kin has a row of 0 and leans on nothing
            there.
    """
    frames = len(payload)
    relatives = np.einsum("st,ftvk->fsvk", kin, last)
    alone = kin.sum(axis=1) == 0
    relatives[:, alone] = last[:, alone]
    parts = [_ago(last, lag) for lag in _MEMORY_LAGS] + [_ago(relatives, lag) for lag in _KIN_LAGS]
    for j in range(len(_KIN_LAGS)):
        parts[len(_MEMORY_LAGS) + j][:, alone] = last[:, alone]
    keep = 0.5 ** (1.0 / np.array(_MEMORY_HALF_LIVES))
    means = np.zeros((*payload.shape, len(keep)), np.float32)
    total, weight = np.zeros(means.shape[1:]), np.zeros(means.shape[1:])
    for f in range(frames):
        total = keep * total + (payload[f] * valid[f])[..., None]
        weight = keep * weight + valid[f][..., None]
        means[f] = total / np.maximum(weight, 1e-9)
    at_home = np.broadcast_to(home[None], payload.shape)
    newest = np.maximum.accumulate(np.where(valid, np.arange(frames)[:, None, None, None], 0), axis=0)
    moved = last + relatives - np.take_along_axis(relatives, newest, axis=0)
    stacked = np.concatenate([np.stack([*parts, moved], axis=-1), means, at_home[..., None]], axis=-1)
    return (stacked - last[..., None]).astype(np.float32)


def kin_weights(variables: Sequence[object]) -> np.ndarray:
    """(S, S) weights: the mean over a slot's kin, the other slots of the same variable (other levels); rows of 0
    without any.
    """
    same = np.array([[a == b for b in variables] for a in variables], np.float64) - np.eye(len(variables))
    return same / np.maximum(same.sum(axis=1, keepdims=True), 1.0)


class GrowingMemory:
    """`last_valid` and `memories` of a document that grows frame by frame, for B ways in which it goes on.

    Args:
        payload, valid, last: (C, S, V, K) of the frames so far, the same for all B.
        home, kin: as for `memories`.
        batch: B.
    """

    def __init__(
        self,
        payload: np.ndarray,
        valid: np.ndarray,
        *,
        last: np.ndarray,
        home: np.ndarray,
        kin: np.ndarray,
        batch: int,
    ) -> None:
        self._kin, self._home = kin, home
        self._alone = kin.sum(axis=1) == 0
        self._keep = 0.5 ** (1.0 / np.array(_MEMORY_HALF_LIVES))
        self._total, self._weight = (np.zeros((batch, *payload.shape[1:], len(self._keep))) for _ in range(2))
        shape = (batch, *last.shape[1:])
        self._last: list[np.ndarray] = []
        self._relatives: list[np.ndarray] = []
        self._moved_from = np.zeros(shape)
        for frame in range(len(payload)):
            now, there, newest = (np.broadcast_to(part[frame], shape) for part in (payload, valid, last))
            self._follow(now, there, last=newest)

    def _follow(self, payload: np.ndarray, valid: np.ndarray, *, last: np.ndarray) -> None:
        relatives = np.einsum("st,btvk->bsvk", self._kin, last)
        relatives[:, self._alone] = last[:, self._alone]
        first = not self._last
        self._moved_from = np.where(valid | first, relatives, self._moved_from)
        self._last = [last, *(self._last or [last] * 3)][:4]
        self._relatives = [relatives, *(self._relatives or [relatives] * 3)][:4]
        self._total = self._keep * self._total + (payload * valid)[..., None]
        self._weight = self._keep * self._weight + valid[..., None]

    def extend(self, payload: np.ndarray, valid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """One more frame, (B, S, V, K): its last values and memories, (B, S, V, K) and (B, S, V, K, J)."""
        last = np.where(valid, payload, self._last[0]).astype(np.float32)
        self._follow(payload, valid, last=last)
        kin = [self._relatives[lag].copy() for lag in _KIN_LAGS]
        for part in kin:
            part[:, self._alone] = last[:, self._alone]
        moved = last + self._relatives[0] - self._moved_from
        means = (self._total / np.maximum(self._weight, 1e-9)).astype(np.float32)
        home = np.broadcast_to(self._home, last.shape)
        near = np.stack([*(self._last[lag] for lag in _MEMORY_LAGS), *kin, moved], axis=-1)
        stacked = np.concatenate([near, means, home[..., None]], axis=-1)
        return last, (stacked - last[..., None]).astype(np.float32)


def _ago(values: np.ndarray, lag: int) -> np.ndarray:
    """Values `lag` frames earlier; the first frame's before that."""
    return np.concatenate([np.repeat(values[:1], min(lag, len(values)), axis=0), values[: max(len(values) - lag, 0)]])
