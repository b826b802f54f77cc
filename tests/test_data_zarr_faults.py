"""Zarr stores that are unsafe, unfit, changed or not whole: refused by name, or tried again, named and counted."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from numcodecs import Pickle

from sci_gpt.data.faults import UnreadableError
from sci_gpt.data.source_zarr import ZarrGrid
from sci_gpt.data.sources import contents
from sci_gpt.data.store import Store
from sci_gpt.errors import DataError
from sci_gpt.recipes import parts
from sci_gpt.train.feed import Place, StepReader, StepRows
from toy_store import toy_config
from toy_zarr import FILL, OFFSET, built, dataset, read_all, settings, write_zarr


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(write_zarr(tmp_path_factory.mktemp("zarr") / "fields.zarr", dataset()))


@pytest.fixture
def copied(archive: Path, tmp_path: Path) -> Path:
    """A copy of the archive that a test may spoil."""
    return Path(shutil.copytree(archive, tmp_path / "spoilt.zarr"))


def spoilt_store(tmp_path: Path, copied: Path) -> tuple[Store, Callable[[], int]]:
    """A store indexed in place on a copy of the archive, and a function that reads the window of chunk t/c/6/0/0/0."""
    store = built(tmp_path / "store", copied, in_place=True)
    keys = store.keys("fields", "train")
    index = next(n for n, key in enumerate(keys) if "-r0-c0/" in key)
    return store, lambda: store.read("fields", "train", index=index, start=32, stop=36).num_times


def cut_short(chunk: Path) -> None:
    chunk.write_bytes(chunk.read_bytes()[:-5])


def scramble(chunk: Path) -> None:
    content = bytearray(chunk.read_bytes())
    content[: len(content) // 2] = bytes(len(content) // 2)
    chunk.write_bytes(bytes(content))


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "deleted": (Path.unlink, r"chunk t/c/6/0/0/0 is missing; it had \d+ bytes when the store was built"),
    "truncated": (cut_short, r"chunk t/c/6/0/0/0 has \d+ bytes; it had \d+ when the store was built"),
    "scrambled": (scramble, "array 't' cannot be decoded"),
}


@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_a_chunk_that_is_gone_or_damaged_is_an_error_and_no_fill_value(
    fault: str, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, read = spoilt_store(tmp_path, copied)
    chunk = copied / "t/c/6/0/0/0"
    whole = chunk.read_bytes()
    damage, words = FAULTS[fault]
    damage(chunk)
    waits: list[float] = []
    monkeypatch.setattr("sci_gpt.data.in_place.time.sleep", waits.append)
    with pytest.raises(UnreadableError, match=words) as caught:
        read()
    assert caught.value.file == str(copied) and "fields/grid-r0-c0/0/train" in str(caught.value)
    assert waits == [0.01], "tried again, once"
    other = store.read("fields", "train", index=0, start=60, stop=70)
    assert other.num_times == 10, "the other chunks are still read"
    if fault != "scrambled":
        with pytest.raises(UnreadableError, match="chunk .* of array 't' is missing or not what was built from"):
            store.verify("fields", "train")

    def mended(seconds: float) -> None:
        chunk.write_bytes(whole)

    monkeypatch.setattr("sci_gpt.data.in_place.time.sleep", mended)
    assert read() == 4


def test_a_shard_cut_short_is_an_error(tmp_path: Path) -> None:
    """Chunks within a shard are read by ranges, which know nothing of its length; its index has a checksum."""
    place = Path(write_zarr(tmp_path / "shards.zarr", dataset(), encoding={"t": {"shards": (100, 2, 4, 6)}}))
    store = built(tmp_path / "store", place, in_place=True)
    cut_short(place / "t/c/0/0/0/0")
    with pytest.raises(UnreadableError, match="shards.zarr: .*array 't' cannot be decoded"):
        store.read("fields", "train", index=0, start=0, stop=4)
    assert store.read("fields", "train", index=0, start=110, stop=120).num_times == 10


def test_a_zarr_with_other_metadata_is_refused(copied: Path, tmp_path: Path) -> None:
    _, read = spoilt_store(tmp_path, copied)
    document = json.loads((copied / "t/zarr.json").read_text())
    document["attributes"]["add_offset"] = 0.0
    (copied / "t/zarr.json").write_text(json.dumps(document))
    with pytest.raises(
        DataError, match=f"{copied}: its metadata are not those that source 'fields' was built from"
    ) as no:
        read()
    assert not isinstance(no.value, UnreadableError)


@pytest.mark.parametrize("kind", ["clock", "place", "chunks"])
def test_a_damaged_table_beside_the_index_is_refused(kind: str, copied: Path, tmp_path: Path) -> None:
    store, read = spoilt_store(tmp_path, copied)
    table = Path(store.path) / "fields/in_place" / f"grid.{kind}.npy"
    content = bytearray(table.read_bytes())
    content[-3] ^= 1
    table.write_bytes(bytes(content))
    with pytest.raises(DataError, match=f"in_place/grid.{kind}.npy of source 'fields' is damaged"):
        read()


def eaten(store: Store, steps: int = 12) -> list[StepRows]:
    """The first steps of a run on the store, of one process."""
    mixture = [{"source": "fields", "weight": 1, "frames": 8, "stride": 4, "context_frames": [2, 3]}]
    shape = {"mixture": mixture, "row_length": 100, "tokenizer": {"grid_patch": 1}}
    config = toy_config(
        store.path, Path(store.path).parent / "run", reading={"attempts": 2, "wait_seconds": 0.0}, **shape
    )
    curriculum = parts.curriculum(config, Store.open(store.path, parts.patience(config)))
    place = Place(rank=0, world=1, accumulation=1)
    read = StepReader(curriculum, place, settings=parts.tokenizer_settings(config))
    found: list[StepRows] = []
    for step in range(steps):
        found.append(read(step, found[-1].next_sample if found else 0))
    return found


def test_a_run_counts_what_it_cannot_read_and_keeps_the_order_of_the_rest(
    copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = built(tmp_path / "store", copied, in_place=True)
    whole = eaten(store)
    assert sum(step.passed_over for step in whole) == 0 and capsys.readouterr().err == ""
    for chunk in (copied / "pr/c").glob("[1-9]/0/0"):
        chunk.unlink()
    torn = eaten(store)
    assert 0 < sum(step.passed_over for step in torn) < sum(len(step.keys) for step in whole)
    for one, other in zip(whole, torn, strict=True):
        assert (one.first, one.next_sample, one.dealt) == (other.first, other.next_sample, other.dealt)
        kept = [(n, key) for n, key in zip(one.samples, one.keys, strict=True) if n in other.samples]
        assert kept == list(zip(other.samples, other.keys, strict=True))
        assert len(other.causes) == other.passed_over == len(one.samples) - len(other.samples)
        assert all(f"{copied}: chunk pr/c/" in cause for cause in other.causes)
    assert "warning: sample " in capsys.readouterr().err


def test_the_fingerprint_is_of_metadata_and_of_names_and_lengths_of_chunks(copied: Path) -> None:
    wanted = settings(str(copied))
    before = contents(wanted)
    assert set(before) == {f"grid/{name}" for name in ("t", "pr", "time", "level", "lat", "lon")}
    os.utime(copied / "t/c/0/0/0/0", (1, 1))
    (copied / "unrelated.txt").write_text("notes")
    assert contents(wanted) == before, "the time of a change is no content"

    def changed() -> set[str]:
        return {name for name, digest in contents(wanted).items() if digest != before[name]}

    whole = (copied / "t/c/0/0/0/0").read_bytes()
    (copied / "t/c/0/0/0/0").write_bytes(whole + b"0")
    assert changed() == {"grid/t"}
    (copied / "t/c/0/0/0/0").unlink()
    with pytest.raises(DataError, match="1 of 320 chunks of 't' are not there"):
        contents(wanted)
    (copied / "t/c/0/0/0/0").write_bytes(whole)
    document = (copied / "pr/zarr.json").read_text()
    (copied / "pr/zarr.json").write_text(document.replace("precipitation_flux", "air_temperature"))
    with pytest.raises(DataError, match="mm day-1"):
        contents(wanted)
    (copied / "pr/zarr.json").write_text(document.replace("86400", "86401") + " ")
    assert changed() == {"grid/pr"}


class Payload:
    """Unpickled, it makes a folder."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def pickled(folder: Path, trap: Path) -> Path:
    """A Zarr v2 whose time axis is pickled objects that run when they are decoded."""
    place = Path(write_zarr(folder / "evil.zarr", dataset(), version=2))
    document = json.loads((place / "time/.zarray").read_text())
    document |= {"dtype": "|O", "filters": [{"id": "pickle", "protocol": 4}], "compressor": None, "fill_value": None}
    (place / "time/.zarray").write_text(json.dumps(document))
    chunk = np.empty(1, object)
    chunk[0] = Payload(str(trap))
    for path in (place / "time").glob("[0-9]*"):
        path.write_bytes(Pickle().encode(chunk))
    return place


