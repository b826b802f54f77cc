"""A desk for a case of bad input: copies of a store, a run and inputs; the installed command; what changed on disk."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from sci_gpt.config import PretrainConfig
from sci_gpt.config_file import show_config
from sci_gpt.train.run_folder import LOG, read_lines
from sci_launch import cli
from test_cli import one_source
from test_forecast import table
from toy_model import make_run
from toy_store import change_manifest

COMMAND = Path(sysconfig.get_path("scripts")) / "sci-gpt"
SECONDS = 90.0
# Limits the size of files and becomes the command: where no file system can be mounted this stands for a full disk.
LIMITED = (
    "import os, resource as r, sys; r.setrlimit(r.RLIMIT_FSIZE, (4096, 4096)); os.execv(sys.argv[1], sys.argv[1:])"
)
STEP = 24  # of the finished run's checkpoint
RARELY = ("checkpoint.every=1000", "validation.every=1000")
FREE = 256 * 1024  # bytes left on a disk that fills up: room for logs and for a part of a checkpoint


@dataclass(frozen=True, kw_only=True)
class Desk:
    """A folder of one case's own. Everything that its command line reads or may write lies below it.

    Attributes:
        folder: holds store/ (of co2.csv), toy/ (a store and a finished run on it), station.csv, out/ and disk/.
        mounted: disk/ is a small file system; otherwise files there are limited in size.
    """

    folder: Path
    mounted: bool = False

    @property
    def disk(self) -> Path:
        """A disk that is full or will be."""
        return self.folder / "disk"

    def build(self, *overrides: str, **changes: Any) -> list[str]:
        """A build into the existing store, with `a__b` for the key a.b of the calendar or of the only source."""
        tree = yaml.safe_load((self.folder / "data.yaml").read_text(encoding="utf-8"))
        for key, value in changes.items():
            *parents, last = key.split("__")
            node = tree if parents[:1] == ["calendar"] else tree["sources"][0]
            for part in parents:
                node = node[part]
            node[last] = value
        (self.folder / "changed.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
        return ["build", "changed.yaml", *_set(overrides)]

    def pretrain(self, *overrides: str, steps: int = STEP + 200, processes: int = 1) -> list[str]:
        """The finished run's configuration, told to train on until `steps`, with overrides."""
        longer = (f"schedule.steps={steps}", f"phases.0.until_step={steps}")
        return ["pretrain", "run.yaml", "--processes", str(processes), *_set((*longer, *RARELY, *overrides))]

    def evaluate(self, *overrides: str) -> list[str]:
        """An evaluation of the finished run."""
        return ["evaluate", "run.yaml", *_set(overrides)]

    def forecast(self, path: str, *words: str, model: str = "toy/run", out: str | None = None) -> list[str]:
        """A forecast by the finished run."""
        target = out or f"out/forecast{Path(path).suffix}"
        return ["forecast", model, path, "--horizon", "1", "--out", target, *words]

    def write(self, name: str, content: bytes) -> str:
        """A file among the inputs; returns its name."""
        (self.folder / name).write_bytes(content)
        return name

    def other_store(self) -> str:
        """A copy of the run's store with another fingerprint."""
        shutil.copytree(self.folder / "toy" / "store", self.folder / "other")
        change_manifest(self.folder / "other", {"fingerprint": "fedcba9876543210"})
        return "other"

    def run_on_disk(self) -> str:
        """The finished run, moved to the disk that will be full."""
        shutil.move(self.folder / "toy" / "run", self.disk / "run")
        return "disk/run"


def _set(overrides: tuple[str, ...]) -> list[str]:
    return [word for override in overrides for word in ("--set", override)]


