"""Damaged, missing and failing shards: tried again, then named, counted, passed over; what is malicious is refused."""

from __future__ import annotations

import gzip
import io
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from sci_gpt.data.curriculum import Curriculum
from sci_gpt.data.faults import DamagedError, Patience, UnreadableError, is_transient, patiently
from sci_gpt.data.shard import BLOCK_BYTES, RefusedError, Shard
from sci_gpt.data.store import Store
from sci_gpt.errors import DataError
from sci_gpt.recipes import parts
from sci_gpt.train.feed import Place, StepReader, StepRows
from test_data_store import same, stretch, write
from toy_store import toy_config, write_store

NOW = Patience(attempts=3, wait_seconds=0.0)
SHARD = "field/train/shard-00000.tar"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy store; tests break copies of it."""
    return write_store(tmp_path_factory.mktemp("faults") / "store")


@pytest.fixture
def broken(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "store"))


def reader(store: Path) -> tuple[StepReader, Curriculum]:
    config = toy_config(store, store.parent / "run", reading={"attempts": 2, "wait_seconds": 0.0})
    curriculum = parts.curriculum(config, Store.open(store, parts.patience(config)))
    return StepReader(curriculum, parts.place(config, rank=0), settings=parts.tokenizer_settings(config)), curriculum


def eaten(store: Path, steps: int = 12) -> list[StepRows]:
    """The first steps of a run of one process."""
    read, curriculum = reader(store)
    read.place = Place(rank=0, world=1, accumulation=1)
    found: list[StepRows] = []
    for step in range(steps):
        found.append(read(step, found[-1].next_sample if found else 0))
    curriculum.store.close()
    return found


def truncate(store: Path) -> None:
    path = store / SHARD
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(store: Path) -> None:
    record = Store.open(store).stretches("field", "train")[1]
    content = bytearray((store / SHARD).read_bytes())
    content[int(record["values_offset"]) + 40_000] ^= 0x10
    (store / SHARD).write_bytes(content)


def remove(store: Path) -> None:
    (store / SHARD).unlink()


def tear_header(store: Path) -> None:
    record = Store.open(store).stretches("field", "train")[1]
    content = bytearray((store / SHARD).read_bytes())
    start = int(record["values_offset"]) // 512 * 512
    content[start - 512 : start - 412] = bytes(100)
    (store / SHARD).write_bytes(content)


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (truncate, "the shard ends at"),
    "flipped": (flip, r"field/train-1\.values\.npy does not match its checksum"),
    "missing": (remove, "No such file or directory"),
    "header": (tear_header, "header at .* is damaged"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_and_costs_its_own_samples_alone(
    name: str, good: Path, broken: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those that cannot be read weigh nothing; keys and order of all others are those of the whole store."""
    whole = eaten(good)
    damage, cause = FAULTS[name]
    damage(broken)
    torn = eaten(broken)
    lost = sum(step.passed_over for step in torn)
    of_field = sum(key.startswith("field/") for step in whole for key in step.keys)
    assert 0 < lost <= of_field
    if name in ("truncated", "flipped", "header"):
        assert lost < of_field, "what is whole is still read"
    said = capsys.readouterr().err
    for one, other in zip(whole, torn, strict=True):
        assert (one.first, one.next_sample, one.dealt) == (other.first, other.next_sample, other.dealt)
        kept = set(other.samples)
        assert [(n, key) for n, key in zip(one.samples, one.keys, strict=True) if n in kept] == list(
            zip(other.samples, other.keys, strict=True)
        )
        for n, key in zip(one.samples, one.keys, strict=True):
            if n not in kept:
                assert key.startswith("field/") and f"warning: sample {n} (field window " in said
        assert len(other.causes) == other.passed_over == len(one.samples) - len(other.samples)
        assert len(set(other.causes)) <= 3 and all("shard-00000.tar" in cause for cause in other.causes)
        for payload in other.batches[0].payloads.values():
            assert np.isfinite(payload.values).all()
    assert len([line for line in said.splitlines() if line.startswith("warning: sample ")]) == lost
    with pytest.raises(UnreadableError, match=rf"shard-00000\.tar: field/train-.: window .* cannot be read: .*{cause}"):
        for index in range(3):
            Store.open(broken, NOW).read("field", "train", index=index, start=0, stop=120)


