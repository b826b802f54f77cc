"""Bad input on the command line: exit code 2, one line on stderr with name and remedy, nothing changed on disk."""

from __future__ import annotations

import hashlib
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from sci_gpt.config import PretrainConfig, show_config
from sci_launch import cli
from test_cli import one_source
from test_forecast import table
from toy_model import make_run
from toy_store import write_store


@dataclass(frozen=True, kw_only=True)
class Desk:
    """What the cases work on: a built store of one table, a finished run on another store, and a nearly full disk."""

    folder: Path
    data: Path
    run: PretrainConfig
    tiny: Path

    @property
    def station(self) -> Path:
        return self.folder / "station.csv"

    def build(self, name: str, **changes: Any) -> list[str]:
        """A build into the existing store, with `a__b` for the key a.b of the only source."""
        tree = yaml.safe_load(self.data.read_text(encoding="utf-8"))
        source = tree["sources"][0]
        for key, value in changes.items():
            *parents, last = key.split("__")
            node = tree if parents[:1] == ["calendar"] else source
            for part in parents:
                node = node[int(part) if part.isdigit() else part]
            node[last] = value
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tree), encoding="utf-8")
        return ["build", str(path)]

    def pretrain(self, *overrides: str) -> list[str]:
        """The finished run's configuration, told to train on, with overrides."""
        path = self.folder / "run.yaml"
        path.write_text(show_config(self.run), encoding="utf-8")
        words = ["pretrain", str(path), "--processes", "1", "--set", "schedule.steps=48"]
        return words + [word for override in overrides for word in ("--set", override)]

    def forecast(self, path: Path, *words: str, out: Path | None = None) -> list[str]:
        """A forecast by the finished run into the outputs folder."""
        target = out or self.folder / "out" / f"forecast{path.suffix}"
        return ["forecast", str(self.run.output), str(path), "--horizon", "1", "--out", str(target), *words]

    def write(self, name: str, content: bytes) -> Path:
        """A file among the inputs."""
        path = self.folder / name
        path.write_bytes(content)
        return path


@dataclass(frozen=True, kw_only=True)
class Case:
    """A command line, the name and the remedy that its error must hold, and the folder that it must not touch.

    fresh: run the command in a process of its own (`python -m sci_launch.cli`), with files of at most `limit` bytes.
    """

    argv: Callable[[Desk], list[str]]
    name: str
    remedy: str
    output: Callable[[Desk], Path] = lambda desk: desk.folder / "store"
    fresh: bool = False
    limit: int | None = None


def run_output(desk: Desk) -> Path:
    return desk.run.output


def outputs(desk: Desk) -> Path:
    return desk.folder / "out"


GARBAGE = bytes(range(256)) * 8
# Its test split would begin after the data's end.
LATE = {
    "name": "all",
    "start": "2001-01-01",
    "train_until": "2001-12-01",
    "valid_until": "2001-12-20",
    "end": "2001-12-31",
}

