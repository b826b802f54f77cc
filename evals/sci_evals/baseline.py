"""The contract of a baseline, and the dressing of a point forecast with its own errors on training data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy.special import ndtri

from sci_evals.climatology import Climatology
from sci_evals.metrics import LEVELS
from sci_evals.windowset import WindowSet

# Errors of a thin month (or cell) are mixed with the pooled ones as if the pool had been seen this many times.
_PRIOR_COUNT = 30.0
# Fewer errors than this do not show a shape; a Gaussian's is taken.
_SHAPE_COUNT = 200
_GAUSSIAN = ndtri(np.asarray(LEVELS))


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """A distribution per value, in the variables' transformed units: mean + spread x shape.

    Attributes:
        mean, spread: float64 (N, lead, frame_times, V, Y, X).
        shape: float64 (level, lead, frame_times, V), quantiles of the standardized errors at `LEVELS`; None for a
            Gaussian.
    """

    mean: np.ndarray
    spread: np.ndarray
    shape: np.ndarray | None = None

    def quantile(self, level: int, channel: int) -> np.ndarray:
        """The quantile at LEVELS[level] of one channel: (N, lead, frame_times, Y, X)."""
        z = _GAUSSIAN[level] if self.shape is None else self.shape[level, :, :, channel][None, :, :, None, None]
        return np.asarray(self.mean[:, :, :, channel] + z * self.spread[:, :, :, channel])

    def take(self, index: np.ndarray) -> Forecast:
        """Those windows."""
        return Forecast(mean=self.mean[index], spread=self.spread[index], shape=self.shape)


class Baseline(ABC):
    """A forecast that learns nothing, or little: fitted on training windows only, read from the context only.

    `fit` before `predict`. A baseline takes part where `applies` says so.
    """

    modalities: ClassVar[tuple[str, ...]] = ("grid", "series")
    # A handful of parameters is fitted to a part of the windows: more would cost time alone.
    few_parameters: ClassVar[bool] = True

    @classmethod
    def applies(cls, windows: WindowSet) -> bool:
        """Can this baseline be fitted to windows of this modality, step and context?"""
        return windows.modality in cls.modalities

    @abstractmethod
    def fit(self, train: WindowSet, climatology: Climatology) -> None:
        """Fit to the training windows; `climatology` is theirs (fitted once, shared by all baselines)."""

    @abstractmethod
    def predict(self, test: WindowSet) -> Forecast:
        """Forecast windows of any split from their contexts."""


class DressedBaseline(Baseline):
    """A point forecast dressed with its errors on the training windows.

    Their spread is by channel, lead and calendar month; the shape of their distribution by channel and lead. A
    Gaussian in its place would hand a model that has learned nothing a skill of 0.3 to 0.4 in visibility or rain,
    which pile up at a bound.
    """

    def fit(self, train: WindowSet, climatology: Climatology) -> None:
        """Fit the point forecast, then the spread of its training errors."""
        self.climatology = climatology
        self.fit_point(train)
        errors = train.future - self.training_point(train)
        self.dressing = fit_dressing(train, errors, climatology=climatology)
        self.shape = fit_shape(errors / self.dressing.at(train))

    def predict(self, test: WindowSet) -> Forecast:
        """The point forecast where it is defined, the climatology elsewhere, and the training spread."""
        return Forecast(mean=self.filled(test, self.point(test)), spread=self.dressing.at(test), shape=self.shape)

    def fit_point(self, train: WindowSet) -> None:
        """Fit the point forecast's parameters; nothing to fit by default."""

    @abstractmethod
    def point(self, windows: WindowSet) -> np.ndarray:
        """(N, lead, frame_times, V, Y, X) from the context alone; NaN where undefined."""

    def training_point(self, train: WindowSet) -> np.ndarray:
        """Forecasts of the training windows whose errors dress (out of fold where parameters could overfit)."""
        return self.filled(train, self.point(train))

    def filled(self, windows: WindowSet, point: np.ndarray) -> np.ndarray:
        """The point forecast, and the climatology where it is not defined."""
        return np.where(np.isnan(point), self.climatology.of_future(windows), point)


