"""A build in jobs: whoever runs them, and however often it is killed, the store is the same; memory stays bounded."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import netCDF4
import numpy as np
import psutil
import pytest
import yaml

from sci_gpt.config import BuildConfig, DataConfig
from sci_gpt.config_file import parse_config
from sci_gpt.data import build_job, statistics
from sci_gpt.data.build_job import DONE, is_done, plan_jobs, run_job
from sci_gpt.data.duplicates import DuplicateGuard
from sci_gpt.data.statistics import TrainingStatistics
from sci_gpt.data.store import Store
from sci_gpt.errors import ConfigError, DataError
from sci_gpt.recipes import build_workers
from sci_gpt.recipes.build import build, source_settings, split_rule
from sci_gpt.recipes.build_place import workplace
from test_data_statistics import weather

ROWS, COLUMNS, TIMES = 12, 24, 3000


def field(path: Path, *, times: int, shape: tuple[int, int]) -> None:
    """A packed netCDF file of hourly fields from 2000 on: independent normal numbers, int16 with scale and offset."""
    random = np.random.default_rng(0)
    axes = {
        "time": ("hours since 2000-01-01", np.arange(float(times))),
        "lat": ("degrees_north", np.linspace(80, -80, shape[0])),
        "lon": ("degrees_east", np.arange(shape[1]) * 360.0 / shape[1]),
    }
    with netCDF4.Dataset(path, "w") as file:
        for name, (units, values) in axes.items():
            file.createDimension(name, len(values))
            file.createVariable(name, "f8", (name,))[:] = values
            file[name].units = units
        variable = file.createVariable("t2", "i2", tuple(axes), fill_value=np.int16(-32768))
        variable.set_auto_maskandscale(False)
        variable.setncatts({"units": "K", "scale_factor": 0.01, "add_offset": 280.0})
        for start in range(0, times, 500):
            rows = min(500, times - start)
            variable[start : start + rows] = (1000 * random.standard_normal((rows, *shape))).astype(np.int16)


def tree(output: Path | str, path: Path, **changes: Any) -> dict[str, Any]:
    """The configuration of a build of one gridded file: 12 tiles, or as `changes` say."""
    source = {
        "name": "field",
        "reader": "netcdf_grid",
        "modality": "grid",
        "nature": "analysis",
        "files": [str(path)],
        "options": {"variable": "t2", "name": "air_temperature", "tile": [4, 6]},
        "licence": "none",
        "citation": "made up",
        "split": {"by": "time", "era": "one"},
    }
    era = {"name": "one", "start": "2000-01-01", "train_until": "2000-03-01", "valid_until": "2000-03-31"}
    calendar = {"gap_days": 2, "eras": [{**era, "end": "2000-12-31"}]}
    sizes = {"stretch_megabytes": 0.05, "shard_megabytes": 0.1, "build": {"workers": 0}}
    return {"name": "small", "output": str(output), "calendar": calendar, "sources": [source]} | sizes | changes


def config_of(mapping: dict[str, Any]) -> DataConfig:
    return parse_config(mapping, DataConfig, where="the test")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def command(folder: Path, mapping: dict[str, Any]) -> list[str]:
    """`sci-gpt build` of a configuration that is written to the folder."""
    (folder / "build.yaml").write_text(yaml.safe_dump(mapping, sort_keys=False))
    return [sys.executable, "-m", "sci_launch.cli", "build", str(folder / "build.yaml")]


def tree_of(process: psutil.Process) -> list[psutil.Process]:
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("archive") / "field.nc"
    field(path, times=TIMES, shape=(ROWS, COLUMNS))
    return path


@pytest.fixture(scope="module")
def straight(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of a build in one process that nobody interrupted."""
    output = tmp_path_factory.mktemp("straight") / "store"
    build(config_of(tree(output, archive)), say=lambda line: None)
    return output


def without_place(files: dict[str, bytes]) -> dict[str, bytes]:
    """All but the data card, which shows where the store is."""
    return {name: content for name, content in files.items() if name != "card.html"}


