"""Forecasts of fields: a Dataset in, the same with lead_time and quantile out; places, land and calendars are kept."""

from __future__ import annotations

import cftime
import numpy as np
import pandas as pd
import pytest
import xarray as xr

from sci_gpt.errors import DataError
from sci_gpt.recipes.film import Notes
from sci_gpt.recipes.film_grid import tiles
from sci_gpt.recipes.load import LoadedModel, load_model
from toy_model import make_run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A model that was never trained but is not at its initial weights, on the toy store's three sources."""
    return load_model(make_run(tmp_path_factory.mktemp("model")).output)


def field(num_times: int = 20, *, rows: int = 8, columns: int = 12, times: object = None) -> xr.Dataset:
    """A sea surface in degrees Celsius with land (NaN), latitudes from the north, and attributes to keep."""
    random = np.random.default_rng(5)
    values = (
        15.0
        + 3.0 * np.sin(np.arange(num_times) / 3.0)[:, None, None]
        + random.standard_normal((num_times, rows, columns))
    )
    values[:, 1, 2:4] = np.nan
    time = pd.date_range("2019-12-20", periods=num_times, freq="D") if times is None else times
    return xr.Dataset(
        {
            "sst": (
                ("time", "lat", "lon"),
                values.astype(np.float32),
                {
                    "units": "degC",
                    "standard_name": "sea_surface_temperature",
                    "cell_methods": "time: point",
                    "long_name": "SST",
                },
            ),
            "mask": (("lat", "lon"), np.ones((rows, columns), np.int8)),
        },
        coords={
            "time": ("time", time),
            "lat": ("lat", np.linspace(60, 40, rows), {"units": "degrees_north", "standard_name": "latitude"}),
            "lon": ("lon", np.linspace(-20, 10, columns), {"units": "degrees_east"}),
        },
        attrs={"title": "made up", "Conventions": "CF-1.7"},
    )


def test_a_dataset_keeps_names_units_attributes_places_and_land(model: LoadedModel) -> None:
    data = field()
    out = model.forecast(data, 1)
    assert out["sst"].dims == ("lead_time", "quantile", "lat", "lon")
    assert out["sst"].attrs["units"] == "degC" and out["sst"].attrs["long_name"] == "SST"
    assert "cell_methods" not in out["sst"].attrs  # said of the past; quantiles are another statistic
    assert out["lat"].variable.identical(data["lat"].variable)
    assert out["mask"].variable.identical(data["mask"].variable)
    assert out.attrs == {"title": "made up", "Conventions": "CF-1.7"}
    assert out["sst"].isel(lat=1, lon=[2, 3]).isnull().all()
    assert out["sst"].isel(lat=0).notnull().all()
    assert 5 < float(out["sst"].sel(quantile=0.5).mean()) < 25, "degrees Celsius again"
    assert out["lead_time"].attrs["standard_name"] == "forecast_period" and out["lead_time"].attrs["units"] == "days"
    assert out["lead_time"].values.tolist() == [1.0]
    assert out["time"].values.tolist() == [np.datetime64("2020-01-09", "ns").astype(int)]
    assert out["forecast_reference_time"].values == np.datetime64("2020-01-08")
    assert (out["sst"].diff("quantile") >= 0).where(out["sst"].diff("quantile").notnull(), True).all()


def test_a_data_array_gives_a_data_array(model: LoadedModel) -> None:
    data = field()["sst"]
    out = model.forecast(data, 1)
    assert isinstance(out, xr.DataArray) and out.name == "sst"
    np.testing.assert_array_equal(out.values, model.forecast(field(), 1)["sst"].values)


def test_dimensions_in_another_order_give_the_same(model: LoadedModel) -> None:
    out = model.forecast(field().transpose("lon", "time", "lat"), 1)
    np.testing.assert_array_equal(out["sst"].values, model.forecast(field(), 1)["sst"].values)