CASES = {
    "missing file, build": Case(
        argv=lambda desk: desk.build("a", files=["nowhere.csv"]), name="'nowhere.csv'", remedy="correct `files`"
    ),
    "missing file, forecast": Case(
        argv=lambda desk: desk.forecast(desk.folder / "nowhere.nc"),
        name="nowhere.nc",
        remedy="check the path",
        output=outputs,
    ),
    "missing file, inspect": Case(
        argv=lambda desk: ["inspect", str(desk.folder / "nowhere.nc")], name="nowhere.nc", remedy="give a data file"
    ),
    "missing configuration": Case(
        argv=lambda desk: ["pretrain", "nowhere.yaml"],
        name="'nowhere.yaml'",
        remedy="examples are in configs/",
        output=run_output,
    ),
    "missing store": Case(
        argv=lambda desk: desk.pretrain("data=nowhere/store"),
        name="'nowhere/store'",
        remedy="make it with `sci-gpt build`",
        output=run_output,
    ),
    "missing model": Case(
        argv=lambda desk: [
            "forecast",
            "nowhere/run",
            str(desk.station),
            "--horizon",
            "1",
            "--out",
            str(desk.folder / "out/f.csv"),
        ],
        name="'nowhere/run'",
        remedy="give a run folder",
        output=outputs,
    ),
    "unreadable file, build": Case(
        argv=lambda desk: desk.build("b", files=[str(desk.write("garbage.csv", GARBAGE))]),
        name="garbage.csv",
        remedy="give a whole file",
    ),
    "unreadable file, forecast": Case(
        argv=lambda desk: desk.forecast(desk.write("garbage.nc", GARBAGE)),
        name="garbage.nc",
        remedy="give a whole netcdf file",
        output=outputs,
    ),
    "unreadable file, inspect": Case(
        argv=lambda desk: ["inspect", str(desk.write("garbage.mseed", GARBAGE))],
        name="garbage.mseed",
        remedy="give a whole file",
    ),
    "variable not in the table, build": Case(
        argv=lambda desk: desk.build("c", options__columns__co2__variable="mole_fraction_of_carbon_dioxid"),
        name="'mole_fraction_of_carbon_dioxid'",
        remedy="nearest: 'mole_fraction_of_carbon_dioxide_in_air'",
    ),
    "variable not in the table, forecast": Case(
        argv=lambda desk: desk.forecast(desk.station, "--columns", "wind_speed=wind_sped"),
        name="'wind_sped'",
        remedy="nearest: 'wind_speed'",
        output=outputs,
    ),
    "unit that does not convert, build": Case(
        argv=lambda desk: desk.build("d", options__columns__co2__unit="hPa"),
        name="'hPa'",
        remedy="name one of ['1e-6', 'ppm']",
    ),
    "unit that does not convert, forecast": Case(
        argv=lambda desk: desk.forecast(desk.station, "--columns", "wind_speed=wind_speed:kg"),
        name="'kg'",
        remedy="name one of",
        output=outputs,
        fresh=True,
    ),
    "window longer than the data, pretrain": Case(
        argv=lambda desk: desk.pretrain(
            "mixture.station.frames=5000", "row_length=20000", f"output={desk.folder}/out/long"
        ),
        name="'station'",
        remedy="lower",
        output=outputs,
    ),
    "window longer than the data, forecast": Case(
        argv=lambda desk: desk.forecast(desk.write("short.csv", table(2).to_csv().encode())),
        name="short.csv",
        remedy="give a longer record",
        output=outputs,
    ),
    "empty split": Case(
        argv=lambda desk: desk.build("e", calendar__eras=[LATE]),
        name="'co2'",
        remedy="split",
    ),
    "NaNs everywhere, build": Case(
        argv=lambda desk: desk.build("f", files=[str(desk.write("nans.csv", nans("co2")))]),
        name="co2/station",
        remedy="check the file, its fill values",
    ),
    "NaNs everywhere, forecast": Case(
        argv=lambda desk: desk.forecast(desk.write("nans2.csv", nans("wind_speed"))),
        name="nans2.csv",
        remedy="mend the data",
        output=outputs,
    ),
    "misspelt key, build": Case(
        argv=lambda desk: desk.build("g", licens="CC0"),
        name="'sources.0.licens'",
        remedy="nearest: 'licence'",
        fresh=True,
    ),
    "misspelt key, pretrain": Case(
        argv=lambda desk: desk.pretrain("optimizer.lerning_rate=1"),
        name="'optimizer.lerning_rate'",
        remedy="nearest: 'learning_rate'",
        output=run_output,
    ),
    "misspelt option of a reader": Case(
        argv=lambda desk: desk.build("h", options__colums={}), name="'colums'", remedy="nearest: 'columns'"
    ),
    "checkpoint of another fingerprint, pretrain": Case(
        argv=lambda desk: desk.pretrain(f"data={desk.folder}/other"),
        name="fingerprint",
        remedy="output",
        output=run_output,
    ),
    "checkpoint of another fingerprint, evaluate": Case(
        argv=lambda desk: [
            "evaluate",
            *desk.pretrain(f"data={desk.folder}/other")[1:2],
            "--set",
            f"data={desk.folder}/other",
        ],
        name="0123456789ab",
        remedy="train on this store",
        output=run_output,
    ),
    "full disk, build": Case(
        argv=lambda desk: ["build", str(desk.data), "--set", f"output={desk.tiny}/store"],
        name="tiny/store",
        remedy="free some space",
        output=lambda desk: desk.tiny,
        fresh=True,
        limit=4096,
    ),
    "full disk, pretrain": Case(
        argv=lambda desk: desk.pretrain("checkpoint.keep=1000000000", f"output={desk.tiny}/run"),
        name="tiny/run",
        remedy="make room or lower checkpoint.keep",
        output=lambda desk: desk.tiny,
    ),
    "full disk, forecast": Case(
        argv=lambda desk: desk.forecast(desk.station, "--quantiles", many(), out=desk.tiny / "forecast.csv"),
        name="tiny/forecast.csv",
        remedy="free some space",
        output=lambda desk: desk.tiny,
        fresh=True,
        limit=4096,
    ),
}


