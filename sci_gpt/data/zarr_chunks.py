"""A Zarr group opened safely: its codecs are looked at before any data, and a chunk that is gone is an error."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

import fsspec
import numpy as np
import zarr
from zarr.abc.store import ByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import FsspecStore, LocalStore, WrapperStore

from sci_gpt.data.faults import DamagedError
from sci_gpt.errors import DataError

METADATA = (".zgroup", ".zattrs", ".zarray", "zarr.json")  # of one folder; consolidated copies are not used
THREADS = 16  # that wait for metadata documents: a store over the network has hundreds
SIZE = np.dtype("<i8")  # bytes of a chunk's file, -1 where there is none
_CODECS = {  # of Zarr v2 (numcodecs); none of them makes Python objects
    *("blosc", "zstd", "zlib", "gzip", "lz4", "lzma", "bz2", "shuffle", "delta", "fixedscaleoffset", "quantize"),
    *("bitround", "packbits", "astype", "crc32", "crc32c", "adler32", "fletcher32", "jenkins_lookup3", "zfpy"),
}
_CODECS_3 = {"bytes", "transpose", "blosc", "gzip", "zstd", "crc32c", "sharding_indexed"}
_TYPES_3 = {"fixed_length_utf32", "null_terminated_bytes", "numpy.datetime64", "numpy.timedelta64"}


@dataclass(frozen=True, kw_only=True)
class ZarrGroup:
    """A Zarr group (v2 or v3), its metadata read once and checked. Make it with `ZarrGroup.open`.

    Attributes:
        location: local folder or fsspec URL.
        documents: {path within the group: content} of the metadata; they are what the arrays are opened with.
    """

    location: str
    documents: Mapping[str, bytes]

    @classmethod
    def open(cls, location: str, names: Iterable[str] | None = None) -> ZarrGroup:
        """Read and check the metadata, no data.

        Args:
            location: local folder or fsspec URL of the group.
            names: arrays that are wanted (nothing is listed then); None: all of the group.

        Raises:
            OSError: it cannot be read (a missing array: FileNotFoundError).
            DataError: no Zarr group; an array of Python objects, or one whose codec could make some.
        """
        files, root = file_system(location)
        if names is None:
            files.invalidate_cache()
            children = files.ls(root, detail=True)
            folders = [PurePosixPath(row["name"]).name for row in children if row["type"] == "directory"]
        else:
            folders = list(names)
        paths = [f"{folder}/{name}".lstrip("/") for folder in ("", *sorted(folders)) for name in METADATA]
        with ThreadPoolExecutor(THREADS) as threads:
            contents = threads.map(lambda path: _content(files, f"{root}/{path}"), paths)
            # A folder has the documents of one format, and not all of them.
            documents = {path: raw for path, raw in zip(paths, contents, strict=True) if raw is not None}
        if not {".zgroup", "zarr.json"} & set(documents):
            raise FileNotFoundError(f"{location} has no metadata of a Zarr group (.zgroup or zarr.json)")
        group = cls(location=location, documents=documents)
        for name in group.names:
            _check(group.document(name), where=f"{location}, array {name!r}")
        for name in names or ():
            if name not in group.names:
                raise FileNotFoundError(f"{location} has no array {name!r} any more")
        return group

    @property
    def names(self) -> tuple[str, ...]:
        """Names of its arrays."""
        found = []
        for path, content in self.documents.items():
            folder, _, name = path.rpartition("/")
            if folder and (
                name == ".zarray" or (name == "zarr.json" and _parsed(content, path)["node_type"] == "array")
            ):
                found.append(folder)
        return tuple(found)

    def document(self, name: str) -> dict[str, Any]:
        """The metadata of an array: `.zarray` of Zarr v2, `zarr.json` of v3."""
        path = f"{name}/zarr.json" if f"{name}/zarr.json" in self.documents else f"{name}/.zarray"
        return _parsed(self.documents[path], f"{self.location}/{path}")

    def dims(self, name: str) -> tuple[str, ...]:
        """Names of an array's dimensions; empty where it has none."""
        attributes = _parsed(self.documents.get(f"{name}/.zattrs", b"{}"), f"{self.location}/{name}/.zattrs")
        dims = self.document(name).get("dimension_names") or attributes.get("_ARRAY_DIMENSIONS") or ()
        return tuple(map(str, dims))

    def attributes(self, name: str) -> dict[str, Any]:
        """The attributes of an array, as its metadata has them."""
        if f"{name}/.zattrs" in self.documents:
            return _parsed(self.documents[f"{name}/.zattrs"], f"{self.location}/{name}/.zattrs")
        return dict(self.document(name).get("attributes", {}))

    def only(self, names: Iterable[str]) -> ZarrGroup:
        """The group with these arrays alone."""
        kept = {"", *names}
        return replace(
            self, documents={path: raw for path, raw in self.documents.items() if path.rpartition("/")[0] in kept}
        )

    def digest(self) -> str:
        """SHA-256 over all metadata documents, by name."""
        found = hashlib.sha256()
        for path in sorted(self.documents):
            found.update(f"{path} {len(self.documents[path])}\n".encode() + self.documents[path])
        return found.hexdigest()

    def array(self, name: str, tables: Mapping[str, np.ndarray]) -> zarr.Array[Any]:
        """An array, read through `ChunkGuard`; `tables` as there."""
        return zarr.open_array(store=self.guarded(tables), path=name, mode="r")

    def guarded(self, tables: Mapping[str, np.ndarray]) -> ChunkGuard:
        """The group as a Zarr store that holds to these metadata and chunks; `tables` as in `ChunkGuard`."""
        files, root = file_system(self.location)
        local = "file" in (files.protocol if isinstance(files.protocol, tuple) else (files.protocol,))
        inner: Store = (
            LocalStore(root, read_only=True) if local else FsspecStore.from_url(self.location, read_only=True)
        )
        return ChunkGuard(inner, documents=self.documents, tables=tables)

    def chunk_sizes(self, name: str) -> np.ndarray:
        """SIZE (chunks along each axis..): bytes of each chunk's file (of a shard, where chunks lie in shards); the
        files are listed, not read.

        Raises:
            OSError: the folder cannot be listed.
        """
        array = self.array(name, {})
        cut = array.shards or array.chunks
        sizes = np.full([-(-n // size) for n, size in zip(array.shape, cut, strict=True)], -1, SIZE)
        files, root = file_system(self.location)
        for path, row in files.find(f"{root}/{name}", detail=True).items():
            key = str(path)[len(root) + len(name) + 2 :]
            place = place_of(key, sizes.ndim)
            if place is None or array.metadata.encode_chunk_key(place) != key:
                continue  # metadata, or a file that is no chunk
            if all(n < size for n, size in zip(place, sizes.shape, strict=True)):
                sizes[place] = row["size"]
        return sizes


class ChunkGuard(WrapperStore[Store]):
    """A Zarr store that answers with the metadata that were checked and with the chunks that were there.

    Zarr reads a missing chunk as its fill value; here it is an error, unless it was missing when it was listed.

    Args:
        store: where the chunks are.
        documents: {path: content} of the metadata.
        tables: {array: sizes of its chunks, as `ZarrGroup.chunk_sizes` gives them}.
    """

    def __init__(self, store: Store, *, documents: Mapping[str, bytes], tables: Mapping[str, np.ndarray]) -> None:
        super().__init__(store)
        self.documents, self.tables = documents, tables

    def _with_store(self, store: Store) -> ChunkGuard:
        return ChunkGuard(store, documents=self.documents, tables=self.tables)

    async def get(  # signature of zarr.abc.store.Store
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Bytes of a document or a chunk; None for a chunk that was absent when chunks were listed.

        Raises:
            DamagedError: a chunk that was there is gone, or has another length.
        """
        if key.rpartition("/")[2] in METADATA or key.rpartition("/")[2].startswith(".z"):
            document = self.documents.get(key)
            return None if document is None else prototype.buffer.from_bytes(document)
        name, _, rest = key.partition("/")
        place = place_of(rest, self.tables[name].ndim) if name in self.tables else None
        if place is None:
            raise DataError(f"chunk {key!r} is of no array that was listed; build the store again")
        size = int(self.tables[name][place])
        if size < 0:
            return None
        found = await self._store.get(key, prototype, byte_range)
        if found is None:
            raise DamagedError(f"chunk {key} is missing; it had {size} bytes when the store was built")
        if byte_range is None and len(found) != size:
            raise DamagedError(f"chunk {key} has {len(found)} bytes; it had {size} when the store was built")
        return found

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """`get` of each."""
        return list(await asyncio.gather(*(self.get(key, prototype, span) for key, span in key_ranges)))

    async def _get_many(
        self, requests: Iterable[tuple[str, BufferPrototype, ByteRequest | None]]
    ) -> AsyncGenerator[tuple[str, Buffer | None], None]:
        for key, prototype, span in requests:
            yield key, await self.get(key, prototype, span)

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """Names in a folder: of the root, those whose metadata were checked."""
        held = {path.split("/")[0] for path in self.documents if not prefix.strip("/")}
        if not held:
            async for name in self._store.list_dir(prefix):
                yield name
        for name in sorted(held):
            yield name


def place_of(key: str, num_dims: int) -> tuple[int, ...] | None:
    """Numbers of a chunk along the axes from its key within the array (`0.1.2`, `0/1/2`, `c/0/1/2`); None if it is no
    chunk's."""
    if re.fullmatch(r"(c[./]?)?(\d+([./]\d+)*)?", key) is None or not key:
        return None
    numbers = tuple(int(number) for number in re.findall(r"\d+", key))
    if not num_dims:
        return ()
    return numbers if len(numbers) == num_dims else None


def file_system(location: str) -> tuple[Any, str]:
    """The fsspec file system of a location, and the path in it without a slash at its end.

    Raises:
        DataError: no such protocol, or its library is not installed.
    """
    try:
        files, root = fsspec.core.url_to_fs(location)
    except (ValueError, ImportError) as error:
        raise DataError(f"{location!r} cannot be opened: {error}; give a folder or a URL of an object store") from error
    return files, str(root).rstrip("/")


def _content(files: Any, path: str) -> bytes | None:
    try:
        content: bytes = files.cat_file(path)
    except FileNotFoundError:
        return None
    return content


def _parsed(content: bytes, where: str) -> dict[str, Any]:
    try:
        document = json.loads(content)
    except ValueError as error:
        raise DataError(f"{where} is no JSON: {error}; write the Zarr again") from error
    if not isinstance(document, dict):
        raise DataError(f"{where}: expected a JSON object, got {str(document)[:60]}; write the Zarr again")
    return document


def _check(document: Mapping[str, Any], *, where: str) -> None:
    """Refuse an array whose chunks could make Python objects, by its metadata."""
    if document.get("zarr_format") == 3:
        kind = document.get("data_type")
        name = str(kind.get("name")) if isinstance(kind, dict) else str(kind)
        good = re.fullmatch(r"bool|(u?int|float|complex)\d+|r\d+", name) is not None or name in _TYPES_3
        bad = _unknown_codecs(document.get("codecs", []))
        if document.get("storage_transformers"):
            bad.append("a storage transformer")
    else:
        name = json.dumps(document.get("dtype"))
        good = re.fullmatch(r'"[<>|][biufcSUMm]\d+(\[\w+\])?"', name) is not None
        codecs = [document.get("compressor"), *(document.get("filters") or [])]
        bad = [str(row.get("id")) if isinstance(row, dict) else str(row) for row in codecs if row is not None]
        bad = [codec for codec in bad if codec not in _CODECS]
    if not good:
        raise DataError(
            f"{where}: its data type {name} is none of numbers: it could hold Python objects, which are never read; "
            "take the array out of the Zarr or write it again as numbers"
        )
    if bad:
        raise DataError(
            f"{where}: codec {bad[0]!r} is none that gives numbers only; nothing of it is read (it could run what it "
            "reads); write the array again with blosc, zstd or gzip"
        )


def _unknown_codecs(codecs: Any) -> list[str]:
    """Names of the codecs (Zarr v3) that are not known to be safe, those within shards too."""
    found = []
    for row in codecs if isinstance(codecs, list) else [codecs]:
        name = str(row.get("name")) if isinstance(row, dict) else str(row)
        inner = row.get("configuration") or {} if isinstance(row, dict) else {}
        if name not in _CODECS_3 and name.removeprefix("numcodecs.") not in _CODECS:
            found.append(name)
        found += _unknown_codecs([*inner.get("codecs", []), *inner.get("index_codecs", [])])
    return found
