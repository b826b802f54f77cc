"""Zarr stores are read into samples by parts, and indexed in place, where windows are what copying would give."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sci_gpt.data.calendars import clock
from sci_gpt.data.in_place import ZarrSample
from sci_gpt.data.in_place_writer import InPlaceWriter
from sci_gpt.data.source import SourceSettings
from sci_gpt.data.source_zarr import ZarrGrid
from sci_gpt.data.store import SPLITS, Store
from sci_gpt.data.store_writer import SplitWriter
from sci_gpt.data.windows import Windows, WindowSpec
from sci_gpt.data.zarr_chunks import ChunkGuard
from sci_gpt.errors import DataError
from toy_zarr import (
    COLUMNS,
    FILL,
    LEVELS,
    OFFSET,
    ROWS,
    SCALE,
    STRETCH_BYTES,
    TILE,
    TIMES,
    built,
    dataset,
    raw_values,
    read_all,
    settings,
    write_zarr,
)


def by_hand(tail: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Values and valid (time, channel, row, column) as they must come: 500 hPa, 850 hPa, rain."""
    packed, rain = raw_values(tail)
    kelvin = (packed.astype(np.float64) * SCALE + OFFSET)[:, ::-1]
    flux = rain.astype(np.float64) / 86400.0
    values = np.concatenate([kelvin, flux[:, None]], axis=1)
    valid = np.concatenate([packed[:, ::-1] != FILL, rain[:, None] < 1e19], axis=1)
    return np.where(valid, values, 0.0).astype(np.float32), valid


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(write_zarr(tmp_path_factory.mktemp("zarr") / "fields.zarr", dataset()))


ENCODINGS: dict[str, dict[str, Any]] = {
    "v2": {"version": 2},
    "v3": {"version": 3},
    "v3 in shards": {"version": 3, "encoding": {"t": {"shards": (100, 2, 4, 6)}}},
}


@pytest.mark.parametrize("kind", sorted(ENCODINGS))
@pytest.mark.parametrize("remote", [False, True])
def test_values_are_those_of_the_chunks(kind: str, remote: bool, tmp_path: Path) -> None:
    place = f"memory://{tmp_path.name}/fields.zarr" if remote else str(tmp_path / "fields.zarr")
    write_zarr(place, dataset(), **ENCODINGS[kind])
    (sample,) = read_all(settings(place))
    values, valid = by_hand()
    assert sample.key == "fields/grid/0" and sample.first == 0
    assert sample.variables == ("air_temperature", "air_temperature", "precipitation_flux")
    np.testing.assert_array_equal(sample.levels, [50000.0, 85000.0, np.nan])
    np.testing.assert_allclose(sample.values, values, rtol=1e-7)
    np.testing.assert_array_equal(sample.valid, valid)
    assert valid.size - valid.sum() == 2
    np.testing.assert_array_equal(sample.latitude[:, 0], [60.0, 50.0, 40.0, 30.0])
    np.testing.assert_array_equal(sample.longitude[0], np.arange(6.0) * 10)
    days = clock(np.arange(TIMES), "days since 2001-01-01", calendar="360_day", where="here")
    for name in ("time", "year_phase", "day_phase"):
        np.testing.assert_array_equal(getattr(sample, name), getattr(days, name))
    assert sample.step_seconds == 86400.0


