"""A shard, looked through before anything of it is used: what our writer never makes is refused, by name."""

from __future__ import annotations

import ast
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import google_crc32c
import numpy as np

from sci_gpt.data.addresses import Address, LocalFile, RemotePath
from sci_gpt.data.faults import DamagedError, UnreadableError

BLOCK_BYTES = (
    16384  # of a member's data have one CRC-32C; a window reads whole blocks, a disk or an object store no less
)
KEY = re.compile(r"[A-Za-z0-9_\-]+(/[A-Za-z0-9_\-]+)+")
MEMBERS = ("values", "valid", "time", "place")  # arrays of a stretch, each KEY.NAME.npy; beside them KEY.meta.json
_MEMBER_TYPES = {"|u1", "<f4", "<f8", "<i2", "<i4"}
_HEADER = 512  # bytes of a tar header, and what sizes are rounded up to
_MOST_NAME, _MOST_JSON, _NPY_BYTES = 1024, 65536, 1024


class RefusedError(UnreadableError):
    """A shard that holds what our writer never makes; nothing of it is read."""

    def __init__(self, path: Address, why: str) -> None:
        super().__init__("refused", file=str(path), cause=why)


@dataclass(frozen=True, kw_only=True)
class Member:
    """An array in a shard: where its first byte is, its type and shape as its own header says."""

    offset: int
    dtype: str
    shape: tuple[int, ...]


