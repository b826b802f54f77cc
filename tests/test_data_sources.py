"""Every reader of the table keeps the Source contract, and reads real files as they are."""

from __future__ import annotations

import csv
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import netCDF4
import numpy as np
import obspy
import pytest
import xarray as xr
from scipy import signal

from data_archives import ARCHIVES, Archive
from sci_gpt.data.calendars import clock, posix_clock
from sci_gpt.data.source import SourceSettings, digest, locate
from sci_gpt.data.sources import SOURCES, make_source
from sci_gpt.data.waveforms import decimation, working_rate
from sci_gpt.errors import DataError
from sci_tokenizers.sample import Sample
from sci_tokenizers.variables import VARIABLES


def read(settings: SourceSettings) -> list[Sample]:
    reader = make_source(settings)
    return [sample for part in reader.parts(settings) for sample in reader.read(settings, part)]


@pytest.fixture(params=sorted(SOURCES))
def archive(request: pytest.FixtureRequest, tmp_path: Path) -> Archive:
    return ARCHIVES[request.param](tmp_path, 0.0)


def test_every_reader_has_an_archive() -> None:
    assert set(ARCHIVES) == set(SOURCES)


def test_reading_twice_gives_the_same(archive: Archive) -> None:
    first, second = read(archive.settings), read(archive.settings)
    assert [sample.key for sample in first] == [sample.key for sample in second]
    for one, other in zip(first, second, strict=True):
        assert one.values.tobytes() == other.values.tobytes()
        assert one.valid.tobytes() == other.valid.tobytes()
        assert one.time.tobytes() == other.time.tobytes()


def test_parts_can_be_read_by_anybody_in_any_order(archive: Archive) -> None:
    """A part is all that a process needs: it is sent there, and nothing of the others is."""
    reader = make_source(archive.settings)
    parts = reader.parts(archive.settings)
    assert len({part.name for part in parts}) == len(parts) and all(part.bytes > 0 for part in parts)
    alone = [
        [sample.values.tobytes() for sample in make_source(archive.settings).read(archive.settings, sent)]
        for sent in reversed(pickle.loads(pickle.dumps(parts)))  # noqa: S301  as Dask sends it to its workers
    ]
    assert [row for rows in reversed(alone) for row in rows] == [s.values.tobytes() for s in read(archive.settings)]


def test_a_grid_is_cut_in_time_and_in_bands(tmp_path: Path) -> None:
    """400 hourly fields of 4 x 6 in two files that overlap, tiles of 2 x 3, 1,600 bytes a stretch: 57 or 58 times."""
    paths = []
    for number, (first, last) in enumerate(((0, 230), (200, 400))):
        values = np.arange(first, last)[:, None, None] + np.arange(24.0).reshape(4, 6) / 100
        axes = {"lat": ("lat", 40.0 - np.arange(4), {"units": "degrees_north"})}
        axes |= {"lon": ("lon", np.arange(6.0), {"units": "degrees_east"})}
        axes |= {"time": ("time", np.arange(first, last) * 1.0, {"units": "hours since 2001-01-01"})}
        variable = ("time", "lat", "lon"), values, {"units": "K", "standard_name": "air_temperature"}
        paths.append(tmp_path / f"{number}.nc")
        xr.Dataset({"t2": variable}, coords=axes).to_netcdf(paths[-1])
    settings = SourceSettings(
        name="fields",
        reader="netcdf_grid",
        modality="grid",
        files=tuple(map(str, paths)),
        options={"variable": "t2", "tile": [2, 3]},
    )
    whole = read(settings)
    assert [sample.key.split("/")[1:] for sample in whole] == [[f"grid-r{r}-c{c}", "0"] for r in (0, 2) for c in (0, 3)]
    small = replace(settings, stretch_bytes=1_600)
    parts = make_source(small).parts(small)
    assert max(part.bytes for part in parts) <= 2 * 1_600  # a band is one tile high at least, and as wide as the grid
    cuts = read(small)
    assert {sample.num_times for sample in cuts} == {57, 58}
    for sample in whole:
        mine = [cut for cut in cuts if cut.key.startswith(f"{sample.key}-")]
        assert [cut.key for cut in mine] == [f"{sample.key}-{number}" for number in range(7)]
        np.testing.assert_array_equal(np.concatenate([cut.values for cut in mine]), sample.values)
        np.testing.assert_array_equal(np.concatenate([cut.time for cut in mine]), sample.time)
        row, column = (int(word[1:]) for word in sample.key.split("/")[1].split("-")[1:])
        assert sample.values[321, 0, 1, 2] == np.float32(321 + ((row + 1) * 6 + column + 2) / 100)
    with pytest.raises(DataError, match="62 times of a tile of 2 x 3 take stretch_megabytes.*fewer than 64"):
        read(replace(settings, stretch_bytes=1_500))


