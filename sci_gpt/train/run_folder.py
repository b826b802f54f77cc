"""The run folder: names of its files, its lock, appended logs that a resume cuts back, and the end markers."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sci_gpt.errors import CheckpointError, ConfigError

CONFIG = "config.yaml"
LOG = "log.jsonl"
COMPLETE = "complete.json"
REQUEUE = "requeue"
TRACKING = "tracking.json"


def keys_log(run: Path, rank: int) -> Path:
    """Where a rank writes the samples that it consumed: one line per step."""
    return run / "keys" / f"rank-{rank}.jsonl"


def read_complete(run: Path) -> dict[str, Any] | None:
    """What a finished run left: {"step", "checkpoint"} (the path relative to the run), None while it is not finished.

    Raises:
        CheckpointError: the run is marked complete, but its last checkpoint is gone.
    """
    path = run / COMPLETE
    if not path.exists():
        return None
    complete: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if not (run / complete["checkpoint"] / "manifest.json").exists():
        raise CheckpointError(
            f"{path} says that the run is complete, but {complete['checkpoint']!r} holds no checkpoint; "
            f"delete {path} to train on from the last one, or the folder to start anew"
        )
    return complete


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold the run folder: two trainings of one run would write over each other. The system frees it with the process.

    Raises:
        ConfigError: another process holds it.
    """
    run.mkdir(parents=True, exist_ok=True)
    with (run / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"another process is training in {run}; wait for it, stop it, or give this run another output"
            ) from error
        yield


def read_lines(path: Path, *, until: int | None = None) -> list[dict[str, Any]]:
    """The records of a .jsonl file, those of steps up to `until` where that is given.

    A missing file holds none. A last line cut by a kill is left out; so are, with `until`, damaged lines after a record
    of that step or a later one: what a machine that lost its power did not bring to the disk.

    Raises:
        CheckpointError: another line is no record, which only a damaged disk or an editor leaves.
    """
    if not path.exists():
        return []
    records: list[dict[str, Any]] = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            record = json.loads(line.decode())
            if not isinstance(record, dict):
                raise ValueError("not a record")
        except ValueError as error:
            if until is not None and records and records[-1]["step"] >= until:
                break
            raise CheckpointError(
                f"{path}, line {number}: expected a JSON record, got {line[:40]!r} ({error}); remove that line: the "
                "run goes on from its last checkpoint, and what the line told of stays missing from the log"
            ) from error
        records.append(record)
    return [record for record in records if until is None or record["step"] <= until]


def cut_back(run: Path, step: int) -> None:
    """Remove what the logs hold beyond the checkpoint of `step` from which the run goes on, and the end markers."""
    for path in [run / LOG, *sorted((run / "keys").glob("rank-*.jsonl"))]:
        if path.exists():
            write_whole(path, "".join(json.dumps(record) + "\n" for record in read_lines(path, until=step)))
    for name in (COMPLETE, REQUEUE):
        (run / name).unlink(missing_ok=True)


def set_aside(checkpoint: Path) -> Path:
    """Give a damaged checkpoint a name that no checkpoint has, so that it is kept and never taken for one."""
    aside = checkpoint.with_name(f"{checkpoint.name}.damaged")
    number = 1
    while aside.exists():
        number += 1
        aside = checkpoint.with_name(f"{checkpoint.name}.damaged-{number}")
    return checkpoint.rename(aside)


def write_marker(run: Path, name: str, *, content: Mapping[str, Any]) -> None:
    """Write a small JSON file in one piece."""
    write_whole(run / name, json.dumps(content))


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file in one piece and bring it to the disk: the name never holds a part, and the old content is not lost.

    Several processes may write the same file at once; the last one's content stays. A text is written as UTF-8.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.partial")
    with naming(path):
        try:
            with partial.open("wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            rename_durably(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def rename_durably(partial: Path, path: Path) -> None:
    """Atomic rename, and the folder's entry on disk."""
    partial.replace(path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Bring a folder's entries to the disk: without it a file's name may be lost with the machine's power."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an OSError that says not where it happened (a write to a full disk does not) the name of the file."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


class LineLog:
    """Appends records to a .jsonl file; each line is handed to the system at once, so that a kill loses none.

    A machine that loses its power loses what came after the last `sync`.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._file = path.open("a", encoding="utf-8")
        for folder in (path.parent, path.parent.parent):  # the file's name, and its folder's
            sync_folder(folder)

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record."""
        with naming(self._path):
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()

    def sync(self) -> None:
        """Bring what was appended to the disk."""
        with naming(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Bring the file to the disk and close it."""
        self.sync()
        self._file.close()
