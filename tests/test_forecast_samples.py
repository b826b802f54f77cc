"""Forecasts with samples: the same kind of object with a `sample` in it, trajectories, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import obspy
import pandas as pd
import pytest
import xarray as xr

from sci_gpt.errors import ConfigError, DataError
from sci_gpt.recipes.film import Notes
from sci_gpt.recipes.load import LoadedModel, load_model
from sci_launch.cli import main
from toy_model import make_run

NOISE = {"size": "tiny", "noise": {"width": 6}}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose model is conditioned on noise."""
    folder = tmp_path_factory.mktemp("noisy")
    make_run(folder, model=NOISE)
    return folder / "run"


@pytest.fixture(scope="module")
def model(run: Path) -> LoadedModel:
    """Loaded."""
    return load_model(run)


def table(count: int = 40) -> pd.DataFrame:
    """Hourly, two columns in units of their own."""
    times = pd.date_range("2021-03-01", periods=count, freq="h", name="time")
    wave = np.sin(np.arange(count) / 4.0)
    return pd.DataFrame({"air_temperature [degC]": 5 + 4 * wave, "wind_speed": np.abs(0.3 + wave)}, index=times)


def field(count: int = 14) -> xr.Dataset:
    """Daily, 8 x 12 cells, some of them without any value."""
    random = np.random.default_rng(0)
    values = 5.0 + 3.0 * random.standard_normal((count, 8, 12))
    values[:, 0, :3] = np.nan
    return xr.Dataset(
        {"t": (("time", "lat", "lon"), values, {"standard_name": "air_temperature", "units": "degC"})},
        coords={
            "time": pd.date_range("2021-03-01", periods=count),
            "lat": ("lat", np.linspace(30, 40, 8), {"units": "degrees_north"}),
            "lon": ("lon", np.linspace(5, 15, 12), {"units": "degrees_east"}),
        },
    )


def record(seconds: float = 30.0) -> obspy.Stream:
    """One vertical channel at 10 Hz."""
    time = np.arange(int(10 * seconds)) / 10.0
    counts = 300.0 * np.sin(2 * np.pi * 0.8 * time) + 40.0 * np.random.default_rng(2).standard_normal(len(time))
    header = {"network": "XX", "station": "TOY", "channel": "BHZ", "sampling_rate": 10.0}
    return obspy.Stream([obspy.Trace(counts, header=header)])


def test_a_table_gets_a_sample_column(model: LoadedModel) -> None:
    """Beyond the largest lead of training (2), in the table's units, the same for the same seed."""
    found = model.forecast(table(), 6, num_samples=3, seed=1)
    assert list(found.columns) == ["time", "lead", "variable", "sample", "value", "unit"]
    assert len(found) == 6 * 3 * 2 and set(found["sample"]) == {0, 1, 2} and found["value"].notna().all()
    assert set(found.loc[found["variable"] == "air_temperature", "unit"]) == {"degC"}
    assert (found.loc[found["variable"] == "wind_speed", "value"] >= 0).all()
    assert found["time"].min() == pd.Timestamp("2021-03-02 16:00")
    pd.testing.assert_frame_equal(found, model.forecast(table(), 6, num_samples=3, seed=1))
    assert not found["value"].equals(model.forecast(table(), 6, num_samples=3, seed=2)["value"])
    assert found["value"].equals(model.forecast(table(), 6, num_samples=3, seed=1)["value"])


def test_a_field_gets_a_sample_dimension(model: LoadedModel) -> None:
    """Units, places, times as for quantiles; land stays missing; quantiles come from members too."""
    data = field()
    found = model.forecast(data, 4, num_samples=2, seed=3)
    assert found["t"].dims == ("lead_time", "sample", "lat", "lon") and found["t"].attrs["units"] == "degC"
    assert found["sample"].values.tolist() == [0, 1] and found["sample"].attrs["standard_name"] == "realization"
    assert found["time"].values[0] == np.datetime64("2021-03-15")
    assert (found["t"].isnull() == np.isnan(data["t"].values[0])).all()
    assert float(np.abs(found["t"].isel(sample=0) - found["t"].isel(sample=1)).max()) > 0.1
    levels = model.forecast(data, 1, quantiles=(0.1, 0.9))["t"]
    assert bool((levels.isel(quantile=1) - levels.isel(quantile=0)).min(skipna=True) > 0)


