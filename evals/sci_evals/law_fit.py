"""From points to a fitted law: values, standard errors, intervals, and what the points cannot tell."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from sci_evals.allocation import exponents, isoflops, log_optimum
from sci_evals.law_uncertainty import (
    Interval,
    condition_number,
    interval,
    lost,
    not_determined,
    resample,
    standard_errors,
    tail,
)
from sci_evals.laws import PARAMETERS, Design, fit_chinchilla, predict
from sci_evals.scaling_points import Points
from sci_gpt.errors import ConfigError

LEVEL, REPLICATES = 0.9, 1000
BUDGETS = (1, 10, 100)  # times the largest compute of the points
ALLOCATION = "allocation"
_FEWEST_REPLICATES = 100


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Chinchilla's law as fitted to points.

    Attributes:
        points: the points.
        design, theta, objective: what was minimised, where, and the sum of Huber's losses there.
        values: E, A, B, alpha, beta; exponent_params a and exponent_tokens b of N_opt ~ C^a, D_opt ~ C^b; and
            params_1x, tokens_1x, loss_1x, ..: the optimum at 1, 10, 100 times the largest compute of the points.
        intervals: of each value; an end is None where the points do not bound it.
        standard_errors: of E, ln A, ln B, alpha, beta, under the parameters' names.
        not_identifiable: {parameter or "allocation": why}.
        condition: number of the scaled Hessian.
        level, replicates, seed: of the intervals; 0 replicates where no parameter can have one.
    """

    points: Points
    design: Design
    theta: np.ndarray
    objective: float
    values: dict[str, float]
    intervals: dict[str, Interval]
    standard_errors: dict[str, float]
    not_identifiable: dict[str, str]
    condition: float
    level: float
    replicates: int
    seed: int

    @property
    def residual_rms(self) -> float:
        """Root mean square of ln(law) - ln(loss)."""
        return float(np.sqrt(np.mean((predict(self.theta, self.design)[0] - self.design.log_loss) ** 2)))

    def to_json(self) -> dict[str, Any]:
        """E, A, B, alpha, beta, intervals, objective, and what qualifies them."""
        known = ALLOCATION not in self.not_identifiable
        errors = {name: None if name in self.not_identifiable else self.standard_errors[name] for name in PARAMETERS}
        return {
            "law": "chinchilla",
            "num_points": len(self.points),
            **{name: _number(self.values[name]) for name in PARAMETERS},
            "intervals": {name: list(self.intervals[name]) for name in PARAMETERS},
            "interval_level": self.level,
            "bootstrap": {"replicates": self.replicates, "seed": self.seed},
            "standard_errors": {"E": errors["E"], "ln_A": errors["A"], "ln_B": errors["B"]}
            | {name: errors[name] for name in ("alpha", "beta")},
            "objective": self.objective,
            "residual_rms": self.residual_rms,
            "condition_number": _number(self.condition),
            "not_identifiable": self.not_identifiable,
            ALLOCATION: {
                **{name: self.values[name] if known else None for name in ("exponent_params", "exponent_tokens")},
                "intervals": {name: list(self.intervals[name]) for name in ("exponent_params", "exponent_tokens")},
                "flops_per_param_token": self.points.flops_per_param_token,
                "optima": [self._optimum(times) for times in BUDGETS] if known else [],
            },
            "isoflops": [
                {
                    "flops": group.flops,
                    "num_points": len(group.members),
                    "params_at_minimum": group.best[0] if group.best else None,
                    "loss_at_minimum": group.best[1] if group.best else None,
                }
                for group in isoflops(self.points)
            ],
        }

    def _optimum(self, times: int) -> dict[str, Any]:
        quantities = {name: f"{name}_{times}x" for name in ("params", "tokens", "loss")}
        return {
            "flops": times * float(self.points.flops.max()),
            **{name: self.values[key] for name, key in quantities.items()},
            "intervals": {name: list(self.intervals[key]) for name, key in quantities.items()},
        }


