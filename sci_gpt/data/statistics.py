"""Statistics of the training split, accumulated in float64 while a store is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from sci_gpt.errors import DataError
from sci_tokenizers.sample import Sample, channel_name
from sci_tokenizers.statistics import CellClimatology, ChannelStatistics, harmonics, place_number
from sci_tokenizers.variables import forward_transform

BINS = 48  # of a cycle
LONGEST_GAP = BINS // 6  # a cycle with a longer unseen part is not covered
_VALUES_AT_ONCE = 2_000_000  # of a stretch
_PER_COEFFICIENT = 3  # values that a cell must have seen for each coefficient of its own climatology


@dataclass(kw_only=True, frozen=True)
class TrainingStatistics:
    """Sums over the training stretches of one source; only the training split is added.

    Sums are about an origin (a channel's first value), so that squares of Pascals do not cancel, and can be merged: the
    moments of two parts about two origins are moved to one, weighted by their counts (the pairwise update of Chan,
    Golub and LeVeque 1983, Am. Stat. 37, 242, which generalizes Welford's). Workers that saw different stretches in any
    order give the moments of the whole to rounding; a stretch taken in is itself a part that is merged.

    Attributes:
        source: its name.
        variables, levels: of its channels.
        num_year, num_day: harmonics of the climatology that are fitted where the split covers the whole cycle.
        by_cell: fit each cell's own climatology too (grids).
    """

    source: str
    variables: tuple[str, ...]
    levels: tuple[float, ...]
    num_year: int
    num_day: int
    by_cell: bool = False
    _sums: list[_Sums] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        size = 1 + 2 * self.num_year + 2 * self.num_day
        self._sums.extend(_Sums(size) for _ in self.variables)

    def add(self, sample: Sample) -> None:
        """Take one training stretch in."""
        part = replace(self, _sums=[])
        for mine, theirs in zip(self._sums, part._sums, strict=True):
            theirs.origin = mine.origin  # as long as one process adds, nothing has to be moved
        design = harmonics(sample.year_phase, sample.day_phase, num_year=self.num_year, num_day=self.num_day)
        cells = sample.values[0, 0].size
        at_once = max(1, _VALUES_AT_ONCE // cells)  # what is transformed in float64 stays small
        for number, (name, sums) in enumerate(zip(self.variables, part._sums, strict=True)):
            for start in range(0, sample.num_times, at_once):
                stop, lead = min(start + at_once, sample.num_times), min(start, 1)
                rows = slice(start - lead, stop)  # with the time before, for the steps
                values = sample.values[rows, number].reshape(-1, cells).astype(np.float64)
                values, valid = forward_transform(values, name), sample.valid[rows, number].reshape(-1, cells)
                now = slice(start, stop)
                sums.add(values, valid, lead=lead, design=design[now])
                sums.cover(sample, start + np.flatnonzero(valid[lead:].any(axis=1)))
                if self.by_cell:
                    sums.add_cells(sample, values[lead:], valid=valid[lead:], design=design[now])
        self.merge(part)

    def merge(self, other: TrainingStatistics) -> None:
        """Take in what another worker has seen of the same source.

        Raises:
            DataError: it is of another source, or counts other channels or harmonics.
        """
        mine, theirs = ((s.source, s.variables, s.levels, s.num_year, s.num_day, s.by_cell) for s in (self, other))
        if repr(mine) != repr(theirs):  # a level that is none is NaN, which equals nothing
            raise DataError(f"statistics of {theirs} cannot be merged into those of {mine}: they count other things")
        for sums, more in zip(self._sums, other._sums, strict=True):
            sums.merge(more)

    def save(self, path: Path) -> None:
        """Write the sums (.npz, nothing pickled), for `load`."""
        arrays = {f"{n}.{name}": array for n, sums in enumerate(self._sums) for name, array in sums.arrays().items()}
        with path.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # names are no options

    def load(self, path: Path) -> TrainingStatistics:
        """Statistics of this source with the sums that `save` wrote."""
        with np.load(path, allow_pickle=False) as arrays:
            found = replace(self, _sums=[])
            for number, sums in enumerate(found._sums):
                sums.fill({name.split(".", 1)[1]: arrays[name] for name in arrays if name.startswith(f"{number}.")})
        return found

    def finish(self) -> dict[str, ChannelStatistics]:
        """Statistics by channel, in transformed units.

        Raises:
            DataError: a channel without one valid training value.
        """
        names = [channel_name(v, level) for v, level in zip(self.variables, self.levels, strict=True)]
        for name, sums in zip(names, self._sums, strict=True):
            if not sums.count:
                raise DataError(f"source {self.source!r}: channel {name!r} has no valid value in its training split")
        return {
            name: sums.statistics(self.num_year, self.num_day) for name, sums in zip(names, self._sums, strict=True)
        }


class _Sums:
    """Sums of one channel about its origin."""

    def __init__(self, size: int) -> None:
        self.count = 0
        self.origin: float | None = None
        self.total = self.squares = 0.0
        self.steps = 0
        self.step_total = self.step_squares = 0.0
        self.minimum, self.maximum = np.inf, -np.inf
        self.normal = np.zeros((size, size))
        self.moment = np.zeros(size)
        self.year_bins = np.zeros(BINS, bool)
        self.day_bins = np.zeros(BINS, bool)
        self.tiles: dict[bytes, _Tile] = {}

    def add(self, values: np.ndarray, valid: np.ndarray, *, lead: int, design: np.ndarray) -> None:
        """values, valid (lead + time, cell); design (time, coefficient). The lead was counted before."""
        if not valid.any():
            return
        if self.origin is None:
            self.origin = float(values[valid][0])
        centred = np.where(valid, values - self.origin, 0.0)
        both = valid[1:] & valid[:-1]
        steps = np.where(both, centred[1:] - centred[:-1], 0.0)
        self.steps += int(both.sum())
        self.step_total += float(steps.sum())
        self.step_squares += float((steps**2).sum())
        values, valid, centred = values[lead:], valid[lead:], centred[lead:]
        if not valid.any():
            return
        self.count += int(valid.sum())
        self.minimum = min(self.minimum, float(values[valid].min()))
        self.maximum = max(self.maximum, float(values[valid].max()))
        self.total += float(centred.sum())
        self.squares += float((centred**2).sum())
        weight = valid.sum(axis=1).astype(np.float64)
        self.normal += (design * weight[:, None]).T @ design
        self.moment += design.T @ centred.sum(axis=1)

    def merge(self, other: _Sums) -> None:
        """Take in the sums of another part; they are moved to this part's origin."""
        if self.origin is None:
            self.origin = other.origin
        away = (other.origin or 0.0) - (self.origin or 0.0)
        self.count += other.count
        self.squares += other.squares + 2 * away * other.total + other.count * away**2
        self.total += other.total + other.count * away
        self.steps += other.steps
        self.step_total += other.step_total
        self.step_squares += other.step_squares
        self.minimum, self.maximum = min(self.minimum, other.minimum), max(self.maximum, other.maximum)
        self.normal += other.normal
        self.moment += other.moment + away * other.normal[0]  # the design's first column is 1
        self.year_bins |= other.year_bins
        self.day_bins |= other.day_bins
        for place, tile in other.tiles.items():
            self.tiles.setdefault(place, _Tile(tile.place, len(tile.moment[0]))).merge(tile)

    def cover(self, sample: Sample, seen: np.ndarray) -> None:
        """Mark the parts of the year and of the day that the split holds; `seen` are numbers of times."""
        self.year_bins[(sample.year_phase[seen] * BINS).astype(int)] = True
        self.day_bins[(sample.day_phase[seen] * BINS).astype(int)] = True

    def arrays(self) -> dict[str, np.ndarray]:
        """All sums as arrays, for `fill`."""
        tiles = list(self.tiles.values())
        size = len(self.moment)
        scalars = [self.count, self.steps, np.nan if self.origin is None else self.origin, self.total, self.squares]
        scalars += [self.step_total, self.step_squares, self.minimum, self.maximum]
        return {
            "scalars": np.array(scalars, np.float64),
            "normal": self.normal,
            "moment": self.moment,
            "bins": np.stack([self.year_bins, self.day_bins]),
            "tile_cells": np.array([len(tile.place) for tile in tiles], np.int64),
            "tile_place": np.concatenate([*(tile.place for tile in tiles), np.zeros(0, np.int64)]),
            "tile_normal": np.concatenate([*(tile.normal for tile in tiles), np.zeros((0, size, size))]),
            "tile_moment": np.concatenate([*(tile.moment for tile in tiles), np.zeros((0, size))]),
        }

    def fill(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take the sums that `arrays` gave."""
        count, steps, origin, self.total, self.squares, *rest = arrays["scalars"].tolist()
        self.step_total, self.step_squares, self.minimum, self.maximum = rest
        self.count, self.steps, self.origin = int(count), int(steps), None if np.isnan(origin) else origin
        self.normal, self.moment = arrays["normal"], arrays["moment"]
        self.year_bins, self.day_bins = arrays["bins"]
        first = 0
        for cells in arrays["tile_cells"].tolist():
            rows = slice(first, first + cells)
            tile = _Tile(arrays["tile_place"][rows], len(self.moment))
            tile.normal, tile.moment = arrays["tile_normal"][rows], arrays["tile_moment"][rows]
            self.tiles[tile.place.tobytes()] = tile
            first += cells

    def add_cells(self, sample: Sample, values: np.ndarray, *, valid: np.ndarray, design: np.ndarray) -> None:
        """Sums of each cell of a stretch; stretches of the same places go to the same sums."""
        place = place_number(sample.latitude, sample.longitude).ravel()
        tile = self.tiles.setdefault(place.tobytes(), _Tile(place, design.shape[1]))
        tile.add(values, valid, design=design)

    def statistics(self, num_year: int, num_day: int) -> ChannelStatistics:
        """The channel's statistics; a cycle that the split does not cover has no harmonics (they would extrapolate)."""
        kept_year = num_year if _covered(self.year_bins) else 0
        kept_day = num_day if _covered(self.day_bins) else 0
        columns = [0, *range(1, 1 + 2 * kept_year)]
        columns += range(1 + 2 * num_year, 1 + 2 * num_year + 2 * kept_day)
        normal = self.normal[np.ix_(columns, columns)]
        coefficients = np.linalg.lstsq(normal, self.moment[columns], rcond=None)[0]
        coefficients[0] += self.origin or 0.0
        mean = self.total / self.count
        variance = max(self.squares / self.count - mean**2, 0.0)
        step_mean = self.step_total / max(self.steps, 1)
        step_variance = max(self.step_squares / max(self.steps, 1) - step_mean**2, 0.0)
        return ChannelStatistics(
            count=self.count,
            mean=(self.origin or 0.0) + mean,
            std=float(np.sqrt(variance)),
            step_std=float(np.sqrt(step_variance)),
            num_year=kept_year,
            num_day=kept_day,
            climatology=tuple(float(c) for c in coefficients),
            minimum=self.minimum,
            maximum=self.maximum,
            cells=self._cells(columns) if len(columns) > 1 else None,
            products=tuple(map(tuple, normal.tolist())),
        )

    def _cells(self, columns: list[int]) -> CellClimatology | None:
        """Each cell's own climatology; a cell that was seen in two tiles keeps the first."""
        fitted = [tile.fit(columns) for tile in self.tiles.values()]
        if not sum(len(place) for place, _, _ in fitted):
            return None
        places, coefficients, normal = (np.concatenate(parts) for parts in zip(*fitted, strict=True))
        place, first = np.unique(places, return_index=True)
        products, pattern = np.unique(normal[first], axis=0, return_inverse=True)
        return CellClimatology(
            place=place,
            coefficients=coefficients[first].astype(np.float32),
            products=products,
            pattern=pattern.reshape(-1).astype(np.int64),
        )


class _Tile:
    """Normal equations of every cell of a tile."""

    def __init__(self, place: np.ndarray, size: int) -> None:
        self.place = place
        self.normal = np.zeros((len(place), size, size))
        self.moment = np.zeros((len(place), size))

    def add(self, values: np.ndarray, valid: np.ndarray, *, design: np.ndarray) -> None:
        """values, valid (time, cell); design (time, coefficient)."""
        seen = valid.astype(np.float64)
        products = design[:, :, None] * design[:, None, :]  # t i j
        self.normal += np.einsum("tc,tij->cij", seen, products, optimize=True)
        self.moment += np.where(valid, values, 0.0).T @ design

    def merge(self, other: _Tile) -> None:
        """Take in the equations of the same cells from another part."""
        self.normal += other.normal
        self.moment += other.moment

    def fit(self, columns: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Places, coefficients and products of the cells seen often enough for `columns` of the design."""
        count = self.normal[:, 0, 0]
        kept = np.flatnonzero(count >= _PER_COEFFICIENT * len(columns))
        normal = self.normal[kept][:, columns][:, :, columns] + 1e-9 * count[kept, None, None] * np.eye(len(columns))
        return self.place[kept], np.linalg.solve(normal, self.moment[kept][:, columns, None])[..., 0], normal


def _covered(bins: np.ndarray) -> bool:
    """Whether no unseen part of a cycle is longer than LONGEST_GAP bins."""
    seen = np.flatnonzero(bins)
    if not len(seen):
        return False
    gaps = np.diff(np.append(seen, seen[0] + len(bins))) - 1
    return bool(gaps.max() <= LONGEST_GAP)