def furnish(folder: Path) -> Path:
    """What every desk gets a copy of; returns `folder`."""
    for name in ("out", "disk"):
        (folder / name).mkdir(parents=True)
    assert cli.main(["build", str(one_source(folder))]) == 0
    tree = yaml.safe_load((folder / "data.yaml").read_text(encoding="utf-8"))
    tree["output"], tree["sources"][0]["files"] = "store", ["co2.csv"]
    (folder / "data.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    config = make_run(folder / "toy", parallel={"processes": 1})
    (folder / "run.yaml").write_text(show_config(_here(config)), encoding="utf-8")
    table(40).to_csv(folder / "station.csv", index_label="time")
    return folder


def _here(config: PretrainConfig) -> PretrainConfig:
    """The configuration with paths relative to the desk, where the command is started."""
    tracking = config.tracking.model_copy(update={"uri": "sqlite:///mlflow/mlflow.db", "artifacts": "mlflow/artifacts"})
    return config.model_copy(
        update={"output": Path("toy/run"), "data": Path("toy/store"), "tracking": tracking},
    )


def open_desk(template: Path, folder: Path, *, disk_size: str | None) -> Desk:
    """A copy of the template; at disk/ a file system of `disk_size` (as mount takes it) where that is permitted."""
    shutil.copytree(template, folder)
    if disk_size is None:
        return Desk(folder=folder)
    command = ["mount", "-t", "tmpfs", "-o", f"size={disk_size}", "tmpfs", str(folder / "disk")]
    mounted = os.geteuid() == 0 and subprocess.run(command, capture_output=True, check=False).returncode == 0
    return Desk(folder=folder, mounted=mounted)


def close_desk(desk: Desk) -> None:
    """Unmount its disk."""
    if desk.mounted:
        subprocess.run(["umount", "--lazy", str(desk.disk)], check=True)


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a command ended: exit code, what it printed, and the paths that came, went or changed meanwhile."""

    code: int
    output: str
    error: str
    changed: list[str]


def run(
    desk: Desk, arguments: list[str], *, kept: str = ".", limited: bool = False, meanwhile: Callable[..., None] | None
) -> Ended:
    """The installed command in a process of its own, started in the desk's folder.

    Args:
        desk: of the case.
        arguments: after `sci-gpt`.
        kept: the folder in which changes are looked for.
        limited: no file may grow beyond 4 KiB.
        meanwhile: called with the desk and the process while it runs.
    """
    before = snapshot(desk.folder / kept)
    limit = [sys.executable, "-c", LIMITED] if limited else []
    process = subprocess.Popen(
        [*limit, str(COMMAND), *arguments],
        cwd=desk.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        if meanwhile is not None:
            meanwhile(desk, process)
        output, error = process.communicate(timeout=SECONDS)
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
    after = snapshot(desk.folder / kept)
    changed = [name for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)]
    return Ended(code=process.returncode, output=output, error=error, changed=changed)


def snapshot(folder: Path) -> dict[str, tuple[int, str]]:
    """{path: (size, sha256)} of every file below a folder; folders are there with neither."""
    found = {}
    for path in folder.rglob("*"):
        data = path.read_bytes() if path.is_file() else None
        sized = (-1, "") if data is None else (len(data), hashlib.sha256(data).hexdigest())
        found[str(path.relative_to(folder))] = sized
    return found


def fill_the_disk_and_save(desk: Desk, process: subprocess.Popen[str]) -> None:
    """When the run on the disk has made a step: leave too little room there for a checkpoint, and ask for one."""
    deadline = time.monotonic() + SECONDS
    while not any(record["step"] > STEP for record in read_lines(desk.disk / "run" / LOG)):
        if process.poll() is not None or time.monotonic() > deadline:
            return  # it ended on its own, or hangs: the exit code tells
        time.sleep(0.02)
    workers = psutil.Process(process.pid).children()
    if desk.mounted:
        (desk.disk / "ballast").write_bytes(bytes(shutil.disk_usage(desk.disk).free - FREE))
    else:
        workers[-1].rlimit(psutil.RLIMIT_FSIZE, (FREE, FREE))
    process.send_signal(signal.SIGUSR2)  # the launcher, which tells a worker