def test_the_store_holds_what_the_file_holds(archive: Path, straight: Path) -> None:
    store = Store.open(straight)
    with netCDF4.Dataset(archive) as file:
        truth = np.asarray(file["t2"][:], np.float32)
    found = 0
    for split in ("train", "valid", "test"):
        for index, record in enumerate(store.stretches("field", split)):
            sample = store.read("field", split, index=index, start=0, stop=int(record["num_times"]))
            row, column = (int(word[1:]) for word in sample.key.split("/")[1].split("-")[1:])
            first = round((sample.time[0] - np.datetime64("2000-01-01", "s").astype(int)) / 3600)
            box = truth[first : first + sample.num_times, row : row + 4, column : column + 6]
            np.testing.assert_allclose(sample.values[:, 0], box, atol=2e-5)
            found += sample.values.size
    gaps = 2 * 2 * 24 + 1  # hours of two gaps, and the first, which is the end of 1999
    assert found == (TIMES - gaps) * ROWS * COLUMNS
    shards = list((straight / "field" / "train").glob("*.tar"))
    assert len(shards) > 5 and len({path.stat().st_size for path in shards[:-1]}) < 4, "shards of one size, about"
    store.verify("field", "train")


def test_a_killed_build_goes_on_to_the_same_store(archive: Path, straight: Path, tmp_path: Path) -> None:
    """Two workers; all processes are killed when a few jobs are finished; these are not run again."""
    line = command(tmp_path, tree(tmp_path / "store", archive) | {"build": {"workers": 2}})
    process = subprocess.Popen(line, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    done: list[Path] = []
    until = time.monotonic() + 60
    while len(done) < 3:
        done = list(tmp_path.glob(f".store.partial-*/field/??????/{DONE}"))
        assert process.poll() is None and time.monotonic() < until, process.communicate()[0].decode()
    workers = tree_of(psutil.Process(process.pid))
    for one in workers:
        one.send_signal(signal.SIGSTOP)  # nobody finishes anything while the others are killed
    finished = {path.parent: path.stat().st_ino for path in tmp_path.glob(f".store.partial-*/field/??????/{DONE}")}
    for one in workers:
        one.kill()
    psutil.wait_procs(workers, timeout=10)
    process.communicate()
    shards = {path.stat().st_ino for folder in finished for path in folder.rglob("*.tar")}
    assert not (tmp_path / "store").exists() and shards
    again = subprocess.run(line, capture_output=True, text=True, check=True)
    total = len(straight_jobs(archive, tmp_path))
    assert 3 <= len(finished) < total
    assert f"{len(finished)} of {total} jobs were finished before; kept" in again.stdout
    assert without_place(contents(tmp_path / "store")) == without_place(contents(straight))
    assert shards <= {path.stat().st_ino for path in (tmp_path / "store").rglob("*.tar")}, "not written again"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def straight_jobs(archive: Path, folder: Path) -> tuple[build_job.Job, ...]:
    config = config_of(tree(folder / "store", archive))
    source = config.sources[0]
    return plan_jobs(
        source_settings(config, source),
        split_rule(config, source),
        shard_bytes=int(config.shard_megabytes * 1e6),
        num_year=2,
        num_day=2,
    )


@pytest.fixture
def scheduler(tmp_path: Path) -> Iterator[str]:
    """The address of a Dask scheduler with one worker, processes of their own on loopback."""
    said = tmp_path / "scheduler.json"
    dask = [sys.executable, "-m", "dask"]
    place = ["--scheduler-file", str(said)]
    with (tmp_path / "dask.log").open("w") as log:
        processes = [
            subprocess.Popen(line, stdout=log, stderr=log, cwd=tmp_path)
            for line in (
                [*dask, "scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", *place],
                [*dask, "worker", "--host", "127.0.0.1", "--nthreads", "1", "--no-dashboard", *place],
            )
        ]
        until = time.monotonic() + 30
        while not said.exists() or not said.read_text().strip():
            assert time.monotonic() < until, (tmp_path / "dask.log").read_text()
            time.sleep(0.02)
        yield yaml.safe_load(said.read_text())["address"]
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(timeout=20)


def test_workers_of_a_scheduler_elsewhere_build_the_same(
    archive: Path, straight: Path, tmp_path: Path, scheduler: str
) -> None:
    said: list[str] = []
    mapping = tree(tmp_path / "store", archive) | {"build": {"scheduler": scheduler}}
    build(config_of(mapping), say=said.append)
    assert without_place(contents(tmp_path / "store")) == without_place(contents(straight))
    assert any("MB/s, ETA 0 s" in line for line in said)
    lost = mapping | {"output": str(tmp_path / "other")}
    lost["sources"][0]["files"] = [str(tmp_path / "field.nc")]
    (tmp_path / "field.nc").write_bytes(archive.read_bytes()[:200_000])
    with pytest.raises(DataError, match=r"field\.nc cannot be read as netCDF"):
        build(config_of(lost), say=said.append)
    assert not (tmp_path / "other").exists()


def test_a_scheduler_that_does_not_answer_is_named(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_workers, "_CONNECT_SECONDS", 1)
    mapping = tree(tmp_path / "store", archive) | {"build": {"scheduler": "tcp://127.0.0.1:9"}}
    with pytest.raises(
        ConfigError, match=r"no Dask scheduler answers at 'tcp://127\.0\.0\.1:9'.*start `dask scheduler`"
    ):
        build(config_of(mapping), say=lambda line: None)
    with pytest.raises(ConfigError, match="workers and memory_megabytes are of the local cluster"):
        config_of(tree(tmp_path, archive) | {"build": {"scheduler": "tcp://127.0.0.1:9", "workers": 2}})


def test_a_damaged_job_is_run_again(archive: Path, tmp_path: Path) -> None:
    job = straight_jobs(archive, tmp_path)[1]
    run_job(job, tmp_path)
    assert is_done(job, tmp_path)
    shard = next(job.folder(tmp_path).rglob("*.tar"))
    whole = shard.read_bytes()
    done = job.folder(tmp_path) / DONE
    said = done.read_bytes()
    for damage in ("torn", "flipped", "nothing said"):
        if damage == "torn":
            os.truncate(shard, len(whole) - 512)
        elif damage == "flipped":
            flip(shard, 5000)
        else:
            done.write_bytes(b"")
        assert not is_done(job, tmp_path), damage
        run_job(job, tmp_path)
        assert is_done(job, tmp_path) and shard.read_bytes() == whole and done.read_bytes() == said


def flip(path: Path, at: int) -> None:
    """Change one bit."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_jobs_that_were_cut_otherwise_are_run_again(archive: Path, straight: Path, tmp_path: Path) -> None:
    """Killed, and started again with other shards: no sample of the finished jobs is repeated or lost."""
    mapping = tree(tmp_path / "store", archive)
    fingerprint = Store.open(straight).fingerprint
    folder = tmp_path / f".store.partial-{fingerprint[:12]}"
    for job in straight_jobs(archive, tmp_path)[:3]:
        run_job(job, folder)
    said: list[str] = []
    build(config_of(mapping | {"shard_megabytes": 0.3}), say=said.append)
    assert not any("finished before" in line for line in said)
    one, two = (Store.open(path) for path in (straight, tmp_path / "store"))
    assert one.fingerprint == two.fingerprint
    for split in ("train", "valid", "test"):
        assert two.keys("field", split) == one.keys("field", split)


def test_a_damaged_store_is_built_again_and_a_new_licence_is_taken(archive: Path, tmp_path: Path) -> None:
    mapping = tree(tmp_path / "store", archive)
    build(config_of(mapping), say=lambda line: None)
    whole = contents(tmp_path / "store")
    said: list[str] = []
    for name in ("field/train/shard-00002.tar", "field/test/shard-00001.idx.npy"):
        flip(tmp_path / "store" / name, 700)
        said.clear()
        assert not build(config_of(mapping), say=said.append).kept
        stem = name.removesuffix(".tar").removesuffix(".idx.npy")
        assert any("cannot be kept: " in line and stem in line for line in said)
        assert contents(tmp_path / "store") == whole
    mapping["sources"][0]["licence"] = "CC-BY-4.0"
    assert build(config_of(mapping), say=said.append).kept
    store = Store.open(tmp_path / "store")
    assert store.manifest["sources"]["field"]["licence"] == "CC-BY-4.0"
    assert "CC-BY-4.0" in (tmp_path / "store" / "card.html").read_text()
    # Killed between the two renames that put a store in place.
    (tmp_path / "store").rename(tmp_path / ".store.old-1")
    assert build(config_of(mapping), say=said.append).kept
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_series_are_planned_with_what_comparing_them_takes(archive: Path, tmp_path: Path) -> None:
    job = straight_jobs(archive, tmp_path)[0]
    series = replace(job, settings=replace(job.settings, modality="series"))
    assert build_workers._compared([job]) == 0 < build_workers._compared([series, series]) == 20 * job.bytes
    little = BuildConfig(memory_megabytes=(build_workers.OWN_BYTES + build_workers._need([job])) / 1e6)
    assert build_workers._planned(little, [job])[0] == 1
    with pytest.raises(ConfigError, match="comparing series and traces for duplicates takes"):
        build_workers._planned(little, [series] * 50)


def test_one_build_at_a_time(archive: Path, tmp_path: Path) -> None:
    with (
        workplace(tmp_path / "store", "f" * 64),
        pytest.raises(DataError, match=r"another process is building .*store'; wait for it"),
    ):
        build(config_of(tree(tmp_path / "store", archive)), say=lambda line: None)


def test_too_little_memory_is_refused_before_anything_is_read(archive: Path, tmp_path: Path) -> None:
    mapping = tree(tmp_path / "store", archive) | {"build": {"workers": 2, "memory_megabytes": 300}}
    with pytest.raises(ConfigError, match=r"takes about \d+ MB, 300 MB are given.*raise build.memory_megabytes"):
        build(config_of(mapping), say=lambda line: None)
    assert list(tmp_path.iterdir()) == []


def test_memory_stays_under_its_bound(tmp_path: Path) -> None:
    """A packed file of 400 MB, 800 MB of float32: the whole tree of processes takes no more than it was given."""
    field(tmp_path / "field.nc", times=12_400, shape=(90, 180))
    assert (tmp_path / "field.nc").stat().st_size > 400e6
    mapping = tree(tmp_path / "store", tmp_path / "field.nc", stretch_megabytes=4, shard_megabytes=64)
    mapping["sources"][0]["options"]["tile"] = [30, 60]
    mapping["calendar"]["eras"][0] |= {"train_until": "2001-01-31", "valid_until": "2001-03-15", "end": "2001-12-31"}
    bound = 1_150e6
    process = psutil.Popen(
        command(tmp_path, mapping | {"build": {"workers": 2, "memory_megabytes": bound / 1e6}}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    peak = most = 0
    while process.poll() is None:
        sizes = []
        for one in tree_of(process):
            try:
                sizes.append(one.memory_info().rss)
            except psutil.NoSuchProcess:
                continue
        peak, most = max(peak, sum(sizes)), max(most, len(sizes))
        time.sleep(0.02)
    assert process.returncode == 0, process.stdout.read().decode()
    assert most >= 3, "this process and two workers"
    assert 400e6 < peak < bound, f"{peak / 1e6:.0f} MB"
    assert Store.open(tmp_path / "store").statistics["field"]["air_temperature"].std == pytest.approx(10, rel=1e-3)


def test_sums_are_saved_and_made_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stretch taken in piece by piece gives the moments of the whole, also the steps between the pieces."""
    sample = weather(1)
    empty = TrainingStatistics(source="s", variables=sample.variables, levels=sample.levels, num_year=2, num_day=2)
    whole, pieces = replace(empty, _sums=[]), replace(empty, _sums=[])
    whole.add(sample)
    monkeypatch.setattr(statistics, "_VALUES_AT_ONCE", 997)
    pieces.add(sample)
    whole.save(tmp_path / "sums.npz")
    assert empty.load(tmp_path / "sums.npz").finish() == whole.finish()
    for name, row in whole.finish().items():
        other = pieces.finish()[name]
        assert (other.count, other.minimum, other.maximum) == (row.count, row.minimum, row.maximum)
        assert [other.mean, other.std, other.step_std] == pytest.approx([row.mean, row.std, row.step_std], rel=1e-10)
        assert other.climatology == pytest.approx(row.climatology, rel=1e-8, abs=1e-8)


def test_nothing_seen_is_saved_too(tmp_path: Path) -> None:
    DuplicateGuard().save(tmp_path / "seen.npz")
    DuplicateGuard.load(tmp_path / "seen.npz").check()
