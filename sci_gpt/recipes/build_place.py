"""Where a build works: a hidden folder beside its output, one build at a time; the finished store is put in place."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sci_gpt.errors import DataError


@contextmanager
def workplace(output: Path, fingerprint: str) -> Iterator[Path]:
    """The folder in which a build of this fingerprint works, on the output's file system.

    Whoever is killed leaves there what was finished, for the next build of the same fingerprint; that of another one is
    removed. After a refusal, an error or success nothing is left.

    Raises:
        DataError: the output is no store, another process is building there, or the disk refuses.
    """
    if output.exists() and not (output / "manifest.json").exists() and any(output.iterdir()):
        raise DataError(f"{str(output)!r} holds files that are no data store; name another `output`")
    made = [folder for folder in output.parents if not folder.exists()]
    folder = output.parent / f".{output.name}.partial-{fingerprint[:12]}"
    lock = output.parent / f".{output.name}.building"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with _locked(lock, output):
            for old in output.parent.glob(f".{output.name}.old-*"):  # killed between two renames
                if output.exists():
                    shutil.rmtree(old)
                else:
                    old.rename(output)
            for old in output.parent.glob(f".{output.name}.partial-*"):
                if old != folder:
                    shutil.rmtree(old)
            try:
                yield folder
            except Exception:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise DataError(
            f"the store cannot be written to {str(output)!r}: {error}; free some space or mend the path "
            "(nothing was changed there)"
        ) from error
    finally:
        for new in made:
            if new.exists() and not any(new.iterdir()):
                new.rmdir()  # a failed build leaves no new empty folder behind


@contextmanager
def _locked(lock: Path, output: Path) -> Iterator[None]:
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"another process is building {str(output)!r}; wait for it or stop it") from error
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def put_in_place(store: Path, output: Path) -> None:
    """Put the finished store in place; an old one is moved aside first and put back if that fails."""
    if not output.exists():
        store.rename(output)
        return
    old = output.parent / f".{output.name}.old-{os.getpid()}"
    output.rename(old)
    try:
        store.rename(output)
    except OSError:
        old.rename(output)
        raise
    shutil.rmtree(old, ignore_errors=True)
