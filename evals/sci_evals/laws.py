"""Chinchilla's law L(N, D) = E + A / N^alpha + B / D^beta, fitted robustly from many starts (Hoffmann et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.optimize import minimize

from sci_evals.scaling_points import Points
from sci_gpt.errors import DataError

PARAMETERS = ("E", "A", "B", "alpha", "beta")
HUBER = 1e-3  # the delta of Hoffmann et al. 2022, appendix D.3, in units of the logarithm of the loss
MAX_EXPONENT = 3.0
MINIMISED = 24  # of the starts, those with the smallest objective
# The objective is of the order of HUBER times a residual: at scipy's defaults (2e-9, 1e-5) L-BFGS would stop early.
TOLERANCES = {"ftol": 1e-15, "gtol": 1e-10, "maxiter": 2000, "maxfun": 10000, "maxcor": 20}
_VANISHED = 1e-3  # a term nowhere above this share of the loss is not seen
# Starts, whatever the units: E's share of the loss at the centre, A's share of the rest, and the exponents.
_E_SHARES = (0.05, 0.25, 0.5, 0.75, 0.95)
_A_SHARES = (0.1, 0.5, 0.9)
_EXPONENTS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0)


@dataclass(frozen=True, kw_only=True)
class Design:
    """Points as the fit sees them: logarithms, with N and D taken relative to their geometric means.

    In these coordinates theta = (ln E, ln of A's term at the centre, ln of B's, alpha, beta) is well conditioned: in
    Hoffmann's own, ln A and alpha are correlated by nearly 1, since N is far from 1.

    Attributes:
        log_params, log_tokens, log_loss: (n,); the first two have mean 0.
        centre: the means of ln N and ln D that were taken off.
    """

    log_params: np.ndarray
    log_tokens: np.ndarray
    log_loss: np.ndarray
    centre: tuple[float, float]

    @classmethod
    def of(cls, points: Points) -> Design:
        """The design of points."""
        x, y = np.log(points.params), np.log(points.tokens)
        centre = (float(x.mean()), float(y.mean()))
        return cls(log_params=x - centre[0], log_tokens=y - centre[1], log_loss=np.log(points.loss), centre=centre)

    @cached_property
    def terms(self) -> np.ndarray:
        """The matrix (5, 3 n) that takes theta to the logarithms of E's, A's and B's term at every point."""
        one, zero = np.ones_like(self.log_loss), np.zeros_like(self.log_loss)
        e, a, b = [one, zero, zero, zero, zero], [zero, one, zero, -self.log_params, zero], [zero, zero, one, zero]
        return np.concatenate([e, a, [*b, -self.log_tokens]], axis=1)

    def to_law(self, theta: np.ndarray) -> np.ndarray:
        """(E, ln A, ln B, alpha, beta) of theta, shape (..., 5): A and B may be beyond any float."""
        e, a, b, alpha, beta = np.moveaxis(np.asarray(theta), -1, 0)
        return np.stack([np.exp(e), a + alpha * self.centre[0], b + beta * self.centre[1], alpha, beta], axis=-1)

    def from_law(self, law: Mapping[str, float]) -> np.ndarray:
        """Theta (5,) of a law {E, A, B, alpha, beta}."""
        alpha, beta = law["alpha"], law["beta"]
        a, b = np.log(law["A"]) - alpha * self.centre[0], np.log(law["B"]) - beta * self.centre[1]
        return np.array([np.log(law["E"]), a, b, alpha, beta])


def predict(theta: np.ndarray, design: Design) -> tuple[np.ndarray, np.ndarray]:
    """Logarithm of the law's loss, shape (..., n), and the share of each of its three terms in it, (..., 3, n)."""
    terms = (theta @ design.terms).reshape(*np.shape(theta)[:-1], 3, -1)
    largest = terms.max(axis=-2)
    parts = np.exp(terms - largest[..., None, :])
    total = parts.sum(axis=-2)
    return largest + np.log(total), parts / total[..., None, :]


def jacobian(theta: np.ndarray, design: Design) -> np.ndarray:
    """Derivative of the logarithm of the law's loss by theta (5,), shape (n, 5)."""
    shares = predict(theta, design)[1]
    return (design.terms.reshape(len(PARAMETERS), 3, -1) * shares).sum(axis=1).T


