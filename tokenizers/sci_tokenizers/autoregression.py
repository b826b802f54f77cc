"""Autoregression fitted to a record's own past: what the trace head corrects, and the baseline that it must beat."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

# The weight of an order in the average is its past errors to this power, negative. On the training and validation
# records of the quickstart 8 beats AR(32) on every one of them, equal weights on all but two.
SHARPNESS = 8.0
# Recent stretches, in steps of the record, whose errors tell whether the record is calmer or wilder now than before.
HORIZONS = (4, 16, 64)
SPREAD_FLOOR = 1e-9


@dataclass(frozen=True, kw_only=True)
class OwnForecast:
    """What a record's own past says at each origin: float64 (B, origins, steps), (B, origins, steps), (B, origins,
    HORIZONS).
    """

    mean: np.ndarray
    spread: np.ndarray
    volatility: np.ndarray


def own_forecast(
    series: np.ndarray,
    known: np.ndarray,
    *,
    origins: np.ndarray,
    steps: np.ndarray,
    orders: tuple[int, ...],
    refit: int,
) -> OwnForecast:
    """Forecast a record from its own past, at every origin from the samples up to it alone.

    Autoregressions of several orders are averaged, each step for itself, with weights spread^-8: a noisy record wants a
    short one, a ringing one a long one, and an average loses less to a wrong choice than the best single order.

    Args:
        series: (B, time), mean removed, 0 (or carried forward) where missing.
        known: bool (B, time).
        origins: ascending sample numbers from which forecasts are made.
        steps: how many samples ahead, ascending.
        orders: of the autoregressions, ascending; they are fitted again every `refit` origins to the samples up to the
            first of them. Orders beyond a quarter of the samples are left out (the first is cut to it).
        refit: see `orders`.

    Returns:
        Means, the spread of the errors made so far at as many steps, and the logarithm of recent one-step errors
        over all.
    """
    batch = len(series)
    mean = np.zeros((batch, len(origins), len(steps)))
    spread = np.ones_like(mean)
    volatility = np.zeros((batch, len(origins), len(HORIZONS)))
    for first in range(0, len(origins), refit):
        asking = slice(first, first + refit)
        past = int(origins[first]) + 1
        fitted = burg(series[:, :past], usable(orders, past))
        members = _members(series, known, fitted=fitted, past=past, origins=origins[asking], steps=steps)
        errors = np.log(members.spread)
        weight = np.exp(-SHARPNESS * (errors - errors.min(axis=0)))
        weight /= weight.sum(axis=0)
        mean[:, asking] = (weight * members.mean).sum(axis=0)
        spread[:, asking] = np.exp((weight * errors).sum(axis=0))
        volatility[:, asking] = (weight.mean(axis=-1)[..., None] * members.volatility).sum(axis=0)
    return OwnForecast(mean=mean, spread=spread, volatility=volatility)


def usable(orders: tuple[int, ...], past: int) -> tuple[int, ...]:
    """The orders that `past` samples can bear: up to a quarter of them, at least one."""
    most = max(1, past // 4)
    return tuple(order for order in orders if order <= most) or (most,)


def _members(
    series: np.ndarray,
    known: np.ndarray,
    *,
    fitted: dict[int, np.ndarray],
    past: int,
    origins: np.ndarray,
    steps: np.ndarray,
) -> OwnForecast:
    """Every order's forecast, an axis of orders first; the spread is the same at every origin.

    Args:
        fitted: of `burg`. All orders are worked out at once, shorter ones filled up with zeros.
    """
    orders, batch = np.array(list(fitted)), len(series)
    padded = np.zeros((len(orders), batch, orders[-1]))
    for row, coefficients in zip(padded, fitted.values(), strict=True):
        row[:, : coefficients.shape[1]] = coefficients
    flat, most = padded.reshape(len(orders) * batch, orders[-1]), int(steps.max())  # (order B) lag
    weights = step_coefficients(flat, most).reshape(len(orders), batch, most, orders[-1])
    end = int(origins[-1]) + 1
    single = np.stack([one_step_errors(series[:, :end], coefficients=rows) for rows in fitted.values()])
    spread = error_spread(single[..., :past], known[:, :past], weights=weights, orders=orders)
    squares = (single**2).reshape(len(orders) * batch, end)
    volatility = recent_errors(squares, np.tile(known[:, :end], (len(orders), 1)), origins=origins)
    return OwnForecast(
        mean=newest(series, origins, order=orders[-1]) @ weights[:, :, steps - 1].swapaxes(2, 3),
        spread=np.repeat(np.maximum(spread, SPREAD_FLOOR)[:, :, None, steps - 1], len(origins), axis=2),
        volatility=volatility.reshape(*padded.shape[:2], *volatility.shape[1:]),
    )


def recent_errors(squares: np.ndarray, known: np.ndarray, *, origins: np.ndarray) -> np.ndarray:
    """Logarithm of the root mean square error over the last HORIZONS samples, over that of the whole past.

    Args:
        squares: (B, time) squared errors of one-step forecasts of each sample.
        known: bool (B, time): the sample was there and was forecast.
        origins: ascending sample numbers; only errors up to each enter its row.

    Returns:
        float64 (B, origins, HORIZONS), 0 where nothing is known.
    """
    total = np.concatenate([np.zeros((len(squares), 1)), np.where(known, squares, 0.0).cumsum(axis=1)], axis=1)
    count = np.concatenate([np.zeros((len(squares), 1)), known.cumsum(axis=1)], axis=1)
    return recent_of_sums(total, count, origins=origins)


def recent_of_sums(total: np.ndarray, count: np.ndarray, *, origins: np.ndarray) -> np.ndarray:
    """`recent_errors` from running sums of squares and of what is known, (B, time + 1), 0 first."""
    whole = total[:, origins + 1] / np.maximum(count[:, origins + 1], 1)
    out = np.zeros((len(total), len(origins), len(HORIZONS)))
    for h, horizon in enumerate(HORIZONS):
        start = np.maximum(origins + 1 - horizon, 0)
        seen = count[:, origins + 1] - count[:, start]
        recent = (total[:, origins + 1] - total[:, start]) / np.maximum(seen, 1)
        ratio = 0.5 * np.log((recent + 1e-3 * whole + 1e-12) / (whole + 1e-12))
        out[..., h] = np.where(seen > 0, ratio, 0.0)
    return out


def burg(series: np.ndarray, orders: tuple[int, ...]) -> dict[int, np.ndarray]:
    """Coefficients of autoregressions by Burg's method (1975): x[t] = sum_k a[k] x[t - 1 - k], stable by construction.

    Args:
        series: (B, time), mean removed.
        orders: ascending, below the number of times; one recursion gives them all.

    Returns:
        {order: float64 (B, order)}, newest lag first; 0 for a series of zeros.
    """
    forward, backward = series[:, 1:].astype(np.float64), series[:, :-1].astype(np.float64)
    polynomial = np.zeros((len(series), orders[-1] + 1))
    polynomial[:, 0] = 1.0
    out = {}
    for k in range(orders[-1]):
        power = np.vecdot(forward, forward) + np.vecdot(backward, backward)
        reflection = (-2.0 * np.vecdot(forward, backward) / np.where(power > 0, power, 1.0))[:, None]
        polynomial[:, : k + 2] += reflection * polynomial[:, k + 1 :: -1][:, : k + 2]
        forward, backward = (forward + reflection * backward)[:, 1:], (backward + reflection * forward)[:, :-1]
        if k + 1 in orders:
            out[k + 1] = -polynomial[:, 1 : k + 2]
    return out


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


def one_step_errors(series: np.ndarray, *, coefficients: np.ndarray) -> np.ndarray:
    """series - its one-step forecast, float64 (B, time); the series is 0 before its start."""
    length = series.shape[1]
    out = series.astype(np.float64)
    for row, weights in zip(out, coefficients, strict=True):
        row[1:] -= np.convolve(row, weights)[: length - 1]
    return out


def error_spread(single: np.ndarray, known: np.ndarray, *, weights: np.ndarray, orders: np.ndarray) -> np.ndarray:
    """Root mean square of the errors 1 .. steps ahead inside the series itself, float64 (O, B, steps).

    An error k steps ahead is the k one-step errors since, weighted with the impulse response. The variance is raised by
    (n + p) / (n - p), since the coefficients were fitted to the same samples (Akaike 1969).

    Args:
        single: (O, B, time), of `one_step_errors`, for each of the `orders` (O,).
        known: bool (B, time).
        weights: of `step_coefficients`, (O, B, steps, lags).
    """
    steps, length = weights.shape[2], single.shape[2]
    response = np.concatenate([np.ones_like(weights[..., :1, 0]), weights[..., :-1, 0]], axis=-1)  # psi_0 ..
    lag = np.tri(steps) * response[..., None, :]  # order B step lag
    before = np.concatenate([np.zeros((*single.shape[:2], steps - 1)), single], axis=-1)
    lagged = sliding_window_view(before, length, axis=-1)[..., ::-1, :]  # order B lag time
    errors = lag @ lagged  # order B step time
    # the origin has a whole state before it
    whole = np.arange(length) >= orders[:, None, None] + np.arange(steps)[:, None]  # order step time
    seen = (whole[:, None] & known[:, None]).astype(np.float64)
    variance = np.einsum("obkt,obkt,obkt->obk", errors, errors, seen) / np.maximum(seen.sum(axis=3), 1)
    raised = (length + orders) / np.maximum(length - orders, 1)
    return np.sqrt(variance * raised[:, None, None])
