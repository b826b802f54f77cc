"""Faults of reading: what is tried again and for how long, and the error that names file, key and cause."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from sci_gpt.errors import DataError

# Libraries of remote file systems: their error classes, not all of them OSErrors, are known without importing them.
REMOTE = {"fsspec", "s3fs", "gcsfs", "adlfs", "aiohttp", "aiobotocore", "botocore", "urllib3", "requests"}

Read = TypeVar("Read")


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long a failing read is tried again.

    Attributes:
        attempts: reads in all, the first included.
        wait_seconds: before the second read; every further wait is twice as long.
    """

    attempts: int = 4
    wait_seconds: float = 0.25


class DamagedError(OSError):
    """What came is not what was written: bytes that lack, or that do not match their checksum."""


class UnreadableError(DataError):
    """A window that could not be read, however often it was tried.

    Attributes:
        file: name of the file or shard.
        cause: without key and window, the same for every window that the cause breaks.
    """

    def __init__(self, what: str, *, file: str, cause: str) -> None:
        super().__init__(f"{file}: {what}: {cause}")
        self.file, self.cause = file, cause


def is_transient(error: BaseException) -> bool:
    """Whether a read that failed so is worth trying again: what disks and networks raise."""
    kinds = type(error).__mro__
    return isinstance(error, (OSError, EOFError)) or any(kind.__module__.split(".")[0] in REMOTE for kind in kinds)


def reason(error: Exception) -> str:
    """What went wrong, without what differs from window to window."""
    return error.strerror if isinstance(error, OSError) and error.strerror else f"{str(error) or type(error).__name__}"


def cause_of(error: Exception) -> str:
    """File and cause of a read that failed, without the window: what a summary counts by."""
    if isinstance(error, UnreadableError):
        return f"{error.file}: {error.cause}"
    return f"{type(error).__name__}: {error}"


def patiently(
    read: Callable[[], Read], patience: Patience, *, again: Callable[[], None], sleep: Callable[[float], None]
) -> Read:
    """What `read` returns, tried again after transient errors with doubling waits; the last error is raised.

    Args:
        read: the read.
        patience: how often.
        again: called before each further try (a file is opened anew).
        sleep: seconds -> None.
    """
    for attempt in range(1, patience.attempts):
        try:
            return read()
        except Exception as error:
            if not is_transient(error):
                raise
            sleep(patience.wait_seconds * 2 ** (attempt - 1))
            again()
    return read()