def test_a_run_without_faults_says_nothing(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sum(step.passed_over for step in eaten(good)) == 0
    assert capsys.readouterr().err == ""


class Gone(OSError):
    """The server does not answer."""


class RemoteError(Exception):
    """An error of a remote file system that is no OSError."""


RemoteError.__module__ = "s3fs.errors"


@pytest.mark.parametrize("kind", [Gone, RemoteError, DamagedError, EOFError])
def test_a_read_that_fails_for_a_while_is_tried_again(
    kind: type[Exception], good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, read, waits, left = Store.open(good, Patience(attempts=4, wait_seconds=0.5)), Shard.read, list[float](), [3]

    def failing(self: Shard, offset: int, *, size: int) -> bytes:
        if left[0]:
            left[0] -= 1
            raise kind("not now")
        return read(self, offset, size=size)

    expected = store.read("quake", "train", index=0, start=3, stop=40)
    monkeypatch.setattr(Shard, "read", failing)
    monkeypatch.setattr("time.sleep", waits.append)
    same(store.read("quake", "train", index=0, start=3, stop=40), expected)
    assert waits == [0.5, 1.0, 2.0] and left == [0]
    left[0] = 99
    with pytest.raises(UnreadableError, match=r"quake/train-0: window 3\.\.40 cannot be read: not now"):
        store.read("quake", "train", index=0, start=3, stop=40)
    assert len(waits) == 6 and left == [95]


def test_what_is_no_fault_of_a_disk_is_not_tried_again() -> None:
    tries: list[int] = []

    def wrong() -> None:
        tries.append(1)
        raise ValueError("a shape that cannot be")

    with pytest.raises(ValueError, match="a shape"):
        patiently(wrong, NOW, again=lambda: None, sleep=lambda seconds: None)
    assert len(tries) == 1
    assert is_transient(TimeoutError()) and not is_transient(RefusedError(Path("x"), "a pickle"))


def test_a_shard_that_is_gone_is_not_waited_for_twice_and_is_read_when_it_is_back(
    broken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, waits = Store.open(broken, Patience(attempts=3, wait_seconds=0.25)), list[float]()
    monkeypatch.setattr("time.sleep", waits.append)
    (broken / SHARD).rename(broken / "aside")
    for _ in range(4):
        with pytest.raises(UnreadableError, match="No such file"):
            store.read("field", "train", index=0, start=0, stop=5)
    assert waits == [0.25, 0.5]
    (broken / "aside").rename(broken / SHARD)
    assert store.read("field", "train", index=0, start=0, stop=5).num_times == 5
    store.close()
    (broken / SHARD).rename(broken / "aside")
    with pytest.raises(UnreadableError, match="No such file"):
        store.read("field", "train", index=0, start=0, stop=5)
    assert len(waits) == 4, "it was well in between: it is waited for again"


def test_a_reader_that_raises_costs_its_sample(
    good: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read, curriculum = reader(good)
    whole = read(0, 0)
    document = curriculum.corpora[0].document

    def raising(n: int) -> object:
        if n == whole.samples[1]:
            raise KeyError("no such column")
        return document(n)

    monkeypatch.setattr(curriculum.corpora[0], "document", raising)
    step = read(0, 0)
    assert step.causes == ("KeyError: 'no such column'",) and step.passed_over == 1
    assert step.samples == tuple(n for n in whole.samples if n != whole.samples[1])
    assert f"warning: sample {whole.samples[1]} (" in capsys.readouterr().err


@pytest.mark.parametrize("at", [0, BLOCK_BYTES - 1, BLOCK_BYTES, 3 * BLOCK_BYTES + 7])
def test_every_byte_has_a_checksum(tmp_path: Path, at: int) -> None:
    sample = stretch(0, times=800)
    store = write(tmp_path / "s", [sample])
    path = tmp_path / "s" / SHARD
    content = bytearray(path.read_bytes())
    content[int(store.stretches("field", "train")["values_offset"][0]) + at] ^= 1
    path.write_bytes(content)
    time = at // sample.values[0].nbytes
    store = Store.open(tmp_path / "s", NOW)
    with pytest.raises(UnreadableError, match="does not match its checksum"):
        store.read("field", "train", index=0, start=time, stop=time + 1)
    far = (time + 400) % 800
    same(store.read("field", "train", index=0, start=far, stop=far + 1), sample.window(far, far + 1))


def test_a_flipped_place_and_a_flipped_record_are_seen(tmp_path: Path) -> None:
    store = write(tmp_path / "s", [stretch(0)])
    path, content = tmp_path / "s" / SHARD, bytearray((tmp_path / "s" / SHARD).read_bytes())
    content[int(store.stretches("field", "train")["place_offset"][0]) + 5] ^= 1
    path.write_bytes(content)
    with pytest.raises(UnreadableError, match=r"run0/0\.place\.npy does not match"):
        Store.open(tmp_path / "s", NOW).read("field", "train", index=0, start=0, stop=1)
    records = tmp_path / "s" / "field/train/shard-00000.idx.npy"
    content = bytearray(records.read_bytes())
    content[-70] ^= 1
    records.write_bytes(content)
    with pytest.raises(DataError, match=r"idx\.npy does not match its checksum: its 1 rows are not"):
        Store.open(tmp_path / "s").stretches("field", "train")


def _member(name: str, content: bytes = b"", *, kind: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
    entry = tarfile.TarInfo(name)
    entry.size, entry.type, entry.linkname = len(content), kind, link
    return entry.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)


def _npy(descr: str, shape: str, content: bytes = b"") -> bytes:
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (117 - len(header)) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + content


def _claiming(size: int, *, kind: bytes = tarfile.REGTYPE) -> bytes:
    entry = tarfile.TarInfo("field/a/0.values.npy")
    entry.size, entry.type = size, kind
    return entry.tobuf(tarfile.GNU_FORMAT) + bytes(512)


def _gzipped() -> bytes:
    """Sixteen megabytes of zeros in sixteen kilobytes."""
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="w", compresslevel=9) as file:
        for _ in range(16):
            file.write(bytes(1 << 20))
    return buffer.getvalue()


MALICIOUS: dict[str, tuple[bytes, str]] = {
    "pickle": (_member("field/a/0.values.pkl", b"\x80\x04."), r"member 'field/a/0\.values\.pkl' is not"),
    "absolute": (_member("/etc/passwd.values.npy", b"x"), r"member '/etc/passwd\.values\.npy' is not"),
    "parent": (_member("../field/a.values.npy", b"x"), r"member '\.\./field/a\.values\.npy' is not"),
    "symlink": (
        _member("field/a/0.values.npy", kind=tarfile.SYMTYPE, link="/etc/shadow"),
        r"member 'field/a/0\.values\.npy' is a symbolic link to '/etc/shadow'",
    ),
    "hard link": (_member("field/a/0.values.npy", kind=tarfile.LNKTYPE, link="x"), "is a link to 'x'"),
    "device": (_member("field/a/0.values.npy", kind=tarfile.CHRTYPE), "is no plain file"),
    "ten gigabytes": (_claiming(10 * 1024**3), "claims 10737418240 bytes, the whole shard has"),
    "an array of ten gigabytes": (
        _member("field/a/0.values.npy", _npy("'<f4'", "(2684354560, 1, 1, 1)")),
        "claims an array of 10737418240 bytes, it has 0",
    ),
    "objects": (_member("field/a/0.values.npy", _npy("'|O'", "(1,)", b"cos\nsystem\n")), r"no array of numbers.*\|O"),
    "a long name": (_member("x", b"y" * 5000, kind=tarfile.GNUTYPE_LONGNAME), "name claims 5000 bytes"),
    "less than nothing": (_claiming(-512), "claims -512 bytes"),
    "a name of less than nothing": (_claiming(-512, kind=tarfile.GNUTYPE_LONGNAME), "claims -512 bytes"),
    "twice": (2 * _member("field/a/0.meta.json", b"{}"), "stands twice"),
    "json bomb": (_member("field/a/0.meta.json", b"[" * 70_000), "has 70000 bytes"),
    "zip in npy": (_member("field/a/0.values.npy", b"PK\x03\x04" * 300), "which is no .npy"),
    "zip bomb": (_gzipped(), r"it begins with .*, no tar header; packed archives are not opened"),
}


@pytest.mark.parametrize("name", MALICIOUS)
def test_a_malicious_shard_is_refused_with_its_name(name: str, tmp_path: Path) -> None:
    """Whether it stands alone or behind good members, nothing of it is read, and nothing large is allocated."""
    content, why = MALICIOUS[name]
    write(tmp_path / "s", [stretch(0, times=1000)])
    path = tmp_path / "s" / SHARD
    good = path.read_bytes().rstrip(b"\0")
    shards = [content + bytes(1024)]
    if name != "zip bomb":  # behind good members it is no archive, but a damaged header
        shards.append(good + bytes(-len(good) % 512) + content + bytes(1024))
    before = psutil.Process().memory_info().rss
    for bad in shards:
        path.write_bytes(bad)
        with pytest.raises(RefusedError, match=rf"{SHARD}: refused: .*{why}"):
            Store.open(tmp_path / "s", NOW).read("field", "train", index=0, start=0, stop=1)
    assert psutil.Process().memory_info().rss - before < 64 << 20


def test_an_index_of_objects_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "s", [stretch(0)])
    np.save(tmp_path / "s" / "field/train/shard-00000.idx.npy", np.array([{"a": 1}], object), allow_pickle=True)
    with pytest.raises(DataError, match=r"idx\.npy is torn: .*[Oo]bjects in dtype"):
        Store.open(tmp_path / "s").stretches("field", "train")


@pytest.fixture(scope="module")
def memory(good: Path) -> Iterator[list[int]]:
    """Resident bytes of this process after 4,000 and after 24,000 samples, read (and some tokenized) as by a worker."""
    curriculum = reader(good)[1]
    corpus, process, found = curriculum.corpora[0], psutil.Process(), list[int]()
    for n in range(24_001):
        source, window, _ = corpus.order.sample(n)
        corpus.windows[source].read(window)
        if n % 13 == 0:  # tokenizing takes ten times as long
            corpus.document(n)
        if n in (4_000, 24_000):
            found.append(process.memory_info().rss)
    yield found


def test_twenty_thousand_samples_cost_no_memory(memory: list[int]) -> None:
    assert memory[1] < 1.02 * memory[0]
