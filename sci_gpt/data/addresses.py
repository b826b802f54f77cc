"""Addresses: where a store and its files are, in a folder or behind a URL (s3://bucket/prefix), and reading them."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec
import numpy as np

from sci_gpt.data.faults import DamagedError
from sci_gpt.errors import DataError

# One try per call, and short: how often a failing read is tried again is said by a run's `reading`, not by a library.
CONNECT_SECONDS, READ_SECONDS = 5, 15
S3_OPTIONS: dict[str, Any] = {
    "config_kwargs": {
        "connect_timeout": CONNECT_SECONDS,
        "read_timeout": READ_SECONDS,
        "retries": {"total_max_attempts": 1},
        # Ours are compared in every read; some servers send a whole object's checksum with a range of it.
        "response_checksum_validation": "when_required",
    }
}
_EXTRAS = {"s3": "s3", "s3a": "s3"}  # protocol: extra of this package that brings what reads it


@dataclass(frozen=True, kw_only=True)
class RemotePath:
    """A file or folder behind a URL, joined with `/` as a Path is. Make it with `address`.

    Endpoint and credentials are those of the environment (S3: AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ..).
    """

    url: str
    filesystem: Any = field(repr=False, compare=False)

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(url=f"{self.url}/{name}", filesystem=self.filesystem)

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return self.url.rsplit("/", 1)[-1]

    def read(self, offset: int, *, size: int) -> bytes:
        """Bytes [offset, offset + size), fewer at the file's end: one request.

        Raises:
            OSError, or an error of the remote library (see `faults.is_transient`).
        """
        return bytes(self.filesystem.cat_file(self.url, start=offset, end=offset + size))

    def read_bytes(self) -> bytes:
        """The whole file; raises as `read` does."""
        return bytes(self.filesystem.cat_file(self.url))

    def exists(self) -> bool:
        """Whether there is such a file; raises as `read` does, also where the server does not answer."""
        try:
            self.filesystem.info(self.url)
        except FileNotFoundError:
            return False
        return True

    def upload(self, source: Path) -> None:
        """Write a local file here, whole or not at all; raises as `read` does."""
        self.filesystem.put_file(str(source), self.url)

    def remove(self) -> None:
        """Remove the file; raises as `read` does."""
        self.filesystem.rm_file(self.url)


Address = Path | RemotePath


def path_or_url(where: Path | str) -> Path | str:
    """A URL as it is, less a last slash; anything else as a Path, which would make one slash of a URL's two.

    Raises:
        ValueError: a URL with a password in it.
    """
    if isinstance(where, Path) or "://" not in where:
        return Path(where)
    parts = urlsplit(where)
    if parts.password is not None:
        raise ValueError(
            f"{parts.scheme}://...@{parts.hostname} holds a password, which would stand in logs and MLflow; leave it "
            "out and set it in the environment (S3: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)"
        )
    return where.rstrip("/")


def address(where: Path | str) -> Address:
    """The address that a path or URL names; nothing is asked of a server yet.

    Raises:
        DataError: a URL with a password in it, of a kind that nothing here reads, or whose library is not installed.
    """
    try:
        url = path_or_url(where)
    except ValueError as error:
        raise DataError(str(error)) from error
    if isinstance(url, Path):
        return url
    parts = urlsplit(url)
    if parts.scheme == "file":
        return Path(parts.path)
    remote = parts.scheme in _EXTRAS
    try:
        # An instance of its own: a shared one would keep the endpoint and credentials of another time.
        filesystem = fsspec.filesystem(
            parts.scheme, skip_instance_cache=True, use_listings_cache=False, **(S3_OPTIONS if remote else {})
        )
    except ImportError as error:
        extra = f"pip install 'sci-gpt[{_EXTRAS[parts.scheme]}]'" if remote else str(error)
        raise DataError(f"{url}: the library that reads {parts.scheme}:// is not installed; {extra}") from error
    except ValueError as error:
        raise DataError(f"{url}: expected a local path or a URL such as s3://bucket/prefix; {error}") from error
    if remote:
        filesystem.retries = 1  # of s3fs itself
    return RemotePath(url=url, filesystem=filesystem)


class LocalFile:
    """An open local file: the same reads as of a RemotePath.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._file = io.FileIO(path)  # closed when the last reader of it is gone, in whatever thread

    def size(self) -> int:
        """Bytes of the file."""
        return os.fstat(self._file.fileno()).st_size

    def read(self, offset: int, *, size: int) -> bytes:
        """Bytes [offset, offset + size), fewer at the file's end."""
        return os.pread(self._file.fileno(), size, offset)


def load_table(path: Address, dtype: np.dtype[Any]) -> np.ndarray:
    """A fixed-width table beside a shard: memory-mapped where it is local, read whole otherwise; never unpickled.

    Raises:
        OSError, or an error of the remote library: it cannot be read.
        DamagedError: it is torn, or a table of something else.
    """
    try:
        table: np.ndarray
        if isinstance(path, RemotePath):
            table = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
        else:
            table = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise DamagedError(f"{path.name} is torn: {error}") from error
    if table.dtype != dtype or table.ndim != 1:
        raise DamagedError(f"{path.name}: expected a table of {dtype}, got {table.dtype} {table.shape}")
    return table
