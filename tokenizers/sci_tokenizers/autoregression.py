"""Autoregression fitted to a record's own past: what the trace head corrects, and the baseline that it must beat."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Recent stretches, in steps of the record, whose errors tell whether the record is calmer or wilder now than before.
HORIZONS = (4, 16, 64)


@dataclass(frozen=True, kw_only=True)
class OwnForecast:
    """What a record's own past says at each origin: float64 (B, origins, steps), (B, origins, steps), (B, origins,
    HORIZONS).
    """

    mean: np.ndarray
    spread: np.ndarray
    volatility: np.ndarray


def own_forecast(
    series: np.ndarray, known: np.ndarray, *, origins: np.ndarray, steps: np.ndarray, order: int, refit: int
) -> OwnForecast:
    """Forecast a record from its own past, at every origin from the samples up to it alone.

    Args:
        series: (B, time), mean removed, 0 (or carried forward) where missing.
        known: bool (B, time).
        origins: ascending sample numbers from which forecasts are made.
        steps: how many samples ahead, ascending.
        order: of the autoregression; it is fitted again every `refit` origins to the samples up to the first of them.
        refit: see `order`.

    Returns:
        Means, the spread of the errors made so far at as many steps, and the logarithm of recent one-step errors
        over all.
    """
    batch, longest = len(series), int(steps.max())
    mean = np.zeros((batch, len(origins), len(steps)))
    spread = np.ones_like(mean)
    volatility = np.zeros((batch, len(origins), len(HORIZONS)))
    for first in range(0, len(origins), refit):
        asking = slice(first, first + refit)
        past = int(origins[first]) + 1
        chosen = max(1, min(order, past // 4))
        weights = step_coefficients(burg(series[:, :past], chosen), longest)
        states = newest(series, origins[asking], order=chosen)
        mean[:, asking] = (states @ weights.transpose(0, 2, 1))[:, :, steps - 1]
        spread[:, asking] = error_spread(series[:, :past], known[:, :past], weights=weights)[:, None, steps - 1]
        volatility[:, asking] = _volatility(series, known, weights=weights[:, 0], origins=origins[asking])
    return OwnForecast(mean=mean, spread=spread, volatility=volatility)


def _volatility(series: np.ndarray, known: np.ndarray, *, weights: np.ndarray, origins: np.ndarray) -> np.ndarray:
    """Logarithm of the root mean square one-step error over the last HORIZONS samples, over that of the whole past."""
    order, end = weights.shape[1], int(origins[-1]) + 1
    before = newest(series[:, :end], np.arange(end) - 1, order=order) if end else series[:, :0, None]
    squares = np.where(known[:, :end], (series[:, :end] - (before @ weights[:, :, None])[..., 0]) ** 2, 0.0)
    total = np.concatenate([np.zeros((len(series), 1)), squares.cumsum(axis=1)], axis=1)
    count = np.concatenate([np.zeros((len(series), 1)), known[:, :end].cumsum(axis=1)], axis=1)
    whole = total[:, origins + 1] / np.maximum(count[:, origins + 1], 1)
    out = np.zeros((len(series), len(origins), len(HORIZONS)))
    for h, horizon in enumerate(HORIZONS):
        start = np.maximum(origins + 1 - horizon, 0)
        seen = count[:, origins + 1] - count[:, start]
        recent = (total[:, origins + 1] - total[:, start]) / np.maximum(seen, 1)
        ratio = 0.5 * np.log((recent + 1e-3 * whole + 1e-12) / (whole + 1e-12))
        out[..., h] = np.where(seen > 0, ratio, 0.0)
    return out


def burg(series: np.ndarray, order: int) -> np.ndarray:
    """Coefficients of autoregressions by Burg's method (1975): x[t] = sum_k a[k] x[t - 1 - k], stable by construction.

    Args:
        series: (B, time), mean removed.
        order: below the number of times.

    Returns:
        float64 (B, order), newest lag first; 0 for a series of zeros.
    """
    forward, backward = series[:, 1:].astype(np.float64), series[:, :-1].astype(np.float64)
    polynomial = np.zeros((len(series), order + 1))
    polynomial[:, 0] = 1.0
    for k in range(order):
        power = (forward**2 + backward**2).sum(axis=1)
        reflection = (-2.0 * (forward * backward).sum(axis=1) / np.where(power > 0, power, 1.0))[:, None]
        polynomial[:, : k + 2] += reflection * polynomial[:, k + 1 :: -1][:, : k + 2]
        forward, backward = (forward + reflection * backward)[:, 1:], (backward + reflection * forward)[:, :-1]
    return -polynomial[:, 1:]


def step_coefficients(coefficients: np.ndarray, steps: int) -> np.ndarray:
    """Weights of the newest samples in the forecast 1 .. steps ahead, float64 (B, steps, order).

    From x(t + k + 1) = c_k[0] x(t + 1) + sum_i c_k[i + 1] x(t - i), with c_1 the coefficients themselves.
    """
    batch, order = coefficients.shape
    out = np.zeros((batch, steps, order))
    current = coefficients
    for k in range(steps):
        out[:, k] = current
        shifted = np.concatenate([current[:, 1:], np.zeros((batch, 1))], axis=1)
        current = current[:, :1] * coefficients + shifted
    return out


def newest(series: np.ndarray, ends: np.ndarray, *, order: int) -> np.ndarray:
    """The `order` samples up to and with each of `ends`, newest first, 0 before the start: (B, len(ends), order)."""
    padded = np.concatenate([np.zeros((len(series), order)), series], axis=1)  # sample t is at t + order
    return padded[:, ends[:, None] + order - np.arange(order)]


def error_spread(series: np.ndarray, known: np.ndarray, *, weights: np.ndarray) -> np.ndarray:
    """Root mean square of the errors 1 .. steps ahead inside the series itself, float64 (B, steps).

    The variance is raised by (n + p) / (n - p), since the coefficients were fitted to the same samples (Akaike 1969).
    """
    steps, order = weights.shape[1:]
    length = series.shape[1]
    origins = np.arange(order - 1, length - 1)
    ahead = newest(series, origins, order=order) @ weights.transpose(0, 2, 1)  # b origin steps
    target = np.minimum(origins[:, None] + 1 + np.arange(steps), length - 1)  # origin step: the target's place
    seen = known[:, target] & (origins[:, None] + 1 + np.arange(steps) < length)
    squares = np.where(seen, (series[:, target] - ahead) ** 2, 0.0)
    variance = squares.sum(axis=1) / np.maximum(seen.sum(axis=1), 1)
    return np.sqrt(variance * (length + order) / max(length - order, 1))
