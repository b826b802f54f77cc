"""No raw value of valid, of test, or of a gap is in train: built from archives whose every raw value is unique."""

from __future__ import annotations

import csv
import io
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import obspy
import pytest

from sci_gpt.config import DataConfig
from sci_gpt.config_file import parse_config
from sci_gpt.data.splits import check_window
from sci_gpt.data.store import SPLITS, Store
from sci_gpt.errors import DataError
from sci_gpt.recipes.build import BuildReport, build

GROUPS, DAYS, GAP = ("a", "b", "c"), 3 * 365, 10
SAMPLES = 700  # of a record, at 10 Hz: nothing filters it
START = np.datetime64("2000-01-01")
# In days since START: a value stamped at midnight is of the day before, so a split is (after, until].
TRAIN_UNTIL, VALID_UNTIL, END = (int((np.datetime64(day) - START).astype(int)) + 1 for day in
                                 ("2001-06-30", "2001-12-31", "2002-12-31"))  # fmt: skip
PARTS = {"train": (0, TRAIN_UNTIL), "valid": (TRAIN_UNTIL + GAP, VALID_UNTIL), "test": (VALID_UNTIL + GAP, END)}
SPLIT: dict[str, dict[str, Any]] = {
    "time": {"by": "time", "era": "one", "gap_days": GAP},
    "station": {"by": "station", "era": "one", "gap_days": GAP, "valid": ["b"], "test": ["c"]},
    "run": {"by": "run", "valid": ["b"], "test": ["c"]},
    "event": {"by": "event", "valid": ["b"], "test": ["c"]},
}


@dataclass(frozen=True, kw_only=True)
class Built:
    """A store and the counters in its archive: {(group, time number): counters of all channels}."""

    kind: str
    store: Store
    raw: dict[tuple[str, int], set[int]]

    def expected(self, split: str) -> set[int]:
        """Counters that belong to a split, by a plain loop over the archive."""
        own: set[int] = set()
        for (group, number), counters in self.raw.items():
            after, until = PARTS[split]
            held = {"a": "train", "b": "valid", "c": "test"}[group]
            in_time = after < number <= until if self.kind in ("time", "station") else True
            if in_time and (self.kind == "time" or held == split):
                own |= counters
        return own

    def stored(self, split: str) -> set[int]:
        """Counters in the shards of a split, read as tar files of arrays."""
        found: set[int] = set()
        for shard in sorted((Path(self.store.path) / "source" / split).glob("*.tar")):
            with tarfile.open(shard) as tar:
                for member in tar.getmembers():
                    if member.name.endswith(".values.npy"):
                        found |= counters_of(np.load(io.BytesIO(tar.extractfile(member).read())), self.kind)  # type: ignore[union-attr]
        return found


def counters_of(values: np.ndarray, kind: str) -> set[int]:
    """Stored float32 values as the counters that they were made from."""
    assert values.dtype == np.float32
    exact = values.astype(np.float64) if kind == "event" else (values.astype(np.float64) - 250.0) * 100.0
    counters = np.rint(exact).astype(int)
    assert np.abs(exact - counters).max() < 0.01
    return set(counters.ravel().tolist())


def stations(path: Path, groups: tuple[str, ...] = GROUPS) -> dict[tuple[str, int], set[int]]:
    """Daily temperatures of stations: 250 K and a hundredth for each count, every count once."""
    counters = np.random.default_rng(0).permutation(len(groups) * DAYS).tolist()
    raw = {}
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["site", "when", "temp"])
        for group in groups:
            for day in range(DAYS):
                counter = counters.pop()
                raw[group, day] = {counter}
                table.writerow([group, str(START + day), f"{250 + counter / 100:.2f}"])
    return raw


def records(folder: Path) -> dict[tuple[str, int], set[int]]:
    """A record of three components of each event, every sample another number of counts."""
    counters = np.random.default_rng(0).permutation(len(GROUPS) * 3 * SAMPLES).reshape(len(GROUPS), 3, SAMPLES) + 1
    raw = {}
    for number, event in enumerate(GROUPS):
        stream = obspy.Stream()
        for channel, data in zip(("BHZ", "BHN", "BHE"), counters[number], strict=True):
            header = {"station": "AAA", "channel": channel, "sampling_rate": 10.0}
            stream += obspy.Trace(data.astype(np.int32), {**header, "starttime": obspy.UTCDateTime(1e6 * number)})
        stream.write(str(folder / f"{event}.mseed"), format="MSEED")
        raw.update({(event, k): set(counters[number, :, k].tolist()) for k in range(SAMPLES)})
    return raw


