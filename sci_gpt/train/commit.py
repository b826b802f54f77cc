"""Write a checkpoint without collectives: each rank leaves its part and a list, rank 0 writes the manifest last.

Asynchronous: `save` copies what the rank holds into memory of its own and returns; a thread does the rest. One save is
under way at a time.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import struct
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from sci_gpt.errors import CheckpointError
from sci_gpt.train.checkpoint import (
    FORMAT,
    MANIFEST,
    STATE,
    committed,
    file_sha256,
    read_state,
    sealed,
    step_folder,
    step_of,
    torn,
)
from sci_gpt.train.fragments import Holding
from sci_gpt.train.retention import Retention
from sci_gpt.train.run_folder import rename_durably, sync_folder, write_whole
from sci_gpt.train.staging import Staging

_POLL_SECONDS = 0.02
_TELL_SECONDS = 1.0  # between two looks at whether a save that is waited for goes on
_LEAVING_SECONDS = 10.0  # for other ranks' parts, when the run has failed meanwhile: they may be dead


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A committed checkpoint: after how many steps, how long the save held up training, how long it took in all."""

    step: int
    blocked_seconds: float
    seconds: float


class CheckpointWriter:
    """One rank's writer of a run's checkpoints. As a context it is left with nothing under way.

    Args:
        run: the run folder.
        rank, size: in the world.
        session: a text that all ranks of this start share and no other start has: part lists of an earlier, killed
            attempt at the same step are not mistaken for this one's.
        retention: which committed checkpoints stay.
        asynchronous: `save` returns when the rank's holding is copied; otherwise when its part is written.
        told: rank 0 calls it after each commit, from the thread that wrote.
        timeout_seconds: how long rank 0 waits for the other ranks' part lists.
    """

    def __init__(
        self,
        run: Path,
        *,
        rank: int,
        size: int,
        session: str,
        retention: Retention | None = None,
        asynchronous: bool = False,
        told: Callable[[Saved], None] | None = None,
        timeout_seconds: float = 600.0,
    ) -> None:
        self.run, self.rank, self.size, self.session = run, rank, size, session
        self.retention, self.asynchronous, self.told = retention or Retention(), asynchronous, told
        self.timeout_seconds = timeout_seconds
        self._staging = Staging()
        self._losses: dict[int, float | None] = {}
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        self._left_at: float | None = None
        self._moves = 0
        self.moving: Callable[[], None] = lambda: None  # called while `finish` waits for a save that goes on
        # Called by the thread that writes, before this rank's part counts: what must be on the disk with it.
        self.before_part: Callable[[], None] = lambda: None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None:
            self.finish()
        else:
            self._leave()

    def prepare(self, holding: Holding) -> None:
        """Take the memory that saves of this size need, so that not even the first one waits for it."""
        if self.asynchronous:
            self._staging.reserve(holding)

    def save(self, step: int, holding: Holding, *, state: Mapping[str, Any]) -> Path:
        """Write this rank's part; rank 0 then waits for all parts, commits, and removes checkpoints that need not stay.

        Waits for the save before, if that is still under way.

        Args:
            step: completed steps.
            holding: what this rank owns (see `fragments.hold`); free to change when this returns.
            state: for state.json (rank 0's is written).

        Raises:
            CheckpointError: a rank could not write (a full disk), or its part list did not come in time. The unfinished
                folder is removed; earlier checkpoints are as they were. Asynchronous: raised by `check`, by the next
                save, or by `finish`, whichever comes first.
        """
        begun = time.monotonic()
        self.finish()
        folder = step_folder(self.run, step)
        if (folder / MANIFEST).exists():
            raise CheckpointError(f"{folder} is already committed; a step is saved once")
        if not self.asynchronous:
            self._write(folder, step, holding=holding, state=state)
            self._tell(step, begun=begun, freed=time.monotonic())
            return folder
        staged, content, freed = self._staging.copy(holding), dict(state), time.monotonic()

        def work() -> None:
            try:
                self._write(folder, step, holding=staged, state=content)
                self._tell(step, begun=begun, freed=freed)
            except Exception as error:  # noqa: BLE001  whatever it is, the thread that trains must hear of it
                self._failure = error

        # A daemon: a process that is told to go must not wait here for ranks that are dead.
        self._thread = threading.Thread(target=work, name="checkpoint", daemon=True)
        self._thread.start()
        return folder

    def check(self) -> None:
        """Raise what a save in the background has failed of, once; never waits."""
        if self._thread is not None and not self._thread.is_alive():
            self.finish()

    def finish(self) -> None:
        """Wait for the save that is under way; on rank 0 its checkpoint is committed when this returns.

        Raises:
            CheckpointError: it failed (see `save`).
        """
        if self._thread is not None:
            seen = self._moves
            while self._thread.is_alive():
                self._thread.join(_TELL_SECONDS)
                if self._moves != seen:
                    seen = self._moves
                    self.moving()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _leave(self) -> None:
        """The run has failed: let a save under way come to its end, but do not wait long for ranks that may be dead."""
        self._left_at = time.monotonic()
        try:
            self.finish()
        except Exception as error:  # noqa: BLE001  the error that is under way says why the run ends; this one is beside it
            print(f"warning: {error}", file=sys.stderr, flush=True)

    def _tell(self, step: int, *, begun: float, freed: float) -> None:
        if self.told is not None and self.rank == 0:
            self.told(Saved(step=step, blocked_seconds=freed - begun, seconds=time.monotonic() - begun))

    def _write(self, folder: Path, step: int, *, holding: Holding, state: Mapping[str, Any]) -> None:
        cause: OSError | None = None
        try:
            self._write_part(folder, holding)
        except Exception as error:
            self._leave_failure(folder, error)
            if not isinstance(error, OSError):
                raise
            cause = error
        if self.rank == 0:
            self._commit(folder, step, holding=holding, state=state, own_failure=cause)
            self._retire()
        elif cause is not None:
            raise self._failed(folder, str(cause)) from cause

    @staticmethod
    def remove_torn(run: Path) -> list[Path]:
        """Remove what killed saves left in a run folder that this process holds; returns the folders removed."""
        folders = torn(run)
        for folder in folders:
            shutil.rmtree(folder)
        return folders

    def _write_part(self, folder: Path, holding: Holding) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for parent in (folder.parent, self.run):  # the names of the folder and of the one that it is in
            sync_folder(parent)
        path = folder / f"rank-{self.rank:05d}.safetensors"
        part = {
            "format": FORMAT,
            "session": self.session,
            "rank": self.rank,
            "file": path.name,
            "sha256": write_safetensors(path, holding.tensors, moved=self._moved),
            "adam_step": holding.adam_step,
            "fragments": holding.fragments,
        }
        self.before_part()
        write_whole(self._part_list(folder, self.rank), json.dumps(part))

    def _moved(self) -> None:
        self._moves += 1

    def _part_list(self, folder: Path, rank: int) -> Path:
        return folder / f"rank-{rank:05d}.parts.json"

    def _leave_failure(self, folder: Path, error: Exception) -> None:
        """Free this rank's share of the disk and leave a note that rank 0 finds at once instead of waiting."""
        for path in folder.glob(f"rank-{self.rank:05d}.*"):
            path.unlink(missing_ok=True)
        with suppress(OSError):  # on a full disk the note stays empty, and its name says enough
            self._failure_note(folder, self.rank).write_text(str(error), encoding="utf-8")

    def _failure_note(self, folder: Path, rank: int) -> Path:
        return folder / f"rank-{rank:05d}.failed-{self.session}"

    def _commit(
        self, folder: Path, step: int, *, holding: Holding, state: Mapping[str, Any], own_failure: OSError | None
    ) -> None:
        """Rank 0: wait for every part list, write state.json, then the manifest; remove the folder on any failure."""
        try:
            parts, adam_steps = self._await_parts(folder, own_failure)
            if len(adam_steps) > 1:
                raise CheckpointError(f"{folder}: Adam's step counters differ between ranks: {sorted(adam_steps)}")
            write_whole(folder / STATE, json.dumps(state, indent=1))
            manifest = {
                "format": FORMAT,
                "step": step,
                "world": self.size,
                "adam_step": max(adam_steps, default=0.0),
                "parameters": holding.parameters,
                "parts": parts,
                "state_sha256": file_sha256(folder / STATE),
            }
            write_whole(folder / MANIFEST, json.dumps(sealed(manifest), indent=1))
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise self._failed(folder, str(error)) from error
        except CheckpointError:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def _await_parts(self, folder: Path, own_failure: OSError | None) -> tuple[list[dict[str, str]], set[float]]:
        """The part lists of this session, in rank order, and Adam's step counters in them."""
        begun = time.monotonic()
        parts: dict[int, dict[str, str]] = {}
        steps: set[float] = set()
        failures: dict[int, str] = {} if own_failure is None else {self.rank: str(own_failure)}
        while len(parts) + len(failures) < self.size:
            for rank in set(range(self.size)) - parts.keys() - failures.keys():
                path = self._part_list(folder, rank)
                if path.exists() and (part := json.loads(path.read_bytes()))["session"] == self.session:
                    parts[rank] = {"file": path.name, "sha256": file_sha256(path)}
                    steps |= set() if part["adam_step"] is None else {float(part["adam_step"])}
                note = self._failure_note(folder, rank)
                if note.exists():
                    failures[rank] = note.read_text(encoding="utf-8") or "it could not write its part"
            if len(parts) + len(failures) < self.size:
                if time.monotonic() > self._deadline(begun):
                    missing = sorted(set(range(self.size)) - parts.keys() - failures.keys())
                    waited = f"{time.monotonic() - begun:.1f} s"
                    raise self._failed(folder, f"ranks {missing} left no part list in {waited}")
                self._moved()  # this wait has a limit of its own
                time.sleep(_POLL_SECONDS)
        if failures:
            rank = min(failures)
            raise self._failed(folder, f"rank {rank}: {failures[rank]}")
        return [parts[rank] for rank in range(self.size)], steps

    def _deadline(self, begun: float) -> float:
        """Until when rank 0 waits, from `begun` on, for the others' part lists."""
        deadline = begun + self.timeout_seconds
        return deadline if self._left_at is None else min(deadline, max(begun, self._left_at) + _LEAVING_SECONDS)

    def _failed(self, folder: Path, cause: str) -> CheckpointError:
        before = [path.name for path in committed(self.run) if path != folder]
        rest = f"{before[-1]} is intact, and the same command resumes from it" if before else "no earlier one exists"
        return CheckpointError(f"checkpoint {folder} was not written: {cause}; make room on the disk: {rest}")

    def _retire(self) -> None:
        """Remove what need not stay; the manifest goes first, so that a half-removed folder is no checkpoint."""
        folders = {step_of(folder) or 0: folder for folder in committed(self.run)}
        stay = self.retention.kept({step: self._loss(step, folder) for step, folder in folders.items()})
        for step, folder in folders.items():
            if step not in stay:
                (folder / MANIFEST).unlink()
                shutil.rmtree(folder)

    def _loss(self, step: int, folder: Path) -> float | None:
        """The validation loss in a checkpoint's state; read once, and only where it decides anything."""
        if self.retention.best == 0:
            return None
        if step not in self._losses:
            try:
                self._losses[step] = (read_state(folder).get("validation") or {}).get("loss")
            except CheckpointError:  # a damaged one is not among the best; the next start says so
                self._losses[step] = None
        return self._losses[step]


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], *, moved: Callable[[], None] = lambda: None) -> str:
    """Write fp32 tensors in the safetensors format in one pass, fsync, rename into place; returns the file's sha256.
    `moved` is called after each tensor.

    The format (8 bytes header length, JSON header, raw little-endian data) is written here, because the library's
    writer neither streams nor hashes: a checksum would read every checkpoint again.

    Raises:
        OSError: the disk is full or refuses; where less is free than the file needs, before anything is written.
    """
    header: dict[str, Any] = {}
    position = 0
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise TypeError(f"fragment {name!r} must be float32, got {tensor.dtype}")
        size = tensor.numel() * 4
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    need, free = 8 + len(text) + position, shutil.disk_usage(path.parent).free
    if free < need:  # not found out by filling the disk, on which the run's logs are written meanwhile
        cause = f"{os.strerror(errno.ENOSPC)}: {need / 1e6:.1f} MB are needed, {free / 1e6:.1f} MB are free"
        raise OSError(errno.ENOSPC, cause, str(path))
    digest = hashlib.sha256()
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        for block in (struct.pack("<Q", len(text)), text):
            digest.update(block)
            file.write(block)
        for tensor in tensors.values():
            data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
            digest.update(data)
            file.write(data)
            moved()
        file.flush()
        os.fsync(file.fileno())
    rename_durably(partial, path)
    return digest.hexdigest()
