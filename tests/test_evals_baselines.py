"""Baselines against plain references and known answers; none sees the future or dresses itself from the test split."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sci_evals.autoregressive import AutoRegression, ContextMedian, Zero
from sci_evals.baseline import Baseline, fit_dressing, fit_shape
from sci_evals.baselines import BASELINES, forecast_baselines
from sci_evals.climatology import Climatology, context_anomalies, fit_climatology, season_seconds
from sci_evals.metrics import LEVELS, MEDIAN, crps_gaussian_values
from sci_evals.naive import DampedPersistence, Persistence, RecentMean, RecentSpread, SeasonAgo, last_valid
from sci_evals.ridge import Ridge, SeasonalRidge, lag_blocks
from sci_evals.scores import score_baseline
from sci_evals.tasks import EVAL_TASKS
from sci_evals.toy import daily_station, hourly_station, monthly_grid, red_noise
from sci_evals.windowset import WindowSet, WindowShape, choose_starts, cut
from sci_gpt.errors import DataError
from sci_tokenizers.autoregression import burg
from sci_tokenizers.sample import Sample


def windows_of(samples: list[Sample], shape: WindowShape, count: int = 2000) -> WindowSet:
    lengths = np.array([sample.num_times for sample in samples])
    return cut(samples, shape, starts=choose_starts(lengths, shape, count=count))


def toy_windows(task: str, count: int = 120) -> tuple[WindowSet, WindowSet]:
    train, test, shape = EVAL_TASKS[task].toy()
    return windows_of(train, shape, 4 * count), windows_of(test, shape, count)


def fitted(kind: type[Baseline], train: WindowSet, *, by_place: bool = False) -> Baseline:
    baseline = kind()
    baseline.fit(train, fit_climatology(train, by_place=by_place))
    return baseline


@pytest.fixture(scope="module")
def toys() -> dict[str, tuple[WindowSet, WindowSet]]:
    return {name: toy_windows(name) for name in EVAL_TASKS}


@pytest.fixture(scope="module")
def station_train() -> WindowSet:
    samples = [daily_station(group=f"S{i}", years=10, seed=20 * i) for i in range(5)]
    return windows_of(samples, WindowShape(num_context=16, leads=(1, 2, 4)), 6000)


@pytest.mark.parametrize("name", BASELINES)
def test_contract_of_every_baseline(name: str, toys: dict[str, tuple[WindowSet, WindowSet]]) -> None:
    taken = 0
    for train, test in toys.values():
        kind = BASELINES[name]
        if not kind.applies(test):
            continue
        taken += 1
        baseline = fitted(kind, train)
        forecast = baseline.predict(test)
        assert forecast.mean.shape == test.truth.shape == forecast.spread.shape
        assert np.isfinite(forecast.mean).all() and np.isfinite(forecast.spread).all()
        assert (forecast.spread >= 0).all()
        again = fitted(kind, train).predict(test)
        np.testing.assert_array_equal(again.mean, forecast.mean)
        np.testing.assert_array_equal(again.spread, forecast.spread)
    assert taken, f"{name} applies to no toy world: give it one"


@pytest.mark.parametrize("name", BASELINES)
def test_no_baseline_sees_the_future(name: str, toys: dict[str, tuple[WindowSet, WindowSet]]) -> None:
    for train, test in toys.values():
        if not BASELINES[name].applies(test):
            continue
        baseline = fitted(BASELINES[name], train)
        values, valid = test.values.copy(), test.valid.copy()
        values[:, test.shape.context_times :] *= 3.0
        valid[::2, test.shape.context_times :] = False
        other = baseline.predict(replace(test, values=values, valid=valid))
        forecast = baseline.predict(test)
        np.testing.assert_array_equal(other.mean, forecast.mean)
        np.testing.assert_array_equal(other.spread, forecast.spread)
        if forecast.shape is not None and other.shape is not None:
            np.testing.assert_array_equal(other.shape, forecast.shape)


@pytest.mark.parametrize("name", BASELINES)
def test_nothing_known_is_still_forecast(name: str, toys: dict[str, tuple[WindowSet, WindowSet]]) -> None:
    for train, test in toys.values():
        if BASELINES[name].applies(test):
            blank = replace(test, values=np.zeros_like(test.values), valid=np.zeros_like(test.valid))
            forecast = fitted(BASELINES[name], train).predict(blank)
            assert np.isfinite(forecast.mean).all() and np.isfinite(forecast.spread).all()


def test_season_is_a_day_or_a_year() -> None:
    assert season_seconds(3600.0) == 86400.0
    assert season_seconds(86400.0) == season_seconds(30.4 * 86400.0) == 365.2425 * 86400.0
    assert season_seconds(0.1) is None
    assert season_seconds(365.0 * 86400.0) is None


def test_climatology_finds_the_cycle(station_train: WindowSet) -> None:
    climatology = fit_climatology(station_train, by_place=False)
    expected = 285.0 - 10.0 * np.cos(2 * np.pi * station_train.year_phase[:, station_train.shape.future_index])
    found = climatology.of_future(station_train)[:, :, :, 0, 0, 0]
    np.testing.assert_allclose(found, expected, atol=0.8)
    assert np.sqrt(np.mean((found - expected) ** 2)) < 0.3


def test_climatology_of_places_and_of_strangers() -> None:
    shape = WindowShape(num_context=12, leads=(1,))
    train = windows_of([monthly_grid(west=west, seed=1) for west in (0.0, 40.0)], shape)
    climatology = fit_climatology(train, by_place=True)
    assert len(climatology.places) == 2
    here, stranger = (windows_of([monthly_grid(west=west, seed=2)], shape) for west in (40.0, 80.0))
    assert set(climatology.place_index(here)) == {1}
    assert set(climatology.place_index(stranger)) == {2}
    near, far = (np.nanstd(windows.future - climatology.of_future(windows)) for windows in (here, stranger))
    assert near < 0.75 * far


def test_last_valid_equals_the_loop() -> None:
    values = np.random.default_rng(0).normal(size=(6, 9, 2))
    values[np.random.default_rng(1).random(values.shape) < 0.6] = np.nan
    values[0, :, 0] = np.nan
    expected = np.full((6, 2), np.nan)
    for i, j in np.ndindex(6, 2):
        known = values[i, :, j][~np.isnan(values[i, :, j])]
        expected[i, j] = known[-1] if len(known) else np.nan
    np.testing.assert_array_equal(last_valid(values), expected)


def test_damping_is_the_memory_to_the_lead(station_train: WindowSet) -> None:
    baseline = DampedPersistence()
    baseline.fit(station_train, fit_climatology(station_train, by_place=False))
    # x[t + k] = memory^k x[t] + noise, memory 0.8
    np.testing.assert_allclose(baseline.fraction[:, 0, 0], [0.8, 0.64, 0.8**4], atol=0.03)


def test_ridge_is_nearly_optimal(station_train: WindowSet) -> None:
    test = windows_of([daily_station(group="T", years=20, seed=999)], station_train.shape, 3000)
    forecast = fitted(Ridge, station_train).predict(test)
    # The best linear forecast of the first channel errs by 3 sqrt(1 - 0.8^(2k)).
    for number, lead in enumerate(test.shape.leads):
        error = (test.future - forecast.mean)[:, number, 0, 0, 0, 0].std()
        assert error == pytest.approx(3.0 * np.sqrt(1 - 0.8 ** (2 * lead)), rel=0.05)
    crps = crps_gaussian_values(forecast.mean, forecast.spread, truth=test.future)[:, 0, 0, 0].mean()
    assert crps == pytest.approx(3.0 * 0.6 / np.sqrt(np.pi), rel=0.06)


def test_ridge_equals_plain_normal_equations() -> None:
    train = windows_of(
        [daily_station(group=f"S{i}", years=1, seed=i) for i in range(5)], WindowShape(num_context=3, leads=(1,))
    )
    ridge = Ridge()
    climatology = fit_climatology(train, by_place=False)
    ridge.fit(train, climatology)
    past = context_anomalies(climatology, train).astype(np.float64).reshape(train.num_windows, -1)
    features = np.concatenate([past, np.ones((len(past), 1))], axis=1)
    season = 2 * np.pi * train.year_phase[:, 2].astype(np.float64)
    features = np.concatenate([features, np.sin(season)[:, None], np.cos(season)[:, None]], axis=1) / ridge.scale
    target = (train.future - climatology.of_future(train)).reshape(train.num_windows, -1)
    for channel in range(2):
        strength = ridge.strength[0, channel] * len(features)
        plain = np.linalg.solve(
            features.T @ features + strength * np.eye(features.shape[1]), features.T @ target[:, channel]
        )
        np.testing.assert_allclose(ridge.coefficients[0, :, channel], plain, rtol=1e-8, atol=1e-10)
        # Out of fold: station S0 is forecast by the others alone.
        first = np.flatnonzero(ridge.fold == ridge.fold[0])
        rest = np.flatnonzero(ridge.fold != ridge.fold[0])
        x, y = features[rest], target[rest, channel]
        plain = np.linalg.solve(x.T @ x + ridge.strength[0, channel] * len(x) * np.eye(x.shape[1]), x.T @ y)
        held = (ridge.training_point(train) - climatology.of_future(train)).reshape(train.num_windows, -1)
        np.testing.assert_allclose(held[first, channel], features[first] @ plain, rtol=1e-6, atol=1e-8)


def test_ridge_is_dressed_by_errors_it_was_not_fitted_to() -> None:
    # 40 windows and 66 features: errors of the fit itself would be far too small.
    shape = WindowShape(num_context=32, leads=(1,))
    train = windows_of([daily_station(group=f"S{i}", years=1, seed=i) for i in range(5)], shape, 40)
    ridge = fitted(Ridge, train)
    assert isinstance(ridge, Ridge)
    inside = np.nanstd(train.future - ridge.point(train))
    outside = np.nanstd(train.future - ridge.training_point(train))
    assert outside > 1.2 * inside


def test_seasonal_ridge_follows_the_season() -> None:
    def station(group: str, seed: int) -> Sample:
        # Anomalies persist in the first half of the year and turn over in the second.
        sample = daily_station(group=group, years=12, seed=seed)
        noise = np.zeros(sample.num_times)
        steps = np.random.default_rng(seed).normal(size=sample.num_times)
        for t in range(1, sample.num_times):
            noise[t] = 0.9 * np.sin(2 * np.pi * sample.year_phase[t - 1]) * noise[t - 1] + steps[t]
        values = (280.0 + np.stack([noise, noise], axis=1)[:, :, None, None]).astype(np.float32)
        return replace(sample, values=values, valid=np.ones(values.shape, bool))

    shape = WindowShape(num_context=8, leads=(1,))
    train = windows_of([station(f"S{i}", i) for i in range(5)], shape, 8000)
    test = windows_of([station("T", 77)], shape, 3000)
    plain, seasonal = (
        np.nanmean((test.future - fitted(kind, train).predict(test).mean) ** 2) for kind in (Ridge, SeasonalRidge)
    )
    assert seasonal == pytest.approx(1.0, rel=0.08)
    assert plain > 1.15 * seasonal


def test_missing_lags_carry_the_last_anomaly() -> None:
    shape = WindowShape(num_context=16, leads=(1,))
    train = windows_of([daily_station(group=f"S{i}", years=8, seed=20 * i) for i in range(5)], shape, 5000)
    test = windows_of([daily_station(group="T", years=8, seed=500)], shape, 2000)
    valid = test.valid.copy()
    valid[:, 15] = False
    forecast = fitted(Ridge, train).predict(replace(test, valid=valid)).mean
    unknown = np.nanmean((test.future - forecast)[:, :, :, 0] ** 2)
    # Carried forward: 0.8 x[t - 2] for x[t], of the process's variance 1 + 0.8^2 - 2 x 0.8 x 0.8^2 = 0.616; as zero: 1.
    assert unknown == pytest.approx(0.616 * 9.0, rel=0.1)


def test_lag_blocks_cover_the_context_once() -> None:
    assert lag_blocks(96, 2) == [(i, i + 1) for i in range(96)]
    for times, channels in ((500, 2), (168, 8), (1000, 20)):
        blocks = lag_blocks(times, channels)
        assert blocks[0][0] == 0 and blocks[-1] == (times - 1, times)
        assert all(stop == start for (_, stop), (start, _) in zip(blocks, blocks[1:], strict=False))
        assert len(blocks) <= max(8, 256 // channels)


def test_recent_mean_takes_the_best_count() -> None:
    # White noise about a level of each station's own: the longer the mean, the better.
    def station(i: int) -> Sample:
        sample = daily_station(group=f"S{i}", years=2, seed=i, memory=0.0)
        values = 260.0 + 10.0 * i + np.random.default_rng(i).normal(size=sample.values.shape)
        return replace(sample, values=values.astype(np.float32))

    train = windows_of([station(i) for i in range(4)], WindowShape(num_context=40, leads=(1, 2)), 1500)
    baseline = RecentMean()
    baseline.fit(train, fit_climatology(train, by_place=False))
    assert min(baseline.counts[i] for i in baseline.best.ravel()) >= 24
    for lead, channel in np.ndindex(2, 2):
        count = baseline.counts[baseline.best[lead, 0, channel]]
        expected = train.context[:, -count:, channel].mean(axis=1)
        np.testing.assert_allclose(baseline.point(train)[:, lead, 0, channel], expected)


def test_the_spread_of_the_context_is_followed_where_calm_and_rough_weeks_alternate() -> None:
    """White noise, its deviation drawn per window: the CRPS of a forecast that knows it is 0.564 of it."""
    shape = WindowShape(num_context=60, leads=(1,))
    windows = windows_of([daily_station(years=40, seed=3)], shape, 200)
    generator = np.random.default_rng(0)
    deviation = np.exp(generator.normal(size=windows.num_windows))[:, None, None, None, None]
    noise = generator.normal(size=windows.values.shape) * deviation
    windows = replace(windows, values=(280.0 + noise).astype(np.float32))
    train, test = windows.take(np.arange(0, 200, 2)), windows.take(np.arange(1, 200, 2))
    spread = fitted(RecentSpread, train).predict(test)
    logs = np.log(np.stack([spread.spread[:, 0, 0, 0, 0, 0], deviation[1::2, 0, 0, 0, 0]]))
    assert np.corrcoef(logs)[0, 1] > 0.95
    scores = {kind: score_baseline(test, fitted(kind, train).predict(test)) for kind in (RecentMean, RecentSpread)}
    known, blind = (scores[kind].total["crps"].mean() for kind in (RecentSpread, RecentMean))
    assert known < 0.95 * blind
    assert known == pytest.approx(0.564 * deviation[1::2].mean(), rel=0.2)


def test_season_ago_is_the_same_hour_of_the_day_before() -> None:
    shape = WindowShape(num_context=30, leads=(1, 24, 25, 30))
    windows = windows_of([hourly_station(days=20)], shape)
    baseline = SeasonAgo()
    point = baseline.point(windows)
    # Lead 1 is the hour index 30; a day before is index 6. Lead 25 (index 54) looks two days back, to index 6.
    for number, index in enumerate((6, 29, 6, 11)):
        np.testing.assert_array_equal(point[:, number, 0], windows.context[:, index])
    assert SeasonAgo.applies(windows)
    assert not SeasonAgo.applies(windows_of([daily_station()], WindowShape(num_context=96, leads=(1,))))


def test_dressing_follows_the_month_and_falls_back() -> None:
    sample = daily_station(years=8)
    train = windows_of([sample], WindowShape(num_context=8, leads=(1, 2)), 2500)
    climatology = fit_climatology(train, by_place=False)
    month = train.future_month
    random = np.random.default_rng(0)
    errors = random.normal(size=train.truth.shape) * np.where(month < 6, 1.0, 3.0)[:, :, None, None, None, None]
    spread = fit_dressing(train, errors, climatology=climatology).at(train)[:, 0, 0, 0, 0, 0]
    pooled = (errors[:, 0, 0, 0] ** 2).mean()
    for number in (2, 8):
        own = errors[month[:, 0] == number][:, 0, 0, 0] ** 2
        expected = (own.sum() + 30 * pooled) / (len(own) + 30)
        np.testing.assert_allclose(spread[month[:, 0] == number] ** 2, expected)
    # Months that training never saw take the spread of all the others.
    some = np.flatnonzero(month[:, 0] < 6)
    spread = fit_dressing(train.take(some), errors[some], climatology=climatology).at(train)[:, 0, 0, 0, 0, 0]
    assert spread[month[:, 0] == 8] == pytest.approx(np.sqrt((errors[some][:, 0, 0, 0] ** 2).mean()), rel=0.02)


def test_dressing_leaves_missing_errors_out(station_train: WindowSet) -> None:
    climatology = fit_climatology(station_train, by_place=False)
    errors = np.random.default_rng(0).normal(size=station_train.truth.shape)
    holes = errors.copy()
    holes[::2] = np.nan
    dense, thin = (
        fit_dressing(station_train, part, climatology=climatology).at(station_train).mean() for part in (errors, holes)
    )
    assert thin == pytest.approx(dense, rel=0.05)


def test_shape_is_that_of_the_errors() -> None:
    errors = np.random.default_rng(0).exponential(size=(5000, 1, 1, 1, 1, 1))
    shape = fit_shape(errors)[:, 0, 0, 0]
    np.testing.assert_allclose(shape, -np.log(1 - np.asarray(LEVELS)), rtol=0.25, atol=0.03)
    few = fit_shape(errors[:20])[:, 0, 0, 0]
    assert few[MEDIAN] == pytest.approx(0.0, abs=1e-12)


def test_bounded_variables_need_the_shape_of_errors() -> None:
    # Visibility: at its bound four days in five. A Gaussian about the last value scores worse than the true shape.
    def station(group: str, seed: int) -> Sample:
        sample = daily_station(group=group, years=6, seed=seed)
        values = np.minimum(280.0, 284.0 + 4 * red_noise(sample.num_times, memory=0.5, seed=seed))
        return replace(sample, values=np.stack([values, values], axis=1)[:, :, None, None].astype(np.float32))

    shape = WindowShape(num_context=4, leads=(1,))
    train, test = windows_of([station("A", 1)], shape), windows_of([station("B", 2)], shape)
    forecast = fitted(Persistence, train).predict(test)
    shaped, gaussian = (
        score_baseline(test, part).total["crps"].sum() for part in (forecast, replace(forecast, shape=None))
    )
    assert shaped < 0.95 * gaussian


def test_autoregression_equals_plain_recursion() -> None:
    random = np.random.default_rng(0)
    context = np.stack([red_noise(300, memory=0.9, seed=1), random.normal(size=300)]) + 5.0
    steps = np.arange(1, 11)
    baseline = AutoRegression()
    mean, spread = baseline.forecast(context, steps)
    for row in range(2):
        anomaly = context[row] - context[row].mean()
        coefficients = burg(anomaly[None], (32,))[32][0]
        errors: list[list[float]] = [[] for _ in steps]
        for origin in range(31, 300):
            past = list(anomaly[: origin + 1])
            for step in steps:
                past.append(float(np.dot(coefficients, past[:-33:-1])))
                if origin + step < 300:
                    errors[step - 1].append(float(anomaly[origin + step] - past[-1]))
        np.testing.assert_allclose(mean[row], np.asarray(past[-10:]) + context[row].mean(), rtol=1e-6)
        plain = [np.sqrt(np.mean(np.square(part)) * (300 + 32) / (300 - 32)) for part in errors]
        np.testing.assert_allclose(spread[row], plain, rtol=1e-6)


def test_autoregression_knows_its_error() -> None:
    context = np.stack([red_noise(480, memory=0.9, seed=seed) for seed in range(60)])
    mean, spread = AutoRegression().forecast(context[:, :470], np.array([1, 10]))
    errors = context[:, [470, 479]] - mean
    # One step ahead AR(1) of unit variance errs by sqrt(1 - 0.81); ten steps by sqrt(1 - 0.9^20).
    np.testing.assert_allclose(spread.mean(axis=0), [np.sqrt(0.19), np.sqrt(1 - 0.9**20)], rtol=0.12)
    np.testing.assert_allclose(errors.std(axis=0) / spread.mean(axis=0), 1.0, rtol=0.25)


def test_zero_and_median_of_a_context_with_holes() -> None:
    context = np.array([[1.0, np.nan, 3.0, -2.0, np.nan, 8.0]])
    steps = np.array([1, 2])
    mean, spread = Zero().forecast(context, steps)
    np.testing.assert_allclose(mean, 0.0)
    np.testing.assert_allclose(spread, np.sqrt((1 + 9 + 4 + 64) / 4))
    mean, spread = ContextMedian().forecast(context, steps)
    np.testing.assert_allclose(mean, 2.0)
    np.testing.assert_allclose(spread, np.sqrt((1 + 1 + 16 + 36) / 4))


def test_only_training_windows_teach(toys: dict[str, tuple[WindowSet, WindowSet]]) -> None:
    train, test = toys["daily series"]
    whole = forecast_baselines(train, test)
    half = forecast_baselines(train, test.take(np.arange(0, test.num_windows, 2)))
    for name, forecast in whole.items():
        np.testing.assert_allclose(half[name].mean, forecast.mean[::2], rtol=1e-12)
        np.testing.assert_allclose(half[name].spread, forecast.spread[::2], rtol=1e-12)


def test_windows_of_another_shape_are_refused(toys: dict[str, tuple[WindowSet, WindowSet]]) -> None:
    with pytest.raises(DataError, match="cut both alike"):
        forecast_baselines(toys["daily series"][0], toys["fields"][1])


def test_climatology_is_made_with_its_places(station_train: WindowSet) -> None:
    climatology = fit_climatology(station_train, by_place=True)
    assert isinstance(climatology, Climatology)
    assert climatology.coefficients.shape[0] == len(climatology.places) + 1 == 2
