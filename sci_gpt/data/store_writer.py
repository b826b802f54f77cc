"""Writes a store: shards of stretches with their tables, then the manifest that seals them; copies it to a URL."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from sci_gpt.data.addresses import RemotePath, address
from sci_gpt.data.faults import Patience, is_transient, patiently, reason
from sci_gpt.data.index import INDEX, RECORD, SUM, quality_name, records_name, shard_name, sums_name
from sci_gpt.data.manifest import MANIFEST, STATISTICS, content_digest, sha256
from sci_gpt.data.quality import RULES, SPAN, find_spans
from sci_gpt.data.shard import KEY, block_sums
from sci_gpt.data.store import Store
from sci_gpt.data.stretch import DTYPES, TIME_BYTES, unpack
from sci_gpt.errors import DataError
from sci_tokenizers.sample import Sample

Done = TypeVar("Done")
_TABLES = {"records": "idx", "sums": "crc", "quality": "quality"}  # of a shard: in index.json, in file names


@dataclass(frozen=True, kw_only=True)
class Packing:
    """An archive's own integers: physical value = stored * scale + offset (in the variable table's unit)."""

    dtype: str
    scale: float
    offset: float


class SplitWriter:
    """Appends stretches to the shards of one split; the index is written by `close`, or at a clean exit from `with`.

    Args:
        folder: `STORE/SOURCE/SPLIT`; made here.
        shard_bytes: a new shard is begun when the present one has reached this size.
        packing: the archive's integers, kept where they give the sample's values back exactly.
    """

    def __init__(self, folder: Path, shard_bytes: int, *, packing: Packing | None = None) -> None:
        self.folder, self.shard_bytes, self.packing = folder, shard_bytes, packing
        self.num_stretches = self.num_times = self.num_values = self.num_missing = 0
        self._tar: tarfile.TarFile | None = None
        self._rows: list[np.ndarray] = []
        self._sums: list[int] = []
        self._spans: list[tuple[int, int, int, int]] = []  # of the present shard
        self._found = {rule.name: {"spans": 0, "times": 0} for rule in RULES}
        self._shards: list[dict[str, object]] = []
        folder.mkdir(parents=True)

    def __enter__(self) -> SplitWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is None:
            self.close()
        elif self._tar is not None:
            self._tar.close()

    def close(self) -> None:
        """Finish the last shard and write the index."""
        self._finish_shard()
        (self.folder / INDEX).write_text(json.dumps({"shards": self._shards}, indent=1) + "\n", encoding="utf-8")

    def quality(self) -> dict[str, dict[str, int]]:
        """{rule: {"spans", "times"}} of what was added: where a rule of quality holds."""
        return {name: dict(found) for name, found in self._found.items()}

    def add(self, sample: Sample) -> None:
        """Append one stretch.

        Raises:
            DataError: the key is not SOURCE/GROUP[/PART] of letters, digits, `_` and `-` (a dot ends a WebDataset key).
        """
        if not KEY.fullmatch(sample.key) or len(sample.key) > RECORD["key"].itemsize:
            raise DataError(
                f"sample key {sample.key!r} must be SOURCE/GROUP[/PART] of letters, digits, '_' and '-', at most "
                f"{RECORD['key'].itemsize} characters"
            )
        if self._tar is None:
            self._tar = tarfile.open(self.folder / shard_name(len(self._shards)), "w", format=tarfile.GNU_FORMAT)
        for rule, start, stop in find_spans(sample):
            self._spans.append((len(self._rows), rule, start, stop))
            self._found[RULES[rule].name]["spans"] += 1
            self._found[RULES[rule].name]["times"] += stop - start
        self._rows.append(self._write(self._tar, sample))
        self.num_stretches += 1
        self.num_times += sample.num_times
        self.num_values += sample.valid.size
        self.num_missing += int(sample.valid.size - np.count_nonzero(sample.valid))
        if self._tar.offset >= self.shard_bytes:
            self._finish_shard()

    def _write(self, tar: tarfile.TarFile, sample: Sample) -> np.ndarray:
        stored, code, scale, offset = _pack(sample, self.packing)
        row = np.zeros((), RECORD)
        row["key"] = sample.key.encode()
        row["num_times"] = sample.num_times
        row["code"], row["scale"], row["offset"] = code, scale, offset
        row["values_bytes_per_time"] = stored[0].nbytes
        row["valid_bytes_per_time"] = sample.valid[0].size
        row["step_seconds"] = sample.step_seconds
        row["start_time"], row["end_time"] = sample.time[0], sample.time[-1]
        row["missing_share"] = 1.0 - np.count_nonzero(sample.valid) / sample.valid.size
        clock = np.stack([sample.time, sample.year_phase, sample.day_phase], axis=1).astype("<f8")
        if clock[0].nbytes != TIME_BYTES:
            raise DataError(f"sample {sample.key!r}: a time's record is {TIME_BYTES} bytes, got {clock[0].nbytes}")
        row["valid_offset"] = -1
        members = {"values": stored}
        if not sample.valid.all():
            members["valid"] = sample.valid.astype(np.uint8)
        members["time"] = clock
        members["place"] = np.stack([sample.latitude, sample.longitude, sample.elevation]).astype("<f4")
        for name, array in members.items():
            row[f"{name}_offset"], data = _add_array(tar, f"{sample.key}.{name}.npy", array=array)
            row[f"{name}_sums"] = len(self._sums)
            self._sums += block_sums(data)
        meta = {
            "key": sample.key,
            "source": sample.source,
            "modality": sample.modality,
            "channels": sample.channels,
            "step_seconds": sample.step_seconds,
            "scale": scale,
            "offset": offset,
        }
        _add_bytes(tar, f"{sample.key}.meta.json", content=json.dumps(meta).encode())
        return row

    def _finish_shard(self) -> None:
        if self._tar is None:
            return
        number = len(self._shards)
        self._tar.close()
        self._tar = None
        tables = {
            records_name(number): np.stack(self._rows),
            sums_name(number): np.array(self._sums, SUM),
            quality_name(number): np.array(self._spans, SPAN),
        }
        for name, table in tables.items():
            np.save(self.folder / name, table, allow_pickle=False)
        records, sums, spans = tables.values()
        path = self.folder / shard_name(number)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self._shards.append(  # says nothing of the shard's number but in its name: a folder can be renumbered
            {
                "shard": path.name,
                "num_stretches": len(records),
                "num_times": int(records["num_times"].sum()),
                "num_spans": len(spans),
                "bytes": path.stat().st_size,
                "sha256": digest,
                "records_crc32": zlib.crc32(records.tobytes()),
                "sums_crc32": zlib.crc32(sums.tobytes()),
                "quality_crc32": zlib.crc32(spans.tobytes()),
            }
        )
        self._rows, self._sums, self._spans = [], [], []


def seal(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest of a store, last and whole: beside what it is given, `files`, the SHA-256 of the statistics
    and of every index (which hold the checksums of all else), and `digest`, over its own content.

    Args:
        folder: of the store, with its statistics and every split's shards and index.
        manifest: what the store says of itself.
    """
    names = [STATISTICS, *sorted(path.relative_to(folder).as_posix() for path in folder.glob(f"*/*/{INDEX}"))]
    sealed = manifest | {"files": {name: sha256((folder / name).read_bytes()) for name in names}}
    sealed["digest"] = content_digest(json.loads(json.dumps(sealed, allow_nan=False)))
    unfinished = folder / f".{MANIFEST}.partial-{os.getpid()}"
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(json.dumps(sealed, indent=1, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(folder / MANIFEST)


def check_files(folder: Path) -> None:
    """Compare every shard and table of a local store with the digests that were written over them.

    Raises:
        DataError: the first that is missing or differs.
    """
    for path in sorted(folder.glob(f"*/*/{INDEX}")):
        for row in json.loads(path.read_bytes())["shards"]:
            stem = path.parent / row["shard"].removesuffix(".tar")
            tables = {kind: Path(f"{stem}.{name}.npy") for kind, name in _TABLES.items()}
            try:
                sums = {
                    kind: zlib.crc32(np.load(table, allow_pickle=False).tobytes()) for kind, table in tables.items()
                }
                if any(row[f"{kind}_crc32"] != sum for kind, sum in sums.items()):
                    raise DataError(f"the tables beside {stem}.tar are not those that were written")
                if row["sha256"] is not None:
                    with Path(f"{stem}.tar").open("rb") as file:
                        if hashlib.file_digest(file, "sha256").hexdigest() != row["sha256"]:
                            raise DataError(f"{stem}.tar is not the shard that was written")
            except (OSError, ValueError) as error:
                raise DataError(f"{stem} cannot be read: {error}") from error


def publish(folder: Path, url: str, *, patience: Patience = Patience()) -> int:  # noqa: B008  it is frozen
    """Copy a finished local store to a URL, its manifest last: until then there is no store. What lies there under the
    same names is written over; a file that the new store does not have stays, unread.

    Args:
        folder: of the store.
        url: s3://bucket/prefix, or another that fsspec writes.
        patience: how long a failing write is tried again.

    Returns:
        Bytes copied; 0 where this very store is there already.

    Raises:
        DataError: no finished store in the folder, no URL, or a write that fails.
    """
    manifest, goal = Store.open(folder).manifest, address(url)
    if not isinstance(goal, RemotePath):
        raise DataError(f"expected a URL such as s3://bucket/prefix to publish to, got {url!r}")
    seal_there = goal / MANIFEST
    if _written(seal_there, seal_there.exists, patience=patience):
        if _same(url, manifest, patience=patience):
            return 0
        _written(seal_there, seal_there.remove, patience=patience)  # it may not stand beside files of this one
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    copied = 0
    for name in [*(name for name in names if name != MANIFEST), MANIFEST]:
        path = goal / name
        _written(path, partial(path.upload, folder / name), patience=patience)
        copied += (folder / name).stat().st_size
    return copied


def _same(url: str, manifest: dict[str, Any], *, patience: Patience) -> bool:
    try:
        return bool(Store.open(url, patience).manifest["digest"] == manifest["digest"])
    except DataError:
        return False  # of another format, or not whole


def _written(path: RemotePath, write: Callable[[], Done], *, patience: Patience) -> Done:
    try:
        return patiently(write, patience, again=lambda: None, sleep=time.sleep)
    except Exception as error:
        if not is_transient(error):
            raise
        raise DataError(f"{path} cannot be written: {reason(error)}; mend the network or the address") from error


def _pack(sample: Sample, packing: Packing | None) -> tuple[np.ndarray, int, float, float]:
    if packing is not None and np.dtype(packing.dtype) in DTYPES:
        dtype = np.dtype(packing.dtype)
        limits = np.iinfo(dtype)
        steps = np.rint((sample.values.astype(np.float64) - packing.offset) / packing.scale)
        steps[~sample.valid] = 0.0
        if steps.min() >= limits.min and steps.max() <= limits.max:
            stored = steps.astype(dtype)
            back = unpack(stored, packing.scale, offset=packing.offset)
            if np.array_equal(back[sample.valid], sample.values[sample.valid]):
                return stored, DTYPES.index(dtype), packing.scale, packing.offset
    return np.ascontiguousarray(sample.values, "<f4"), 0, 1.0, 0.0


def _add_array(tar: tarfile.TarFile, name: str, *, array: np.ndarray) -> tuple[int, memoryview]:
    """Offset of the array's first byte in the tar, and its data."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
    content = buffer.getvalue()
    header = len(content) - array.nbytes
    return _add_bytes(tar, name, content=content) + header, memoryview(content)[header:]


def _add_bytes(tar: tarfile.TarFile, name: str, *, content: bytes) -> int:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    entry.mode = 0o644
    start = tar.offset + len(entry.tobuf(tar.format))
    tar.addfile(entry, io.BytesIO(content))
    return start