def test_files_of_one_name_are_all_in_the_fingerprint(tmp_path: Path) -> None:
    paths = [tmp_path / folder / "x" / "f.csv" for folder in ("a", "b")] + [tmp_path / "a" / "g.csv"]
    for number, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(number))
    rows = digest(paths)
    assert list(rows) == ["a/x/f.csv", "b/x/f.csv", "g.csv"] and len(set(rows.values())) == 3


def test_keys_and_modality(archive: Archive) -> None:
    samples = read(archive.settings)
    assert len({sample.key for sample in samples}) == len(samples)
    for sample in samples:
        assert sample.key.startswith(f"{archive.settings.name}/") and len(sample.key.split("/")) >= 2
        assert sample.modality == archive.settings.modality == SOURCES[archive.settings.reader].modality
        assert (sample.values[~sample.valid] == 0).all()


def test_values_are_in_the_tables_units(archive: Archive) -> None:
    sample = read(archive.settings)[0]
    assert archive.known
    for channel, time, value in archive.known:
        assert sample.valid[time, channel, 0, 0]
        assert sample.values[time, channel, 0, 0] == pytest.approx(value, rel=1e-6, abs=1e-4)


def test_values_stay_within_the_valid_range(archive: Archive) -> None:
    for sample in read(archive.settings):
        for number, name in enumerate(sample.variables):
            known = sample.values[:, number][sample.valid[:, number]]
            assert (known >= VARIABLES[name].minimum).all() and (known <= VARIABLES[name].maximum).all()


@pytest.mark.parametrize("reader", sorted(SOURCES))
def test_the_future_changes_nothing_before_it(reader: str, tmp_path: Path) -> None:
    for name in ("as_it_is", "altered"):
        (tmp_path / name).mkdir()
    plain = ARCHIVES[reader](tmp_path / "as_it_is", 0.0)
    altered = ARCHIVES[reader](tmp_path / "altered", 7.0)
    changed = 0
    for one, other in zip(read(plain.settings), read(altered.settings), strict=True):
        before = one.time < plain.altered_from
        assert one.key == other.key
        assert one.values[before].tobytes() == other.values[before].tobytes()
        assert one.valid[before].tobytes() == other.valid[before].tobytes()
        changed += int((one.values[~before] != other.values[~before]).any())
    assert changed, "the archive's tail was not altered: the test shows nothing"


def test_an_unknown_option_is_named_with_the_nearest(archive: Archive) -> None:
    known = next(iter(SOURCES[archive.settings.reader].options))
    settings = replace(archive.settings, options={**archive.settings.options, f"{known}s_": 1})
    with pytest.raises(DataError, match=f"{archive.settings.name}.*{known}s_.*nearest") as caught:
        read(settings)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(archive: Archive) -> None:
    settings = replace(archive.settings, files=("nowhere/none.dat",))
    with pytest.raises(DataError, match=f"{archive.settings.name}.*nowhere/none.dat"):
        read(settings)


def test_an_unreadable_file_is_named(archive: Archive, tmp_path: Path) -> None:
    broken = tmp_path / Path(archive.settings.files[0]).name
    (broken / "zarr.json" if broken.is_dir() else broken).write_bytes(b"\x00\xff not an archive \x80" * 40)
    with pytest.raises(DataError, match=broken.name) as caught:
        read(archive.settings)
    assert "\n" not in str(caught.value)


def test_a_missing_package_names_the_extra() -> None:
    settings = SourceSettings(name="s", reader="csv_series", modality="series", package="not_there", files=("a.csv",))
    with pytest.raises(
        DataError, match=r"package 'not_there' is not installed; run: pip install 'sci-gpt\[quickstart\]'"
    ):
        locate(settings)


