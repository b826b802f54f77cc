"""How well points determine a law: standard errors, resampled intervals, and what they cannot tell at all."""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np
from scipy.special import erf, ndtr
from scipy.stats import t as student

from sci_evals.laws import HUBER, PARAMETERS, Design, exponent_at_bound, jacobian, minimise, predict, vanished

Interval = tuple[float | None, float | None]

_RANK = 1e-6  # singular values below this share of the largest count as zero
_SECONDS_BETWEEN_LINES = 5.0


def standard_errors(design: Design, theta: np.ndarray) -> np.ndarray:
    """Standard errors of (E, ln A, ln B, alpha, beta), shape (5,), by the sandwich of an M-estimator.

    With psi Huber's slope and J the derivative of the predictions, covariance = (sum psi^2 / (n - 5)) / rho^2 (J'J)^-1,
    rho the expected share of residuals within delta (Huber and Ronchetti 2009, section 7.6). The raw Hessian counts
    that share, but a fit as robust as this one passes through about five points exactly and would find five where noise
    leaves none. So rho = P(|z| < delta) for normal residuals of the robust scale, the median of the n - 4 largest
    |residuals| / 0.6745 (Street, Carroll and Ruppert 1988). Without a degree of freedom: NaN.
    """
    degrees = len(design.log_loss) - len(PARAMETERS)
    if degrees < 1:
        return np.full(len(PARAMETERS), np.nan)
    residual = predict(theta, design)[0] - design.log_loss
    largest = np.sort(np.abs(residual))[len(PARAMETERS) - 1 :]
    scale = float(np.median(largest)) / 0.6745
    rho = float(erf(HUBER / (scale * np.sqrt(2)))) if scale > 0 else 1.0
    spread = float((np.clip(residual, -HUBER, HUBER) ** 2).sum()) / degrees / rho**2
    slopes = jacobian(theta, design)
    covariance = spread * np.linalg.pinv(slopes.T @ slopes)
    # (E, ln A, ln B, alpha, beta) from theta: E = exp(e), ln A = a + alpha mean(ln N), ln B likewise.
    change = np.eye(len(PARAMETERS))
    change[0, 0] = np.exp(theta[0])
    change[1, 3], change[2, 4] = design.centre
    return np.sqrt(np.diag(change @ covariance @ change.T))


def condition_number(design: Design, theta: np.ndarray) -> float:
    """Of the Hessian J'J in centred coordinates with columns scaled to length 1; infinite where it is singular."""
    singular = np.linalg.svd(_scaled(jacobian(theta, design)), compute_uv=False)
    return float((singular[0] / singular[-1]) ** 2) if singular[-1] > 0 else float("inf")


def not_determined(design: Design, theta: np.ndarray) -> dict[str, str]:
    """{parameter: why these points cannot determine it, however small their noise}; empty for a good design."""
    found: dict[str, str] = {}
    few = f"{_distinct(design.log_params)} different params and {_distinct(design.log_tokens)} different tokens"
    _, singular, directions = np.linalg.svd(_scaled(jacobian(theta, design)))
    for value, direction in zip(singular, directions, strict=True):
        if value <= _RANK * singular[0]:
            touched = [name for name, part in zip(PARAMETERS, direction, strict=True) if abs(part) > 1e-3]
            for name in _with_partners(touched):
                found.setdefault(name, f"{few} cannot tell it from the others ({', '.join(_with_partners(touched))})")
    if _on_a_line(design):
        for name in PARAMETERS[1:]:
            found.setdefault(name, "tokens are a fixed power of params: which term is whose cannot be told")
    for name, gone in zip(("E", "A", "B"), vanished(theta, design), strict=True):
        if gone:
            for partner in _with_partners([name]):
                found.setdefault(partner, f"the fit has no visible term of {name}: it is nowhere 0.1 % of the loss")
    for name, side in zip(("alpha", "beta"), exponent_at_bound(theta), strict=True):
        if side:
            for partner in _with_partners([name]):
                found.setdefault(partner, f"the fit runs to the {'upper' if side > 0 else 'lower'} bound of {name}")
    return found