def tree(folder: Path, split: dict[str, Any], **changes: Any) -> DataConfig:
    """A configuration of one source in `folder`."""
    column = {"variable": "air_temperature", "unit": "K"}
    source: dict[str, Any] = {
        "name": "source",
        "reader": "csv_series",
        "modality": "series",
        "nature": "simulation" if split["by"] == "run" else "observation",
        "files": [str(folder / "station.csv")],
        "options": {"time": "when", "step": "day", "station": "site", "columns": {"temp": column}},
        "licence": "none",
        "citation": "made up",
        "split": split,
    }
    era = {"name": "one", "start": "2000-01-01", "train_until": "2001-06-30", "valid_until": "2001-12-31"}
    calendar = {"gap_days": 5, "eras": [{**era, "end": "2002-12-31"}]}
    mapping = {"name": "small", "output": str(folder / "store"), "calendar": calendar, "sources": [source | changes]}
    return parse_config(mapping, DataConfig, where="the test")


def quiet(config: DataConfig, said: list[str] | None = None) -> BuildReport:
    return build(config, say=(said if said is not None else []).append)


@pytest.fixture(scope="module", params=SPLIT)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    kind, folder = request.param, tmp_path_factory.mktemp("leaks")
    if kind == "event":
        raw = records(folder)
        files = [str(folder / f"{event}.mseed") for event in GROUPS]
        options = {"events": {event: {"files": [f"{event}.mseed"]} for event in GROUPS}}
        changes = {"reader": "obspy_records", "modality": "trace", "files": files, "options": options}
        report = quiet(tree(folder, SPLIT[kind], **changes))
    else:
        raw = stations(folder / "station.csv")
        report = quiet(tree(folder, SPLIT[kind]))
    assert sum(map(len, raw.values())) == len(set().union(*raw.values())), "every raw value is unique"
    return Built(kind=kind, store=Store.open(report.path), raw=raw)


def test_no_raw_value_of_another_split_or_of_a_gap_is_in_train(built: Built) -> None:
    found = {split: built.stored(split) for split in SPLITS}
    for split in SPLITS:
        assert found[split] == built.expected(split), split
        assert found[split], split
    held = built.expected("valid") | built.expected("test")
    assert not found["train"] & held
    assert not found["valid"] & found["test"]
    dropped = set().union(*built.raw.values()) - found["train"] - found["valid"] - found["test"]
    if built.kind == "time":
        gaps = {d for last in (TRAIN_UNTIL, VALID_UNTIL) for d in range(last + 1, last + GAP + 1)}
        outside = {day for day in range(DAYS) if day < 1 or day > END}
        assert dropped == set().union(*(built.raw[group, day] for group in GROUPS for day in gaps | outside))
    elif built.kind in ("run", "event"):
        assert not dropped


def test_a_window_that_would_reach_over_the_gap_is_refused(built: Built) -> None:
    """The last window of train and the first of the next split share no day, nor do two with the gap between them."""
    if built.kind in ("run", "event"):
        check_window(built.store, "source", num_times=10**6)
        return
    check_window(built.store, "source", num_times=GAP)
    with pytest.raises(DataError, match="a window of 11 times is 11 days long, the gap between its splits is 10 days"):
        check_window(built.store, "source", num_times=GAP + 1)


def test_stations_within_the_buffer_of_a_held_out_one_have_no_split(tmp_path: Path) -> None:
    """`n` lies half a degree of latitude (55.6 km) from the held-out `t`, `m` 33.4 km from `v`, over the date line."""
    names = ("a", "n", "t", "m", "v")
    raw = stations(tmp_path / "station.csv", names)
    rows = ((10.0, 10.0), (0.5, 10.0), (0.0, 10.0), (60.0, -179.7), (60.0, 179.7))
    places = {name: {"latitude": row[0], "longitude": row[1]} for name, row in zip(names, rows, strict=True)}
    split = SPLIT["station"] | {"valid": ["v"], "test": ["t"], "buffer_km": 56.0}
    config = tree(tmp_path, split)
    config.sources[0].options["stations"] = places
    said: list[str] = []
    store = Store.open(quiet(config, said).path)
    built = Built(kind="station", store=store, raw={})
    counters = {name: set().union(*(own for (group, _), own in raw.items() if group == name)) for name in names}
    everywhere = set().union(*(built.stored(split) for split in SPLITS))
    assert not everywhere & (counters["n"] | counters["m"])
    assert built.stored("train") <= counters["a"] and built.stored("train")
    near = store.manifest["sources"]["source"]["within_buffer"]
    assert {name: held for name, (held, _) in near.items()} == {"n": "t", "m": "v"}
    assert near["n"][1] == pytest.approx(55.6, abs=0.1) and near["m"][1] == pytest.approx(33.4, abs=0.1)
    assert [line for line in said if "'n' is left out: 55.59" in line and "'t'" in line]
    places["a"] = {}
    with pytest.raises(DataError, match=r"buffer_km needs the latitude and longitude of every station, 'a' has none"):
        quiet(config)
    places["a"] = places["n"]
    with pytest.raises(DataError, match=r"train is empty \(buffer_km leaves out a, m, n\)"):
        quiet(config)