def test_an_unknown_reader_and_a_wrong_modality() -> None:
    settings = SourceSettings(name="s", reader="csv_serie", modality="series")
    with pytest.raises(DataError, match="csv_serie.*nearest: 'csv_series'"):
        make_source(settings)
    with pytest.raises(DataError, match="modality 'series'.*'grid'"):
        make_source(replace(settings, reader="csv_series", modality="grid"))


UNITS: dict[str, tuple[dict[str, Any], str]] = {
    "netcdf_grid": ({"unit": "furlong"}, "furlong"),
    "csv_series": ({"columns": {"temp": {"variable": "air_temperature", "unit": "Pa"}}}, "'Pa' does not convert"),
    "obspy_records": ({"unit": "volt"}, "volt"),
}


@pytest.mark.parametrize("reader", sorted(UNITS))
def test_a_unit_that_does_not_convert(reader: str, tmp_path: Path) -> None:
    archive = ARCHIVES[reader](tmp_path, 0.0)
    options, words = UNITS[reader]
    with pytest.raises(DataError, match=words):
        read(replace(archive.settings, options={**archive.settings.options, **options}))


NAMES: dict[str, dict[str, Any]] = {
    "netcdf_grid": {"name": "air_temprature"},
    "netcdf_column_series": {"name": "air_temprature"},
    "csv_series": {"columns": {"temp": {"variable": "air_temprature", "unit": "degF"}}},
}


@pytest.mark.parametrize("reader", sorted(NAMES))
def test_a_variable_that_is_not_in_the_table(reader: str, tmp_path: Path) -> None:
    archive = ARCHIVES[reader](tmp_path, 0.0)
    with pytest.raises(DataError, match="'air_temprature' is not in the variable table; nearest: 'air_temperature'"):
        read(replace(archive.settings, options={**archive.settings.options, **NAMES[reader]}))


def test_grid_rows_keep_their_latitudes(tmp_path: Path) -> None:
    archive = ARCHIVES["netcdf_grid"](tmp_path, 0.0)
    (sample,) = read(archive.settings)
    raw, latitude = archive.raw["values"], archive.raw["latitude"]
    for row in range(4):
        at = int(np.flatnonzero(latitude == sample.latitude[row, 0])[0])
        good = raw[:, at] < 1e30
        assert sample.latitude[row, 0] == latitude[at]
        np.testing.assert_allclose(sample.values[:, 0, row][good], raw[:, at][good] + 273.15, atol=1e-4)
    assert not sample.valid[3, 0, 1, 2] and sample.valid.sum() == sample.valid.size - 1


def test_tiles_are_pieces_of_the_grid(tmp_path: Path) -> None:
    archive = ARCHIVES["netcdf_grid"](tmp_path, 0.0)
    (whole,) = read(archive.settings)
    tiles = read(replace(archive.settings, options={**archive.settings.options, "tile": [2, 3]}))
    assert len(tiles) == 4
    for tile, (row, column) in zip(tiles, [(0, 0), (0, 3), (2, 0), (2, 3)], strict=True):
        box = (slice(row, row + 2), slice(column, column + 3))
        np.testing.assert_array_equal(tile.values, whole.values[:, :, box[0], box[1]])
        np.testing.assert_array_equal(tile.latitude, whole.latitude[box])
        np.testing.assert_array_equal(tile.longitude, whole.longitude[box])
    with pytest.raises(DataError, match="3 x 3 do not divide a grid of 4 x 6"):
        read(replace(archive.settings, options={**archive.settings.options, "tile": [3, 3]}))


def test_a_wind_without_direction_and_an_impossible_speed_are_missing(tmp_path: Path) -> None:
    archive = ARCHIVES["csv_series"](tmp_path, 0.0)
    sample = read(archive.settings)[0]
    assert not sample.valid[2, 2:].any() and not sample.valid[3, 2:].any()
    assert not sample.valid[6, 0].any(), "the missing code"
    assert not sample.valid[9].any(), "the row that is not there"
    assert sample.valid[10].all() and sample.num_times == 60


def test_ghcn_flags_make_values_missing(tmp_path: Path) -> None:
    (sample,) = read(ARCHIVES["ghcn_daily"](tmp_path, 0.0).settings)
    assert sample.num_times == 31 + 29
    np.testing.assert_array_equal(np.flatnonzero(~sample.valid[:, 0, 0, 0]), [2, 3])
    np.testing.assert_array_equal(np.flatnonzero(~sample.valid[:, 2, 0, 0]), [4])
    assert sample.time[0] == np.datetime64("2004-01-02T00:00:00").astype("datetime64[s]").astype(int), "known when over"


