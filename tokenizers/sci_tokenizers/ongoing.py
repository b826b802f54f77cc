"""Ongoing autoregression: the forecast of a record from its own past, kept up as the record grows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sci_tokenizers.autoregression import (
    SHARPNESS,
    SPREAD_FLOOR,
    burg,
    error_spread,
    newest,
    one_step_errors,
    recent_of_sums,
    step_coefficients,
    usable,
)


@dataclass(frozen=True, kw_only=True)
class OwnSettings:
    """How a modality forecasts a record from its own past (see `autoregression.own_forecast`).

    Attributes:
        orders, refit: of the autoregressions.
        steps: samples in a frame, all of which are forecast.
        floor: of the spread, in scaled units.
    """

    orders: tuple[int, ...]
    refit: int
    steps: int
    floor: float


@dataclass(frozen=True, kw_only=True)
class _Order:
    """One order since its last fit: coefficients, its forecasts' weights and spread, running sums of squared errors."""

    coefficients: np.ndarray
    weights: np.ndarray
    spread: np.ndarray
    total: np.ndarray


class OngoingForecast:
    """`autoregression.own_forecast` at the newest frame alone; fits are made where it makes them.

    Args:
        series, known: (B, time) of the context: rows as `own_forecast` takes them.
        capacity: times that the record will have at most.
        settings: of the modality.
        sources: int (B,), number of the row of the first copy that each row equals so far: fitted once for all copies.
    """

    def __init__(
        self, series: np.ndarray, known: np.ndarray, *, capacity: int, settings: OwnSettings, sources: np.ndarray
    ) -> None:
        self._settings, self._end = settings, series.shape[1]
        self._series, self._known = np.zeros((len(series), capacity)), np.zeros((len(series), capacity), bool)
        self._series[:, : self._end], self._known[:, : self._end] = series, known
        self._count = np.zeros((len(series), capacity + 1))
        self._count[:, 1 : self._end + 1] = known.cumsum(axis=1)
        self._asked = 1  # origins since the last fit; the first is the context's end, at which it was asked already
        self._fit(sources)

    def _fit(self, sources: np.ndarray | None = None) -> None:
        rows = np.arange(len(self._series)) if sources is None else np.arange(int(sources.max(initial=-1)) + 1)
        back = rows if sources is None else sources
        past, known = self._series[rows, : self._end], self._known[rows, : self._end]
        self._orders = []
        if not len(rows):
            return
        for order, coefficients in burg(past, usable(self._settings.orders, self._end)).items():
            weights = step_coefficients(coefficients, self._settings.steps)
            single = one_step_errors(past, coefficients=coefficients)
            spread = error_spread(single[None], known, weights=weights[None], orders=np.array([order]))[0]
            spread = np.maximum(spread, SPREAD_FLOOR)
            total = np.zeros((len(self._series), self._series.shape[1] + 1))
            squares = np.where(known, single**2, 0.0)
            total[:, 1 : self._end + 1] = squares.cumsum(axis=1)[back]
            self._orders.append(
                _Order(coefficients=coefficients[back], weights=weights[back], spread=spread[back], total=total)
            )

    def extend(self, values: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One more frame, (B, steps): the next one's mean and log-spread (B, steps), and volatility (B, HORIZONS)."""
        start, end = self._end, self._end + values.shape[1]
        self._series[:, start:end], self._known[:, start:end] = values, known
        self._count[:, start + 1 : end + 1] = self._count[:, start, None] + known.cumsum(axis=1)
        self._end = end
        if self._asked == self._settings.refit:
            self._asked = 0
            self._fit()
        else:
            for one in self._orders:
                self._follow(one, start)
        self._asked += 1
        if not self._orders:
            return np.zeros(values.shape), np.zeros(values.shape), np.zeros((0, 3))
        errors = np.log(np.stack([one.spread for one in self._orders]))  # order b step
        weight = np.exp(-SHARPNESS * (errors - errors.min(axis=0)))
        weight /= weight.sum(axis=0)
        origin = np.array([end - 1])
        means, recent = [], []
        for one in self._orders:
            state = newest(self._series[:, :end], origin, order=one.coefficients.shape[1])
            means.append((state @ one.weights.transpose(0, 2, 1))[:, 0])
            recent.append(recent_of_sums(one.total[:, : end + 1], self._count[:, : end + 1], origins=origin)[:, 0])
        spread = np.exp((weight * errors).sum(axis=0))
        volatility = (weight.mean(axis=-1)[..., None] * np.stack(recent)).sum(axis=0)
        return (
            (weight * np.stack(means)).sum(axis=0),
            np.log(np.maximum(spread, self._settings.floor)),
            volatility,
        )

    def _follow(self, one: _Order, start: int) -> None:
        """Squared errors of the new samples, each forecast from those before it."""
        new = np.arange(start, self._end)
        state = newest(self._series[:, : self._end], new - 1, order=one.coefficients.shape[1])
        errors = self._series[:, new] - np.einsum("btk,bk->bt", state, one.coefficients)
        squares = np.where(self._known[:, new], errors**2, 0.0)
        one.total[:, start + 1 : self._end + 1] = one.total[:, start, None] + squares.cumsum(axis=1)