@dataclass(frozen=True, kw_only=True)
class Dressing:
    """Standard deviation of errors: month by channel and lead, times a factor per cell.

    Attributes:
        month_variance: float64 (12, lead, frame_times, V).
        cell_factor: float64 (place + 1, V, Y, X) of the climatology's places; 1 for places that it does not know.
    """

    month_variance: np.ndarray
    cell_factor: np.ndarray
    climatology: Climatology

    def at(self, windows: WindowSet) -> np.ndarray:
        """(N, lead, frame_times, V, Y, X)."""
        month = windows.future_month  # (N, lead)
        leads = np.arange(month.shape[1])
        variance = self.month_variance[month, leads]  # (N, lead, frame_times, V)
        factor = self.cell_factor[self.climatology.place_index(windows)]  # (N, V, Y, X)
        return np.asarray(np.sqrt(variance[..., None, None] * factor[:, None, None]))


def fit_dressing(train: WindowSet, errors: np.ndarray, *, climatology: Climatology) -> Dressing:
    """Mean squared training errors by channel, lead and month, and their ratio between cells of known places.

    A month's variance is shrunk to that of all months with a weight of 30 windows, so that a month without training
    data takes the pooled one; a cell's ratio is shrunk to 1 in the same way.

    Args:
        errors: (N, lead, frame_times, V, Y, X) of the training windows, NaN where the truth is missing.
    """
    squares, known = np.nan_to_num(errors) ** 2, ~np.isnan(errors)
    total, count = squares.sum(axis=(0, 4, 5)), known.sum(axis=(0, 4, 5))  # (lead, frame_times, V)
    pooled = total / np.maximum(count, 1)
    cells = squares[0, 0, 0, 0].size
    window_total, window_count = squares.sum(axis=(4, 5)), known.sum(axis=(4, 5))  # (N, lead, frame_times, V)
    month = train.future_month  # (N, lead)
    variances = np.empty((12, *pooled.shape))
    for m in range(12):
        chosen = (month == m)[:, :, None, None]
        share, windows = (window_total * chosen).sum(axis=0) / cells, (window_count * chosen).sum(axis=0) / cells
        variances[m] = (share + _PRIOR_COUNT * pooled) / (windows + _PRIOR_COUNT)
    scaled = squares / np.where(pooled > 0, pooled, 1.0)[..., None, None]
    repeats = squares.shape[1] * squares.shape[2]  # leads are not independent: together they count as one
    factor = np.ones((len(climatology.places) + 1, *squares.shape[3:]))
    place = climatology.place_index(train)
    for row in range(len(climatology.places)):
        own = place == row
        share, windows = (part[own].sum(axis=(0, 1, 2)) / repeats for part in (scaled, known))  # (V, Y, X)
        factor[row] = (share + _PRIOR_COUNT) / (windows + _PRIOR_COUNT)
    return Dressing(month_variance=variances, cell_factor=factor, climatology=climatology)


def fit_shape(standardized: np.ndarray) -> np.ndarray:
    """Quantiles at `LEVELS` of standardized errors (N, lead, frame_times, V, Y, X), NaN left out: (level, lead,
    frame_times, V).
    """
    leads, times, channels = standardized.shape[1:4]
    shape = np.empty((len(LEVELS), leads, times, channels))
    for lead, at, channel in np.ndindex(leads, times, channels):
        errors = standardized[:, lead, at, channel].ravel()
        errors = errors[np.isfinite(errors)]
        errors = errors[:: max(1, len(errors) // 20_000)]
        shape[:, lead, at, channel] = _GAUSSIAN if len(errors) < _SHAPE_COUNT else np.quantile(errors, LEVELS)
    return shape