def test_a_gap_ends_a_trace_and_restarts_the_filter(tmp_path: Path) -> None:
    one, *late = read(ARCHIVES["obspy_records"](tmp_path, 0.0).settings)
    assert one.values.shape == (1200, 3, 1, 1) and one.step_seconds == 0.1 and one.valid.all()
    assert [sample.num_times for sample in late] == [1000, 1200]
    assert [float(sample.time[0]) for sample in late] == [1000.0, 1200.0]
    for sample in late:
        assert abs(sample.values[0, 0, 0, 0]) < 1e-6 and not sample.valid[:, 1:].any()


@pytest.mark.parametrize(
    ("rate", "factor"), [(40.0, 4), (20.0, 2), (19.9999997, 2), (200.0, 20), (10.0, 1), (53.0, 5), (6.625, 1), (1.0, 1)]
)
def test_decimation(rate: float, factor: int) -> None:
    assert decimation(rate, 10.0) == factor


def test_the_filter_keeps_the_band_and_stops_aliases() -> None:
    seconds = np.arange(0, 400, 1 / 40)
    slow, rate = working_rate(np.sin(2 * np.pi * 1.0 * seconds), 40.0)
    fast, _ = working_rate(np.sin(2 * np.pi * 9.0 * seconds), 40.0)  # 9 Hz would appear as 1 Hz at 10 Hz
    assert rate == 10.0 and len(slow) == 4000
    assert np.abs(slow[1000:]).max() == pytest.approx(1.0, abs=0.02)
    assert np.abs(fast[1000:]).max() < 1e-3
    constant, _ = working_rate(np.full(1000, 321.0), 40.0)
    np.testing.assert_allclose(constant, 321.0 * 10 ** (-0.05 / 20), rtol=1e-9)  # the ripple, 0.05 dB


@pytest.mark.parametrize(
    ("calendar", "units", "number", "text", "year_phase"),
    [
        ("standard", "days since 2000-01-01", 59.5, "2000-02-29T12:00:00", 59.5 / 366),
        # Day 31 + 28 of a 365-day year is 1 March; a share of 59/365 of the 366 days of 2000.
        ("noleap", "days since 2000-01-01", 59.0, None, 59.0 / 365),
        ("360_day", "hours since 1970-01-01 00:00", 180 * 24.0, None, 0.5),
        ("julian", "days since 2001-01-01", 0.0, "2001-01-01T00:00:00", 0.0),
    ],
)
def test_calendars(calendar: str, units: str, number: float, text: str | None, year_phase: float) -> None:
    times = clock(np.array([number]), units, calendar=calendar, where="here")
    assert times.year_phase[0] == pytest.approx(year_phase, abs=1e-6)
    if text is not None:
        assert times.time[0] == np.datetime64(text).astype("datetime64[s]").astype(int)
    year = int(units.split("since ")[1][:4])
    start, end = (np.datetime64(f"{y}-01-01").astype("datetime64[s]").astype(int) for y in (year, year + 1))
    assert times.time[0] == pytest.approx(start + year_phase * (end - start), abs=1e-3)


def test_phases_never_reach_one() -> None:
    ends = np.array(["2001-01-01", "1969-12-31", "2000-12-31T23:59:59.999999"], "datetime64[us]").astype(np.int64) / 1e6
    times = posix_clock(ends)
    for phase in (times.year_phase, times.day_phase):
        assert (phase >= 0).all() and (phase < 1).all()


def test_real_netcdf(sample_data: Path) -> None:
    path = sample_data / "cmip6" / "tas_Amon_ACCESS-ESM1-5_historical_r1i1p1f1_gn_200001-201412.nc"
    settings = SourceSettings(
        name="tas", reader="netcdf_grid", modality="grid", files=(str(path),), options={"variable": "tas"}
    )
    (sample,) = read(settings)
    with netCDF4.Dataset(path) as file:
        raw, latitude, longitude = np.asarray(file["tas"][:]), np.asarray(file["lat"][:]), np.asarray(file["lon"][:])
        bounds = np.asarray(file["time_bnds"][:])
        units = file["time"].units
    np.testing.assert_array_equal(sample.values[:, 0], raw)
    np.testing.assert_array_equal(sample.latitude[:, 0], latitude.astype(np.float32))
    np.testing.assert_array_equal(sample.longitude[0], longitude.astype(np.float32))
    epoch = np.datetime64(units.split("since ")[1].split()[0], "s").astype(int)
    np.testing.assert_allclose(
        sample.time, epoch + bounds[:, 1] * 86400.0
    )  # a monthly mean is known at the month's end