def test_a_stream_gets_a_trace_per_sample(model: LoadedModel) -> None:
    """Its number is the location code; more than two digits hold is refused."""
    found = model.forecast(record(), 12, num_samples=3)
    assert [trace.stats.location for trace in found] == ["00", "01", "02"]
    assert all(len(trace) == 12 and np.isfinite(trace.data).all() for trace in found)
    with pytest.raises(ConfigError, match="two-digit number, so ask for at most 100"):
        model.forecast(record(), 1, num_samples=101)


def test_the_command_line_draws_samples(run: Path, tmp_path: Path) -> None:
    """`--num-samples` and `--seed`, from a file to a file."""
    table().to_csv(tmp_path / "in.csv")
    words = ["forecast", str(run), str(tmp_path / "in.csv"), "--horizon", "3", "--num-samples", "2", "--seed", "5"]
    assert main([*words, "--out", str(tmp_path / "out.csv")]) == 0
    found = pd.read_csv(tmp_path / "out.csv")
    expected = load_model(run).forecast(table(), 3, num_samples=2, seed=5)
    np.testing.assert_allclose(found["value"], expected["value"], rtol=1e-5)
    assert found["sample"].tolist() == expected["sample"].tolist()


def test_what_cannot_be_sampled_is_one_clear_error(model: LoadedModel, tmp_path: Path) -> None:
    """A model of marginals, a number or horizon that cannot be, a short context."""
    make_run(tmp_path)
    marginal = load_model(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"no trajectories; ask for quantiles, or train a model with model.noise"):
        marginal.forecast(table(), 1, num_samples=2)
    for data in (field(), record()):
        with pytest.raises(ConfigError, match="no trajectories"):
            marginal.forecast(data, 1, num_samples=2)
    for count in (0, -3):
        with pytest.raises(ConfigError, match=f"num_samples is at least 1, got {count}"):
            model.forecast(table(), 1, num_samples=count)
    with pytest.raises(ConfigError, match="seed=4 without num_samples"):
        model.forecast(table(), 1, seed=4)
    with pytest.raises(ConfigError, match="horizon is at least 1 step, got 0"):
        model.forecast(table(), 0, num_samples=2)
    with pytest.raises(ConfigError, match=r"horizon 22 is beyond 21 steps of 3600 s, what its documents hold"):
        model.forecast(table(), 22, num_samples=2)
    with pytest.raises(DataError, match="2 time steps are shorter than the context of 3"):
        model.forecast(table(2), 1, num_samples=2)
    with pytest.raises(ConfigError, match="is not one that this model knows"):
        model.forecast(table(), 1, num_samples=2, notes=Notes(source="statoin"))


@pytest.mark.parametrize(("radius", "limits"), [(1, True), (2, False)])
def test_a_radius_refuses_samples_only_where_it_limits_a_layer(
    model: LoadedModel, radius: int, limits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The field has 2 x 3 patches of 4 x 4 cells: a radius of 1 cuts its columns, one of 2 does not; a table and a
    stream have neither rows nor columns.
    """
    monkeypatch.setattr(model.model, "settings", replace(model.model.settings, radius=radius))
    assert model.forecast(table(), 2, num_samples=2)["value"].notna().all()
    assert all(np.isfinite(trace.data).all() for trace in model.forecast(record(), 5, num_samples=2))
    if limits:
        with pytest.raises(ConfigError, match=r"a grid of 6 patches.* attention.radius 1; ask for quantiles"):
            model.forecast(field(), 1, num_samples=2)
    else:
        assert model.forecast(field(), 1, num_samples=2)["t"].sizes["sample"] == 2