def test_pickled_chunks_are_refused_before_any_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("numcodecs.pickles.ALLOW_UNSAFE_PICKLE_DECODE", True)  # what its older releases always did
    trap = tmp_path / "trap"
    place = pickled(tmp_path, trap)
    with pytest.raises(DataError, match="array 'time': its data type .*Python objects, which are never read"):
        list(read_all(settings(str(place))))
    assert not trap.exists()
    Pickle().decode((place / "time/0").read_bytes())
    assert trap.exists(), "the trap is one: whoever decodes the chunk runs it"


CODECS: dict[str, tuple[int, dict[str, Any], str]] = {
    "a pickle filter on numbers": (2, {"filters": [{"id": "pickle"}]}, "codec 'pickle'"),
    "json as compressor": (2, {"compressor": {"id": "json2"}}, "codec 'json2'"),
    "structured objects": (2, {"dtype": [["a", "|O"]]}, "data type .*Python objects"),
    "a pickle codec": (3, {"codecs": [{"name": "numcodecs.pickle"}]}, "codec 'numcodecs.pickle'"),
    "a codec of one's own within shards": (
        3,
        {"codecs": [{"name": "sharding_indexed", "configuration": {"codecs": [{"name": "mine"}]}}]},
        "codec 'mine'",
    ),
    "strings of any length": (3, {"data_type": "string"}, "data type string"),
    "a transformer": (3, {"storage_transformers": [{"name": "x"}]}, "codec 'a storage transformer'"),
}


