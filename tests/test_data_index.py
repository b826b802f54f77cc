"""The two-level index: windows as by plain counting, shards that can be renumbered, few tables held, digests."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from sci_gpt.data.index import RECORD, Recent, SplitIndex
from sci_gpt.data.quality import RULES, SPAN, find_spans, left_out
from sci_gpt.data.store import MOST_OPEN, Store
from sci_gpt.data.windows import Windows, WindowSpec
from sci_gpt.errors import DataError
from sci_tokenizers.sample import Sample
from test_data_store import same, stretch, write
from toy_store import change_manifest, write_store


def spoiled(number: int) -> Sample:
    """A stretch of its own length, every third with values out of range at times of its own."""
    sample = stretch(number, times=37 + 5 * (number % 4))
    if number % 3 == 1:
        sample.values[3 + number % 5] = 1e5
        sample.values[30] = 1e5
        sample.valid[[3 + number % 5, 30]] = True
    return sample


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, list[Sample]]:
    """Eleven stretches in several shards of two or three each."""
    samples = [spoiled(number) for number in range(11)]
    store = write(tmp_path_factory.mktemp("index") / "s", samples, shard_bytes=14_000)
    counts = [len(records) for records, _ in store.shards("field", "train")]
    assert len(counts) >= 4 and max(counts) > 1 and sum(counts) == len(samples)
    return store, samples


def spec(frames: int, stride: int) -> WindowSpec:
    return WindowSpec(source="field", frames=frames, stride=stride, context_frames=(1, 2), leads=(1,))


@pytest.mark.parametrize(("frames", "stride"), [(8, 1), (9, 4), (38, 1), (43, 3)])
def test_windows_over_shards_are_those_of_one_plain_count(
    many: tuple[Store, list[Sample]], frames: int, stride: int
) -> None:
    """Stretch by stretch, start by start, leaving out the bad ones: as if there were no shards."""
    store, samples = many
    expected, lost = [], Counter[str]()
    for number, sample in enumerate(samples):
        spans = np.array([(0, *span) for span in find_spans(sample)], SPAN)
        verdict = left_out(spans, num_times=sample.num_times, need=frames, step=stride)
        assert len(verdict) == len(range(0, sample.num_times - frames + 1, stride))
        for window, rule in enumerate(verdict.tolist()):
            if rule < 0:
                expected.append((number, window * stride, window * stride + frames))
            else:
                lost[RULES[rule].name] += 1
    windows = Windows(store, spec(frames, stride), split="train", frame_times=1)
    assert windows.num_windows == len(expected) and windows.left_out == dict(lost) and lost
    for k in np.random.default_rng(0).permutation(len(expected)).tolist():
        assert windows.locate(k) == expected[k]
    number, start, stop = expected[-1]
    same(windows.read(len(expected) - 1), samples[number].window(start, stop))


def test_a_window_looks_at_its_own_shard_once(
    many: tuple[Store, list[Sample]], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, looked, shard = many[0], list[int](), Store.shard

    def counted(self: Store, source: str, split: str, *, number: int) -> tuple[np.ndarray, np.ndarray]:
        looked.append(number)
        return shard(self, source, split, number=number)

    monkeypatch.setattr(Store, "shard", counted)
    windows = Windows(store, spec(8, 1), split="train", frame_times=1)
    num_shards = len(looked)
    assert looked == list(range(num_shards)) and num_shards > 3
    looked.clear()
    for _ in range(2):
        windows.locate(windows.num_windows - 1)
    assert looked == [num_shards - 1]


def test_few_tables_are_held(tmp_path: Path) -> None:
    kept, made = Recent[str](2), list[str]()

    def get(key: str) -> str:
        return kept.get(key, lambda: made.append(key) or key.upper())  # type: ignore[func-returns-value]

    assert [get(key) for key in "abab"] == ["A", "B", "A", "B"] and made == ["a", "b"]
    assert get("c") == "C" and get("b") == "B" and made == ["a", "b", "c"], "the one asked for longest ago went"
    assert get("a") == "A" and made == ["a", "b", "c", "a"]
    kept.drop("a")
    assert get("a") == "A" and made[-2:] == ["a", "a"]
    samples = [stretch(number, times=4) for number in range(MOST_OPEN + 6)]
    store = write(tmp_path / "s", samples, shard_bytes=1)
    table = store.shard("field", "train", number=0)[0]
    assert store.shard("field", "train", number=0)[0] is table and isinstance(table, np.memmap)
    assert len(store.lengths("field", "train")) == len(samples)
    assert store.shard("field", "train", number=0)[0] is not table


def test_a_folder_of_shards_is_renumbered_by_names_alone(many: tuple[Store, list[Sample]], tmp_path: Path) -> None:
    """As a parallel build puts its parts together: files are renamed, rows of index.json moved, nothing else."""
    store, samples = many
    folder = shutil.copytree(store.path, tmp_path / "s") / "field" / "train"
    rows = json.loads((folder / "index.json").read_text())["shards"]
    order = list(reversed(range(len(rows))))
    for number in order:
        for path in folder.glob(f"shard-{number:05d}.*"):
            path.rename(folder / path.name.replace("shard-", "old-"))
    for new, old in enumerate(order):
        for path in folder.glob(f"old-{old:05d}.*"):
            path.rename(folder / path.name.replace(f"old-{old:05d}", f"shard-{new:05d}"))
    moved = [rows[old] | {"shard": f"shard-{new:05d}.tar"} for new, old in enumerate(order)]
    (folder / "index.json").write_text(json.dumps({"shards": moved}))
    change_manifest(tmp_path / "s", {})
    again = Store.open(tmp_path / "s")
    counts = np.cumsum([0, *(row["num_stretches"] for row in rows)])
    expected = [k for old in order for k in range(counts[old], counts[old + 1])]
    assert again.keys("field", "train") == [samples[k].key for k in expected]
    for index, k in enumerate(expected):
        same(again.read("field", "train", index=index, start=1, stop=30), samples[k].window(1, 30))
    windows = Windows(again, spec(8, 1), split="train", frame_times=1)
    assert windows.left_out == Windows(store, spec(8, 1), split="train", frame_times=1).left_out
    assert "shard" not in (RECORD.names or ())


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    return write_store(tmp_path / "store", times={"quake": [60], "field": [30], "station": [50, 60]})


def test_every_flipped_byte_of_a_manifest_is_refused_by_name(toy: Path) -> None:
    path = toy / "manifest.json"
    content = path.read_bytes()
    for at in range(0, len(content), 37):
        changed = bytearray(content)
        changed[at] ^= 1
        path.write_bytes(changed)
        with pytest.raises(DataError, match=rf"{re.escape(str(path))}|data store '{re.escape(str(toy))}' has format"):
            Store.open(toy)
    path.write_bytes(content)
    Store.open(toy)


@pytest.mark.parametrize(("name", "other"), [("statistics.json", None), ("field/train/index.json", "field/valid")])
def test_a_changed_or_foreign_file_is_refused_by_name(toy: Path, name: str, other: str | None) -> None:
    """A digit of the statistics; an index of another split, which is whole in itself."""
    path = toy / name
    content = path.read_bytes()
    path.write_bytes(content.replace(b"1000", b"1001", 1) if other is None else (toy / other / path.name).read_bytes())
    assert path.read_bytes() != content
    with pytest.raises(DataError, match=rf"{re.escape(str(path))}: expected the file of SHA-256 .* by manifest\.json"):
        Store.open(toy).num_stretches("field", "train")


@pytest.mark.parametrize("kind", ["idx", "crc", "quality"])
def test_a_table_of_another_shard_is_refused_by_name(
    many: tuple[Store, list[Sample]], tmp_path: Path, kind: str
) -> None:
    folder = shutil.copytree(many[0].path, tmp_path / "s") / "field" / "train"
    counts = [row["num_spans"] for row in json.loads((folder / "index.json").read_text())["shards"]]
    at = next(number for number, count in enumerate(counts) if count)
    shutil.copy(folder / f"shard-{(at + 1) % len(counts):05d}.{kind}.npy", folder / f"shard-{at:05d}.{kind}.npy")
    with pytest.raises(DataError, match=rf"shard-{at:05d}\.{kind}\.npy does not match its checksum"):
        store = Store.open(tmp_path / "s")
        store.shard("field", "train", number=at)
        first = sum(len(records) for records, _ in list(many[0].shards("field", "train"))[:at])
        store.read("field", "train", index=first, start=0, stop=1)


def test_an_index_that_is_none_is_refused_by_name(tmp_path: Path) -> None:
    row = dict.fromkeys(("num_stretches", "num_times", "num_spans", "bytes"), 1)
    row |= dict.fromkeys(("records_crc32", "sums_crc32", "quality_crc32"), 1)
    cases = [
        (b"{}", "expected a row of num_stretches, .* per shard, got KeyError"),
        (json.dumps({"shards": [{"shard": "shard-00000.tar"}]}).encode(), "got KeyError: 'num_stretches'"),
        (json.dumps({"shards": [row | {"shard": "shard-00001.tar"}]}).encode(), "'shard-00000.tar' in row 0, got 'sh"),
    ]
    for content, why in cases:
        with pytest.raises(DataError, match=rf"{re.escape(str(tmp_path))}/index\.json: .*{why}"):
            SplitIndex(tmp_path, content, tables=Recent(1))
