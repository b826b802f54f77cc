"""Calibrated forecasts: only when asked, from the calibration of the same weights, exported with the model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import sci_gpt
from sci_gpt.config import PretrainConfig
from sci_gpt.errors import CheckpointError, ConfigError
from sci_gpt.model.calibration import CALIBRATION, Calibration, SourceCalibration
from sci_gpt.recipes.film import Notes
from sci_launch import cli
from test_forecast import table
from toy_model import make_run

FINGERPRINT = "0123456789abcdef"  # of the toy store


def write_calibration(run: Path, *, step: int = 24, factor: float = 3.0) -> None:
    """A calibration of the station as `sci-gpt evaluate` leaves it: wider below, the same above."""
    ones = np.ones((2, 1, 2))
    station = SourceCalibration(
        channels=("air_temperature",),
        leads=(1, 2),
        below=factor * ones,
        above=ones,
        num_windows=50,
        num_blocks=9,
    )
    (run / "report").mkdir(exist_ok=True)
    Calibration(step=step, fingerprint=FINGERPRINT, sources={"station": station}).write(run / "report" / CALIBRATION)


@pytest.fixture
def config(tmp_path: Path) -> PretrainConfig:
    return make_run(tmp_path / "model")


def by_quantile(forecast: pd.DataFrame, variable: str) -> np.ndarray:
    """(lead, quantile)."""
    rows = forecast[forecast["variable"] == variable]
    return rows.pivot(index="lead", columns="quantile", values="value").to_numpy()


def test_the_spread_is_stretched_if_and_only_if_asked(config: PretrainConfig) -> None:
    data, notes = table(), Notes(source="station")
    plain = sci_gpt.load_model(config.output).forecast(data, 2, quantiles=(0.1, 0.5, 0.9), notes=notes)
    write_calibration(config.output)
    unasked = sci_gpt.load_model(config.output).forecast(data, 2, quantiles=(0.1, 0.5, 0.9), notes=notes)
    pd.testing.assert_frame_equal(plain, unasked)
    model = sci_gpt.load_model(config.output, calibrated=True)
    before = by_quantile(plain, "air_temperature")
    after = by_quantile(model.forecast(data, 2, notes=notes), "air_temperature")
    np.testing.assert_allclose(after[:, 1:], before[:, 1:], rtol=1e-6)
    np.testing.assert_allclose(after[:, 1] - after[:, 0], 3.0 * (before[:, 1] - before[:, 0]), rtol=1e-3)
    # The median need not be asked for.
    low = by_quantile(model.forecast(data, 2, quantiles=(0.1,), notes=notes), "air_temperature")
    np.testing.assert_allclose(low[:, 0], after[:, 0], rtol=1e-6)


def test_a_model_without_its_calibration_is_refused(config: PretrainConfig) -> None:
    with pytest.raises(CheckpointError, match=r"has no calibration .*`sci-gpt evaluate` on its run writes one"):
        sci_gpt.load_model(config.output, calibrated=True)
    write_calibration(config.output, step=12)
    with pytest.raises(CheckpointError, match=r"of step 12.*the model is of step 24.*`sci-gpt evaluate` again"):
        sci_gpt.load_model(config.output, calibrated=True)


def test_data_of_a_source_that_was_not_calibrated_are_refused(config: PretrainConfig) -> None:
    write_calibration(config.output)
    model = sci_gpt.load_model(config.output, calibrated=True)
    with pytest.raises(ConfigError, match=r"calibrated for station; name one of these as the data's source"):
        model.forecast(table(), 1)


def test_the_command_calibrates_and_export_takes_the_calibration_along(
    config: PretrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table().to_csv(tmp_path / "in.csv")
    out = tmp_path / "out.csv"
    words = ["--horizon", "2", "--out", str(out), "--source", "station", "--place", "47,8,400", "--calibrated"]
    assert cli.main(["forecast", str(config.output), str(tmp_path / "in.csv"), *words]) == 2
    assert "has no calibration" in capsys.readouterr().err and not out.exists()
    write_calibration(config.output)
    assert cli.main(["forecast", str(config.output), str(tmp_path / "in.csv"), *words]) == 0
    from_run = pd.read_csv(out)
    exported = tmp_path / "exported"
    assert cli.main(["export", str(config.output), "--out", str(exported)]) == 0
    assert (exported / CALIBRATION).exists()
    assert cli.main(["forecast", str(exported), str(tmp_path / "in.csv"), *words]) == 0
    pd.testing.assert_frame_equal(pd.read_csv(out), from_run)
    assert cli.main(["forecast", str(exported), str(tmp_path / "in.csv"), *words[:-1]]) == 0
    assert (
        by_quantile(from_run, "air_temperature")[:, 0] < by_quantile(pd.read_csv(out), "air_temperature")[:, 0]
    ).all()


def test_samples_are_not_calibrated_so_they_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Uncalibrated trajectories under the name of calibrated ones would be a lie, in Python and on the command line."""
    config = make_run(tmp_path / "noisy", model={"size": "tiny", "noise": {"width": 6}})
    write_calibration(config.output)
    model, notes = sci_gpt.load_model(config.output, calibrated=True), Notes(source="station")
    with pytest.raises(ConfigError, match=r"num_samples=2 of a calibrated model: .* leave calibration .* out"):
        model.forecast(table(), 1, num_samples=2, notes=notes)
    table().to_csv(tmp_path / "in.csv")
    words = ["forecast", str(config.output), str(tmp_path / "in.csv"), "--horizon", "1", "--source", "station"]
    words += ["--num-samples", "2", "--out", str(tmp_path / "out.csv")]
    assert cli.main([*words, "--calibrated"]) == 2
    assert "a calibration stretches quantiles" in capsys.readouterr().err and not (tmp_path / "out.csv").exists()
    assert cli.main(words) == 0
    assert len(model.forecast(table(), 1, notes=notes)) == 2 * 3  # two columns by three levels