@pytest.mark.parametrize("kind", sorted(CODECS))
def test_what_could_make_objects_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    version, change, words = CODECS[kind]
    place = Path(write_zarr(tmp_path / "evil.zarr", dataset(), version=version))
    path = place / "lon" / (".zarray" if version == 2 else "zarr.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=f"array 'lon': .*{words}") as caught:
        list(read_all(settings(str(place))))
    assert "\n" not in str(caught.value)


def test_chunks_that_were_never_there(tmp_path: Path) -> None:
    place = Path(write_zarr(tmp_path / "fields.zarr", dataset()))
    (place / "t/c/6/0/0/0").unlink()
    with pytest.raises(DataError, match="1 of 320 chunks of 't' are not there, and their fill value 0 stands for no"):
        list(read_all(settings(str(place))))
    (sample,) = read_all(settings(str(place), absent_is_fill=True))
    np.testing.assert_allclose(sample.values[30:35, :2, :2, :3], OFFSET)
    (place / "lat/c/0").unlink()
    (place / "t/zarr.json").write_text(
        (place / "t/zarr.json").read_text().replace('"fill_value": 0', f'"fill_value": {FILL}')
    )
    with pytest.raises(DataError, match="1 of 1 chunks of 'lat' are not there"):
        list(read_all(settings(str(place))))
    older = Path(write_zarr(tmp_path / "older.zarr", dataset(), version=2))
    (older / "t/6.0.0.0").unlink()
    (sample,) = read_all(settings(str(older)))
    gone = ~sample.valid[:, :2]
    assert gone[30:35, :, :2, :3].all() and gone.sum() == 5 * 2 * 6 + 1, "declared missing: a mask, no value"


def without_time(content: xr.Dataset) -> xr.Dataset:
    return content.transpose("lat", "lon", "level", "time")


REFUSED: dict[str, tuple[Callable[[xr.Dataset], xr.Dataset], dict[str, Any], str]] = {
    "no such variable": (lambda c: c, {"variables": ["t", "tp"]}, "no variable 'tp'; the Zarr has .*pr, t, time"),
    "no such level": (lambda c: c, {"levels": [500, 700]}, r"no level 700; the file has \[850.0, 500.0\]"),
    "other order of axes": (without_time, {}, r"has dimensions \('lat', 'lon', 'level', 'time'\), expected \(time"),
    "unit of levels": (lambda c: c, {"level_unit": "furlong"}, "levels 'level' have unit 'furlong'"),
    "a unit that does not convert": (lambda c: c, {"units": {"t": "Pa"}}, "'Pa' does not convert"),
    "not in the table": (lambda c: c, {"names": {"t": "air_temprature"}}, "nearest: 'air_temperature'"),
    "tiles": (lambda c: c, {"tile": [3, 3]}, "tiles of 3 x 3 do not divide a grid of 4 x 6"),
    "twice the same": (lambda c: c, {"variables": ["t", "t"]}, "two of the variables are channel"),
    "read amplification": (
        lambda c: c,
        {"tile": [1, 1], "in_place": True},
        r"one time of one tile of \(1, 1\) decodes 75.0 bytes for each that it needs, at most 16 .*most_amplification",
    ),
    "known at other times": (
        lambda c: c.assign(pr=c["pr"].assign_attrs(cell_methods="time: mean")),
        {},
        "variables 't' and 'pr' are on other axes or known at other times",
    ),
}


@pytest.mark.parametrize("kind", sorted(REFUSED))
def test_what_is_not_fit_is_refused(kind: str, tmp_path: Path) -> None:
    change, options, words = REFUSED[kind]
    content = change(dataset())
    chunks = {name: {"chunks": tuple(reversed(content[name].shape))} for name in ("t", "pr")}
    place = write_zarr(tmp_path / "fields.zarr", content, encoding=chunks if change is without_time else None)
    with pytest.raises(DataError, match=words) as caught:
        ZarrGrid().parts(settings(place, **options))
    assert "\n" not in str(caught.value)
