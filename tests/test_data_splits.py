"""Splits keep a gap, hold whole things out, share one calendar, and refuse what stands on both sides."""

from __future__ import annotations

from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
import pytest

from sci_gpt.data.duplicates import DuplicateGuard
from sci_gpt.data.splits import DAY, Era, SplitRule, check_eras, check_window, least_distance_km
from sci_gpt.data.store import Store
from sci_gpt.errors import DataError
from sci_tokenizers.sample import Sample

ERA = Era(
    name="one",
    start=date(2000, 1, 1),
    train_until=date(2000, 3, 31),
    valid_until=date(2000, 6, 30),
    end=date(2000, 12, 31),
)


def series(key: str, *, days: int = 500, first: str = "1999-10-01", seed: int = 0) -> Sample:
    start = float(np.datetime64(first, "s").astype(int))
    one = np.full((1, 1), np.nan, np.float32)
    values = np.random.default_rng(seed).normal(280, 5, (days, 1, 1, 1)).astype(np.float32)
    return Sample(
        key=key,
        source=key.split("/")[0],
        modality="series",
        variables=("air_temperature",),
        levels=(float("nan"),),
        values=values,
        valid=np.ones_like(values, bool),
        time=start + np.arange(days) * DAY,
        year_phase=np.zeros(days, np.float32),
        day_phase=np.zeros(days, np.float32),
        step_seconds=DAY,
        latitude=one,
        longitude=one,
        elevation=one,
    )


def dates(sample: Sample) -> tuple[str, str]:
    first, last = sample.time[[0, -1]].astype(np.int64).astype("datetime64[s]").astype("datetime64[D]")
    return str(first), str(last)


def test_time_splits_keep_the_gap() -> None:
    rule = SplitRule(source="s", by="time", era=ERA, gap_days=10.0)
    parts = dict(rule.parts(series("s/a/0")))
    # A value stamped at midnight is of the day before: (start, end]. 2000-04-01 is the end of 31 March.
    assert dates(parts["train"]) == ("2000-01-02", "2000-04-01")
    assert dates(parts["valid"]) == ("2000-04-12", "2000-07-01")
    assert dates(parts["test"]) == ("2000-07-12", "2001-01-01")
    for before, after in (("train", "valid"), ("valid", "test")):
        assert parts[after].time[0] - parts[before].time[-1] > 10 * DAY


def test_no_validation_where_its_dates_are_empty() -> None:
    era = replace(ERA, valid_until=ERA.train_until)
    parts = dict(SplitRule(source="s", by="time", era=era, gap_days=10.0).parts(series("s/a/0")))
    assert list(parts) == ["train", "test"] and dates(parts["test"])[0] == "2000-04-12"


def test_a_station_is_held_out_and_within_the_calendar() -> None:
    rule = SplitRule(source="s", by="station", era=ERA, gap_days=10.0, test=("lga",))
    assert [split for split, _ in rule.parts(series("s/jfk/0"))] == ["train", "valid"]
    ((split, part),) = rule.parts(series("s/lga/0"))
    assert split == "test" and dates(part) == ("2000-07-12", "2001-01-01")
    both = replace(rule, valid=("ewr",))
    assert [split for split, _ in both.parts(series("s/jfk/0"))] == ["train"]
    assert [split for split, _ in both.parts(series("s/ewr/0"))] == ["valid"]


@pytest.mark.parametrize("by", ["run", "event"])
def test_runs_and_events_are_whole(by: str) -> None:
    rule = SplitRule(source="s", by=by, valid=("b",), test=("c",))  # type: ignore[arg-type]
    for group, split in (("a", "train"), ("b", "valid"), ("c", "test")):
        sample = series(f"s/{group}/0")
        assert rule.parts(sample) == [(split, sample)]


@pytest.mark.parametrize("gap", [0.0, -1.0, None])
def test_gap_zero_is_refused(gap: float | None) -> None:
    with pytest.raises(DataError, match=f"source 's'.*gap_days must be positive, got {gap}"):
        SplitRule(source="s", by="time", era=ERA, gap_days=gap)
    rule = SplitRule(source="s", by="time", era=ERA, gap_days=1.0)
    with pytest.raises(DataError, match="gap_days must be positive"):
        check_eras([rule], simulations=[], gap_days=0.0)


def test_contradictions_are_refused() -> None:
    with pytest.raises(DataError, match="'a' is held out for both"):
        SplitRule(source="s", by="run", valid=("a",), test=("a", "b"))
    with pytest.raises(DataError, match="needs an era"):
        SplitRule(source="s", by="time", gap_days=1.0)
    with pytest.raises(DataError, match="by time holds nothing out whole"):
        SplitRule(source="s", by="time", era=ERA, gap_days=1.0, test=("a",))
    with pytest.raises(DataError, match="by run has no era"):
        SplitRule(source="s", by="run", era=ERA)


def test_eras_of_real_sources_are_apart() -> None:
    later = replace(ERA, name="two", start=date(2001, 1, 5), train_until=date(2001, 6, 1), valid_until=date(2001, 7, 1))
    later = replace(later, end=date(2002, 1, 1))
    rules = [SplitRule(source=s, by="time", era=e, gap_days=9.0) for s, e in (("s", ERA), ("t", later))]
    check_eras(rules, simulations=[], gap_days=4.0)
    with pytest.raises(DataError, match="era 'one' ends 2000-12-31, era 'two' starts 2001-01-05"):
        check_eras(rules, simulations=[], gap_days=5.0)
    check_eras(rules, simulations=["t"], gap_days=5.0)