def fit(points: Points, *, replicates: int = REPLICATES, seed: int = 0, level: float = LEVEL) -> Fit:
    """Fit Chinchilla's law, with intervals of `level` (0..1) from `replicates` refits of reweighted points.

    Raises:
        DataError: fewer points than parameters.
        ConfigError: too few replicates, a negative seed.
    """
    if replicates < _FEWEST_REPLICATES:
        raise ConfigError(f"--bootstrap {replicates}: give {_FEWEST_REPLICATES} or more (the default is {REPLICATES})")
    if seed < 0:
        raise ConfigError(f"--seed {seed}: give 0 or more")
    design, theta, objective = fit_chinchilla(points)
    unknown = not_determined(design, theta)
    quantile, degrees = tail(len(points), level), len(points) - len(PARAMETERS)
    if quantile * replicates < 1:
        why = f"{len(points)} points leave {degrees} degree{'' if degrees == 1 else 's'} of freedom: no interval"
        unknown = dict.fromkeys(PARAMETERS, why) | unknown
    if any(name in unknown for name in PARAMETERS[1:]):
        unknown[ALLOCATION] = "it follows from A, B, alpha and beta"
    hopeless = all(name in unknown for name in PARAMETERS)
    samples = theta[None] if hopeless else resample(design, theta, replicates=replicates, seed=seed)
    intervals = _intervals(design, samples, points=points, quantile=quantile, unknown=set(unknown))
    unknown |= _open_ended(intervals, unknown=set(unknown))
    errors = zip(PARAMETERS, standard_errors(design, theta), strict=True)
    return Fit(
        points=points,
        design=design,
        theta=theta,
        objective=objective,
        values={name: float(value) for name, value in _quantities(theta, design, points=points).items()},
        intervals=intervals,
        standard_errors={name: float(error) for name, error in errors},
        not_identifiable=unknown,
        condition=condition_number(design, theta),
        level=level,
        replicates=0 if hopeless else replicates,
        seed=seed,
    )


def _quantities(theta: np.ndarray, design: Design, *, points: Points) -> dict[str, np.ndarray]:
    """All values of a Fit by name, (...,) each, of theta (..., 5)."""
    e, log_a, log_b, alpha, beta = np.moveaxis(design.to_law(theta), -1, 0)
    a, b = np.moveaxis(exponents(theta), -1, 0)
    with np.errstate(over="ignore"):
        found = {"E": e, "A": np.exp(log_a), "B": np.exp(log_b), "alpha": alpha, "beta": beta}
    found |= {"exponent_params": a, "exponent_tokens": b}
    for times in BUDGETS:
        flops, factor = times * float(points.flops.max()), points.flops_per_param_token
        best = log_optimum(theta, design, flops=flops, per_param_token=factor)
        loss = e + np.exp(log_a - alpha * best[..., 0]) + np.exp(log_b - beta * best[..., 1])
        found |= {f"params_{times}x": np.exp(best[..., 0]), f"tokens_{times}x": np.exp(best[..., 1])}
        found[f"loss_{times}x"] = loss
    return found


def _owner(name: str) -> str:
    """Under which name a value stands in not_identifiable."""
    return name if name in PARAMETERS else ALLOCATION


def _intervals(
    design: Design, samples: np.ndarray, *, points: Points, quantile: float, unknown: set[str]
) -> dict[str, Interval]:
    ends = lost(design, samples)
    return {
        name: (None, None) if _owner(name) in unknown else interval(values, ends[_owner(name)], quantile=quantile)
        for name, values in _quantities(samples, design, points=points).items()
    }


def _open_ended(intervals: dict[str, Interval], *, unknown: set[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, ends in intervals.items():
        missing = [word for word, end in zip(("lower", "upper"), ends, strict=True) if end is None]
        if missing and _owner(name) not in unknown:
            what = f"the interval has no {' and no '.join(missing)} end"
            found.setdefault(_owner(name), f"{what}: too many resamples run to a bound or lose its term")
    return found


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
