"""A store behind a URL, on a real S3 server: equal to the local one, through outages, and through every command."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import sci_gpt.data.addresses as addresses
from s3_server import S3Server, served
from sci_gpt.config import PretrainConfig
from sci_gpt.config_file import show_config
from sci_gpt.data.addresses import RemotePath, address
from sci_gpt.data.faults import Patience, UnreadableError
from sci_gpt.data.store import SPLITS, Store
from sci_gpt.data.store_writer import publish
from sci_gpt.errors import ConfigError, DataError
from sci_gpt.recipes import parts
from sci_gpt.recipes.build import build
from sci_gpt.train.feed import Place, StepReader, StepRows
from sci_gpt.train.run_folder import keys_log, read_lines
from sci_launch import cli
from test_build_jobs import config_of as config_of_build
from test_build_jobs import field, tree
from test_data_store import same
from toy_model import toy_data
from toy_store import SOURCES, change_manifest, toy_config

ONCE, LONG = Patience(attempts=1), Patience(attempts=8, wait_seconds=0.1)
MEMBERS = 4  # of a stretch with gaps: values, valid, time, place


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_data(tmp_path_factory.mktemp("remote") / "store")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, good: Path) -> Iterator[S3Server]:
    """A server that holds the store under the prefix `store`; a test that stops it starts it again."""
    with served(tmp_path_factory.mktemp("s3") / "objects") as one:
        assert publish(good, one.url("store")) == sum(p.stat().st_size for p in good.rglob("*") if p.is_file())
        yield one


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """URLs of the ranged reads that were asked for."""
    asked: list[str] = []
    read = RemotePath.read

    def counted(self: RemotePath, offset: int, *, size: int) -> bytes:
        asked.append(self.url)
        return read(self, offset, size=size)

    monkeypatch.setattr(RemotePath, "read", counted)
    return asked


def config_of(data: Path | str, **reading: float) -> PretrainConfig:
    return toy_config(data, Path("unused") / "run", reading=reading)


def eaten(data: Path | str, steps: range = range(8), **reading: float) -> list[StepRows]:
    """The steps of a run of one process, from its first sample."""
    config = config_of(data, **reading)
    curriculum = parts.curriculum(config, Store.open(config.data, parts.patience(config)))
    read = StepReader(curriculum, Place(rank=0, world=1, accumulation=1), settings=parts.tokenizer_settings(config))
    found: list[StepRows] = []
    for step in steps:
        found.append(read(step, found[-1].next_sample if found else 0))
    return found


def test_a_published_store_is_the_local_one(server: S3Server, good: Path, requests: list[str]) -> None:
    here, there = Store.open(good), Store.open(server.url("store"))
    assert there.manifest == here.manifest and there.statistics.keys() == here.statistics.keys()
    for source in SOURCES:
        for split in SPLITS:
            records, expected = there.stretches(source, split), here.stretches(source, split)
            np.testing.assert_array_equal(records, expected)
            for index in range(len(expected)):
                before = len(requests)
                one = there.read(source, split, index=index, start=5, stop=90)
                same(one, here.read(source, split, index=index, start=5, stop=90))
                assert 0 < len(requests) - before <= MEMBERS
    assert publish(good, server.url("store")) == 0, "it is there already"


def test_training_eats_the_same_samples_from_either(server: S3Server, good: Path) -> None:
    one, other = eaten(good), eaten(server.url("store"))
    assert [step.keys for step in one] == [step.keys for step in other]
    assert [step.samples for step in one] == [step.samples for step in other]
    assert sum(step.passed_over for step in other) == 0
    for here, there in zip(one, other, strict=True):
        for name, payload in here.batches[0].payloads.items():
            np.testing.assert_array_equal(payload.values, there.batches[0].payloads[name].values)


def test_a_server_that_comes_back_in_time_costs_nothing(
    server: S3Server, good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is killed before the 20th read and started again after 0.4 s."""
    read, calls, back = RemotePath.read, list[int](), list[threading.Timer]()

    def killing(self: RemotePath, offset: int, *, size: int) -> bytes:
        calls.append(size)
        if len(calls) == 20:
            server.kill()
            back.append(threading.Timer(0.4, server.start))
            back[0].start()
        return read(self, offset, size=size)

    monkeypatch.setattr(RemotePath, "read", killing)
    try:
        found = eaten(server.url("store"), attempts=8, wait_seconds=0.1)
    finally:
        back[0].join()
    monkeypatch.undo()
    expected = eaten(good)
    assert [(step.samples, step.keys) for step in found] == [(step.samples, step.keys) for step in expected]
    assert sum(step.passed_over for step in found) == 0
    assert len(calls) > 21, "some were asked for again"