def test_real_netcdf_with_missing_values(sample_data: Path) -> None:
    path = sample_data / "extra" / "ostia_monthly.nc"
    options = {"variable": "surface_temperature", "name": "sea_surface_temperature"}
    settings = SourceSettings(name="sst", reader="netcdf_grid", modality="grid", files=(str(path),), options=options)
    (sample,) = read(settings)
    with netCDF4.Dataset(path) as file:
        raw = file["surface_temperature"][:]
    np.testing.assert_array_equal(sample.valid[:, 0], ~np.ma.getmaskarray(raw))
    np.testing.assert_array_equal(sample.values[:, 0], raw.filled(0.0))


def test_real_ghcn(sample_data: Path) -> None:
    path = sample_data / "ghcn" / "USW00094728.dly"
    settings = SourceSettings(name="park", reader="ghcn_daily", modality="series", files=(str(path),), options={})
    samples = read(settings)
    lines = [
        line for line in path.read_text().splitlines() if line[11:17] == "199607" and line[17:21] in ("TMAX", "PRCP")
    ]
    assert len(lines) == 2
    for line in lines:
        channel = {"TMAX": 0, "PRCP": 2}[line[17:21]]
        offset = {"TMAX": 273.15, "PRCP": 0.0}[line[17:21]]
        for day in (1, 13, 31):
            stamp = np.datetime64(f"1996-07-{day:02d}").astype("datetime64[s]").astype(int) + 86400
            (sample,) = [s for s in samples if s.time[0] <= stamp <= s.time[-1]]
            at = int(np.flatnonzero(sample.time == stamp)[0])
            text = line[21 + 8 * (day - 1) : 29 + 8 * (day - 1)]
            assert sample.valid[at, channel, 0, 0] and text[6] == " "
            assert sample.values[at, channel, 0, 0] == pytest.approx(int(text[:5]) / 10 + offset, abs=1e-4)


def test_real_csv(sample_data: Path) -> None:
    path = sample_data / "extra" / "ETTh1.csv"
    options = {"time": "date", "step": "hour", "columns": {"OT": {"variable": "air_temperature", "unit": "degC"}}}
    settings = SourceSettings(name="ett", reader="csv_series", modality="series", files=(str(path),), options=options)
    (sample,) = read(settings)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert sample.num_times == len(rows)
    for at in (0, 4321, len(rows) - 1):
        assert sample.values[at, 0, 0, 0] == pytest.approx(float(rows[at]["OT"]) + 273.15, abs=1e-4)
        stamp = np.datetime64(rows[at]["date"].replace(" ", "T")).astype("datetime64[s]").astype(int)
        assert sample.time[at] == stamp


def test_real_miniseed(sample_data: Path) -> None:
    files = tuple(str(sample_data / "earthscope" / f"TA.POKR..BH{c}.mseed") for c in "ZNE")
    places = str(sample_data / "earthscope" / "TA.POKR..BH_.xml")
    settings = SourceSettings(
        name="quakes",
        reader="obspy_records",
        modality="trace",
        files=(*files, places),
        options={"events": {"okhotsk_2013": {"files": ["TA.POKR..BH?.mseed"]}}},
    )
    (sample,) = read(settings)
    assert sample.values.shape == (42001, 3, 1, 1)
    assert (round(float(sample.latitude[0, 0]), 2), round(float(sample.longitude[0, 0]), 2)) == (65.12, -147.43)
    for component, file in enumerate(files):
        trace = obspy.read(file)[0]
        raw = trace.data.astype(np.float64)
        # From the steady state of the first sample = from rest on what differs from the first sample.
        b, a = signal.cheby1(8, 0.05, 0.8 / 4)
        sections = signal.tf2sos(b, a)
        reference = (signal.sosfilt(sections, raw - raw[0]) + raw[0] * 10 ** (-0.05 / 20))[::4]
        assert np.abs(sample.values[:, component, 0, 0] - reference).max() < 1e-6 * np.abs(reference).max()
        assert sample.time[0] == pytest.approx(trace.stats.starttime.timestamp, abs=1e-6)
