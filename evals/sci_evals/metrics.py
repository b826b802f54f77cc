"""Metrics on plain arrays: point errors, anomaly correlation, CRPS of three kinds, coverage, quantile losses."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtr

from sci_tokenizers.sphere import row_bounds

_INVERSE_ROOT_PI = 1.0 / np.sqrt(np.pi)


def area_weights(lat: ArrayLike) -> np.ndarray:
    """Area of latitude cells, mean 1: differences of sin(latitude) at the cell bounds (WeatherBench 2).

    Bounds are those of `sci_tokenizers.sphere.row_bounds`, by which the loss weighs cells too.

    Args:
        lat: (row,), degrees north, strictly monotonic, in either order.

    Returns:
        float64 (row,).

    Raises:
        ValueError: not monotonic, or not within -90..90.
    """
    degrees = np.atleast_1d(np.asarray(lat, np.float64))
    if degrees.size == 1:
        return np.ones(1)
    areas = np.abs(np.diff(np.sin(np.radians(row_bounds(degrees)))))
    return np.asarray(areas / areas.mean())


def weighted_mean(values: np.ndarray, weights: ArrayLike | None = None) -> float:
    """Mean over time of the weighted spatial mean; NaN is left out of numerator and denominator alike.

    Args:
        values: (.., row, column), or (time,) without space.
        weights: broadcasts to (row, column); one dimension means one weight per row. None: all 1.
    """
    values = np.asarray(values, np.float64)
    if values.ndim < 2:
        kept = values[~np.isnan(values)]
        return float(kept.mean()) if kept.size else float("nan")
    weight = np.ones(1) if weights is None else np.asarray(weights, np.float64)
    weight = weight[:, None] if weight.ndim == 1 else weight
    known = ~np.isnan(values)
    total = np.where(known, values * weight, 0.0).sum(axis=(-2, -1))
    area = np.where(known, weight, 0.0).sum(axis=(-2, -1))
    seen = area > 0
    return float((total[seen] / area[seen]).mean()) if seen.any() else float("nan")


def _minus(left: ArrayLike, right: ArrayLike) -> np.ndarray:
    return np.asarray(np.asarray(left, np.float64) - np.asarray(right, np.float64))


def rmse(forecast: ArrayLike, truth: ArrayLike, *, weights: ArrayLike | None = None) -> float:
    """Root of the time mean of the weighted mean squared error; arrays (time, row, column)."""
    return float(np.sqrt(weighted_mean(_minus(forecast, truth) ** 2, weights)))


def mae(forecast: ArrayLike, truth: ArrayLike, *, weights: ArrayLike | None = None) -> float:
    """Weighted mean absolute error; arrays (time, row, column)."""
    return weighted_mean(np.abs(_minus(forecast, truth)), weights)


def bias(forecast: ArrayLike, truth: ArrayLike, *, weights: ArrayLike | None = None) -> float:
    """Weighted mean of forecast - truth; arrays (time, row, column)."""
    return weighted_mean(_minus(forecast, truth), weights)


def acc(  # signature of DESIGN section 7
    forecast: ArrayLike, truth: ArrayLike, climatology: ArrayLike, *, weights: ArrayLike | None = None
) -> float:
    """Anomaly correlation, not centred again (WeatherBench 2): per time over space, then the mean over times.

    Args:
        forecast, truth: (time, row, column).
        climatology: broadcasts to them.
    """
    ours = _minus(forecast, climatology)
    theirs = _minus(truth, climatology)
    known = ~(np.isnan(ours) | np.isnan(theirs))
    weight = np.ones(1) if weights is None else np.asarray(weights, np.float64)
    weight = np.where(known, weight[:, None] if weight.ndim == 1 else weight, 0.0)
    ours, theirs = np.where(known, ours, 0.0), np.where(known, theirs, 0.0)
    covariance = (weight * ours * theirs).sum(axis=(-2, -1))
    variances = (weight * ours**2).sum(axis=(-2, -1)) * (weight * theirs**2).sum(axis=(-2, -1))
    defined = variances > 0
    return float((covariance[defined] / np.sqrt(variances[defined])).mean()) if defined.any() else float("nan")


def crps_gaussian_values(mean: ArrayLike, std: ArrayLike, *, truth: ArrayLike) -> np.ndarray:
    """CRPS of N(mean, std) value by value, in the truth's unit (Gneiting et al. 2005, eq. 5); |truth - mean| where
    std is 0.
    """
    mean, std, truth = (np.asarray(part, np.float64) for part in (mean, std, truth))
    safe = np.where(std > 0, std, 1.0)
    z = (truth - mean) / safe
    density = np.exp(-0.5 * z * z) / np.sqrt(2 * np.pi)
    spread = safe * (z * (2 * ndtr(z) - 1) + 2 * density - _INVERSE_ROOT_PI)
    return np.asarray(np.where(std > 0, spread, np.abs(truth - mean)))


def crps_gaussian(  # signature of DESIGN section 7
    mean: ArrayLike, std: ArrayLike, truth: ArrayLike, *, weights: ArrayLike | None = None
) -> float:
    """Weighted mean of the closed-form CRPS of N(mean, std); arrays (time, row, column)."""
    return weighted_mean(crps_gaussian_values(mean, std, truth=truth), weights)


def crps_ensemble(
    ensemble: ArrayLike, truth: ArrayLike, *, weights: ArrayLike | None = None, fair: bool = True
) -> float:
    """CRPS of an ensemble: mean|x - y| - sum|xi - xj| / (2 M (M - 1)); M^2 instead of M (M - 1) where not `fair`.

    Args:
        ensemble: (member, time, row, column); a value with a missing member is left out.
        truth: (time, row, column).

    Raises:
        ValueError: fewer than 2 members and `fair`.
    """
    members = np.sort(np.asarray(ensemble, np.float64), axis=0)
    count = members.shape[0]
    if fair and count < 2:
        raise ValueError(f"a fair CRPS needs at least 2 members, got {count}; pass fair=False for one")
    error = np.abs(members - np.asarray(truth, np.float64)).mean(axis=0)
    # sum over i, j of |xi - xj| = 2 sum_i (2i - M + 1) x_(i): no pairs are formed
    rank = (2.0 * np.arange(count) - count + 1).reshape(-1, *[1] * (members.ndim - 1))
    pairs = 2.0 * (rank * members).sum(axis=0)
    return weighted_mean(error - pairs / (2.0 * count * (count - 1 if fair else count)), weights)


def energy_score(ensemble: ArrayLike, truth: ArrayLike, *, weights: ArrayLike | None = None) -> float:
    """Fair energy score of an ensemble of whole fields: mean|x - y| - sum|xi - xj| / (2 M (M - 1)), with the norm
    sqrt(mean of the weighted squares) over all values (Gneiting & Raftery 2007, eq. 22).

    It judges the joint distribution: members whose cells do not belong together score worse than the same values put
    together rightly. In the unit of the values.

    Args:
        ensemble: (member, ..).
        truth: (..); values that are missing there, or in a member, count in no norm.
        weights: broadcast to `truth`.

    Raises:
        ValueError: fewer than 2 members.
    """
    members, observed = np.asarray(ensemble, np.float64), np.asarray(truth, np.float64)
    count = len(members)
    if count < 2:
        raise ValueError(f"an energy score needs at least 2 members, got {count}")
    weight = np.broadcast_to(1.0 if weights is None else np.asarray(weights, np.float64), observed.shape)
    there = np.isfinite(observed) & np.isfinite(members).all(axis=0)
    root = np.sqrt(weight[there] / weight[there].sum())
    flat, aim = members[:, there] * root, observed[there] * root
    error = np.sqrt(((flat - aim) ** 2).sum(axis=1)).mean()
    squares = (flat**2).sum(axis=1)
    apart = np.sqrt(np.maximum(squares[:, None] + squares - 2.0 * flat @ flat.T, 0.0))
    np.fill_diagonal(apart, 0.0)
    return float(error - apart.sum() / (2.0 * count * (count - 1)))


def midpoint_levels(count: int) -> tuple[float, ...]:
    """Quantile levels (i + 0.5) / count; 0.1, 0.5 and 0.9 are among them where count is an odd multiple of 5."""
    return tuple((i + 0.5) / count for i in range(count))


# 0.1, 0.5 and 0.9 are among them.
LEVELS = midpoint_levels(45)
MEDIAN = LEVELS.index(0.5)
# Central bands whose coverage is scored.
BANDS = (0.5, 0.9)


def crps_from_quantiles_values(
    quantiles: Sequence[np.ndarray] | np.ndarray, truth: np.ndarray, *, levels: ArrayLike
) -> np.ndarray:
    """CRPS value by value from quantiles at midpoint levels: twice the mean pinball loss over the levels.

    It is exactly the CRPS of the M equally likely values, a distribution other than the one they were read from; CRPS
    is proper, so where the original is calibrated the expected score is never below the exact one (a Gaussian's is
    0.04 % above at M = 45, 0.84 % at M = 9). A single value, or a forecast that is too wide, can score below, by O(1
    / M^2).

    Args:
        quantiles: (level, ..).
        truth: (..).
        levels: (level,), those of `midpoint_levels`.
    """
    total = np.zeros(np.shape(truth))
    for quantile, level in zip(quantiles, np.asarray(levels, np.float64), strict=True):
        error = np.asarray(truth, np.float64) - quantile
        total += np.maximum(level * error, (level - 1.0) * error)
    return total * (2.0 / len(quantiles))


def crps_from_quantiles(
    quantiles: ArrayLike, truth: ArrayLike, *, levels: ArrayLike, weights: ArrayLike | None = None
) -> float:
    """Weighted mean of `crps_from_quantiles_values`; quantiles (level, time, row, column)."""
    return weighted_mean(crps_from_quantiles_values(np.asarray(quantiles), np.asarray(truth), levels=levels), weights)


def quantile_at(quantiles: Sequence[np.ndarray] | np.ndarray, level: float, *, levels: ArrayLike) -> np.ndarray:
    """The quantile at a level between those given, linear between its neighbours.

    Args:
        quantiles: (level, ..).
        levels: (level,), ascending, with `level` inside.
    """
    known = np.asarray(levels, np.float64)
    upper = min(max(int(np.searchsorted(known, level)), 1), len(known) - 1)
    share = (level - known[upper - 1]) / (known[upper] - known[upper - 1])
    # An atom's neighbours are equal, and so is what lies between them: to the bit, since a tie is asked for.
    return np.asarray(quantiles[upper - 1] + share * (quantiles[upper] - quantiles[upper - 1]))


def covered_values(
    quantiles: Sequence[np.ndarray] | np.ndarray, truth: np.ndarray, *, levels: ArrayLike, nominal: float
) -> np.ndarray:
    """Share of each truth inside the central band that should hold `nominal` of them: 1 inside, 0 outside.

    A truth that equals an end of the band lies on an atom of the forecast (a dry hour) and counts by the part of the
    atom's probability that the band holds: the mean over the randomised probability integral transform (Czado,
    Gneiting and Held 2009). So the mean is `nominal` for a calibrated forecast, atoms or not.

    Args:
        quantiles: (level, ..); truth: (..), NaN where missing (0 comes back).
        levels: (level,), of `midpoint_levels`.
        nominal: 0.5 for the band from the quantile at 0.25 to that at 0.75.
    """
    ends = ((1.0 - nominal) / 2.0, (1.0 + nominal) / 2.0)
    low, high = (_share_below(quantiles, truth, levels=levels, level=level) for level in ends)
    return np.asarray(high - low)


def _share_below(
    quantiles: Sequence[np.ndarray] | np.ndarray, truth: np.ndarray, *, levels: ArrayLike, level: float
) -> np.ndarray:
    """Share of each truth (..) below the quantile at `level`."""
    bound = quantile_at(quantiles, level, levels=levels)
    share = (truth < bound).astype(np.float64)
    tied = truth == bound
    if tied.any():
        atoms, values = np.stack([np.broadcast_to(part, truth.shape)[tied] for part in quantiles]), truth[tied]
        less, upto = (atoms < values).mean(axis=0), (atoms <= values).mean(axis=0)
        share[tied] = np.clip((level - less) / np.where(upto > less, upto - less, np.inf), 0.0, 1.0)
    return share


def spread_skill_ratio(ensemble: ArrayLike, truth: ArrayLike, *, weights: ArrayLike | None = None) -> float:
    """Root mean ensemble variance (M - 1) over the RMSE of the ensemble mean.

    A calibrated ensemble of M members scores sqrt(M / (M + 1)) (Fortin et al. 2014); the factor is not applied.
    Values whose truth is missing count in neither.
    """
    members = np.asarray(ensemble, np.float64)
    variance = np.where(np.isnan(np.asarray(truth, np.float64)), np.nan, members.var(axis=0, ddof=1))
    return float(np.sqrt(weighted_mean(variance, weights)) / rmse(members.mean(axis=0), truth, weights=weights))


def mase(  # signature of DESIGN section 7
    forecast: ArrayLike, truth: ArrayLike, context: ArrayLike, season: int
) -> float:
    """Mean absolute error over the context's mean absolute seasonal difference (GluonTS), mean over series.

    Args:
        forecast, truth: (.., lead).
        context: (.., time), longer than `season` steps.
        season: steps.

    Raises:
        ValueError: the context is not longer than a season.
    """
    past = np.asarray(context, np.float64)
    if not 0 < season < past.shape[-1]:
        raise ValueError(f"the season must be within 1..{past.shape[-1] - 1} steps of the context, got {season}")
    error = np.nanmean(np.abs(_minus(forecast, truth)), axis=-1)
    scale = np.nanmean(np.abs(past[..., season:] - past[..., :-season]), axis=-1)
    return float(np.nanmean(error / scale))


def wql(  # signature of DESIGN section 7
    quantiles: ArrayLike, truth: ArrayLike, levels: ArrayLike
) -> float:
    """Weighted quantile loss (GluonTS, with its factor 2): 2 sum pinball / sum |truth|, mean over the levels.

    Args:
        quantiles: (level, ..).
        truth: (..); NaN is left out.
        levels: (level,).
    """
    observed = np.asarray(truth, np.float64)
    losses = []
    for quantile, level in zip(np.asarray(quantiles, np.float64), np.asarray(levels, np.float64), strict=True):
        error = observed - quantile
        losses.append(2.0 * np.nansum(np.maximum(level * error, (level - 1.0) * error)))
    return float(np.mean(losses) / np.nansum(np.abs(observed)))