def test_a_server_that_stays_away_costs_its_samples_until_it_is_back(
    server: S3Server, good: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(server.url("store"), attempts=2, wait_seconds=0.0)
    curriculum = parts.curriculum(config, Store.open(config.data, parts.patience(config)))
    read = StepReader(curriculum, Place(rank=0, world=1, accumulation=1), settings=parts.tokenizer_settings(config))
    expected, first = eaten(good, range(3)), read(0, 0)
    server.kill()
    try:
        lost = read(1, first.next_sample)
        with pytest.raises(
            UnreadableError,
            match=r"s3://bucket/store/field/train/shard-00000\.tar: field/train-0: window 1\.\.4 cannot be read: "
            r"Could not connect to the endpoint URL",
        ):
            curriculum.store.read("field", "train", index=0, start=1, stop=4)
        with pytest.raises(DataError, match=r"s3://bucket/store/manifest\.json cannot be read: Could not connect"):
            Store.open(server.url("store"), ONCE)
    finally:
        server.start()
    assert lost.passed_over == len(expected[1].samples) > 0 and lost.samples == ()
    assert (lost.next_sample, lost.dealt) == (expected[1].next_sample, expected[1].dealt)
    assert all("s3://bucket/store/" in cause and "Could not connect" in cause for cause in lost.causes)
    assert capsys.readouterr().err.count("is passed over: s3://bucket/store/") == lost.passed_over
    again = read(2, lost.next_sample)
    assert (again.samples, again.keys, again.passed_over) == (expected[2].samples, expected[2].keys, 0)


def test_tables_are_waited_for_too(server: S3Server) -> None:
    """The index and the tables beside shards, when the server comes back while a corpus is opened."""
    store = Store.open(server.url("store"), LONG)
    server.kill()
    back = threading.Timer(0.3, server.start)
    back.start()
    try:
        assert store.num_times("station", "train") == 1200
        assert [len(records) for records, _ in store.shards("station", "train")] == [3]
    finally:
        back.join()


@pytest.mark.parametrize("name", ["manifest.json", "statistics.json", "field/train/index.json"])
def test_a_changed_file_behind_a_url_is_refused_by_name(
    server: S3Server, good: Path, tmp_path: Path, name: str
) -> None:
    goal = server.url(f"changed-{name.split('/')[-1]}")
    publish(good, goal)
    content = (good / name).read_bytes()
    changed = (good / "field/valid/index.json").read_bytes() if "index" in name else content.replace(b"1", b"2", 1)
    (tmp_path / "file").write_bytes(changed)
    there = address(f"{goal}/{name}")
    assert isinstance(there, RemotePath) and changed != content
    there.upload(tmp_path / "file")
    with pytest.raises(DataError, match=rf"{goal}/{name}"):
        Store.open(goal).num_stretches("field", "train")


def test_an_unfinished_copy_is_no_store(
    server: S3Server, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest goes last, and an old one does not stand beside another store's files."""
    goal, upload, sent = server.url("torn"), RemotePath.upload, list[str]()

    def failing(self: RemotePath, source: Path) -> None:
        if source.name == "shard-00000.crc.npy":
            raise OSError("the disk is full")
        sent.append(self.name)
        upload(self, source)

    publish(good, goal)
    other = shutil.copytree(good, tmp_path / "other")
    change_manifest(other, {"fingerprint": "another"})
    with monkeypatch.context() as patch:
        patch.setattr(RemotePath, "upload", failing)
        with pytest.raises(DataError, match=rf"{goal}/.*/shard-00000\.crc\.npy cannot be written: the disk is full"):
            publish(other, goal, patience=ONCE)
    assert sent and "manifest.json" not in sent
    with pytest.raises(DataError, match=rf"no data store at '{goal}' \(manifest\.json is missing\)"):
        Store.open(goal)
    assert publish(other, goal) > 0 and Store.open(goal).fingerprint == "another"


def test_inspect_and_a_configuration_take_a_url(
    server: S3Server, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(server.url("store/"))
    assert config.data == "s3://bucket/store" and config.model_dump(mode="json")["data"] == "s3://bucket/store"
    assert isinstance(config_of(good).data, Path)
    with pytest.raises(ConfigError, match=r"data.*s3://\.\.\.@bucket holds a password"):
        config_of("s3://name:secret@bucket/store")
    named = shutil.copytree(good, tmp_path / "named")
    splits = {split: {"stretches": 3, "times": 1, "missing_share": 0.0, "quality": {}} for split in SPLITS}
    rows = {name: row | {"splits": splits} for name, row in Store.open(good).manifest["sources"].items()}
    change_manifest(named, {"name": "toy", "commit": None, "sources": rows})
    publish(named, server.url("named"))
    assert cli.main(["inspect", server.url("named"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["path"] == "s3://bucket/named" and [row["source"] for row in said["sources"]] == list(SOURCES)


def test_what_reads_no_url_says_so(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="nosuch://a/b: expected a local path or a URL such as s3://bucket/prefix"):
        Store.open("nosuch://a/b")
    with pytest.raises(DataError, match="expected a URL such as s3://bucket/prefix to publish to, got"):
        publish(good, str(good))

    def missing(*_: object, **__: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(addresses.fsspec, "filesystem", missing)
    with pytest.raises(DataError, match=r"s3://a/b: .*not installed; pip install 'sci-gpt\[s3\]'"):
        Store.open("s3://a/b")


def test_a_server_that_never_answers_is_asked_once_a_try(monkeypatch: pytest.MonkeyPatch) -> None:
    """The libraries' own retries are off and their waits limited: `reading` alone says how long a run waits."""
    assert addresses.CONNECT_SECONDS + addresses.READ_SECONDS <= 30
    changed = addresses.S3_OPTIONS["config_kwargs"] | {"read_timeout": 0.3}
    monkeypatch.setitem(addresses.S3_OPTIONS, "config_kwargs", changed)
    accepted: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as silent, monkeypatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{silent.getsockname()[1]}",
            "AWS_ACCESS_KEY_ID": "a",
            "AWS_SECRET_ACCESS_KEY": "b",
        }.items():
            patch.setenv(name, value)
        with pytest.raises(DataError, match=r"s3://bucket/store/manifest\.json cannot be read: .*[Tt]ime"):
            Store.open("s3://bucket/store", Patience(attempts=2, wait_seconds=0.0))
        silent.settimeout(0.2)
        while len(accepted) < 10:
            try:
                accepted.append(silent.accept()[0])
            except TimeoutError:
                break
    for one in accepted:
        one.close()
    assert len(accepted) == 2


def test_a_run_whose_server_stays_away_stops_at_its_limit_with_a_summary(
    server: S3Server, good: Path, tmp_path: Path
) -> None:
    """`sci-gpt pretrain` on a URL trains, until the server is killed under it."""
    config = toy_config(
        server.url("store"),
        tmp_path / "run",
        schedule={"steps": 4000, "warmup_steps": 1, "cooldown_steps": 1},
        validation={"every": 4000, "windows": 1},
        checkpoint={"every": 4000},
        parallel={"processes": 1},
        reading={"attempts": 2, "wait_seconds": 0.0, "most_passed_over": 3},
    )
    (tmp_path / "run.yaml").write_text(show_config(config))
    command = [sys.executable, "-m", "sci_launch.cli", "pretrain", str(tmp_path / "run.yaml")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        deadline = time.monotonic() + 120
        while len(eaten_by(config)) < 3 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        server.kill()
        said = process.communicate(timeout=120)[0]
    finally:
        process.kill()
        process.wait()
        server.start()
    last = said.splitlines()[-1]
    assert process.returncode == 2, said
    assert "samples could not be read, more than the 3 of reading.most_passed_over" in last
    assert "s3://bucket/store/" in last and "Could not connect" in last
    trained = eaten_by(config)
    whole = [list(step.keys) for step in eaten(good, range(len(trained)))]
    assert len(trained) >= 3 and trained[:3] == whole[:3]


def eaten_by(config: PretrainConfig) -> list[list[str]]:
    """Keys of each step that a run of one process has logged."""
    log = keys_log(config.output, 0)
    return [row["keys"] for row in read_lines(log)] if log.exists() else []


def test_a_build_goes_to_a_url(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Built in data/NAME, copied; built again, neither is touched."""
    field(tmp_path / "field.nc", times=3000, shape=(12, 24))
    monkeypatch.chdir(tmp_path)
    config = config_of_build(tree(server.url("built"), tmp_path / "field.nc"))
    said: list[str] = []
    report = build(config, say=said.append)
    assert report.path == "s3://bucket/built" and not report.kept
    assert any("MB copied to s3://bucket/built" in line for line in said)
    there, here = Store.open(server.url("built")), Store.open(tmp_path / "data" / "small")
    assert there.fingerprint == here.fingerprint == report.fingerprint
    same(*(store.read("field", "test", index=3, start=5, stop=25) for store in (there, here)))
    again = build(config, say=said.append)
    assert again.kept and said[-1] == "build small: s3://bucket/built holds this store already; kept"