# Times of a tile that a part may hold, and parts that it makes of 130 and 270 times (a gap between) of four tiles: 17
# times are cut to 10, where the longest chunks end; 9 are less than a chunk; 800 are both tiles of a row.
@pytest.mark.parametrize(
    ("times", "num_parts"), [(17, 4 * (13 + 27)), (9, 4 * (15 + 30)), (60, 4 * (3 + 5)), (800, 2 * 2), (10**6, 2)]
)
def test_parts_are_bounded_cover_all_once_and_end_at_gaps(times: int, num_parts: int, tmp_path: Path) -> None:
    place = write_zarr(tmp_path / "fields.zarr", dataset(gap=130))
    most = times * 3 * 2 * 3 * 4
    wanted = replace(settings(place, tile=TILE), stretch_bytes=most)
    reader = ZarrGrid()
    parts = reader.parts(wanted)
    assert len({part.name for part in parts}) == len(parts) == num_parts
    assert all(part.bytes <= most for part in parts)
    assert parts == [replace(part, select=json.loads(json.dumps(part.select))) for part in parts]
    whole = list(read_all(wanted, reader))
    again = [sample for part in parts for sample in reader.read(wanted, part)]
    assert [sample.key for sample in whole] == [sample.key for sample in again]
    seen = np.zeros((TIMES, ROWS, COLUMNS), int)
    values, valid = by_hand()
    for sample, other in zip(whole, again, strict=True):
        assert sample.values.tobytes() == other.values.tobytes()
        box = cells(sample)
        seen[box] += 1
        np.testing.assert_allclose(sample.values, values[box[0], :, box[1], box[2]], rtol=1e-7)
        np.testing.assert_array_equal(sample.valid, valid[box[0], :, box[1], box[2]])
        assert not sample.first < 130 < sample.first + sample.num_times, "a block across the gap"
    assert (seen == 1).all()


def cells(sample: ZarrSample) -> tuple[slice, slice, slice]:
    """Times, rows and columns of the toy Zarr that a sample says it holds."""
    row = [60.0, 50.0, 40.0, 30.0].index(float(sample.latitude[0, 0]))
    column = int(sample.longitude[0, 0] / 10)
    rows, columns = sample.latitude.shape
    return (
        slice(sample.first, sample.first + sample.num_times),
        slice(row, row + rows),
        slice(column, column + columns),
    )