def nans(variable: str) -> bytes:
    """A year of days without a value."""
    days = pd.date_range("2001-01-01", periods=365, freq="D")
    return pd.DataFrame({"date": days, variable: np.full(365, np.nan)}).to_csv(index=False, na_rep="nan").encode()


def many() -> str:
    """So many quantiles that their table is longer than the nearly full disk."""
    return ",".join(f"{level / 1000:.3f}" for level in range(1, 999))


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    folder = tmp_path_factory.mktemp("desk")
    for name in ("out", "tiny"):
        (folder / name).mkdir()
    data = one_source(folder)
    assert cli.main(["build", str(data)]) == 0
    run = make_run(folder / "toy", parallel={"processes": 1})
    other = write_store(folder / "other") / "manifest.json"
    other.write_text(other.read_text().replace("0123456789abcdef", "fedcba9876543210"))
    table(40).to_csv(folder / "station.csv", index_label="time")
    mounted = _mount(folder / "tiny")
    (folder / "tiny" / "forecast.csv").write_text("an earlier forecast, which must survive")
    yield Desk(folder=folder, data=data, run=run, tiny=folder / "tiny")
    if mounted:
        subprocess.run(["umount", str(folder / "tiny")], check=True)


def _mount(folder: Path) -> bool:
    """A file system of 16 KiB where this process may mount one; elsewhere a limit on file sizes stands for it."""
    command = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(folder)]
    return os.geteuid() == 0 and subprocess.run(command, capture_output=True, check=False).returncode == 0


def tree_hash(folder: Path) -> str:
    """Digest over names and contents of everything below a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        digest.update(str(path.relative_to(folder)).encode())
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()


def call(arguments: list[str], *, limit: int | None) -> tuple[int, str]:
    """The command line in a process of its own; its exit code and stderr."""

    def small_files() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [sys.executable, "-m", "sci_launch.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=small_files)
    return done.returncode, done.stderr


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_refused_in_one_line_and_changes_nothing(
    desk: Desk, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    case = CASES[name]
    arguments = case.argv(desk)
    folder = case.output(desk)
    before = tree_hash(folder)
    if case.fresh:
        code, error = call(arguments, limit=None if desk.tiny.is_mount() else case.limit)
    else:
        capfd.readouterr()
        code, error = cli.main(arguments), capfd.readouterr().err
    assert code == 2, error
    assert error.count("\n") == 1 and error.startswith("sci-gpt: "), error
    assert case.name in error, error
    assert case.remedy in error, error
    assert "Traceback" not in error
    assert tree_hash(folder) == before, f"{folder} was changed"


def test_every_kind_of_bad_input_that_was_asked_for_has_a_case() -> None:
    asked = (
        "missing file",
        "unreadable file",
        "variable not in the table",
        "unit that does not convert",
        "window longer than the data",
        "empty split",
        "NaNs everywhere",
        "misspelt key",
        "checkpoint of another fingerprint",
        "full disk",
    )
    for kind in asked:
        assert any(name.startswith(kind) for name in CASES), kind