def resample(design: Design, theta: np.ndarray, *, replicates: int, seed: int) -> np.ndarray:
    """Refits (replicates, 5) from the optimum, each with the points weighted anew; a progress line every few seconds.

    The weights are drawn from the exponential distribution (mean 1): the resampling of Jin, Ying and Wei (2001), made
    for minimands without a usable Hessian. Points drawn with replacement are such weights too, but of nine points one
    draw in six lacks a size or a budget and determines nothing.
    """
    rng = np.random.default_rng(seed)
    weights = rng.exponential(size=(replicates, len(design.log_loss)))
    found = np.empty((replicates, len(PARAMETERS)))
    began = shown = time.monotonic()
    for i, weight in enumerate(weights):
        found[i] = minimise(theta, design, weights=weight)[0]
        now = time.monotonic()
        if now - shown > _SECONDS_BETWEEN_LINES:
            rate, shown = (i + 1) / (now - began), now
            left = (replicates - i - 1) / rate
            print(f"fit: resample {i + 1} of {replicates}, {rate:.0f} a second, {left:.0f} s left", flush=True)
    return found


def tail(num_points: int, level: float) -> float:
    """The quantile at which an interval of `level` begins: Phi of Student's t at n - 5 degrees (Hesterberg 2015).

    A plain percentile interval is too short for few points. 0 without a degree of freedom.
    """
    degrees = num_points - len(PARAMETERS)
    return float(ndtr(student.ppf((1 - level) / 2, degrees))) if degrees >= 1 else 0.0


def lost(design: Design, samples: np.ndarray) -> Mapping[str, tuple[np.ndarray, np.ndarray]]:
    """{parameter, or "allocation": which refits leave it without a lower end, without an upper end}, (replicates,)."""
    gone, sides = vanished(samples, design), exponent_at_bound(samples)
    flags = {"E": (gone[:, 0], np.zeros(len(samples), dtype=bool))}
    for i, (term, exponent) in enumerate((("A", "alpha"), ("B", "beta"))):
        ends = (gone[:, i + 1] | (sides[:, i] < 0), gone[:, i + 1] | (sides[:, i] > 0))
        flags |= {term: ends, exponent: ends}
    either = gone[:, 1:].any(axis=1) | (sides != 0).any(axis=1)
    return flags | {"allocation": (either, either)}


def interval(values: np.ndarray, ends: tuple[np.ndarray, np.ndarray], *, quantile: float) -> Interval:
    """The values (replicates,) between `quantile` and 1 - `quantile`; None for an end that runs to a bound."""
    low = np.quantile(np.where(ends[0], -np.inf, values), quantile, method="inverted_cdf")
    high = np.quantile(np.where(ends[1], np.inf, values), 1 - quantile, method="inverted_cdf")
    return float(low) if np.isfinite(low) else None, float(high) if np.isfinite(high) else None


def _scaled(slopes: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(slopes, axis=0)
    return slopes / np.where(lengths > 0, lengths, 1.0)


def _with_partners(names: list[str]) -> list[str]:
    """With A comes alpha, with B beta, and the other way: one without the other says nothing."""
    partner = {"A": "alpha", "alpha": "A", "B": "beta", "beta": "B"}
    wanted = {*names, *(partner[name] for name in names if name in partner)}
    return [name for name in PARAMETERS if name in wanted]


def _distinct(logarithms: np.ndarray) -> int:
    return len(np.unique(np.round(logarithms, 9)))


def _on_a_line(design: Design) -> bool:
    spread = np.linalg.svd(np.stack([design.log_params, design.log_tokens]), compute_uv=False)
    return bool(spread[1] <= _RANK * spread[0])
