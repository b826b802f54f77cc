"""The climatology that baselines share: harmonics of year and day per channel and cell, fitted to training windows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from sci_evals.windowset import WindowSet
from sci_tokenizers.statistics import harmonics

DAY_SECONDS = 86400.0
YEAR_SECONDS = 365.2425 * DAY_SECONDS
_MAX_ROWS = 200_000
# A harmonic of the year is fitted when the training windows see this many twelfths of it: fewer would extrapolate.
_MONTHS_FOR_YEAR = 10


def season_seconds(step_seconds: float) -> float | None:
    """Length of a season: a day for sub-daily data, a year for daily to monthly data, None for slower data and for
    traces.
    """
    if 60.0 <= step_seconds < DAY_SECONDS:
        return DAY_SECONDS
    return YEAR_SECONDS if DAY_SECONDS <= step_seconds < YEAR_SECONDS / 6 else None


@dataclass(frozen=True, kw_only=True, eq=False)
class Climatology:
    """Expected value by phase of year and day, of every known place and of all together.

    Attributes:
        coefficients: float64 (place + 1, harmonic, V, Y, X), in transformed units; the last is that of all places
            pooled.
        places: the known places (see `WindowSet.place_names`); empty where test windows lie elsewhere.
        num_year, num_day: harmonics of each cycle.
    """

    coefficients: np.ndarray
    places: tuple[str, ...]
    num_year: int
    num_day: int

    def place_index(self, windows: WindowSet) -> np.ndarray:
        """Row of `coefficients` for each window, int (N,)."""
        known = {name: i for i, name in enumerate(self.places)}
        rows = np.asarray([known.get(name, len(known)) for name in windows.place_names])
        return np.asarray(rows[windows.stretch])

    def of_context(self, windows: WindowSet) -> np.ndarray:
        """At the context's times: (N, C, V, Y, X)."""
        times = windows.shape.context_times
        return self._at(windows, np.arange(times))

    def of_future(self, windows: WindowSet) -> np.ndarray:
        """At the forecast times: (N, lead, frame_times, V, Y, X)."""
        return self._at(windows, windows.shape.future_index)

    def _at(self, windows: WindowSet, index: np.ndarray) -> np.ndarray:
        year, day = windows.year_phase[:, index], windows.day_phase[:, index]
        out = np.empty((*year.shape, *self.coefficients.shape[2:]))
        place = self.place_index(windows)
        for row in np.unique(place):
            own = place == row
            design = harmonics(year[own].ravel(), day[own].ravel(), num_year=self.num_year, num_day=self.num_day)
            flat = design @ self.coefficients[row].reshape(design.shape[1], -1)
            out[own] = flat.reshape(-1, *out.shape[1:])
        return out


@lru_cache(maxsize=3)
def context_anomalies(climatology: Climatology, windows: WindowSet) -> np.ndarray:
    """Context less climatology, NaN where missing: float32 (N, C, V, Y, X).

    Several baselines need those of the same windows; `context_anomalies.cache_clear()` frees them.
    """
    return np.asarray(windows.context - climatology.of_context(windows), np.float32)


def fit_climatology(train: WindowSet, *, by_place: bool) -> Climatology:
    """Least squares over the training windows' values, per place and cell, or pooled over places (cells stay apart).

    Two harmonics of the year where the windows see nearly all of it, two of the day
    for sub-daily data. A ridge of a millionth keeps thin fits defined. A cell never seen takes its channel's mean
    over all cells. With `by_place` each place has its own fit; it is for sources whose test windows lie at training
    places.
    """
    step = float(np.median(train.step_seconds))
    months = len(np.unique((train.year_phase * 12).astype(int)))
    seasonal = season_seconds(step) is not None and months >= _MONTHS_FOR_YEAR
    num_year = 2 if seasonal else 0
    num_day = 2 if season_seconds(step) == DAY_SECONDS else 0
    names = np.asarray(train.place_names)[train.stretch]
    places = tuple(dict.fromkeys(names.tolist())) if by_place else ()
    subsets = [np.flatnonzero(names == place) for place in places] + [np.arange(train.num_windows)]
    coefficients = [_fit_cells(train, subset, num_year=num_year, num_day=num_day) for subset in subsets]
    return Climatology(coefficients=np.stack(coefficients), places=places, num_year=num_year, num_day=num_day)


def _fit_cells(train: WindowSet, subset: np.ndarray, *, num_year: int, num_day: int) -> np.ndarray:
    """Coefficients (K, V, Y, X) of the windows `subset`."""
    size = len(subset) * train.time.shape[1]
    rows, columns = np.unravel_index(np.arange(0, size, max(1, size // _MAX_ROWS)), (len(subset), train.time.shape[1]))
    rows = subset[rows]
    values = train.work[rows, columns].astype(np.float64)  # (R, V, Y, X)
    valid = train.valid[rows, columns]
    design = harmonics(
        train.year_phase[rows, columns], train.day_phase[rows, columns], num_year=num_year, num_day=num_day
    )  # (R, K)
    own = _solve(design, values.reshape(len(values), -1), valid=valid.reshape(len(valid), -1))  # (K, V Y X)
    if np.isnan(own).any():
        count = valid.sum(axis=(0, 2, 3))
        mean = np.where(valid, values, 0.0).sum(axis=(0, 2, 3)) / np.maximum(count, 1)  # (V,)
        fallback = np.zeros((len(own), len(mean)))
        fallback[0] = mean
        own = np.where(np.isnan(own), np.repeat(fallback, values[0, 0].size, axis=1), own)
    return own.reshape(-1, *values.shape[1:])


def _solve(design: np.ndarray, values: np.ndarray, *, valid: np.ndarray) -> np.ndarray:
    """Least squares per column over its valid rows: (K, columns); NaN where a column has no valid row."""
    ridge = 1e-6 * np.eye(design.shape[1])
    count = valid.sum(axis=0)
    offset = np.where(valid, values, 0.0).sum(axis=0) / np.maximum(count, 1)  # the ridge shrinks towards the mean
    masked = np.where(valid, values - offset, 0.0)
    right = design.T @ masked  # (K, columns)
    if valid.all():
        solution = np.linalg.solve(design.T @ design / len(design) + ridge, right / len(design))
    else:
        products = (design[:, :, None] * design[:, None, :]).reshape(len(design), -1)  # (R, K K)
        grams = (valid.T.astype(np.float64) @ products).reshape(-1, *ridge.shape) / np.maximum(count, 1)[:, None, None]
        solution = np.linalg.solve(grams + ridge, (right / np.maximum(count, 1)).T[:, :, None])[:, :, 0].T
    solution[0] += offset
    return np.where(count > 0, solution, np.nan)
