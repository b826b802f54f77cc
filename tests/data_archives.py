"""Small archives on disk, one per source reader, whose raw values after a given time can be altered."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import netCDF4
import numpy as np
import obspy
import xarray as xr

from sci_gpt.data.source import SourceSettings
from toy_zarr import dataset, write_zarr
from toy_zarr import settings as zarr_settings

DAY = 86400.0


@dataclass(frozen=True, kw_only=True)
class Archive:
    """An archive that was written.

    Attributes:
        settings: to read it with.
        altered_from: seconds since 1970 at which the first altered raw value is known; all later ones are altered too.
        known: (channel number, time number, physical value) of the first sample, worked out by hand.
    """

    settings: SourceSettings
    altered_from: float
    known: tuple[tuple[int, int, float], ...] = ()
    raw: Mapping[str, Any] = field(default_factory=dict)


def grid(folder: Path, tail: float) -> Archive:
    """30 daily fields, latitudes from north to south, in degC; a fill value that the file does not declare."""
    random = np.random.default_rng(0)
    values = (10.0 + random.standard_normal((30, 4, 6))).astype(np.float32)
    values[3, 1, 2] = 1e36
    values[7, 0, 0] = 20.0
    values[20:] += tail
    latitude = np.array([60.0, 50.0, 40.0, 30.0])
    dataset = xr.Dataset(
        {"t2": (("time", "lat", "lon"), values, {"units": "degC", "standard_name": "air_temperature"})},
        coords={
            "time": ("time", np.arange(30.0), {"units": "days since 2001-01-01", "calendar": "standard"}),
            "lat": ("lat", latitude, {"units": "degrees_north"}),
            "lon": ("lon", np.arange(6.0) * 10, {"units": "degrees_east"}),
        },
    )
    path = folder / "grid.nc"
    dataset.to_netcdf(path)
    settings = SourceSettings(
        name="fields", reader="netcdf_grid", modality="grid", files=(str(path),), options={"variable": "t2"}
    )
    raw = {"values": values, "latitude": latitude}
    return Archive(settings=settings, altered_from=_day("2001-01-21"), known=((0, 7, 293.15),), raw=raw)


def column(folder: Path, tail: float) -> Archive:
    """40 days of a no-leap model on two levels and 2 x 2 points, stamped at noon; one value undeclared 1e36."""
    path = folder / "column.nc"
    with netCDF4.Dataset(path, "w") as file:
        file.source_id = "TOY.1-0"
        for name, size in (("time", 40), ("plev", 2), ("lat", 2), ("lon", 2), ("bnds", 2)):
            file.createDimension(name, size)
        _axis(file, "time", np.arange(40) + 0.5, units="days since 2003-02-01", calendar="365_day")
        _axis(file, "plev", np.array([100000.0, 85000.0]), units="Pa")
        _axis(file, "lat", np.array([30.0, 60.0]), units="degrees_north", bounds="lat_bnds")
        _axis(file, "lon", np.array([0.0, 10.0]), units="degrees_east")
        file.createVariable("lat_bnds", "f8", ("lat", "bnds"))[:] = [[0.0, 30.0], [30.0, 60.0]]
        values = np.random.default_rng(1).normal(280.0, 1.0, (40, 2, 2, 2)).astype(np.float32)
        values[4] = [[[270.0, 270.0], [290.0, 290.0]], [[250.0, 250.0], [1e36, 1e36]]]
        values[25:] += tail
        variable = file.createVariable("ta", "f4", ("time", "plev", "lat", "lon"))
        variable.units, variable.cell_methods = "K", "time: mean"
        variable[:] = values
    settings = SourceSettings(
        name="models",
        reader="netcdf_column_series",
        modality="series",
        files=(str(path),),
        options={"variable": "ta", "name": "air_temperature", "levels": [100000, 85000]},
    )
    # Areas of the bands 0-30 and 30-60 degrees: 0.5 and sin 60 - 0.5 = 0.3660254; the mean of 270 and 290 K is
    # 270 + 20 * 0.3660254 / 0.8660254. The second level's northern band is missing: 42 %.
    known = ((0, 4, 278.4529946), (1, 4, 250.0))
    return Archive(settings=settings, altered_from=_day("2003-02-27"), known=known)


def station_table(folder: Path, tail: float) -> Archive:
    """60 hours of two stations with a missing row, a missing code, a calm and a wind without direction."""
    random = np.random.default_rng(2)
    lines = ["when,site,temp,rain,speed,from"]
    for site in ("A", "B"):
        for hour in range(60):
            if (site, hour) == ("A", 9):
                continue
            temp = 50.0 if hour == 5 else round(50 + float(random.standard_normal()), 2)
            temp = -9999.0 if hour == 6 else temp + (tail if hour >= 40 else 0.0)
            wind = {0: "10,90", 1: "0,NA", 2: "5,NA", 3: "5000,80"}.get(hour, "4,200")
            lines.append(
                f"2004-02-{28 + hour // 24 if hour < 48 else '01'}".replace("-02-01", "-03-01")
                + f"T{hour % 24:02d}:00:00Z,{site},{temp},0.0,{wind}"
            )
    path = folder / "stations.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    settings = SourceSettings(
        name="stations",
        reader="csv_series",
        modality="series",
        files=(str(path),),
        options={
            "time": "when",
            "station": "site",
            "step": "hour",
            "missing": [-9999],
            "columns": {
                "temp": {"variable": "air_temperature", "unit": "degF"},
                "rain": {"variable": "precipitation_amount", "unit": "inch"},
            },
            "wind": {"speed": "speed", "direction": "from", "unit": "m s-1"},
            "stations": {"A": {"latitude": 1.0, "longitude": 2.0, "elevation": 3.0}, "B": {"latitude": 4.0}},
        },
    )
    # 50 degF = 10 degC; a 10 m/s wind from the east blows to the west; a calm is 0 in both components.
    known = ((0, 5, 283.15), (2, 0, -10.0), (3, 0, 0.0), (2, 1, 0.0))
    return Archive(settings=settings, altered_from=_day("2004-02-29") + 16 * 3600, known=known)


def dly(folder: Path, tail: float) -> Archive:
    """Two months of GHCN-Daily with a missing value, a failed check and a presumed zero."""
    lines = []
    for month, days in ((1, 31), (2, 29)):
        for element in ("TMAX", "TMIN", "PRCP"):
            fields = []
            for day in range(1, days + 1):
                value = {"TMAX": 100, "TMIN": -50, "PRCP": 0}[element] + day
                value += int(tail) if (month, day) > (2, 10) else 0
                flags = "   "
                if (month, day, element) == (1, 3, "TMAX"):
                    value = -9999
                if (month, day, element) == (1, 4, "TMAX"):
                    flags = " I "
                if (month, day, element) == (1, 5, "PRCP"):
                    flags = "P  "
                fields.append(f"{value:5d}{flags}")
            fields += ["-9999   "] * (31 - days)
            lines.append(f"USC000000012004{month:02d}{element}" + "".join(fields))
    path = folder / "USC00000001.dly"
    path.write_text("\n".join(lines) + "\n", encoding="ascii")
    settings = SourceSettings(name="daily", reader="ghcn_daily", modality="series", files=(str(path),), options={})
    # 10.1 degC on the first day (tenths of a degree); 0.1 mm.
    return Archive(settings=settings, altered_from=_day("2004-02-12"), known=((0, 0, 283.25), (2, 0, 0.1)))


def records(folder: Path, tail: float) -> Archive:
    """120 s of three components at 40 Hz, in counts, with an offset; a second event at 20 Hz with a gap."""
    random = np.random.default_rng(3)
    stream = obspy.Stream()
    for channel in ("BHZ", "BHN", "BHE"):
        data = 500 + np.cumsum(random.integers(-20, 21, 4800)).astype(np.int32)
        data[3000:] += np.int32(tail)
        header = {"network": "XX", "station": "AAA", "channel": channel, "sampling_rate": 40.0}
        stream += obspy.Trace(data.astype(np.int32), {**header, "starttime": obspy.UTCDateTime(0)})
    stream.write(str(folder / "one.mseed"), format="MSEED")
    late = obspy.Stream()
    for start, size in ((1000.0, 2000), (1200.0, 2400)):
        late += obspy.Trace(
            random.integers(-99, 99, size).astype(np.int32),
            {"station": "BBB", "channel": "SHZ", "sampling_rate": 20.0, "starttime": obspy.UTCDateTime(start)},
        )
    late.write(str(folder / "two.mseed"), format="MSEED")
    settings = SourceSettings(
        name="quakes",
        reader="obspy_records",
        modality="trace",
        files=(str(folder / "one.mseed"), str(folder / "two.mseed")),
        options={"high_pass_hz": 0.01, "events": {"one": {"files": ["one.mseed"]}, "two": {"files": ["two.mseed"]}}},
    )
    # The filters start in the steady state of the first sample, and the high-pass takes constants away.
    return Archive(settings=settings, altered_from=3000 / 40.0, known=((0, 0, 0.0),), raw={"stream": stream})


def zarr_store(folder: Path, tail: float) -> Archive:
    """400 days of a 360-day calendar in a Zarr: packed temperatures on two levels, rain; latitudes north to south."""
    place = write_zarr(folder / "fields.zarr", dataset(tail))
    # 250 + 0.01 * 2500 K on the level 500 hPa, which the Zarr has second; 86.4 mm a day = 0.001 kg m-2 s-1. A year of
    # 360 days is stretched to the real one: day 300 of it is 300 / 360 of the way through 2001.
    known = ((0, 9, 275.0), (1, 7, 265.0), (2, 8, 0.001))
    altered_from = _day("2001-01-01") + 300 / 360 * 365 * DAY
    return Archive(settings=zarr_settings(place, tile=[4, 3]), altered_from=altered_from, known=known)


ARCHIVES: dict[str, Callable[[Path, float], Archive]] = {
    "netcdf_grid": grid,
    "zarr_grid": zarr_store,
    "netcdf_column_series": column,
    "csv_series": station_table,
    "ghcn_daily": dly,
    "obspy_records": records,
}


def _axis(file: netCDF4.Dataset, name: str, values: np.ndarray, **attributes: str) -> None:
    variable = file.createVariable(name, "f8", (name,))
    variable[:] = values
    variable.setncatts(attributes)


def _day(text: str) -> float:
    return float(np.datetime64(text, "D").astype(np.int64)) * DAY