def huber(residual: np.ndarray) -> np.ndarray:
    """Huber's loss with delta HUBER: r^2 / 2 up to delta, delta (|r| - delta / 2) beyond (Huber 1964)."""
    size = np.abs(residual)
    return np.where(size <= HUBER, 0.5 * size**2, HUBER * (size - 0.5 * HUBER))


def objective(theta: np.ndarray, design: Design, *, weights: np.ndarray | None = None) -> tuple[float, np.ndarray]:
    """The sum over points of Huber's loss of ln L(N, D) - ln loss, and its gradient (5,).

    The sum, not the mean: n times smaller numbers end L-BFGS before it has arrived (Besiroglu et al. 2024).

    Args:
        theta: (5,), as in Design.
        design: the points.
        weights: (n,) of the points; all 1 where None.
    """
    weights = np.ones(len(design.log_loss)) if weights is None else weights
    predicted, shares = predict(theta, design)
    residual = predicted - design.log_loss
    slope = weights * np.clip(residual, -HUBER, HUBER)
    return float((weights * huber(residual)).sum()), design.terms @ (slope * shares).ravel()


def minimise(start: np.ndarray, design: Design, *, weights: np.ndarray | None = None) -> tuple[np.ndarray, float]:
    """Theta (5,) that L-BFGS reaches from `start`, and its objective; the exponents stay in 0 .. MAX_EXPONENT."""
    low, high = float(design.log_loss.min()), float(design.log_loss.max())
    term = (low - 16.0, high + 1.0)  # from a ten-millionth of the loss to more than all of it
    bounds = [term, term, term, (0.0, MAX_EXPONENT), (0.0, MAX_EXPONENT)]
    clipped = np.clip(start, *np.transpose(bounds))
    found = minimize(
        lambda theta: objective(theta, design, weights=weights),
        clipped,
        jac=True,
        method="L-BFGS-B",
        bounds=bounds,
        options=TOLERANCES,
    )
    return np.asarray(found.x), float(found.fun)


def starts(design: Design) -> np.ndarray:
    """A grid of theta (1215, 5): shares of the terms at the centre of the points, times exponents 0.05 to 2."""
    level = float(np.median(design.log_loss))
    grid = np.meshgrid(_E_SHARES, _A_SHARES, _EXPONENTS, _EXPONENTS, indexing="ij")
    e, a, alpha, beta = (axis.ravel() for axis in grid)
    return np.stack(
        [level + np.log(e), level + np.log((1 - e) * a), level + np.log((1 - e) * (1 - a)), alpha, beta], axis=-1
    )


def fit_chinchilla(points: Points) -> tuple[Design, np.ndarray, float]:
    """The design, theta (5,) and objective of the best minimum: all starts are ranked, the best MINIMISED descend.

    Raises:
        DataError: fewer points than the law has parameters.
    """
    if len(points) < len(PARAMETERS):
        several = f"{len(points)} point{'' if len(points) == 1 else 's'}"
        raise DataError(
            f"{several} for a law of {len(PARAMETERS)} parameters ({', '.join(PARAMETERS)}): give at least "
            f"{len(PARAMETERS)}, of at least 3 different params and 3 different tokens"
        )
    design = Design.of(points)
    grid = starts(design)
    ranked = np.argsort(huber(predict(grid, design)[0] - design.log_loss).sum(axis=-1), kind="stable")
    minima = [minimise(grid[i], design) for i in ranked[:MINIMISED]]
    theta, value = min(minima, key=lambda found: found[1])
    return design, theta, value


def vanished(theta: np.ndarray, design: Design) -> np.ndarray:
    """Which of the three terms (E, A's, B's) are nowhere a thousandth of the loss; theta (..., 5) gives (..., 3)."""
    return predict(theta, design)[1].max(axis=-1) < _VANISHED


def exponent_at_bound(theta: np.ndarray) -> np.ndarray:
    """-1 where alpha, beta lie at 0, +1 where they lie at MAX_EXPONENT, else 0; theta (..., 5) gives (..., 2)."""
    exponents = np.asarray(theta)[..., 3:]
    return np.where(exponents < 1e-3, -1, np.where(exponents > MAX_EXPONENT - 1e-3, 1, 0))
