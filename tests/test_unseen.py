"""The quickstart's unseen files: one per modality, made from packaged data that are left out or held out."""

from __future__ import annotations

from pathlib import Path

import obspy
import pandas as pd
import pytest
import xarray as xr
import yaml

from sci_gpt.errors import DataError
from sci_launch import cli, unseen
from toy_model import make_run


def test_one_file_per_kind() -> None:
    assert sorted(Path(file.name).suffix for file in unseen.FILES) == [".csv", ".mseed", ".nc"]


def test_series_is_the_airport_held_out(tmp_path: Path, root: Path) -> None:
    unseen.make_series(tmp_path / "series.csv")
    table = pd.read_csv(tmp_path / "series.csv", parse_dates=["time_hour"])
    assert len(table) == 21 * 24
    # weather.csv: the last row of LaGuardia, 2013-12-30 18 h local time, 28.94 degF
    assert table["time_hour"].iloc[-1] == pd.Timestamp("2013-12-30T23:00Z")
    assert table["temp"].iloc[-1] == 28.94
    config = yaml.safe_load((root / "configs/data/quickstart.yaml").read_text(encoding="utf-8"))
    (weather,) = (source for source in config["sources"] if source["name"] == "nycflights_weather")
    assert weather["split"]["test"] == ["LGA"]


def test_grid_is_the_scenario_left_out(tmp_path: Path, root: Path) -> None:
    unseen.make_grid(tmp_path / "grid.nc")
    with xr.open_dataset(tmp_path / "grid.nc", decode_times=xr.coders.CFDatetimeCoder(use_cftime=True)) as data:
        assert data["air_temperature"].sizes == {"time": 50, "latitude": 37, "longitude": 49}
        assert (data["time"].values[0].year, data["time"].values[-1].year) == (2050, 2099)
    config = yaml.safe_load((root / "configs/data/quickstart.yaml").read_text(encoding="utf-8"))
    assert not [name for source in config["sources"] for name in source["files"] if "E1" in name]


def test_trace_is_a_record_of_a_held_out_event(tmp_path: Path, root: Path) -> None:
    unseen.make_trace(tmp_path / "trace.mseed")
    (trace,) = obspy.read(tmp_path / "trace.mseed")
    assert (trace.id, trace.stats.sampling_rate, trace.stats.npts) == ("II.TLY.00.BHZ", 20.0, 8001)
    # the P wave comes 301.5 s into the record (SAC header field `a`): the shaking grows more than twentyfold
    before, after = trace.slice(endtime=trace.stats.starttime + 300), trace.slice(trace.stats.starttime + 310)
    assert after.data.std() > 20 * before.data.std()
    config = yaml.safe_load((root / "configs/data/quickstart.yaml").read_text(encoding="utf-8"))
    (records,) = (source for source in config["sources"] if source["modality"] == "trace")
    assert "tohoku_2011" in records["split"]["test"]
    assert records["options"]["events"]["tohoku_2011"]["files"] == ["II.TLY.BHZ.SAC"]


def test_a_missing_package_names_the_extra() -> None:
    with pytest.raises(DataError, match=r"no file 'a' of package 'no_such_package'.*\[quickstart\]"):
        unseen.file_of("no_such_package", "a")


def test_the_first_refusal_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def refuse(command: list[str]) -> int:
        asked.append(command)
        return 2

    monkeypatch.setattr(cli, "main", refuse)
    assert unseen.forecast_files("models:/m@candidate", tmp_path / "out") == 2
    first = tmp_path / "out" / unseen.FILES[0].name
    assert first.is_file()
    assert asked[0][:3] == ["forecast", "models:/m@candidate", str(first)]
    assert len(asked) == 1


def test_a_run_forecasts_each_of_them(tmp_path: Path) -> None:
    """A small run's forecasts of the three files: the file's kind, its next steps, three quantiles in order."""
    shape = {"weight": 1, "stride": 4}
    mixture = [
        {"source": "field", "frames": 16, "context_frames": [2, 6], "leads": [1, 2]} | shape,
        {"source": "station", "frames": 40, "context_frames": [3, 12], "leads": [1, 12]} | shape,
        {"source": "quake", "frames": 60, "context_frames": [20, 30], "leads": [1, 2, 3, 4]} | shape,
    ]
    run = make_run(tmp_path, mixture=mixture).output
    out = tmp_path / "out"
    assert unseen.forecast_files(str(run), out) == 0
    table = pd.read_csv(out / "series-forecast.csv", parse_dates=["time"])
    assert table["time"].min() == pd.Timestamp("2013-12-31T00:00Z")
    assert len(table) == 12 * 3 * 3  # leads x columns x quantiles
    wide = table[table["lead"] == 1].pivot(index="variable", columns="quantile", values="value")
    assert (wide[0.1] < wide[0.5]).all()
    assert (wide[0.5] < wide[0.9]).all()
    with xr.open_dataset(out / "grid-forecast.nc", decode_times=False) as grid:
        assert grid["air_temperature"].sizes["latitude"] == 37
        assert bool(grid["air_temperature"].notnull().all())
    assert obspy.read(out / "trace-forecast.mseed")[0].stats.npts == 20
