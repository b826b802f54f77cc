"""Baselines without regression: persistence, climatology, damped anomaly persistence, recent mean, a season ago."""

from __future__ import annotations

import numpy as np

from sci_evals.baseline import DressedBaseline, Forecast, fit_shape
from sci_evals.climatology import Climatology, context_anomalies, season_seconds
from sci_evals.windowset import WindowSet

_RECENT_COUNTS = (2, 3, 5, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)

_SPREAD_COUNT = 8.0  # values of the context that the training errors' spread weighs as much as


def last_valid(values: np.ndarray) -> np.ndarray:
    """The last value along axis 1 that is not NaN: (N, time, ..) -> (N, ..); NaN where there is none."""
    age = np.argmax(~np.isnan(values[:, ::-1]), axis=1, keepdims=True)
    return np.take_along_axis(values, values.shape[1] - 1 - age, axis=1)[:, 0]


def _every_lead(windows: WindowSet, value: np.ndarray) -> np.ndarray:
    """(N, V, Y, X) -> (N, lead, frame_times, V, Y, X)."""
    leads, times = windows.shape.future_index.shape
    return np.broadcast_to(value[:, None, None], (len(value), leads, times, *value.shape[1:]))


def _last_anomaly(climatology: Climatology, windows: WindowSet) -> np.ndarray:
    return _every_lead(windows, last_valid(context_anomalies(climatology, windows)))


class Persistence(DressedBaseline):
    """The last valid value of the context."""

    def point(self, windows: WindowSet) -> np.ndarray:
        """The same value at every lead."""
        return _every_lead(windows, last_valid(windows.context))


class SeasonalClimatology(DressedBaseline):
    """The training years' expectation by phase of year and hour."""

    def point(self, windows: WindowSet) -> np.ndarray:
        """The climatology at the forecast times; the context is not used."""
        return self.climatology.of_future(windows)


class AnomalyPersistence(DressedBaseline):
    """Climatology plus the last anomaly, whole."""

    def point(self, windows: WindowSet) -> np.ndarray:
        """Climatology + last anomaly."""
        return self.climatology.of_future(windows) + _last_anomaly(self.climatology, windows)


class DampedPersistence(DressedBaseline):
    """Climatology plus a fraction of the last anomaly, regressed on training windows per channel and lead."""

    def fit_point(self, train: WindowSet) -> None:
        """Fraction = sum(last x future) / sum(last^2) over anomalies."""
        last = _last_anomaly(self.climatology, train)
        future = train.future - self.climatology.of_future(train)
        known = ~np.isnan(last * future)
        axes = (0, 4, 5)
        product = np.where(known, last * future, 0.0).sum(axis=axes)
        power = np.where(known, np.broadcast_to(last, future.shape) ** 2, 0.0).sum(axis=axes)
        self.fraction = product / np.where(power > 0, power, 1.0)  # (lead, frame_times, V)

    def point(self, windows: WindowSet) -> np.ndarray:
        """Climatology + fraction x last anomaly."""
        return self.climatology.of_future(windows) + self.fraction[..., None, None] * _last_anomaly(
            self.climatology, windows
        )


class RecentMean(DressedBaseline):
    """The mean of the last k frames; k is the one with the least squared error on training windows, per channel and
    lead.
    """

    def fit_point(self, train: WindowSet) -> None:
        """Try the counts that the context holds."""
        context, future = train.context, train.future
        self.counts = tuple(k for k in _RECENT_COUNTS if k < context.shape[1]) or (context.shape[1],)
        errors = []
        for count in self.counts:
            squares = (future - _every_lead(train, _mean_of_last(context, count))) ** 2
            known = ~np.isnan(squares)
            errors.append(np.where(known, squares, 0.0).sum(axis=(0, 4, 5)) / np.maximum(known.sum(axis=(0, 4, 5)), 1))
        self.best = np.argmin(errors, axis=0)  # (lead, frame_times, V)

    def point(self, windows: WindowSet) -> np.ndarray:
        """The chosen mean per channel and lead."""
        context = windows.context
        means = np.stack([_mean_of_last(context, count) for count in self.counts])  # (k, N, V, Y, X)
        return np.moveaxis(means[self.best, :, np.arange(means.shape[2])], 3, 0)  # (lead, time, V, N, Y, X) -> N first


class RecentSpread(RecentMean):
    """The recent mean with the spread of its own context, drawn towards that of its training errors.

    A calm week is followed by a calm day: what knows no more than how its context scatters must not gain by it.
    """

    def fit(self, train: WindowSet, climatology: Climatology) -> None:
        """As every dressed baseline, then the shape of errors over the local spread."""
        super().fit(train, climatology)
        errors = train.future - self.training_point(train)
        self.shape = fit_shape(errors / self._local(train))

    def predict(self, test: WindowSet) -> Forecast:
        """The recent mean, the local spread."""
        return Forecast(mean=self.filled(test, self.point(test)), spread=self._local(test), shape=self.shape)

    def _local(self, windows: WindowSet) -> np.ndarray:
        """Root of the context's variance and the training errors' variance, weighted as so many values."""
        known = ~np.isnan(windows.context)
        count = known.sum(axis=1)
        values = np.nan_to_num(windows.context)
        mean = values.sum(axis=1) / np.maximum(count, 1)
        squares = (np.where(known, windows.context - mean[:, None], 0.0) ** 2).sum(axis=1)[:, None, None]
        seen = count[:, None, None]
        return np.asarray(np.sqrt((squares + _SPREAD_COUNT * self.dressing.at(windows) ** 2) / (seen + _SPREAD_COUNT)))


class SeasonAgo(DressedBaseline):
    """The value a season (a day for sub-daily, a year for daily to monthly data) before, where the context holds it."""

    @classmethod
    def applies(cls, windows: WindowSet) -> bool:
        """The context must reach one season before the longest lead."""
        lag = _season_times(windows)
        return super().applies(windows) and lag > 0 and (windows.shape.future_index - lag).min() >= 0

    def point(self, windows: WindowSet) -> np.ndarray:
        """The value at the forecast time less the fewest seasons that fall inside the context."""
        lag, index = _season_times(windows), windows.shape.future_index
        ahead = index - (windows.shape.context_times - 1)
        return windows.context[:, index - lag * -(-ahead // lag)]


def _season_times(windows: WindowSet) -> int:
    step = float(np.median(windows.step_seconds))
    season = season_seconds(step)
    return 0 if season is None else round(season / step)


def _mean_of_last(context: np.ndarray, count: int) -> np.ndarray:
    """Mean over the last `count` times, NaN left out: (N, V, Y, X)."""
    tail = context[:, -count:]
    known = ~np.isnan(tail)
    seen = known.sum(axis=1)
    return np.where(seen > 0, np.where(known, tail, 0.0).sum(axis=1) / np.maximum(seen, 1), np.nan)
