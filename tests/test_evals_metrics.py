"""Metrics against analytic numbers, numerical integrals and plain loops."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.special import ndtri
from scipy.stats import norm

from sci_evals.metrics import (
    LEVELS,
    MEDIAN,
    acc,
    area_weights,
    bias,
    crps_ensemble,
    crps_from_quantiles,
    crps_from_quantiles_values,
    crps_gaussian,
    crps_gaussian_values,
    energy_score,
    mae,
    mase,
    midpoint_levels,
    rmse,
    spread_skill_ratio,
    wql,
)

RANDOM = np.random.default_rng(3)


def test_area_weights_are_the_areas_of_the_cells() -> None:
    # Cells -90..-45, -45..45, 45..90: areas sin(45)-sin(90) etc.: 0.292893, 1.414214, 0.292893; their mean is 2/3.
    expected = np.array([1 - np.sqrt(0.5), np.sqrt(2.0), 1 - np.sqrt(0.5)]) * 1.5
    np.testing.assert_allclose(area_weights([-90.0, 0.0, 90.0]), expected, rtol=1e-12)
    # A region: 10..20 and 20..30 degrees, centres 15 and 25; nothing reaches the pole.
    areas = np.diff(np.sin(np.radians([10.0, 20.0, 30.0])))
    np.testing.assert_allclose(area_weights([15.0, 25.0]), areas / areas.mean(), rtol=1e-12)


def test_area_weights_turn_with_the_latitudes() -> None:
    latitudes = np.linspace(-88.0, 88.0, 45)
    np.testing.assert_allclose(area_weights(latitudes[::-1]), area_weights(latitudes)[::-1])
    assert area_weights(latitudes).mean() == pytest.approx(1.0)


def test_area_weights_refuse_what_is_no_axis() -> None:
    with pytest.raises(ValueError, match="rise or fall"):
        area_weights([0.0, 10.0, 5.0])
    with pytest.raises(ValueError, match=r"-90\.\.90"):
        area_weights([0.0, 95.0])


def test_point_errors_weigh_by_area() -> None:
    truth = np.zeros((2, 3, 4))
    forecast = np.zeros((2, 3, 4))
    forecast[:, 1] = 2.0  # the middle row only
    weights = np.array([0.5, 2.0, 0.5])
    # Weighted mean of squares: 4 x 2 / 3; of absolute errors: 2 x 2 / 3.
    assert rmse(forecast, truth, weights=weights) == pytest.approx(np.sqrt(8 / 3))
    assert mae(forecast, truth, weights=weights) == pytest.approx(4 / 3)
    assert bias(-forecast, truth, weights=weights) == pytest.approx(-4 / 3)
    assert rmse(forecast, truth) == pytest.approx(np.sqrt(4 / 3))


def test_missing_truth_leaves_numerator_and_denominator() -> None:
    truth = np.array([[[1.0, np.nan], [3.0, 4.0]]])
    forecast = np.array([[[2.0, 50.0], [3.0, 6.0]]])
    # Left: errors 1, 0, 2 with weights 1, 3, 3.
    weights = np.array([1.0, 3.0])
    assert mae(forecast, truth, weights=weights) == pytest.approx((1 * 1 + 3 * 0 + 3 * 2) / 7)
    assert rmse(forecast, truth, weights=weights) == pytest.approx(np.sqrt((1 + 0 + 3 * 4) / 7))
    assert crps_gaussian(forecast, np.zeros_like(forecast), truth, weights=weights) == pytest.approx(1.0)
    assert np.isnan(mae(forecast, np.full_like(truth, np.nan)))


def test_acc_is_the_uncentred_correlation_of_anomalies() -> None:
    climatology = RANDOM.normal(size=(1, 4, 5))
    anomaly = RANDOM.normal(size=(3, 4, 5))
    assert acc(climatology + 2 * anomaly, climatology + anomaly, climatology) == pytest.approx(1.0)
    assert acc(climatology - anomaly, climatology + anomaly, climatology) == pytest.approx(-1.0)
    # Not centred: a constant anomaly of one sign correlates fully, where a centred one would have no variance.
    assert acc(climatology + 1.0, climatology + np.full((3, 4, 5), 3.0), climatology) == pytest.approx(1.0)


@pytest.mark.parametrize(("mean", "std", "truth"), [(0.0, 1.0, 0.0), (1.5, 0.3, 1.1), (-2.0, 2.0, 3.0)])
def test_gaussian_crps_is_its_integral(mean: float, std: float, truth: float) -> None:
    def square(x: float) -> float:
        return float((norm.cdf(x, mean, std) - (x >= truth)) ** 2)

    below, above = (quad(square, low, high)[0] for low, high in ((mean - 40 * std, truth), (truth, mean + 40 * std)))
    assert float(crps_gaussian_values(mean, std, truth=truth)) == pytest.approx(below + above, rel=1e-6)


def test_gaussian_crps_of_a_calibrated_forecast() -> None:
    # E CRPS(N(0, s), N(0, s)) = s / sqrt(pi)
    truth = 2.0 * RANDOM.normal(size=(400, 20, 20))
    assert crps_gaussian(np.zeros(1), np.full(1, 2.0), truth) == pytest.approx(2.0 / np.sqrt(np.pi), rel=5e-3)


def test_ensemble_crps_equals_the_double_loop() -> None:
    ensemble, truth = RANDOM.normal(size=(5, 3, 2, 2)), RANDOM.normal(size=(3, 2, 2))
    pairs = np.mean([np.abs(a - b).sum() for a in ensemble for b in ensemble]) * 25
    error = np.abs(ensemble - truth).mean(axis=0).sum()
    assert crps_ensemble(ensemble, truth) == pytest.approx((error - pairs / (2 * 5 * 4)) / 12)
    assert crps_ensemble(ensemble, truth, fair=False) == pytest.approx((error - pairs / (2 * 25)) / 12)
    with pytest.raises(ValueError, match="at least 2 members"):
        crps_ensemble(ensemble[:1], truth)


def test_fair_crps_does_not_depend_on_the_members() -> None:
    truth = RANDOM.normal(size=(4000, 3, 3))
    few, many = (crps_ensemble(RANDOM.normal(size=(m, 4000, 3, 3)), truth) for m in (2, 12))
    assert few == pytest.approx(many, rel=0.03)
    assert few == pytest.approx(1 / np.sqrt(np.pi), rel=0.03)


def test_quantile_crps_is_that_of_its_members() -> None:
    quantiles, truth = np.sort(RANDOM.normal(size=(9, 6, 2, 2)), axis=0), RANDOM.normal(size=(6, 2, 2))
    own = crps_from_quantiles(quantiles, truth, levels=midpoint_levels(9))
    assert own == pytest.approx(crps_ensemble(quantiles, truth, fair=False))


def test_quantile_crps_never_favours_a_calibrated_forecast() -> None:
    # Uniform on 0..1: E CRPS = 1/6, with M midpoint quantiles 1/6 + 1 / (12 M^2).
    truth = (np.arange(200_000) + 0.5) / 200_000
    for count in (5, 9, 45):
        levels = midpoint_levels(count)
        score = crps_from_quantiles_values(np.asarray(levels)[:, None], truth, levels=levels).mean()
        assert score == pytest.approx(1 / 6 + 1 / (12 * count**2), rel=1e-5)
    score = crps_from_quantiles_values(ndtri(LEVELS)[:, None], ndtri(truth), levels=LEVELS).mean()
    assert 1.0 < score * np.sqrt(np.pi) < 1.0005


def test_levels_hold_the_ones_that_are_shown() -> None:
    assert {0.1, 0.5, 0.9} <= set(LEVELS)
    assert LEVELS[MEDIAN] == 0.5


def test_spread_skill_of_a_calibrated_ensemble() -> None:
    # Members and truth from one distribution, M members: sqrt(M / (M + 1)).
    members, truth = RANDOM.normal(size=(8, 4000, 3, 3)), RANDOM.normal(size=(4000, 3, 3))
    assert spread_skill_ratio(members, truth) == pytest.approx(np.sqrt(8 / 9), rel=0.02)
    assert spread_skill_ratio(3 * members, truth) > 1.5


def test_mase_and_wql_as_gluonts_defines_them() -> None:
    context = np.array([1.0, 3.0, 2.0, 5.0, 4.0, 6.0])
    # Seasonal differences of 2: 1, 2, 2, 1, mean 1.5; errors 1 and 2.
    assert mase(np.array([5.0, 5.0]), np.array([6.0, 7.0]), context, 2) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="season"):
        mase(np.zeros(1), np.zeros(1), context, 6)
    # Level 0.5: errors 1 and -1, losses 0.5 and 0.5, twice their sum over |2| + |4|.
    assert wql(np.array([[1.0, 5.0]]), np.array([2.0, 4.0]), [0.5]) == pytest.approx(2 * 1.0 / 6.0)
    # Level 0.9 of an error +1 costs 0.9, of -1 0.1.
    assert wql(np.array([[1.0, 5.0]]), np.array([2.0, 4.0]), [0.9]) == pytest.approx(2 * 1.0 / 6.0)
    assert wql(np.array([[1.0, 3.0]]), np.array([2.0, 4.0]), [0.9]) == pytest.approx(2 * 1.8 / 6.0)


def test_energy_score_against_all_pairs_and_the_crps() -> None:
    """Pair by pair with weights and a missing value; for one value it is the fair CRPS."""
    random = np.random.default_rng(4)
    members, truth = random.standard_normal((5, 3, 4)), random.standard_normal((3, 4))
    weights = random.random((3, 4))
    truth[1, 2] = np.nan
    there = np.isfinite(truth)

    def size(away: np.ndarray) -> float:
        return float(np.sqrt((weights[there] * away[there] ** 2).sum() / weights[there].sum()))

    pairs = sum(size(members[i] - members[j]) for i in range(5) for j in range(5))
    expected = np.mean([size(one - truth) for one in members]) - pairs / (2 * 5 * 4)
    assert energy_score(members, truth, weights=weights) == pytest.approx(expected, rel=1e-12)
    one = members[:, :1, :1]
    assert energy_score(one, truth[:1, :1]) == pytest.approx(crps_ensemble(one, truth[:1, :1]), rel=1e-9)
    with pytest.raises(ValueError, match="at least 2 members, got 1"):
        energy_score(members[:1], truth)
