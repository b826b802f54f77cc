"""Write a checkpoint without collectives: each rank leaves its part and a list, rank 0 writes the manifest last."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sci_gpt.errors import CheckpointError
from sci_gpt.train.checkpoint import FORMAT, MANIFEST, STATE, committed, file_sha256, step_folder, torn
from sci_gpt.train.fragments import Holding

_POLL_SECONDS = 0.02


class CheckpointWriter:
    """One rank's writer of a run's checkpoints.

    Args:
        run: the run folder.
        rank, size: in the world.
        session: a text that all ranks of this start share and no other start has: part lists of an earlier, killed
            attempt at the same step are not mistaken for this one's.
        keep: committed checkpoints that stay.
        timeout_seconds: how long rank 0 waits for the other ranks' part lists.
    """

    def __init__(
        self, run: Path, *, rank: int, size: int, session: str, keep: int = 2, timeout_seconds: float = 600.0
    ) -> None:
        self.run, self.rank, self.size, self.session = run, rank, size, session
        self.keep, self.timeout_seconds = keep, timeout_seconds

    def save(self, step: int, holding: Holding, *, state: Mapping[str, Any]) -> Path:
        """Write this rank's part; rank 0 then waits for all parts, commits, and removes the oldest checkpoints.

        Args:
            step: completed steps.
            holding: what this rank owns (see `fragments.hold`).
            state: for state.json (rank 0's is written).

        Raises:
            CheckpointError: a rank could not write (a full disk), or its part list did not come in time. The unfinished
                folder is removed; earlier checkpoints are as they were.
        """
        folder = step_folder(self.run, step)
        if (folder / MANIFEST).exists():
            raise CheckpointError(f"{folder} is already committed; a step is saved once")
        try:
            self._write_part(folder, holding)
            cause = None
        except OSError as error:
            cause = error
            self._leave_failure(folder, error)
        if self.rank == 0:
            self._commit(folder, step, holding=holding, state=state, own_failure=cause)
            self._retire()
        elif cause is not None:
            raise self._failed(folder, str(cause)) from cause
        return folder

    @staticmethod
    def remove_torn(run: Path) -> list[Path]:
        """Remove what killed saves left in a run folder that this process holds; returns the folders removed."""
        folders = torn(run)
        for folder in folders:
            shutil.rmtree(folder)
        return folders

    def _write_part(self, folder: Path, holding: Holding) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"rank-{self.rank:05d}.safetensors"
        part = {
            "format": FORMAT,
            "session": self.session,
            "rank": self.rank,
            "file": path.name,
            "sha256": write_safetensors(path, holding.tensors),
            "adam_step": holding.adam_step,
            "fragments": holding.fragments,
        }
        _write_durably(self._part_list(folder, self.rank), json.dumps(part).encode())

    def _part_list(self, folder: Path, rank: int) -> Path:
        return folder / f"rank-{rank:05d}.parts.json"

    def _leave_failure(self, folder: Path, error: OSError) -> None:
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
            _write_durably(folder / STATE, json.dumps(state, indent=1).encode())
            manifest = {
                "format": FORMAT,
                "step": step,
                "world": self.size,
                "adam_step": max(adam_steps, default=0.0),
                "parameters": holding.parameters,
                "parts": parts,
                "state_sha256": file_sha256(folder / STATE),
            }
            _write_durably(folder / MANIFEST, json.dumps(manifest, indent=1).encode())
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise self._failed(folder, str(error)) from error
        except CheckpointError:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def _await_parts(self, folder: Path, own_failure: OSError | None) -> tuple[list[dict[str, str]], set[float]]:
        """The part lists of this session, in rank order, and Adam's step counters in them."""
        deadline = time.monotonic() + self.timeout_seconds
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
                if time.monotonic() > deadline:
                    missing = sorted(set(range(self.size)) - parts.keys() - failures.keys())
                    raise self._failed(folder, f"ranks {missing} left no part list in {self.timeout_seconds:g} s")
                time.sleep(_POLL_SECONDS)
        if failures:
            rank = min(failures)
            raise self._failed(folder, f"rank {rank}: {failures[rank]}")
        return [parts[rank] for rank in range(self.size)], steps

    def _failed(self, folder: Path, cause: str) -> CheckpointError:
        before = [path.name for path in committed(self.run) if path != folder]
        rest = f"{before[-1]} is intact, and the same command resumes from it" if before else "no earlier one exists"
        return CheckpointError(f"checkpoint {folder} was not written: {cause}; make room on the disk: {rest}")

    def _retire(self) -> None:
        """Remove all but the newest `keep`; the manifest goes first, so that a half-removed folder is no checkpoint."""
        for folder in committed(self.run)[: -self.keep]:
            (folder / MANIFEST).unlink()
            shutil.rmtree(folder)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write fp32 tensors in the safetensors format in one pass, fsync, rename into place; returns the file's sha256.

    The format (8 bytes header length, JSON header, raw little-endian data) is written here, because the library's
    writer neither streams nor hashes: a checksum would read every checkpoint again.

    Raises:
        OSError: the disk is full or refuses.
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
        file.flush()
        os.fsync(file.fileno())
    _rename_durably(partial, path)
    return digest.hexdigest()


def _write_durably(path: Path, data: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    _rename_durably(partial, path)


def _rename_durably(partial: Path, path: Path) -> None:
    """Atomic rename, and the folder's entry on disk."""
    partial.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