def test_empty_splits_and_absent_groups_are_refused() -> None:
    rule = SplitRule(source="s", by="run", test=("c",))
    times = {"train": 5, "valid": 0, "test": 5}
    with pytest.raises(DataError, match=r"valid is empty.*split\.empty: \[valid\]"):
        rule.check_complete(groups=["a", "c"], times=times)
    replace(rule, empty=("valid",)).check_complete(groups=["a", "c"], times=times)
    with pytest.raises(DataError, match="holds out 'c', which the files do not have; they have a, b"):
        rule.check_complete(groups=["a", "b"], times={"train": 1, "valid": 1, "test": 1})


def test_a_window_longer_than_the_gap_is_refused() -> None:
    row = {"step_seconds": 3600.0, "gap_days": 2.0}
    store = Store(path=Path("s"), manifest={"sources": {"s": row}}, statistics={})
    check_window(store, "s", num_times=48)
    with pytest.raises(
        DataError, match="a window of 49 times is 2.04167 days long, the gap between its splits is 2 days"
    ):
        check_window(store, "s", num_times=49)
    row["gap_days"] = None  # type: ignore[assignment]
    check_window(store, "s", num_times=10**9)


@pytest.mark.parametrize("shift", [0, 5])
def test_a_renamed_or_shifted_copy_across_splits_is_refused(shift: int) -> None:
    original, guard = series("s/a/0"), DuplicateGuard()
    guard.add(original, "train")
    guard.add(series("s/c/0", seed=9), "valid")
    guard.check()
    copy = replace(original.window(shift, 200), key="s/b/0")
    guard.add(copy, "test")
    with pytest.raises(DataError, match=r"'s/a/0' \(train\) and 's/b/0' \(test\) hold the same values"):
        guard.check()


def test_a_copy_across_held_out_splits_is_refused_and_within_one_is_not() -> None:
    original, guard = series("s/a/0"), DuplicateGuard()
    guard.add(original, "valid")
    guard.add(replace(original, key="s/b/0"), "valid")
    guard.check()
    guard.add(replace(original, key="s/c/0"), "test")
    with pytest.raises(DataError, match=r"'s/a/0' \(valid\) and 's/c/0' \(test\) hold the same values"):
        guard.check()


def test_constant_and_missing_stretches_are_not_duplicates() -> None:
    flat = replace(series("s/a/0"), values=np.zeros((500, 1, 1, 1), np.float32))
    guard = DuplicateGuard()
    guard.add(flat, "train")
    guard.add(replace(flat, key="s/b/0"), "test")
    guard.check()


def at(station: str, latitude: float, longitude: float) -> Sample:
    north, east = (np.full((1, 1), degrees, np.float32) for degrees in (latitude, longitude))
    return replace(series(f"s/{station}/0"), latitude=north, longitude=east)


def test_distances_are_those_of_great_circles() -> None:
    """A degree of latitude is 6371.0088 pi / 180 = 111.195 km; of longitude half of it at 60 N, over the date line."""

    def km(one: tuple[float, float], other: tuple[float, float]) -> float:
        return least_distance_km(np.array([one]), np.array([other]))

    assert km((0.0, 0.0), (1.0, 0.0)) == pytest.approx(111.195, abs=1e-3)
    assert km((60.0, 179.75), (60.0, -179.75)) == pytest.approx(111.195 / 4, abs=1e-3)
    assert km((60.0, 359.75), (60.0, 0.25)) == pytest.approx(111.195 / 4, abs=1e-3)
    assert km((0.0, 0.0), (0.0, 180.0)) == pytest.approx(111.195 * 180, rel=1e-5)
    several = np.array([(50.0, 0.0), (1.0, 0.0)])
    assert least_distance_km(several, np.array([(0.0, 0.0), (-40.0, 9.0)])) == pytest.approx(111.195, abs=1e-3)


def test_a_buffer_leaves_near_stations_out() -> None:
    rule = SplitRule(source="s", by="station", era=ERA, gap_days=10.0, test=("t",), buffer_km=111.0)
    samples = [at("t", 0.0, 0.0), at("n", 0.99, 0.0), at("f", 1.01, 0.0)]
    known = rule.with_places(samples)
    assert known.near is not None and set(known.near) == {"n"} and known.near["n"][0] == "t"
    assert [[split for split, _ in known.parts(one)] for one in samples] == [["test"], [], ["train", "valid"]]
    with pytest.raises(DataError, match="must know all places before it splits"):
        rule.parts(samples[0])
    with pytest.raises(DataError, match=r"buffer_km needs the latitude and longitude of every station, 'x' has none"):
        rule.with_places([*samples, series("s/x/0")])
    plain = replace(rule, buffer_km=None)
    assert plain.with_places([series("s/x/0")]) is plain
    with pytest.raises(DataError, match="buffer_km 5 goes with by: station and stations held out.*by: run and 1 held"):
        SplitRule(source="s", by="run", test=("a",), buffer_km=5.0)
    with pytest.raises(DataError, match="got by: station and 0 held out"):
        SplitRule(source="s", by="station", era=ERA, gap_days=1.0, buffer_km=5.0)