class Shard:
    """An open shard: ranged reads, nothing else.

    Args:
        path: the tar.
        index_bytes: its length by the store's index.

    Attributes:
        torn: why the shard could not be looked through to its end, empty where it could.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: Address, *, index_bytes: int) -> None:
        self.path, self.index_bytes, self.torn = path, index_bytes, ""
        self._file = path if isinstance(path, RemotePath) else LocalFile(path)

    def read(self, offset: int, *, size: int) -> bytes:
        """Bytes [offset, offset + size): one read or request.

        Raises:
            OSError, or an error of a remote library: they lack, or the disk or the server fails.
        """
        raw = self._file.read(offset, size=size)
        if len(raw) != size:
            raise DamagedError(f"{size} bytes at {offset} expected, the shard holds {len(raw)}")
        return raw

    def members(self) -> dict[str, Member] | None:
        """Every array, as far as the shard is whole: every member is looked at, no data are.

        Of a shard behind a URL None: that would be a request per member. Nothing of its tar is then parsed; what is
        read of it are the bytes that its records name and whose checksums stand beside it.

        Raises:
            RefusedError: a member that is no plain file, has another name than the writer gives, claims more bytes than
                the shard has, holds Python objects, or is packed; or a file that is no plain tar.
        """
        return None if isinstance(self._file, RemotePath) else dict(self._walk(self._file))

    def _walk(self, file: LocalFile) -> Iterator[tuple[str, Member]]:
        """(name, member) of every array, as far as the shard is whole."""
        offset, name, seen = 0, "", set[str]()
        length = file.size()
        while offset + _HEADER <= length:
            raw = file.read(offset, size=_HEADER + _NPY_BYTES)
            if raw[:_HEADER] == bytes(_HEADER):
                return  # a tar ends with empty blocks
            entry = self._entry(raw[:_HEADER], offset)
            if entry is None:
                return
            if entry.size < 0:
                raise RefusedError(self.path, f"a member at {offset} claims {entry.size} bytes")
            if entry.type == tarfile.GNUTYPE_LONGNAME:
                if entry.size > _MOST_NAME:
                    raise RefusedError(self.path, f"a member's name claims {entry.size} bytes")
                name = raw[_HEADER : _HEADER + entry.size].rstrip(b"\0").decode("utf-8", "replace")
                offset += _HEADER + -(-entry.size // _HEADER) * _HEADER
                continue
            name = name or entry.name
            self._check_member(entry, name)
            if name in seen:
                raise RefusedError(self.path, f"member {name!r} stands twice")
            seen.add(name)
            if offset + _HEADER + entry.size > length:
                self.torn = f"{name} has {entry.size} bytes at {offset + _HEADER}, the shard ends at {length}"
                return
            if name.endswith(".npy"):
                yield name, self._array(raw[_HEADER:], entry.size, name=name, start=offset + _HEADER)
            offset, name = offset + _HEADER + -(-entry.size // _HEADER) * _HEADER, ""
        self.torn = f"the shard ends at {length} without the mark of its end"

    def _entry(self, raw: bytes, offset: int) -> tarfile.TarInfo | None:
        """A member's header; None where it is damaged."""
        try:
            return tarfile.TarInfo.frombuf(raw, "utf-8", "replace")
        except tarfile.HeaderError as error:
            if not offset:
                raise RefusedError(
                    self.path, f"it begins with {raw[:4]!r}, no tar header; packed archives are not opened"
                ) from error
            self.torn = f"the member's header at {offset} is damaged ({error})"
            return None

    def _check_member(self, entry: tarfile.TarInfo, name: str) -> None:
        if entry.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            kind = {tarfile.SYMTYPE: "a symbolic link", tarfile.LNKTYPE: "a link", tarfile.DIRTYPE: "a folder"}
            to = f" to {entry.linkname!r}" if entry.linkname else ""
            raise RefusedError(self.path, f"member {name!r} is {kind.get(entry.type, 'no plain file')}{to}")
        key, _, suffix = name.partition(".")
        known = {"meta.json", *(f"{member}.npy" for member in MEMBERS)}
        if not KEY.fullmatch(key) or suffix not in known:
            raise RefusedError(self.path, f"member {name!r} is not SOURCE/GROUP[/PART] with one of {sorted(known)}")
        if entry.size > self.index_bytes:
            raise RefusedError(
                self.path, f"member {name!r} claims {entry.size} bytes, the whole shard has {self.index_bytes}"
            )
        if suffix == "meta.json" and entry.size > _MOST_JSON:
            raise RefusedError(self.path, f"member {name!r} has {entry.size} bytes, at most {_MOST_JSON} are written")

    def _array(self, raw: bytes, size: int, *, name: str, start: int) -> Member:
        """The array that a member's first bytes describe; its size must be the member's."""
        if raw[:8] != b"\x93NUMPY\x01\x00":
            raise RefusedError(self.path, f"member {name!r} begins with {raw[:4]!r}, which is no .npy of version 1")
        header = 10 + int.from_bytes(raw[8:10], "little")
        found = _described(raw[10:header])
        if found is None:
            raise RefusedError(
                self.path, f"member {name!r} is no array of numbers in plain order: {raw[10:header][:80]!r}"
            )
        dtype, shape = found
        claimed = header + int(np.dtype(dtype).itemsize) * int(np.prod(shape, dtype=object))
        if claimed != size:
            raise RefusedError(
                self.path, f"member {name!r} claims an array of {claimed - header} bytes, it has {size - header}"
            )
        return Member(offset=start + header, dtype=dtype, shape=shape)


@lru_cache(maxsize=256)
def _described(header: bytes) -> tuple[str, tuple[int, ...]] | None:
    """(dtype, shape) of a .npy header; None where it is not one that our writer makes. Only literals are read."""
    try:
        said = ast.literal_eval(header.decode("latin-1").strip())
        dtype, shape = said["descr"], said["shape"]
    except (ValueError, SyntaxError, KeyError, TypeError, MemoryError, RecursionError):
        return None
    numbers = isinstance(shape, tuple) and all(type(number) is int and number >= 0 for number in shape)
    if dtype not in _MEMBER_TYPES or said.get("fortran_order") is not False or not numbers:
        return None
    return dtype, shape


def block_sums(data: bytes | memoryview) -> list[int]:
    """CRC-32C of every BLOCK_BYTES of a member's data: processors compute it themselves, zlib's CRC-32 takes longer."""
    return [google_crc32c.value(bytes(data[start : start + BLOCK_BYTES])) for start in range(0, len(data), BLOCK_BYTES)]
