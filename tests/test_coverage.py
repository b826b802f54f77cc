"""Coverage of bands and their recalibration: known spreads, atoms, order of quantiles, validation only."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import ndtri

from sci_evals.coverage import coverage_headline, coverage_rows
from sci_evals.metrics import LEVELS, covered_values, quantile_at
from sci_evals.recalibration import calibrate, fit_calibration
from sci_evals.scores import ALL, Bootstrap, LeadGroup, WindowScores, score_quantiles
from sci_evals.tasks import EVAL_TASKS
from sci_evals.toy import daily_station
from sci_evals.windowset import WindowSet, WindowShape, cut
from sci_gpt.config import EvaluateConfig
from sci_gpt.data.store import Store
from sci_gpt.errors import CheckpointError, ConfigError
from sci_gpt.model.calibration import LOWER, Calibration, SourceCalibration
from sci_tokenizers.sample import Sample
from toy_store import write_store

SHAPE = WindowShape(num_context=4, leads=(1, 2))


def normal_windows(*, seed: int, count: int = 1500) -> WindowSet:
    """Windows of white noise about 280, spread 2 below the median and 2 above."""
    station = daily_station(years=1)
    need = SHAPE.num_times
    shape = (count * need, *station.values.shape[1:])
    values = (280.0 + 2.0 * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)
    days = np.arange(len(values))
    sample = replace(
        station,
        values=values,
        valid=np.ones(shape, bool),
        time=days * 86400.0,
        year_phase=((days / 365.25) % 1.0).astype(np.float32),
        day_phase=np.zeros(len(values), np.float32),
    )
    return cut([sample], SHAPE, starts=[np.arange(count) * need])


@dataclass(frozen=True)
class Normal:
    """Says N(280, spread) whatever it sees; another spread above the median."""

    below: float
    above: float

    def documents(self, samples: Sequence[Sample], *, num_context: int, leads: tuple[int, ...]) -> list[Any]:
        return [(sample, leads) for sample in samples]

    def answers(self, documents: Sequence[Any], *, levels: tuple[float, ...]) -> list[np.ndarray]:
        z = ndtri(np.asarray(levels))
        line = 280.0 + z * np.where(z < 0, self.below, self.above)
        return [
            np.broadcast_to(line[:, None, None, None, None, None], (len(levels), len(leads), 1, *s.values.shape[1:]))
            for s, leads in documents
        ]

    def quantiles(
        self, samples: Sequence[Sample], *, num_context: int, leads: tuple[int, ...], levels: tuple[float, ...]
    ) -> list[np.ndarray]:
        return self.answers(self.documents(samples, num_context=num_context, leads=leads), levels=levels)


def asked(model: Normal, windows: WindowSet) -> list[np.ndarray]:
    return model.quantiles(list(windows.samples()), num_context=4, leads=SHAPE.leads, levels=LEVELS)


def held(scores: WindowScores, nominal: float) -> float:
    return float(scores.covered[nominal].sum() / scores.weight.sum())


def calibrated_scores(fitted: SourceCalibration, windows: WindowSet, model: Normal) -> WindowScores:
    moved = [
        fitted.apply(part, levels=LEVELS, leads=SHAPE.leads, channels=windows.channels)
        for part in asked(model, windows)
    ]
    return score_quantiles(windows, moved)


def plain_blocks(windows: WindowSet, count: int) -> np.ndarray:
    return np.arange(windows.num_windows) * count // windows.num_windows


def test_quantiles_between_levels_are_linear_and_ties_stay() -> None:
    levels = (0.1, 0.2, 0.6)
    values = np.array([[1.0, 0.1], [3.0, 0.1], [4.0, 5.0]])
    np.testing.assert_allclose(quantile_at(values, 0.15, levels=levels)[0], 2.0)
    np.testing.assert_allclose(quantile_at(values, 0.3, levels=levels), [3.25, 0.1 + 4.9 / 4])
    assert quantile_at(values, 0.17, levels=levels)[1] == 0.1


def test_bands_of_the_true_distribution_hold_their_share() -> None:
    truth = np.random.default_rng(0).normal(size=200_000)
    bands = ndtri(np.asarray(LEVELS))[:, None]
    for nominal in (0.5, 0.9):
        assert covered_values(bands, truth, levels=LEVELS, nominal=nominal).mean() == pytest.approx(nominal, abs=0.004)
    narrow = covered_values(0.5 * bands, truth, levels=LEVELS, nominal=0.9).mean()
    assert narrow == pytest.approx(0.589, abs=0.006)  # P(|z| < 1.645 / 2)


def test_an_end_of_the_band_is_inside_and_what_lies_beyond_is_not() -> None:
    bands = np.linspace(-1, 1, len(LEVELS))[:, None]
    truth = np.array([-1.1, -0.4, 0.0, 0.4, 1.1])
    inside = covered_values(bands, truth, levels=LEVELS, nominal=0.5)
    np.testing.assert_array_equal(inside, [0, 1, 1, 1, 0])


def test_dry_hours_do_not_make_a_band_look_wide() -> None:
    """Rain that is none with probability 0.7 and exponential else, forecast exactly."""
    random = np.random.default_rng(1)
    dry = random.random(100_000) < 0.7
    truth = np.where(dry, 0.0, random.exponential(size=dry.size))
    levels = np.asarray(LEVELS)
    bands = np.where(levels < 0.7, 0.0, -np.log1p(-(np.maximum(levels, 0.7) - 0.7) / 0.3))[:, None]
    for nominal in (0.5, 0.9):
        assert covered_values(bands, truth, levels=LEVELS, nominal=nominal).mean() == pytest.approx(nominal, abs=0.015)


@pytest.mark.parametrize(("below", "above"), [(1.0, 1.0), (5.0, 5.0), (1.0, 4.0)])
def test_bands_hold_their_share_after_calibration(below: float, above: float) -> None:
    model, valid, test = Normal(below, above), normal_windows(seed=1), normal_windows(seed=2)
    fitted = fit_calibration(model, valid, blocks=plain_blocks(valid, 1500))
    np.testing.assert_allclose(fitted.below, 2.0 / below, rtol=0.12)
    np.testing.assert_allclose(fitted.above, 2.0 / above, rtol=0.12)
    before, after = score_quantiles(test, asked(model, test)), calibrated_scores(fitted, test, model)
    for nominal in (0.5, 0.9):
        assert abs(held(before, nominal) - nominal) > 0.03
        assert held(after, nominal) == pytest.approx(nominal, abs=0.015)
    assert after.total["crps"].sum() < 0.98 * before.total["crps"].sum()


def test_a_calibrated_forecast_stays_as_it_is() -> None:
    valid = normal_windows(seed=3)
    fitted = fit_calibration(Normal(2.0, 2.0), valid, blocks=plain_blocks(valid, 1500))
    for factors in (fitted.below, fitted.above):
        np.testing.assert_allclose(factors, 1.0, atol=0.1)


def test_few_independent_windows_move_little() -> None:
    valid = normal_windows(seed=4)
    many, few, one = (
        fit_calibration(Normal(1.0, 1.0), valid, blocks=plain_blocks(valid, count)).below.mean()
        for count in (1500, 20, 1)
    )
    assert many == pytest.approx(2.0, rel=0.1)
    assert few == pytest.approx(2.0**0.5, rel=0.05)  # 20 blocks count as much as no change
    assert one == pytest.approx(2.0 ** (1 / 21), rel=0.02)


def calibration_of(below: Sequence[float], above: Sequence[float], *, channel: str) -> SourceCalibration:
    return SourceCalibration(
        channels=(channel,),
        leads=(1, 3),
        below=np.tile(np.asarray(below), (2, 1, 1)) * np.array([1.0, 2.0])[:, None, None],
        above=np.tile(np.asarray(above), (2, 1, 1)),
        num_windows=9,
        num_blocks=3,
    )


def test_quantiles_stay_in_order_and_the_median_stays() -> None:
    fitted = calibration_of((3.0, 0.3), (4.0, 0.2), channel="air_temperature")
    levels = tuple(np.linspace(0.01, 0.99, 99).round(2).tolist())
    values = (280 + 2 * ndtri(np.asarray(levels)))[:, None, None, None, None, None] * np.ones((1, 2, 1, 1, 1, 1))
    moved = fitted.apply(values, levels=levels, leads=(1, 3), channels=("air_temperature",))
    assert (np.diff(moved, axis=0) >= 0).all()
    np.testing.assert_array_equal(moved[49], values[49])
    at = levels.index(LOWER[0])
    np.testing.assert_allclose((280 - moved[at]) / (280 - values[at]), np.reshape([3.0, 6.0], (2, 1, 1, 1, 1)))


def test_factors_between_leads_and_of_bounded_variables() -> None:
    fitted = calibration_of((1.0, 1.0), (1.0, 1.0), channel="precipitation_amount")
    levels = (0.1, 0.5, 0.9)
    rain = np.array([0.0, 1.0, 8.0])[:, None, None, None, None, None] * np.ones((1, 3, 1, 1, 1, 1))
    moved = fitted.apply(rain, levels=levels, leads=(1, 2, 3), channels=("precipitation_amount",))
    assert (moved >= 0).all(), "no negative rain"
    np.testing.assert_allclose(moved[1:], rain[1:], rtol=1e-6)
    warm = calibration_of((1.0, 1.0), (1.0, 1.0), channel="air_temperature")
    line = np.array([278.0, 280.0, 282.0])[:, None, None, None, None, None] * np.ones((1, 3, 1, 1, 1, 1))
    moved = warm.apply(line, levels=levels, leads=(1, 2, 3), channels=("air_temperature",))
    np.testing.assert_allclose(280 - moved[0].ravel(), [2.0, 2.0 * 2**0.5, 4.0])
    other = warm.apply(line, levels=levels, leads=(1, 2, 3), channels=("wind_speed",))
    np.testing.assert_array_equal(other, line)
    with pytest.raises(ConfigError, match=r"around the median: 0.5 is not in \[0.1, 0.9\]"):
        warm.apply(line[[0, 2]], levels=(0.1, 0.9), leads=(1, 2, 3), channels=("air_temperature",))


def test_rows_of_coverage_pool_channels_and_know_their_blocks() -> None:
    windows = normal_windows(seed=5, count=200)
    inside = np.zeros((200, 2, 2))
    inside[:100, :, 0], inside[:, :, 1] = 1.0, 0.8
    scores = WindowScores(total={}, weight=np.ones((200, 2, 2)), covered={0.9: inside})
    bootstrap = Bootstrap(
        blocks=plain_blocks(windows, 10), regions=np.full(200, ALL, dtype=object), resamples=300, interval=0.9
    )
    groups = [LeadGroup(name="1-2 d", leads=(1, 2))]
    rows = coverage_rows(windows, {"m": scores}, lead_groups=groups, bootstrap=bootstrap)
    assert [row.coverage for row in rows] == pytest.approx([0.5, 0.8, 0.65])
    assert [(row.num_windows, row.num_blocks) for row in rows] == [(200, 10)] * 3
    # Ten blocks, five of them whole: a binomial share, spread 0.16; the other channel never varies.
    assert rows[0].low == pytest.approx(0.25, abs=0.11) and rows[0].high == pytest.approx(0.75, abs=0.11)
    assert rows[1].low == pytest.approx(0.8) == pytest.approx(rows[1].high)
    assert coverage_headline(rows) == [rows[2]]
    alone = coverage_rows(
        windows, {"m": scores}, lead_groups=groups, bootstrap=replace(bootstrap, blocks=np.zeros(200, int))
    )
    assert all(np.isnan(row.low) and row.num_blocks == 1 for row in alone)


def test_only_the_validation_split_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.open(write_store(tmp_path / "store"))
    read: list[str] = []
    plain = Store.read

    def watched(self: Store, source: str, split: str, **where: int) -> Sample:
        read.append(split)
        return plain(self, source, split, **where)

    monkeypatch.setattr(Store, "read", watched)
    test = normal_windows(seed=6, count=10)
    test = replace(test, source="station")
    task = EVAL_TASKS["daily series"]()
    fitted = calibrate(store, test, model=Normal(1.0, 1.0), task=task, settings=EvaluateConfig())
    assert fitted is not None and set(read) == {"valid"}
    noisy = replace(test, values=test.values + 50.0)
    again = calibrate(store, noisy, model=Normal(1.0, 1.0), task=task, settings=EvaluateConfig())
    assert again is not None
    np.testing.assert_array_equal(fitted.below, again.below)
    np.testing.assert_array_equal(fitted.above, again.above)


def test_a_calibration_comes_back_from_its_file(tmp_path: Path) -> None:
    fitted = calibration_of((1.0, 2.0), (3.0, 4.0), channel="air_temperature")
    path = tmp_path / "calibration.json"
    Calibration(step=7, fingerprint="ab", sources={"station": fitted}).write(path)
    back = Calibration.read(path)
    assert (back.step, back.fingerprint, back.sources["station"].leads) == (7, "ab", (1, 3))
    np.testing.assert_array_equal(back.sources["station"].below, fitted.below)
    content = json.loads(path.read_text())
    content["sources"]["station"]["above"][0][0][0] = -1.0
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"no calibration.*positive"):
        Calibration.read(path)
