"""`sci-gpt inspect` tells what real files hold, in numbers read without our readers."""

from __future__ import annotations

from pathlib import Path

import netCDF4
import numpy as np
import obspy
import pytest

from data_archives import ARCHIVES
from sci_gpt.errors import ConfigError, DataError
from sci_gpt.recipes.inspect import inspect_file

KEYS = {"name", "source_name", "units", "missing_share", "min", "max", "mapped"}


def test_netcdf(sample_data: Path) -> None:
    path = sample_data / "cmip6" / "pr_Amon_ACCESS-ESM1-5_historical_r1i1p1f1_gn_200001-201412.nc"
    result = inspect_file(path, "cmip6")
    with netCDF4.Dataset(path) as file:
        raw = np.asarray(file["pr"][:])
    (row,) = result["variables"]
    assert set(row) == KEYS
    assert (row["name"], row["source_name"], row["units"], row["mapped"]) == (
        "precipitation_flux",
        "pr",
        "kg m-2 s-1",
        True,
    )
    assert row["max"] == pytest.approx(raw.max(), rel=1e-6)
    assert row["missing_share"] == pytest.approx((raw < 0).mean(), abs=1e-9), "negative rain is outside the valid range"
    assert (result["family"], result["num_samples"]) == ("cmip6", 180)
    assert result["start"].startswith("2000-01-16T12:00") and result["end"].startswith("2014-12-16T12:00")
    assert result["step_seconds"] == pytest.approx(365.2425 / 12 * 86400)


def test_ghcn(sample_data: Path) -> None:
    path = sample_data / "ghcn" / "USC00042319.dly"
    result = inspect_file(path, "ghcn")
    rows = {row["source_name"]: row for row in result["variables"]}
    highest = max(
        int(line[at : at + 5])
        for line in path.read_text().splitlines()
        if line[17:21] == "TMAX"
        for at in range(21, len(line) - 7, 8)
        if line[at + 6] == " " and line[at : at + 5] != "-9999"
    )
    assert rows["TMAX"]["name"] == "air_temperature_daily_maximum" and rows["TMAX"]["units"] == "K"
    assert rows["TMAX"]["max"] == pytest.approx(highest / 10 + 273.15)
    assert not rows["TOBS"]["mapped"] and rows["TOBS"]["name"] == "TOBS"
    assert result["step_seconds"] == 86400.0


def test_miniseed(sample_data: Path) -> None:
    path = sample_data / "earthscope" / "AE.113A..BHN.mseed"
    result = inspect_file(path, "earthscope")
    trace = obspy.read(str(path))[0]
    (row,) = result["variables"]
    assert (row["name"], row["source_name"], row["units"]) == ("digitizer_counts_north", "AE.113A..BHN", "count")
    assert (row["min"], row["max"], row["missing_share"]) == (trace.data.min(), trace.data.max(), 0.0)
    assert (result["num_samples"], result["rate_hz"]) == (168001, 40.0)
    assert result["start"].startswith("2013-05-24T05:40:00")


def test_miniseed_with_a_gap(tmp_path: Path) -> None:
    ARCHIVES["obspy_records"](tmp_path, 0.0)
    result = inspect_file(tmp_path / "two.mseed", "miniseed")
    # 2,000 samples from 1,000 s and 2,400 from 1,200 s, at 20 Hz: 6,400 samples of time, 4,400 of data.
    assert result["num_samples"] == 6400
    assert result["variables"][0]["missing_share"] == pytest.approx(2000 / 6400)


def test_csv(sample_data: Path) -> None:
    result = inspect_file(sample_data / "extra" / "ETTh1.csv", "csv")
    rows = {row["name"]: row for row in result["variables"]}
    values = np.genfromtxt(sample_data / "extra" / "ETTh1.csv", delimiter=",", skip_header=1, usecols=[7])
    assert (rows["OT"]["min"], rows["OT"]["max"]) == (pytest.approx(values.min()), pytest.approx(values.max()))
    assert (result["num_samples"], result["step_seconds"]) == (len(values), 3600.0)
    assert not rows["OT"]["mapped"] and rows["OT"]["units"] is None


def test_bad_requests(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no family 'cmip5'; nearest: 'cmip6'"):
        inspect_file(tmp_path / "x.nc", "cmip5")
    with pytest.raises(DataError, match=r"no file .*x\.nc"):
        inspect_file(tmp_path / "x.nc", "netcdf")
    (tmp_path / "x.nc").write_bytes(b"not netCDF")
    with pytest.raises(DataError, match=r"x\.nc cannot be read as netCDF"):
        inspect_file(tmp_path / "x.nc", "netcdf")
