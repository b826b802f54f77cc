"""Autoregression fitted to a record's own past: what the trace head corrects, and the baseline that it must beat."""

from __future__ import annotations

import numpy as np


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


def newest(series: np.ndarray, ends: np.ndarray, order: int) -> np.ndarray:
    """The `order` samples up to and with each of `ends`, newest first, 0 before the start: (B, len(ends), order)."""
    padded = np.concatenate([np.zeros((len(series), order)), series], axis=1)
    return padded[:, ends[:, None] + order - np.arange(order)]


def error_spread(series: np.ndarray, known: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Root mean square of the errors 1 .. steps ahead inside the series itself, float64 (B, steps).

    The variance is raised by (n + p) / (n - p), since the coefficients were fitted to the same samples (Akaike 1969).
    """
    steps, order = weights.shape[1:]
    length = series.shape[1]
    origins = np.arange(order - 1, length - 1)
    ahead = newest(series, origins, order) @ weights.transpose(0, 2, 1)  # b origin steps
    target = np.minimum(origins[:, None] + 1 + np.arange(steps), length - 1)  # origin step: the target's place
    seen = known[:, target] & (origins[:, None] + 1 + np.arange(steps) < length)
    squares = np.where(seen, (series[:, target] - ahead) ** 2, 0.0)
    variance = squares.sum(axis=1) / np.maximum(seen.sum(axis=1), 1)
    return np.sqrt(variance * (length + order) / max(length - order, 1))
