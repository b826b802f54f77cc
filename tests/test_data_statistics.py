"""Training statistics equal plain NumPy over all valid values, and fit no cycle that the split does not cover."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest

from sci_gpt.data.statistics import TrainingStatistics
from sci_gpt.errors import DataError
from sci_tokenizers.sample import Sample
from sci_tokenizers.statistics import ChannelStatistics
from test_data_splits import series

HOURS = 24 * 400


def weather(seed: int, *, hours: int = HOURS) -> Sample:
    """Temperature with a seasonal and a daily cycle, and rain; a tenth is missing."""
    random = np.random.default_rng(seed)
    time = np.arange(hours) * 3600.0
    year, day = np.mod(time / (365.25 * 86400), 1), np.mod(time / 86400, 1)
    temperature = 280 + 10 * np.cos(2 * np.pi * year) + 3 * np.sin(2 * np.pi * day) + random.normal(0, 1, hours)
    values = np.stack([temperature, random.gamma(0.3, 4.0, hours)], axis=1)[:, :, None, None].astype(np.float32)
    valid = random.random(values.shape) > 0.1
    values[~valid] = 0.0
    return replace(
        series(f"s/{seed}/0", days=hours),
        variables=("air_temperature", "precipitation_amount"),
        levels=(85000.0, float("nan")),
        values=values,
        valid=valid,
        time=time,
        year_phase=year.astype(np.float32),
        day_phase=day.astype(np.float32),
        step_seconds=3600.0,
    )


def gather(samples: list[Sample]) -> dict[str, ChannelStatistics]:
    first = samples[0]
    sums = TrainingStatistics(source="s", variables=first.variables, levels=first.levels, num_year=2, num_day=2)
    for sample in samples:
        sums.add(sample)
    return sums.finish()


def test_moments_equal_numpy_in_transformed_units() -> None:
    samples = [weather(1), weather(2)]
    result = gather(samples)
    assert list(result) == ["air_temperature@85000", "precipitation_amount"]
    for number, (name, transform) in enumerate(
        (("air_temperature@85000", np.positive), ("precipitation_amount", np.log1p))
    ):
        kept = [transform(s.values[:, number, 0, 0].astype(np.float64)) for s in samples]
        valid = [s.valid[:, number, 0, 0] for s in samples]
        pooled = np.concatenate([v[ok] for v, ok in zip(kept, valid, strict=True)])
        steps = np.concatenate([np.diff(v)[ok[1:] & ok[:-1]] for v, ok in zip(kept, valid, strict=True)])
        row = result[name]
        assert row.count == len(pooled)
        assert row.mean == pytest.approx(pooled.mean(), rel=1e-12)
        assert row.std == pytest.approx(pooled.std(), rel=1e-9)
        assert row.step_std == pytest.approx(steps.std(), rel=1e-9)
        assert (row.minimum, row.maximum) == (pooled.min(), pooled.max())


def test_the_climatology_finds_the_cycles() -> None:
    row = gather([weather(1), weather(2), weather(3)])["air_temperature@85000"]
    assert (row.num_year, row.num_day) == (2, 2)
    mean, *rest = row.climatology
    # 280 + 10 cos(year) + 3 sin(day): coefficients cos, sin, cos 2, sin 2 of the year, then of the day; 26,000 values.
    assert mean == pytest.approx(280, abs=0.05)
    np.testing.assert_allclose(rest, [10, 0, 0, 0, 0, 3, 0, 0], atol=0.05)
    at = row.climatology_at(np.array([0.5]), np.array([0.25]))
    assert at[0] == pytest.approx(280 - 10 + 3, abs=0.1)


def test_a_cycle_that_is_not_covered_is_not_fitted() -> None:
    half = weather(1, hours=24 * 180)
    row = gather([half])["air_temperature@85000"]
    assert (row.num_year, row.num_day) == (0, 2) and len(row.climatology) == 5
    daily = replace(half, day_phase=np.zeros(half.num_times, np.float32))
    assert gather([daily])["air_temperature@85000"].num_day == 0
    monthly = weather(1)
    monthly = replace(monthly, year_phase=(np.arange(HOURS) % 12 / 12).astype(np.float32))
    assert gather([monthly])["air_temperature@85000"].num_year == 2


def test_missing_values_weigh_nothing() -> None:
    sample = weather(4)
    spoiled = sample.values.copy()
    spoiled[~sample.valid] = 1e6
    assert gather([replace(sample, values=spoiled)]) == gather([sample])


def test_json_round_trip() -> None:
    row = gather([weather(5)])["precipitation_amount"]
    assert ChannelStatistics.from_json(row.to_json()) == row


def test_a_channel_without_a_value_is_refused() -> None:
    sample = weather(6)
    valid = sample.valid.copy()
    valid[:, 1] = False
    with pytest.raises(
        DataError, match="source 's': channel 'precipitation_amount' has no valid value in its training"
    ):
        gather([replace(sample, valid=valid)])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_workers_of_any_share_and_order_give_the_moments_of_the_whole(seed: int) -> None:
    """Parts of very different sizes and levels (a first value far from the rest, too) against NumPy in float64."""
    random = np.random.default_rng(seed)
    samples = [weather(number, hours=hours) for number, hours in enumerate((2, 24 * 300, 24, 24 * 120, 500))]
    lifted = []
    for number, sample in enumerate(samples):
        values = sample.values + np.array([40.0 * number, 3.0 * number], np.float32)[None, :, None, None]
        values[0, :] = 150.0 + 30.0 * number
        lifted.append(replace(sample, values=np.where(sample.valid, values, 0.0).astype(np.float32)))
    workers = [
        TrainingStatistics(source="s", variables=s.variables, levels=s.levels, num_year=2, num_day=2, by_cell=True)
        for s in (lifted[0], lifted[0], lifted[0])
    ]
    for number in random.permutation(len(lifted)).tolist():
        workers[number % 2].add(lifted[number])  # the third worker saw nothing
    whole = workers[2]
    for number in random.permutation(2).tolist():
        whole.merge(workers[number])
    merged = whole.finish()
    for number, transform in enumerate((np.positive, np.log1p)):
        kept = [transform(s.values[:, number, 0, 0].astype(np.float64)) for s in lifted]
        valid = [s.valid[:, number, 0, 0] for s in lifted]
        pooled = np.concatenate([v[ok] for v, ok in zip(kept, valid, strict=True)])
        steps = np.concatenate([np.diff(v)[ok[1:] & ok[:-1]] for v, ok in zip(kept, valid, strict=True)])
        row = list(merged.values())[number]
        assert (row.count, row.minimum, row.maximum) == (len(pooled), pooled.min(), pooled.max())
        assert row.mean == pytest.approx(pooled.mean(), rel=1e-6)
        assert row.std == pytest.approx(pooled.std(), rel=1e-6)
        assert row.step_std == pytest.approx(steps.std(), rel=1e-6)
    alone = TrainingStatistics(
        source="s", variables=lifted[0].variables, levels=lifted[0].levels, num_year=2, num_day=2, by_cell=True
    )
    for sample in lifted:
        alone.add(sample)
    for name, row in alone.finish().items():
        np.testing.assert_allclose(merged[name].climatology, row.climatology, rtol=1e-6, atol=1e-6)
        cells, other = row.cells, merged[name].cells
        assert cells is not None and other is not None
        np.testing.assert_array_equal(other.place, cells.place)
        np.testing.assert_allclose(other.coefficients, cells.coefficients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("order", list(permutations(range(3))))
@pytest.mark.parametrize("drift", [0.0, 40.0])
def test_a_large_offset_costs_no_digits(order: tuple[int, ...], drift: float) -> None:
    """Pressure in Pa: the spread is a two-millionth of the level, where plain sums of squares lose the digits that are
    asked for, or the steps drift; merged in every order against NumPy in float64 on the concatenation.
    """
    random, samples = np.random.default_rng(0), []
    for number, hours in enumerate((3, 1700, 300)):
        level = 101_325.0 + drift * np.arange(hours) + 0.05 * random.standard_normal(hours)
        values = level.astype(np.float32)[:, None, None, None]
        sample = series(f"s/{number}/0", days=hours)
        samples.append(replace(sample, variables=("surface_air_pressure",), values=values))
    workers = []
    for sample in samples:
        workers.append(
            TrainingStatistics(source="s", variables=("surface_air_pressure",), levels=(np.nan,), num_year=0, num_day=0)
        )
        workers[-1].add(sample)
    whole = workers[order[0]]
    for number in order[1:]:
        whole.merge(workers[number])
    row = whole.finish()["surface_air_pressure"]
    pooled = [sample.values[:, 0, 0, 0].astype(np.float64) for sample in samples]
    steps = np.concatenate([np.diff(part) for part in pooled])
    assert row.mean == pytest.approx(np.concatenate(pooled).mean(), rel=1e-6)
    assert row.std == pytest.approx(np.concatenate(pooled).std(), rel=1e-6)
    assert row.step_std == pytest.approx(steps.std(), rel=1e-6)
    if drift == 0:
        every = np.concatenate(pooled)
        naive = float((every**2).mean() - every.mean() ** 2)
        assert abs(naive / every.var() - 1) > 1e-5, "sums of squares would not do here"


def test_statistics_of_other_things_are_not_merged() -> None:
    sample = weather(1, hours=48)
    one = TrainingStatistics(source="s", variables=sample.variables, levels=sample.levels, num_year=2, num_day=2)
    with pytest.raises(DataError, match="cannot be merged into those of .*they count other things"):
        one.merge(replace(one, source="t", _sums=[]))
    with pytest.raises(DataError, match="cannot be merged"):
        one.merge(replace(one, num_day=1, _sums=[]))
