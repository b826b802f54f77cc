"""Forecasts of files: netCDF, CSV and miniSEED in, the same kind out; and the folders that a model is loaded from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import netCDF4
import numpy as np
import obspy
import pandas as pd
import pytest
import xarray as xr

from sci_gpt.config import PretrainConfig
from sci_gpt.data.store import Store
from sci_gpt.errors import CheckpointError, ConfigError, DataError
from sci_gpt.recipes.export import export_model
from sci_gpt.recipes.forecast import FileOptions, forecast_file
from sci_gpt.recipes.load import load_model
from sci_gpt.train.checkpoint import latest
from sci_launch import cli
from test_forecast import table
from test_forecast_fields import field
from test_forecast_waveforms import record
from toy_model import make_run


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> PretrainConfig:
    return make_run(tmp_path_factory.mktemp("model"))


def test_a_netcdf_file_gives_a_cf_netcdf_file(config: PretrainConfig, tmp_path: Path) -> None:
    data = field()
    packing = {"sst": {"dtype": "int16", "scale_factor": 0.01, "add_offset": 10.0, "_FillValue": -32768}}
    data.to_netcdf(tmp_path / "in.nc", encoding=packing | {"time": {"units": "hours since 1900-01-01"}})
    command = [
        "forecast",
        str(config.output),
        str(tmp_path / "in.nc"),
        "--horizon",
        "1",
        "--out",
        str(tmp_path / "out.nc"),
    ]
    assert cli.main(command) == 0
    with netCDF4.Dataset(tmp_path / "out.nc") as raw:
        assert raw.variables["sst"].dimensions == ("lead_time", "quantile", "lat", "lon")
        assert raw.variables["sst"].units == "degC"
        assert raw.variables["sst"].dtype == np.float32, "quantiles must not be packed like the past was"
        assert raw.variables["lead_time"].standard_name == "forecast_period"
        assert raw.variables["lead_time"].units == "days"
        assert raw.variables["forecast_reference_time"].standard_name == "forecast_reference_time"
        assert "since" in raw.variables["time"].units
    with xr.open_dataset(tmp_path / "out.nc", decode_timedelta=False) as out:
        expected = load_model(config.output).forecast(xr.open_dataset(tmp_path / "in.nc").load(), 1)
        np.testing.assert_allclose(out["sst"], expected["sst"], rtol=1e-6)
        assert out["time"].values[0] == np.datetime64("2020-01-09")


def test_a_file_of_another_calendar_keeps_it(config: PretrainConfig, tmp_path: Path) -> None:
    field(times=xr.date_range("2000-01-01", periods=20, freq="D", calendar="360_day", use_cftime=True)).to_netcdf(
        tmp_path / "in.nc"
    )
    forecast_file(
        str(config.output), tmp_path / "in.nc", horizon=1, out=tmp_path / "out.nc", options=FileOptions(levels=(0.5,))
    )
    with netCDF4.Dataset(tmp_path / "out.nc") as raw:
        assert raw.variables["time"].calendar == "360_day"


def test_a_csv_file_gives_a_long_csv_file_in_its_own_units(
    config: PretrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = table()
    celsius = pd.DataFrame({"when": data.index, "station": "A", "t": data["air_temperature"] - 273.15, "flag": 7})
    celsius.to_csv(tmp_path / "in.csv", index=False)
    command = [
        "forecast",
        str(config.output),
        str(tmp_path / "in.csv"),
        "--horizon",
        "2",
        "--out",
        str(tmp_path / "out.csv"),
    ]
    options = ["--time", "when", "--columns", "t=air_temperature:degC", "--quantiles", "0.05,0.5,0.95", "--json"]
    assert cli.main([*command, *options]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["kind"], report["horizon"], report["model_step"]) == ("csv", 2, 24)
    out = pd.read_csv(tmp_path / "out.csv")
    assert list(out.columns) == ["time", "lead", "variable", "quantile", "value", "unit"]
    assert out["time"].unique().tolist() == ["2024-02-29T16:00:00", "2024-02-29T17:00:00"]
    assert out["quantile"].unique().tolist() == [0.05, 0.5, 0.95]
    assert set(out["unit"]) == {"degC"} and set(out["variable"]) == {"t"}


def test_a_csv_file_whose_headers_say_all_needs_no_words(config: PretrainConfig, tmp_path: Path) -> None:
    data = table()
    told = pd.DataFrame(
        {"air_temperature [degC]": data["air_temperature"] - 273.15, "wind_speed [m s-1]": data["wind_speed"]}
    )
    told.to_csv(tmp_path / "in.csv", index_label="time")
    forecast_file(str(config.output), tmp_path / "in.csv", horizon=2, out=tmp_path / "out.csv", options=FileOptions())
    out = pd.read_csv(tmp_path / "out.csv")
    plain = load_model(config.output).forecast(data, 2)
    kelvin = out[out["variable"] == "air_temperature"]["value"] + 273.15
    np.testing.assert_allclose(kelvin, plain[plain["variable"] == "air_temperature"]["value"], atol=2e-3)


def test_a_miniseed_file_gives_a_miniseed_file(config: PretrainConfig, tmp_path: Path) -> None:
    stream = obspy.Stream([record(), record(channel="BHN")])
    stream.write(str(tmp_path / "in.mseed"), format="MSEED")
    command = ["forecast", str(config.output), str(tmp_path / "in.mseed"), "--horizon", "5"]
    assert cli.main([*command, "--out", str(tmp_path / "out.mseed"), "--place", "10,20"]) == 0
    out = obspy.read(str(tmp_path / "out.mseed"))
    assert sorted({trace.stats.location for trace in out}) == ["10", "50", "90"]
    assert {trace.stats.sampling_rate for trace in out} == {10.0}
    assert {trace.data.dtype for trace in out} == {np.dtype(np.float32)}
    assert out[0].stats.starttime == stream[0].stats.starttime + 40.0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"quantiles": "0.1,much"}, r"quantiles are numbers with commas between, got '0\.1,much'"),
        ({"quantiles": "0,0.5"}, r"ascending levels between 0 and 1"),
        ({"place": "99,10"}, r"place is LATITUDE,LONGITUDE\[,ELEVATION\] in degrees and m, got '99,10'"),
        ({"place": "1"}, r"place is LATITUDE,LONGITUDE"),
        ({"columns": "temp"}, r"columns are COL=VARIABLE\[:UNIT\],\.\., got 'temp'"),
    ],
)
def test_words_that_cannot_be_read_are_refused(words: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FileOptions.parse(**words)


def test_words_are_read() -> None:
    options = FileOptions.parse(place="47.5,-8.6,420", columns="a=air_temperature:degC, b = wind_speed")
    assert options.levels == (0.1, 0.5, 0.9)
    assert options.notes.place == (47.5, -8.6, 420.0)
    assert options.notes.columns == {"a": "air_temperature:degC", "b": "wind_speed"}


def spoil_weights(folder: Path) -> None:
    raw = bytearray((folder / "model.safetensors").read_bytes())
    raw[-3] ^= 1
    (folder / "model.safetensors").write_bytes(raw)


def spoil_description(change: Callable[[dict[str, object]], object]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        description = json.loads((folder / "model.json").read_text())
        change(description)
        (folder / "model.json").write_text(json.dumps(description))

    return spoil


@pytest.fixture(scope="module")
def exported(config: PretrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkpoint = latest(config.output)
    assert checkpoint is not None
    folder = tmp_path_factory.mktemp("exported") / "model"
    export_model(checkpoint, folder, manifest=Store.open(config.data).manifest)
    return folder


def test_run_folder_checkpoint_and_exported_folder_give_the_same_forecast(
    config: PretrainConfig, exported: Path
) -> None:
    checkpoint = latest(config.output)
    assert checkpoint is not None
    forecasts = [load_model(folder).forecast(table(), 2) for folder in (config.output, checkpoint, exported)]
    pd.testing.assert_frame_equal(forecasts[0], forecasts[1])
    pd.testing.assert_frame_equal(forecasts[0], forecasts[2])


def test_an_exported_folder_says_what_it_is(config: PretrainConfig, exported: Path) -> None:
    assert sorted(path.name for path in exported.iterdir()) == ["card.md", "model.json", "model.safetensors"]
    description = json.loads((exported / "model.json").read_text())
    assert description["leads"] == {"field": [1], "station": [1, 2], "quake": [1]}
    assert description["sources"]["quake"]["step_seconds"] == 0.1
    assert description["fingerprint"] == "0123456789abcdef"
    assert description["code_version"] == "0.1.0+test"
    assert description["shape"] == {"layers": 2, "width": 32, "heads": 2, "hidden": 64}
    assert description["tokenizer"]["grid_patch"] == 4
    card = (exported / "card.md").read_text()
    for part in ("## Data", "CC0", "made up for tests", "## Intended use", "## Limits", "0123456789abcdef"):
        assert part in card


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_weights, r"model\.safetensors is damaged: its sha256 differs"),
        (
            lambda folder: (folder / "model.safetensors").unlink(),
            r"exported model .* cannot be read: .*model\.safetensors",
        ),
        (lambda folder: (folder / "model.json").write_text("{"), r"exported model .* cannot be read"),
        (spoil_description(lambda d: d.update(format=99)), r"is of export format 99, this code reads 1"),
        (spoil_description(lambda d: d["variables"].reverse()), r"its variable table differs from this code's"),  # type: ignore[attr-defined]
        (spoil_description(lambda d: d["config"]["model"].update(size="1M")), r"weights do not fit model '1M'"),  # type: ignore[index]
    ],
)
def test_a_spoilt_export_is_refused(
    exported: Path, tmp_path: Path, spoil: Callable[[Path], object], message: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(exported, folder)
    spoil(folder)
    with pytest.raises(CheckpointError, match=message):
        load_model(folder)


def test_folders_that_hold_no_model_are_refused(config: PretrainConfig, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no model folder '.*nowhere'"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"holds no manifest\.json"):
        load_model(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match=r"holds no finished checkpoint"):
        load_model(tmp_path)
    with pytest.raises(CheckpointError, match=r"no tracking database .* so no 'models:/x@candidate'"):
        load_model("models:/x@candidate", tracking_uri=f"sqlite:///{tmp_path}/none.db")


def test_a_forecast_file_of_another_kind_is_refused(config: PretrainConfig, tmp_path: Path) -> None:
    table().to_csv(tmp_path / "in.csv")
    with pytest.raises(ConfigError, match=r"'out\.nc': the forecast of a csv file is a csv file; use '\.csv'"):
        forecast_file(
            str(config.output), tmp_path / "in.csv", horizon=1, out=tmp_path / "out.nc", options=FileOptions()
        )
    with pytest.raises(ConfigError, match=r"ending '\.txt' is of no known kind; use one of \.nc"):
        forecast_file(
            str(config.output), tmp_path / "in.txt", horizon=1, out=tmp_path / "out.nc", options=FileOptions()
        )


def test_a_forecast_into_a_folder_that_is_not_there_is_refused(config: PretrainConfig, tmp_path: Path) -> None:
    table().to_csv(tmp_path / "in.csv")
    with pytest.raises(ConfigError, match=r"no folder '.*nowhere' for the forecast"):
        forecast_file(
            str(config.output),
            tmp_path / "in.csv",
            horizon=1,
            out=tmp_path / "nowhere" / "out.csv",
            options=FileOptions(),
        )


@pytest.mark.parametrize("name", ["in.nc", "in.csv", "in.mseed"])
def test_bytes_that_are_no_such_file_are_refused(config: PretrainConfig, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"\x00\x01not what the ending says\xff" * 30)
    with pytest.raises(DataError, match=rf"{name} cannot be read as "):
        forecast_file(str(config.output), path, horizon=1, out=path.with_stem("out"), options=FileOptions())
    assert sorted(tmp_path.iterdir()) == [path]
