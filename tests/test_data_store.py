"""The store gives back what was written, by ranged reads, and names what is broken."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import webdataset

from sci_gpt.data.store import DTYPES, FORMAT_VERSION, Store
from sci_gpt.data.store_writer import Packing, SplitWriter, seal
from sci_gpt.errors import DataError
from sci_tokenizers.sample import Sample

SHAPE = (2, 3, 4)


def stretch(number: int, *, times: int = 50, whole: bool = False, step: float = 0.0) -> Sample:
    random = np.random.default_rng(number)
    valid = np.ones((times, *SHAPE), bool) if whole else random.random((times, *SHAPE)) > 0.2
    values = random.normal(280.0, 3.0, (times, *SHAPE)).astype(np.float32)
    if step:
        values = (np.rint((values - 280.0) / step) * step + 280.0).astype(np.float32)
    values[~valid] = 0.0
    return Sample(
        key=f"field/run{number}/0",
        source="field",
        modality="grid",
        variables=("air_temperature", "dew_point_temperature"),
        levels=(85000.0, float("nan")),
        values=values,
        valid=valid,
        time=np.arange(times) * 3600.0 + 1e9,
        year_phase=random.random(times).astype(np.float32),
        day_phase=random.random(times).astype(np.float32),
        step_seconds=3600.0,
        latitude=random.uniform(-90, 90, SHAPE[1:]).astype(np.float32),
        longitude=random.uniform(0, 360, SHAPE[1:]).astype(np.float32),
        elevation=np.full(SHAPE[1:], np.nan, np.float32),
    )


def write(path: Path, samples: list[Sample], *, shard_bytes: int = 1 << 30, packing: Packing | None = None) -> Store:
    with SplitWriter(path / "field" / "train", shard_bytes, packing=packing) as writer:
        for sample in samples:
            writer.add(sample)
    row = {"modality": "grid", "step_seconds": 3600.0, "gap_days": None, "shape": SHAPE, "levels": [85000.0, None]}
    row["variables"] = ["air_temperature", "dew_point_temperature"]
    manifest = {"format_version": FORMAT_VERSION, "fingerprint": "f", "sources": {"field": row}}
    (path / "statistics.json").write_text("{}")
    seal(path, manifest)
    return Store.open(path)


def same(one: Sample, other: Sample) -> None:
    for name in ("values", "valid", "time", "year_phase", "day_phase", "latitude", "longitude", "elevation"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
        assert getattr(one, name).dtype == getattr(other, name).dtype, name
    assert (one.key, one.source, one.modality, one.channels) == (
        other.key,
        other.source,
        other.modality,
        other.channels,
    )
    assert one.step_seconds == other.step_seconds


def test_stretches_come_back_over_several_shards(tmp_path: Path) -> None:
    samples = [stretch(number, times=40 + number, whole=number == 1) for number in range(5)]
    store = write(tmp_path / "s", samples, shard_bytes=20_000)
    assert len(list((tmp_path / "s" / "field" / "train").glob("*.tar"))) > 1
    assert store.keys("field", "train") == [sample.key for sample in samples]
    for index, sample in enumerate(samples):
        same(store.read("field", "train", index=index, start=0, stop=sample.num_times), sample)
    assert store.verify("field", "train") == 5
    store.close()


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (0, 50), (49, 50), (7, 31)])
def test_a_window_is_the_slice_of_its_stretch(tmp_path: Path, start: int, stop: int) -> None:
    samples = [stretch(0), stretch(1)]
    store = write(tmp_path / "s", samples)
    same(store.read("field", "train", index=1, start=start, stop=stop), samples[1].window(start, stop))


def test_integers_of_the_archive_are_kept_where_they_are_exact(tmp_path: Path) -> None:
    packing = Packing(dtype="<i2", scale=0.01, offset=280.0)
    exact, inexact = stretch(3, step=0.01), stretch(4)
    store = write(tmp_path / "s", [exact, inexact], packing=packing)
    codes = [DTYPES[code] for code in store.stretches("field", "train")["code"]]
    assert codes == [np.dtype("<i2"), np.dtype("<f4")]
    same(store.read("field", "train", index=0, start=5, stop=20), exact.window(5, 20))
    same(store.read("field", "train", index=1, start=5, stop=20), inexact.window(5, 20))


def test_a_shard_is_a_webdataset(tmp_path: Path) -> None:
    sample = stretch(2)
    write(tmp_path / "s", [sample])
    shard = tmp_path / "s" / "field" / "train" / "shard-00000.tar"
    (row,) = list(webdataset.WebDataset(str(shard), shardshuffle=False))
    assert row["__key__"] == sample.key
    members = {name for name in row if not name.startswith("__")}
    assert members == {"values.npy", "valid.npy", "time.npy", "place.npy", "meta.json"}
    (decoded,) = list(webdataset.WebDataset(str(shard), shardshuffle=False).decode())
    np.testing.assert_array_equal(decoded["values.npy"], sample.values)


def test_nothing_is_pickled(tmp_path: Path) -> None:
    write(tmp_path / "s", [stretch(2)])
    for path in (tmp_path / "s").rglob("*"):
        assert path.suffix in {"", ".json", ".tar", ".npy"}
        if path.suffix == ".npy":
            np.load(path, allow_pickle=False)


def test_a_torn_shard_is_named_with_its_key(tmp_path: Path) -> None:
    store = write(tmp_path / "s", [stretch(0), stretch(1)])
    shard = tmp_path / "s" / "field" / "train" / "shard-00000.tar"
    shard.write_bytes(shard.read_bytes()[: int(store.stretches("field", "train")["values_offset"][1]) + 100])
    same(store.read("field", "train", index=0, start=0, stop=50), stretch(0))
    with pytest.raises(DataError, match=r"shard-00000\.tar: field/run1/0: window 0\.\.50 cannot be read: .*bytes"):
        store.read("field", "train", index=1, start=0, stop=50)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    store = write(tmp_path / "s", [stretch(0)])
    (tmp_path / "s" / "field" / "train" / "shard-00000.tar").unlink()
    with pytest.raises(DataError, match=r"shard-00000\.tar: field/run0/0: .*No such file"):
        store.read("field", "train", index=0, start=0, stop=50)


def test_verify_finds_a_flipped_bit(tmp_path: Path) -> None:
    store = write(tmp_path / "s", [stretch(0)])
    shard = tmp_path / "s" / "field" / "train" / "shard-00000.tar"
    content = bytearray(shard.read_bytes())
    content[int(store.stretches("field", "train")["values_offset"][0]) + 40] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"field/run0/0\.values\.npy does not match its checksum"):
        store.verify("field", "train")


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (3, 3), (40, 51)])
def test_a_window_outside_its_stretch_is_refused(tmp_path: Path, start: int, stop: int) -> None:
    store = write(tmp_path / "s", [stretch(0)])
    with pytest.raises(DataError, match=f"field/run0/0 has 50 times, got window {start}..{stop}"):
        store.read("field", "train", index=0, start=start, stop=stop)


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    store = write(tmp_path / "s", [stretch(0)])
    with pytest.raises(DataError, match="no source 'fields'; it has field"):
        store.stretches("fields", "train")
    with pytest.raises(DataError, match="split is one of .* got 'trial'"):
        store.stretches("field", "trial")
    with pytest.raises(DataError, match="1 stretches, got index 1"):
        store.read("field", "train", index=1, start=0, stop=1)


def test_a_folder_without_a_store_and_another_format(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no data store at .*make it with `sci-gpt build`"):
        Store.open(tmp_path)
    write(tmp_path / "s", [stretch(0)])
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
    (tmp_path / "s" / "manifest.json").write_text(json.dumps(manifest | {"format_version": 99}))
    with pytest.raises(DataError, match="format version 99"):
        Store.open(tmp_path / "s")


def test_a_key_that_would_break_a_shard_is_refused(tmp_path: Path) -> None:
    sample = stretch(0)
    object.__setattr__(sample, "key", "field/a.b/0")
    with pytest.raises(DataError, match=r"field/a\.b/0"), SplitWriter(tmp_path / "w", 1 << 20) as writer:
        writer.add(sample)
    assert not (tmp_path / "w" / "index.json").exists()
