"""What a law and its points say of a given compute: the best size and token count, and the IsoFLOP minima."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sci_evals.laws import Design
from sci_evals.scaling_points import Points

_SAME_COMPUTE = 0.1  # points whose ln C follow each other more closely than this have one compute


@dataclass(frozen=True, kw_only=True)
class IsoFlop:
    """Points of one compute.

    Attributes:
        flops: their geometric mean, FLOPs.
        members: indices of the points.
        coefficients: of the parabola ln L = c2 (ln N)^2 + c1 ln N + c0; None below three different sizes.
        best: (N, L) at the parabola's minimum; None where it has none between the smallest and the largest size.
    """

    flops: float
    members: np.ndarray
    coefficients: np.ndarray | None
    best: tuple[float, float] | None


def exponents(theta: np.ndarray) -> np.ndarray:
    """a = beta / (alpha + beta) and b = alpha / (alpha + beta) of N_opt ~ C^a, D_opt ~ C^b; (..., 5) gives (..., 2)."""
    alpha, beta = theta[..., 3], theta[..., 4]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.stack([beta, alpha], axis=-1) / (alpha + beta)[..., None]


def log_optimum(theta: np.ndarray, design: Design, *, flops: float, per_param_token: float) -> np.ndarray:
    """ln N_opt and ln D_opt at compute C = k N D, (..., 5) gives (..., 2) (Hoffmann et al. 2022, equation 4).

    Args:
        theta: as in Design.
        design: of the points.
        flops: C.
        per_param_token: k, 6 as a rule.
    """
    _, log_a, log_b, alpha, beta = np.moveaxis(design.to_law(theta), -1, 0)
    product = np.log(flops / per_param_token)
    with np.errstate(invalid="ignore", divide="ignore"):
        log_g = (np.log(alpha) + log_a - np.log(beta) - log_b) / (alpha + beta)
        params = log_g + product * beta / (alpha + beta)
    return np.stack([params, product - params], axis=-1)


def isoflops(points: Points) -> tuple[IsoFlop, ...]:
    """The points by compute, from the smallest; a parabola through those of one compute with three sizes or more.

    Approach 2 of Hoffmann et al. (2022), section 3.2.
    """
    order = np.argsort(points.flops, kind="stable")
    cuts = np.flatnonzero(np.diff(np.log(points.flops[order])) > _SAME_COMPUTE) + 1
    return tuple(_isoflop(points, members) for members in np.split(order, cuts))


def _isoflop(points: Points, members: np.ndarray) -> IsoFlop:
    flops = float(np.exp(np.log(points.flops[members]).mean()))
    x, y = np.log(points.params[members]), np.log(points.loss[members])
    if len(np.unique(x)) < 3:
        return IsoFlop(flops=flops, members=members, coefficients=None, best=None)
    middle = x.mean()
    c2, c1, c0 = np.polyfit(x - middle, y, 2)
    coefficients = np.array([c2, c1 - 2 * c2 * middle, c0 - c1 * middle + c2 * middle**2])
    at = middle - c1 / (2 * c2) if c2 > 0 else np.inf
    best = (float(np.exp(at)), float(np.exp(c0 - c1**2 / (4 * c2)))) if x.min() <= at <= x.max() else None
    return IsoFlop(flops=flops, members=members, coefficients=coefficients, best=best)