@pytest.mark.parametrize(
    ("times", "following", "lead", "unit"),
    [
        (xr.date_range("2000-12-01", periods=20, freq="MS", calendar="360_day", use_cftime=True) + pd.Timedelta("15D"),
         cftime.Datetime360Day(2002, 8, 16), 30.0, "days"),
        (xr.date_range("2000-02-10", periods=20, freq="D", calendar="noleap", use_cftime=True),
         cftime.DatetimeNoLeap(2000, 3, 2), 1.0, "days"),
        (pd.date_range("2000-02-28T06:00", periods=20, freq="3h"), np.datetime64("2000-03-01T18:00"), 3.0, "hours"),
        (pd.date_range("1980-01-01", periods=20, freq="YS"), np.datetime64("2000-01-01"), 365.0, "days"),
        (pd.date_range("2000-02-28T06:00", periods=20, freq="10s"), np.datetime64("2000-02-28T06:03:20"), 10.0,
         "seconds"),
    ],
)  # fmt: skip
def test_the_next_time_is_of_the_data_s_own_calendar(
    model: LoadedModel, times: object, following: object, lead: float, unit: str
) -> None:
    out = model.forecast(field(times=times), 1)
    assert out["time"].values[0] == following
    assert out["lead_time"].values[0] == pytest.approx(lead)
    assert out["lead_time"].attrs["units"] == unit


def test_a_large_grid_is_forecast_tile_by_tile_as_in_training(model: LoadedModel) -> None:
    data = field(rows=16, columns=18)
    whole = model.forecast(data, 1)["sst"]
    corner = model.forecast(data.isel(lat=slice(0, 8), lon=slice(0, 12)), 1)["sst"]  # the toy source's tiles are 8 x 12
    np.testing.assert_allclose(whole.isel(lat=slice(0, 8), lon=slice(0, 6)), corner.isel(lon=slice(0, 6)), rtol=1e-5)
    assert whole.isel(lat=slice(2, None)).notnull().all()


def test_tiles_cover_a_grid_and_stay_whole() -> None:
    boxes = tiles(20, 30, tile=(8, 12))
    seen = np.zeros((20, 30), int)
    for box in boxes:
        seen[box] += 1
        assert seen[box].shape == (8, 12)
    assert seen.min() == 1
    assert tiles(5, 30, tile=(8, 12))[0] == (slice(0, 5), slice(0, 12))


def test_what_lies_before_a_gap_is_not_used(model: LoadedModel) -> None:
    data = field(40)
    cut = data.isel(time=[*range(0, 18), *range(22, 40)])
    xr.testing.assert_equal(model.forecast(cut, 1), model.forecast(data.isel(time=slice(22, 40)), 1))


def test_two_variables_are_forecast_each(model: LoadedModel) -> None:
    data = field()
    data["tas"] = (data["sst"] + 273.15).assign_attrs(units="K", standard_name="air_temperature")
    out = model.forecast(data, 1)
    assert set(out.data_vars) == {"sst", "tas", "mask"}
    only = model.forecast(data, 1, notes=Notes(columns={"sst": "sea_surface_temperature:degC"}))
    assert set(only.data_vars) == {"sst", "mask"}
    np.testing.assert_array_equal(only["sst"], out["sst"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.drop_vars("time"), "has no time coordinate"),
        (lambda data: data["mask"].to_dataset(), "no variable of .* is on time, latitude and"),
        (
            lambda data: data.assign(sst=data["sst"].assign_attrs(standard_name="sea_temperature")),
            "'sea_temperature' is not in",
        ),
        (lambda data: data.assign(sst=data["sst"].assign_attrs(units="hPa")), "'hPa' does not convert"),
        (lambda data: data.isel(time=slice(0, 1)), "1 time steps are shorter than the context of 2"),
        (lambda data: data * np.nan, "none of the last"),
        (
            lambda data: data.isel(time=[*range(5), 7, 5, *range(8, 20)]),
            r"'sst': time axis 'time': times must increase, but step 5 -> 6 goes -172800.0 s; sort the file by time",
        ),
        (
            lambda data: data.isel(time=[*range(6), *range(5, 20)]),
            r"step 5 -> 6 goes 0.0 s; .*keep one field of each time",
        ),
        (
            lambda data: data.assign_coords(time=data["time"].where(np.arange(20) != 4)),
            r"time 4 is nan, not a time; drop what has no time",
        ),
    ],
)
def test_a_dataset_that_cannot_be_forecast_is_refused(model: LoadedModel, change: object, message: str) -> None:
    assert callable(change)
    with xr.set_options(keep_attrs=True), pytest.raises(DataError, match=message):
        model.forecast(change(field()), 1)
