"""Scores and skill: area and missing values, the sign, the bootstrap's coverage, pooling, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.special import ndtri

from sci_evals.baseline import Forecast
from sci_evals.metrics import LEVELS, crps_gaussian_values
from sci_evals.scores import ALL, Bootstrap, LeadGroup, Score, WindowScores, compare, score_baseline, score_quantiles
from sci_evals.toy import daily_station, hourly_station, monthly_grid, trace_record
from sci_evals.windowset import WindowSet, WindowShape, cut
from sci_gpt.errors import DataError
from sci_tokenizers.sample import Sample
from sci_tokenizers.variables import VARIABLES


def windows_of(sample: Sample, shape: WindowShape, count: int) -> WindowSet:
    starts = np.linspace(0, sample.num_times - shape.num_times, count).astype(int)
    return cut([sample], shape, starts=[starts])


def gaussian(windows: WindowSet, error: float, spread: float) -> Forecast:
    """Wrong by `error` everywhere, in transformed units; anything where there is no truth."""
    mean = np.nan_to_num(windows.future, nan=1e3) + error
    return Forecast(mean=mean, spread=np.full(mean.shape, spread))


def as_quantiles(windows: WindowSet, forecast: Forecast) -> list[np.ndarray]:
    quantiles = np.stack([forecast.mean + z * forecast.spread for z in ndtri(np.asarray(LEVELS))])
    return [quantiles[:, i] for i in range(windows.num_windows)]


def plain_bootstrap(windows: int, blocks: int, *, resamples: int = 300) -> Bootstrap:
    regions = np.full(windows, ALL, dtype=object)
    block = np.arange(windows) * blocks // windows
    return Bootstrap(blocks=block, regions=regions, resamples=resamples, interval=0.9)


def scored(values: np.ndarray) -> WindowScores:
    """Scores (N,) of one channel at one lead."""
    return WindowScores(total={"crps": values[:, None, None]}, weight=np.ones((len(values), 1, 1)))


def one_channel(count: int) -> WindowSet:
    grid = monthly_grid(rows=1, columns=1, years=1 + (count + 5) // 12)
    windows = windows_of(grid, WindowShape(num_context=4, leads=(1,)), count)
    assert windows.num_windows == count
    return windows


def skill_rows(
    windows: WindowSet, model: WindowScores, *, baselines: dict[str, WindowScores], bootstrap: Bootstrap
) -> list[Score]:
    groups = [LeadGroup(name="all", leads=windows.shape.leads)]
    return compare(windows, {"model": model}, baselines=baselines, lead_groups=groups, bootstrap=bootstrap)


def test_cells_count_by_their_area() -> None:
    windows = windows_of(monthly_grid(), WindowShape(num_context=12, leads=(1, 2)), 3)
    forecast = gaussian(windows, 0.0, 0.0)
    forecast.mean[..., 0, :] += 2.0  # the northernmost row only
    scores = score_baseline(windows, forecast)
    known = ~np.isnan(windows.truth)
    weights = np.cos(np.radians(windows.places[0][0].astype(np.float64)))
    weights = weights / weights.mean()
    expected = (2.0 * (weights * known)[..., 0, :].sum()) / (weights * known).sum()
    for metric in ("crps", "mae"):
        assert scores.total[metric].sum() / scores.weight.sum() == pytest.approx(expected, rel=2e-3)


def test_crps_is_the_closed_form() -> None:
    windows = windows_of(daily_station(missing=0.3), WindowShape(num_context=8, leads=(1, 3)), 50)
    forecast = gaussian(windows, 0.7, 1.3)
    scores = score_baseline(windows, forecast)
    exact = np.nansum(crps_gaussian_values(forecast.mean, forecast.spread, truth=windows.truth), axis=(2, 4, 5))
    np.testing.assert_allclose(scores.total["crps"], exact, rtol=2e-3)
    np.testing.assert_array_equal(scores.weight, (~np.isnan(windows.truth)).sum(axis=(2, 4, 5)))
    from_model = score_quantiles(windows, as_quantiles(windows, forecast))
    np.testing.assert_allclose(from_model.total["crps"], scores.total["crps"])
    np.testing.assert_allclose(from_model.total["mae"], scores.total["mae"])


def test_missing_truth_counts_in_no_score() -> None:
    windows = windows_of(daily_station(missing=0.4), WindowShape(num_context=8, leads=(1,)), 80)
    forecast = gaussian(windows, 0.5, 0.0)
    wild = replace(forecast, mean=np.where(np.isnan(windows.truth), 1e9, forecast.mean))
    one, two = score_baseline(windows, forecast), score_baseline(windows, wild)
    np.testing.assert_array_equal(one.total["mae"], two.total["mae"])
    assert one.total["mae"].sum() / one.weight.sum() == pytest.approx(0.5, rel=1e-5)


def test_transformed_variables_are_scored_in_physical_units() -> None:
    windows = windows_of(hourly_station(days=20), WindowShape(num_context=24, leads=(1,)), 60)
    forecast = gaussian(windows, 0.0, 0.4)
    rain = score_baseline(windows, forecast).total["crps"][:, 0, 1]
    generator = np.random.default_rng(0)
    # A sampled CRPS of expm1(N(log1p(truth), 0.4)), nothing below 0.
    truth = windows.truth[:, 0, 0, 1, 0, 0]
    members = np.expm1(np.maximum(np.log1p(truth) + 0.4 * generator.normal(size=(4000, 60)), 0.0))
    pairs = np.abs(members[:2000] - members[2000:]).mean(axis=0) / 2
    expected = np.abs(members - truth).mean(axis=0) - pairs
    assert rain.sum() == pytest.approx(expected.sum(), rel=0.03)


def test_a_forecast_that_is_not_finite_is_refused() -> None:
    windows = windows_of(daily_station(), WindowShape(num_context=8, leads=(1,)), 5)
    quantiles = as_quantiles(windows, gaussian(windows, 0.0, 1.0))
    quantiles[3][2, 0, 0, 1] = np.nan
    with pytest.raises(DataError, match=r"air_temperature@85000.*window 3"):
        score_quantiles(windows, quantiles)


def test_skill_is_positive_where_the_model_is_better() -> None:
    random = np.random.default_rng(0)
    windows = one_channel(200)
    errors = random.exponential(size=200)
    baselines = {"poor": scored(2 * errors), "best": scored(errors)}
    better, equal, worse = (
        skill_rows(windows, scored(share * errors), baselines=baselines, bootstrap=plain_bootstrap(200, 40))[0]
        for share in (0.8, 1.0, 1.25)
    )
    assert better.baseline == "best"
    assert better.skill == pytest.approx(0.2) and better.low == pytest.approx(0.2) == better.high
    assert equal.skill == pytest.approx(0.0) and equal.high <= 0
    assert worse.skill == pytest.approx(-0.25)
    assert better.baseline_score == pytest.approx(errors.mean()) and better.score == pytest.approx(0.8 * errors.mean())
    assert (better.num_windows, better.num_blocks) == (200, 40)


def test_the_interval_covers_the_truth() -> None:
    # 20 blocks of 10 windows; block and window noise in both scores; the true ratio is 0.9.
    windows = one_channel(200)
    inside = []
    for seed in range(150):
        random = np.random.default_rng(seed)
        block = np.repeat(random.gamma(4.0, size=20), 10)
        baseline = block * random.gamma(8.0, size=200)
        model = 0.9 * block * random.gamma(8.0, size=200)
        row = skill_rows(
            windows, scored(model), baselines={"b": scored(baseline)}, bootstrap=plain_bootstrap(200, 20, resamples=200)
        )[0]
        inside.append(row.low <= 0.1 <= row.high)
    assert 0.8 <= np.mean(inside) <= 0.97


def test_dependent_windows_widen_the_interval() -> None:
    random = np.random.default_rng(1)
    windows = one_channel(400)
    model, baseline = (np.repeat(random.gamma(4.0, size=20), 20) for _ in range(2))
    widths = {}
    for blocks in (20, 400):
        row = skill_rows(
            windows, scored(model), baselines={"b": scored(baseline)}, bootstrap=plain_bootstrap(400, blocks)
        )[0]
        widths[blocks] = row.high - row.low
    assert widths[20] > 2.5 * widths[400]


def test_one_block_gives_no_interval() -> None:
    windows = one_channel(30)
    row = skill_rows(
        windows, scored(np.ones(30)), baselines={"b": scored(np.full(30, 2.0))}, bootstrap=plain_bootstrap(30, 1)
    )[0]
    assert row.skill == pytest.approx(0.5)
    assert np.isnan(row.low) and np.isnan(row.high)


def test_channels_and_regions_pool_as_geometric_means() -> None:
    sample = daily_station()
    windows = windows_of(sample, WindowShape(num_context=8, leads=(1,)), 40)
    total = np.ones((40, 1, 2))
    model = WindowScores(total={"mae": total * np.array([0.5, 0.8])}, weight=np.ones((40, 1, 2)))
    baseline = WindowScores(total={"mae": total}, weight=np.ones((40, 1, 2)))
    bootstrap = replace(plain_bootstrap(40, 10), regions=np.asarray(["north", "south"] * 20, dtype=object))
    rows = skill_rows(windows, model, baselines={"b": baseline}, bootstrap=bootstrap)
    assert [(row.region, row.channel) for row in rows[:-1]] == [
        (region, channel) for region in ("north", "south") for channel in sample.channels
    ]
    pooled = rows[-1]
    assert (pooled.region, pooled.channel, pooled.num_windows) == (ALL, ALL, 40)
    assert pooled.skill == pytest.approx(1 - np.sqrt(0.5 * 0.8))


def test_leads_of_a_group_are_averaged() -> None:
    windows = windows_of(daily_station(), WindowShape(num_context=8, leads=(1, 2, 5)), 40)
    total = np.broadcast_to(np.array([1.0, 3.0, 100.0])[None, :, None], (40, 3, 2))
    scores = WindowScores(total={"mae": total}, weight=np.ones((40, 3, 2)))
    groups = [LeadGroup(name="1-2", leads=(1, 2)), LeadGroup(name="5", leads=(5,))]
    rows = compare(
        windows, {"m": scores}, baselines={"b": scores}, lead_groups=groups, bootstrap=plain_bootstrap(40, 10)
    )
    assert {row.lead: row.score for row in rows if row.channel != ALL} == {"1-2": 2.0, "5": 100.0}


def test_traces_are_also_scored_by_their_own_scale() -> None:
    record = trace_record()
    loud = replace(record, values=record.values * np.float32(1000.0))
    shape = WindowShape(num_context=8, leads=(1,), frame_times=5)
    scaled = []
    for sample in (record, loud):
        windows = windows_of(sample, shape, 30)
        level = np.sqrt((windows.context**2).mean(axis=1))[:, None, None]
        forecast = Forecast(mean=windows.future + 0.5 * level, spread=np.zeros(windows.future.shape))
        scores = score_baseline(windows, forecast)
        scaled.append(scores.total["scaled crps"].sum() / scores.weight.sum())
    np.testing.assert_allclose(scaled, 0.5, rtol=1e-4)


def test_units_stand_in_the_rows() -> None:
    windows = windows_of(daily_station(), WindowShape(num_context=8, leads=(1,)), 40)
    scores = score_baseline(windows, gaussian(windows, 1.0, 1.0))
    rows = skill_rows(windows, scores, baselines={"b": scores}, bootstrap=plain_bootstrap(40, 4))
    assert {row.unit for row in rows if row.channel != ALL} == {VARIABLES["air_temperature"].unit}


def test_angles_are_not_scored() -> None:
    sample = replace(daily_station(), variables=("wind_from_direction", "wind_speed"), levels=(np.nan, np.nan))
    windows = windows_of(sample, WindowShape(num_context=8, leads=(1,)), 40)
    scores = score_baseline(windows, gaussian(windows, 1.0, 1.0))
    rows = skill_rows(windows, scores, baselines={"b": scores}, bootstrap=plain_bootstrap(40, 4))
    assert {row.channel for row in rows} == {"wind_speed"}
