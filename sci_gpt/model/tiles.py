"""Tiles: a frame's slots in tiles of queries, each with the keys within a radius around it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Tiles:
    """n tiles of the S slots of a frame, each of a queries (the last repeated where fewer) and b keys (masked where
    fewer).

    Attributes:
        queries: int64 (n, a), slots.
        keys: int64 (n, b), slots.
        mask: bool (n, a, b), True where the key lies within the radius of the query.
        place: int64 (S,), where each slot stands among the n * a queries; used of the whole, not of a part.
    """

    queries: Tensor
    keys: Tensor
    mask: Tensor
    place: Tensor

    def part(self, start: int, stop: int) -> Tiles:
        """Tiles [start, stop)."""
        return Tiles(
            queries=self.queries[start:stop], keys=self.keys[start:stop], mask=self.mask[start:stop], place=self.place
        )


def tiles_of(row: np.ndarray, column: np.ndarray, *, period: int, radius: int) -> Tiles | None:
    """The tiles of a frame whose slots lie at patch `row`, `column` (S,), or None where every slot sees every other.

    Args:
        row, column: integers.
        period: columns once around the globe, 0 where the frame does not go around.
        radius: farthest patch that is seen, in rows and in columns.
    """
    rows, columns = (np.ascontiguousarray(axis, np.int64).tobytes() for axis in (row, column))
    return _tiles(rows, columns, period=period, radius=radius)


def _apart(first: np.ndarray, second: np.ndarray, *, period: int) -> np.ndarray:
    """Columns between, the shorter way around where there is one."""
    between = np.abs(first - second)
    return np.minimum(between % period, -between % period) if period else between


@lru_cache(maxsize=64)
def _tiles(rows: bytes, columns: bytes, *, period: int, radius: int) -> Tiles | None:
    row, column = np.frombuffer(rows, np.int64), np.frombuffer(columns, np.int64)
    wide = int(np.ptp(column))
    across = min(wide, period // 2) if period else wide
    if np.ptp(row) <= radius and across <= radius:
        return None
    edge = max(4, 3 * radius // 2)  # wider tiles multiply more, narrower ones gather more
    tile = (row // edge) * (column.max() // edge + 1) + column // edge
    members = [np.flatnonzero(tile == number) for number in np.unique(tile)]
    seen = []
    for own in members:
        band = np.flatnonzero((row >= row[own].min() - radius) & (row <= row[own].max() + radius))
        near = (np.abs(row[own][:, None] - row[band]) <= radius) & (
            _apart(column[own][:, None], column[band], period=period) <= radius
        )
        met = near.any(axis=0)
        seen.append((band[met], near[:, met]))
    return _joined(members, seen, num_slots=len(row))


def _joined(members: list[np.ndarray], seen: list[tuple[np.ndarray, np.ndarray]], *, num_slots: int) -> Tiles:
    a, b = max(map(len, members)), max(len(keys) for keys, _ in seen)
    queries, keys = np.zeros((len(members), a), np.int64), np.zeros((len(members), b), np.int64)
    mask, place = np.zeros((len(members), a, b), bool), np.zeros(num_slots, np.int64)
    for n, (own, (band, near)) in enumerate(zip(members, seen, strict=True)):
        filled = np.minimum(np.arange(a), len(own) - 1)
        queries[n], keys[n, : len(band)], mask[n, :, : len(band)] = own[filled], band, near[filled]
        place[own] = n * a + np.arange(len(own))
    return Tiles(
        queries=torch.from_numpy(queries),
        keys=torch.from_numpy(keys),
        mask=torch.from_numpy(mask),
        place=torch.from_numpy(place),
    )