def test_a_part_reads_its_own_chunks_alone(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, wanted = ZarrGrid(), replace(settings(str(archive), tile=TILE), stretch_bytes=STRETCH_BYTES)
    parts = reader.parts(wanted)
    read: list[str] = []
    get = ChunkGuard.get

    async def watched(self: ChunkGuard, key: str, *rest: Any, **more: Any) -> Any:
        read.append(key)
        return await get(self, key, *rest, **more)

    monkeypatch.setattr(ChunkGuard, "get", watched)
    part = next(part for part in parts if part.select["times"][0] and part.select["columns"] == [0, 3])
    first, stop = part.select["times"]
    row = part.select["rows"][0] // 2
    list(reader.read(wanted, part))
    wanted_keys = {f"t/c/{n}/0/{row}/0" for n in range(first // 5, -(-stop // 5))}
    wanted_keys |= {f"pr/c/{n}/0/0" for n in range(first // 10, -(-stop // 10))}
    assert set(read) == wanted_keys


@pytest.mark.parametrize("bounds", [False, True])
def test_a_mean_is_known_when_its_interval_is_over(bounds: bool, tmp_path: Path) -> None:
    content = dataset()
    content["t"].attrs["cell_methods"] = content["pr"].attrs["cell_methods"] = "time: mean"
    if bounds:
        days = content["time"].values
        content["time"].attrs["bounds"] = "time_bnds"
        content["time_bnds"] = (("time", "nv"), np.stack([days - 0.75, days + 0.25], axis=1))
    (sample,) = read_all(settings(write_zarr(tmp_path / "means.zarr", content)))
    later = 0.25 if bounds else 0.5
    ends = clock(np.arange(TIMES) + later, "days since 2001-01-01", calendar="360_day", where="here")
    np.testing.assert_array_equal(sample.time, ends.time)


@pytest.fixture(scope="module")
def both(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Store]:
    """The archive copied, and indexed in place."""
    folder = tmp_path_factory.mktemp("stores")
    return built(folder / "copied", archive), built(folder / "in_place", archive, in_place=True)


def test_in_place_a_window_is_what_copying_gives(both: tuple[Store, Store]) -> None:
    copied, in_place = both
    compared = 0
    for split in SPLITS:
        where = {
            record["key"].split(b"/")[1]: (n, record) for n, record in enumerate(in_place.stretches("fields", split))
        }
        assert len(where) == len(in_place.stretches("fields", split)) == 4, (
            "one stretch a tile: nothing but splits cuts"
        )
        for index, record in enumerate(copied.stretches("fields", split)):
            times = int(record["num_times"])
            number, long = where[record["key"].split(b"/")[1]]
            start = int(round((record["start_time"] - long["start_time"]) / (86400.0 * 365 / 360)))
            one = copied.read("fields", split, index=index, start=0, stop=times)
            other = in_place.read("fields", split, index=number, start=start, stop=start + times)
            assert (one.variables, one.channels, one.step_seconds) == (
                other.variables,
                other.channels,
                other.step_seconds,
            )
            for name in ("values", "valid", "time", "year_phase", "day_phase", "latitude", "longitude", "elevation"):
                assert getattr(one, name).tobytes() == getattr(other, name).tobytes(), name
                assert getattr(one, name).dtype == getattr(other, name).dtype
            compared += times
        assert sum(copied.stretches("fields", split)["num_times"]) == sum(
            in_place.stretches("fields", split)["num_times"]
        )
    assert compared > 4 * 0.9 * TIMES


def test_in_place_nothing_is_copied_and_the_facts_are_the_same(both: tuple[Store, Store]) -> None:
    copied, in_place = both
    assert not list(Path(in_place.path).rglob("*.tar")) and list(Path(copied.path).rglob("*.tar"))
    assert copied.statistics == in_place.statistics
    one, other = copied.manifest["sources"]["fields"], in_place.manifest["sources"]["fields"]
    for split in SPLITS:
        mine, theirs = one["splits"][split], other["splits"][split]
        assert mine["times"] == theirs["times"] > 0 and mine["missing_share"] == theirs["missing_share"]
    assert len(copied.stretches("fields", "train")) > len(in_place.stretches("fields", "train"))
    # t: a time of a tile of 2 x 3 touches a chunk of 5 x 2 x 2 x 3, both levels; pr: one of 10 x 4 x 3, float32.
    assert other["in_place"]["grid"]["amplification"] == round((60 * 2 + 120 * 4) / (12 * 2 + 6 * 4), 2)
    assert in_place.verify("fields", "train") == 4


def test_a_url_is_indexed_in_place_too(both: tuple[Store, Store], archive: Path, tmp_path: Path) -> None:
    place = f"memory://{tmp_path.name}/fields.zarr"
    write_zarr(place, dataset())
    said: list[str] = []
    store = built(tmp_path / "store", place, said, in_place=True)
    assert store.manifest["sources"]["fields"]["in_place"]["grid"]["location"] == place
    amplified = "fields/grid is read in place; one time of one tile decodes 12.5 bytes for each that it needs"
    assert [line for line in said if line.endswith(amplified)]
    for split in SPLITS:
        one, other = (
            where.read("fields", split, index=3, start=5, stop=25).values.tobytes() for where in (store, both[1])
        )
        assert one == other


def test_windows_of_a_run_cross_the_blocks_of_the_build(both: tuple[Store, Store]) -> None:
    spec = WindowSpec(source="fields", frames=80, stride=1, context_frames=(10, 10), leads=(1,))
    windows = Windows(both[1], spec, split="train", frame_times=1)
    times = int(both[1].stretches("fields", "train")["num_times"][0])
    assert windows.num_windows == 4 * (times - 79)
    with pytest.raises(DataError, match=r"a window of 80 frames \(80 times\) is longer than the data"):
        Windows(both[0], spec, split="train", frame_times=1)


def test_parts_indexed_apart_are_joined(archive: Path, tmp_path: Path) -> None:
    reader, wanted = ZarrGrid(), replace(settings(str(archive), tile=TILE), stretch_bytes=STRETCH_BYTES)
    with InPlaceWriter(tmp_path / "whole") as whole:
        for sample in read_all(wanted, reader):
            whole.add(sample)
    with InPlaceWriter(tmp_path / "joined") as joined:
        for number, part in reversed(list(enumerate(reader.parts(wanted)))):
            with InPlaceWriter(tmp_path / f"part-{number}") as writer:
                for sample in reader.read(wanted, part):
                    writer.add(sample)
            joined.take(tmp_path / f"part-{number}")
    tables = [np.sort(np.load(tmp_path / name / "shard-00000.idx.npy"), order="key") for name in ("whole", "joined")]
    assert len(tables[0]) == 4 and (tables[0]["num_times"] == TIMES).all() and (tables[0]["values_offset"] == 0).all()
    for name in tables[0].dtype.names or ():
        if name == "missing_share":
            np.testing.assert_allclose(tables[0][name], tables[1][name], rtol=1e-12)
        else:
            np.testing.assert_array_equal(tables[0][name], tables[1][name])
    for name in ("num_stretches", "num_times", "num_values", "num_missing"):
        assert getattr(whole, name) == getattr(joined, name)
    assert whole.quality() == joined.quality()


def test_spans_of_quality_move_with_their_blocks_and_a_gap_cuts(tmp_path: Path) -> None:
    content = dataset(gap=130)
    content["t"].values[200:220] = FILL
    content["pr"].values[200:220] = 1e20
    place = write_zarr(tmp_path / "fields.zarr", content)
    with InPlaceWriter(tmp_path / "index") as writer:
        for sample in read_all(replace(settings(place, tile=TILE), stretch_bytes=STRETCH_BYTES)):
            writer.add(sample)
    rows, spans = (np.load(tmp_path / "index" / name) for name in ("shard-00000.idx.npy", "shard-00000.quality.npy"))
    assert writer.num_stretches == len(rows) == 8
    assert rows["num_times"].tolist() == [130, 270] * 4 and rows["values_offset"].tolist() == [0, 130] * 4
    missing = spans[spans["rule"] == 0]
    assert set(missing["stretch"].tolist()) == {1, 3, 5, 7}
    covered = np.zeros((8, 270), int)
    for stretch, _, start, stop in missing.tolist():
        covered[stretch, start:stop] += 1
    assert (covered[1::2, 70:90] == 1).all() and covered.sum() == 4 * 20
    assert writer.num_missing == 20 * 3 * ROWS * COLUMNS + 2
    assert rows["missing_share"] @ rows["num_times"] * 3 * 6 == pytest.approx(writer.num_missing)


def test_more_amplification_is_allowed_where_it_is_asked_for(archive: Path) -> None:
    assert ZarrGrid().parts(settings(str(archive), tile=[1, 1], in_place=True, most_amplification=75))
    assert ZarrGrid().parts(settings(str(archive), tile=[1, 1])), "a copy is made once"


def test_two_zarrs_are_two_groups_and_a_plain_file_is_none(archive: Path, tmp_path: Path) -> None:
    second = shutil.copytree(archive, tmp_path / "spoilt.zarr")
    samples = list(read_all(settings(str(archive), str(second))))
    assert [sample.key for sample in samples] == ["fields/fields/0", "fields/spoilt/0"]
    plain = tmp_path / "plain.nc"
    plain.write_bytes(b"no zarr")
    with pytest.raises(DataError, match="plain.nc is a file, expected the folder of a Zarr group"):
        ZarrGrid().parts(settings(str(plain)))
    (tmp_path / "again").mkdir()
    twin = shutil.copytree(archive, tmp_path / "again" / archive.name)
    with pytest.raises(DataError, match="would be group 'fields', which another Zarr or a tile could be"):
        ZarrGrid().parts(settings(str(archive), str(twin)))


def test_one_packed_variable_keeps_its_integers(archive: Path, tmp_path: Path) -> None:
    wanted = SourceSettings(
        name="fields", reader="zarr_grid", modality="grid", files=(str(archive),), options={"variables": ["t"]}
    )
    reader = ZarrGrid()
    packing = reader.packing(wanted)
    assert packing is not None and (packing.dtype, packing.scale, packing.offset) == ("<i2", SCALE, OFFSET)
    assert reader.packing(settings(str(archive))) is None
    with SplitWriter(tmp_path / "split", 1 << 20, packing=packing) as writer:
        for sample in read_all(wanted, reader):
            writer.add(sample)
    (record,) = np.load(tmp_path / "split" / "shard-00000.idx.npy")
    assert record["code"] == 1 and record["values_bytes_per_time"] == LEVELS * ROWS * COLUMNS * 2
