"""Store: the built corpus, in a folder or behind a URL, read window by window; nothing is ever unpickled."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sci_gpt.data.addresses import Address, RemotePath, address, load_table, path_or_url
from sci_gpt.data.faults import DamagedError, Patience, UnreadableError, is_transient, patiently, reason
from sci_gpt.data.in_place import FOLDER, InPlace
from sci_gpt.data.index import INDEX, RECORD, Recent, SplitIndex, shard_name
from sci_gpt.data.manifest import STATISTICS, read_manifest, read_object, read_sealed
from sci_gpt.data.shard import Member, Shard
from sci_gpt.data.stretch import DTYPES, Stretch, member_sizes
from sci_gpt.errors import DataError
from sci_tokenizers.sample import Modality, Sample
from sci_tokenizers.statistics import SourceStatistics, statistics_from_json

FORMAT_VERSION = 5
SPLITS = ("train", "valid", "test")
MOST_OPEN = 64  # shards kept open, and so many tables of the index
MOST_KEPT = 1 << 20  # bytes that the stretches made ready of an open shard may hold
AT_ONCE = 16  # requests, when the tables of all shards behind a URL are gone through


@dataclass(frozen=True, kw_only=True)
class _Open:
    """A shard that is being read: its file, the checksums of its blocks, and which of its stretches are damaged."""

    source: str
    shard: Shard
    sums: np.ndarray
    damaged: dict[bytes, str]
    ready: dict[int, Stretch] = field(default_factory=dict)


class _OutsideError(DataError):
    """A window that its stretch does not have: the caller's error, not the disk's."""


def _recent_tables() -> Recent[np.ndarray]:
    return Recent(MOST_OPEN)


def _recent_shards() -> Recent[_Open]:
    return Recent(MOST_OPEN)


@dataclass(frozen=True, kw_only=True)
class Store:
    """A built corpus. Make it with `Store.open`.

    Attributes:
        path: the store's folder, or its URL.
        manifest: what was built, from what, under which licences and splits, and the digests of what it stands on.
        statistics: training statistics, {source: {channel: ChannelStatistics}}.
        patience: how long a failing read is tried again.
    """

    path: Path | str
    manifest: dict[str, Any]
    statistics: dict[str, SourceStatistics]
    patience: Patience = Patience()
    _root: Address | None = field(default=None, repr=False)
    _indices: dict[tuple[str, str], SplitIndex] = field(default_factory=dict, repr=False)
    _places: dict[str, InPlace] = field(default_factory=dict, repr=False)
    _tables: Recent[np.ndarray] = field(default_factory=_recent_tables, repr=False)
    _open: Recent[_Open] = field(default_factory=_recent_shards, repr=False)
    _gone: set[str] = field(default_factory=set, repr=False)

    @classmethod
    def open(cls, path: Path | str, patience: Patience = Patience()) -> Store:  # noqa: B008  it is frozen
        """Open a store: its manifest and statistics are read and compared with their digests; the index of a split is
        when it is first used, a shard is opened when a window of it is.

        Args:
            path: a folder, or a URL that fsspec reads: s3://bucket/prefix.
            patience: how long a failing read is tried again.

        Raises:
            DataError: no store there, an unfinished or changed one, or one of another format version; a URL that
                nothing installed reads.
        """
        root = address(path)
        manifest = read_manifest(root, FORMAT_VERSION, patience=patience)
        content = read_sealed(root, STATISTICS, manifest=manifest, patience=patience)
        rows = read_object(root / STATISTICS, content)
        return cls(
            path=path_or_url(path),
            _root=root,
            manifest=manifest,
            statistics=statistics_from_json(rows),
            patience=patience,
        )

    @property
    def fingerprint(self) -> str:
        """Hex digest over the sources' files, the splits and the format version."""
        return str(self.manifest["fingerprint"])

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the sources, in the configuration's order."""
        return tuple(self.manifest["sources"])

    def modality(self, source: str) -> Modality:
        """Modality of a source."""
        modality: Modality = self._source(source)["modality"]
        return modality

    def step_seconds(self, source: str) -> float:
        """Nominal step of a source's time axis, s (of its first stretch, where records differ in rate)."""
        return float(self._source(source)["step_seconds"])

    def gap_seconds(self, source: str) -> float:
        """Length of the gap between two splits of a source, s; infinite where whole runs or events are held out."""
        gap = self._source(source)["gap_days"]
        return float("inf") if gap is None else float(gap) * 86400.0

    def variables(self, source: str) -> tuple[tuple[str, ...], tuple[float, ...]]:
        """Names and levels (NaN where there is none) of a source's variable axis."""
        row = self._source(source)
        return tuple(row["variables"]), tuple(np.nan if level is None else float(level) for level in row["levels"])

    def shape(self, source: str) -> tuple[int, int, int]:
        """(variables, rows, columns), constant within a source."""
        variables, rows, columns = self._source(source)["shape"]
        return int(variables), int(rows), int(columns)

    def num_stretches(self, source: str, split: str) -> int:
        """Stretches of a split.

        Raises:
            DataError: no such source or split, or a changed index.
        """
        return self._index(source, split).num_stretches

    def num_times(self, source: str, split: str) -> int:
        """Times of all stretches of a split; raises as `num_stretches` does."""
        return int(self._index(source, split).rows["num_times"].sum())

    def shards(self, source: str, split: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """`shard` of every shard, in order; behind a URL several are asked for at a time."""
        numbers = range(len(self._index(source, split).rows))
        if not isinstance(self._root, RemotePath):
            yield from (self.shard(source, split, number=number) for number in numbers)
            return
        with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="index") as pool:
            for first in range(0, len(numbers), AT_ONCE):
                yield from pool.map(
                    lambda number: self.shard(source, split, number=number), numbers[first : first + AT_ONCE]
                )

    def shard(self, source: str, split: str, *, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Records (dtype RECORD) of a shard's stretches, and where a rule of quality holds in them (dtype quality.SPAN,
        stretches counted within the shard).

        Raises:
            DataError: no such source or split, or tables that cannot be read or are not those that were written.
        """
        index = self._index(source, split)
        try:
            return patiently(
                lambda: (index.records(number), index.spans(number)),
                self.patience,
                again=lambda: None,
                sleep=time.sleep,
            )
        except Exception as error:
            if not is_transient(error):
                raise
            where = index.folder / shard_name(number)
            raise DataError(
                f"{where}: its tables cannot be read: {reason(error)}; mend it or build the store again"
            ) from error

    def lengths(self, source: str, split: str) -> np.ndarray:
        """Times of every stretch of a split, int64 (stretch,); raises as `shard` does."""
        parts = [np.asarray(records["num_times"], np.int64) for records, _ in self.shards(source, split)]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def stretches(self, source: str, split: str) -> np.ndarray:
        """Records (dtype RECORD) of all stretches of a split, in the order of their index; empty where the split is.

        They are put together at each call, 250 bytes a stretch; what runs on every rank goes shard by shard.

        Raises:
            DataError: as of `shard`.
        """
        parts = [records for records, _ in self.shards(source, split)]
        return np.concatenate(parts) if parts else np.zeros(0, RECORD)

    def keys(self, source: str, split: str) -> list[str]:
        """Keys of a split's stretches (SOURCE/GROUP[/PART])."""
        return [key.decode() for key in self.stretches(source, split)["key"]]

    def read(self, source: str, split: str, *, index: int, start: int, stop: int) -> Sample:
        """The times [start, stop) of a stretch as a sample: one ranged read per member, its checksums compared.

        What fails as disks and networks do, or does not match its checksum, is tried again (`patience`); a shard that
        was given up because it is missing or damaged is tried once only until it can be read again.

        Raises:
            DataError: no such window.
            UnreadableError: the window cannot be read; file, key and cause are named.
        """
        own = self._index(source, split)
        if not 0 <= index < own.num_stretches:
            raise DataError(f"{source}/{split} has {own.num_stretches} stretches, got index {index}")
        if "in_place" in self._source(source):
            record = self._record(source, split, index=index)
            return self._in_place(source).read(record, self.patience, start=start, stop=stop)
        number, row = own.find(index)
        name = str(own.folder / shard_name(number))
        key = f"{source}/{split} stretch {index}"  # until its record is read

        def sample() -> Sample:
            nonlocal key
            record = own.records(number)[row]
            key = record["key"].decode()
            if not 0 <= start < stop <= record["num_times"]:
                raise _OutsideError(f"{name}: {key} has {record['num_times']} times, got window {start}..{stop}")
            return self._stretch(record, row, opened=self._shard(own, source, number=number)).window(start, stop)

        try:
            found = patiently(
                sample,
                Patience(attempts=1) if name in self._gone else self.patience,
                again=lambda: self._open.drop(name),
                sleep=time.sleep,
            )
        except (UnreadableError, _OutsideError):
            raise
        except Exception as error:
            if isinstance(error, (FileNotFoundError, DamagedError)):
                self._gone.add(name)
            self._open.drop(name)  # whatever comes next opens it anew
            if not is_transient(error) and not isinstance(error, (ValueError, DataError)):
                raise
            what = f"{key}: window {start}..{stop} cannot be read"
            raise UnreadableError(what, file=name, cause=reason(error)) from error
        self._gone.discard(name)
        return found

    def verify(self, source: str, split: str) -> int:
        """Compare every member's checksums; the number of stretches checked.

        Raises:
            DataError: the first member that differs, with file and key.
        """
        own = self._index(source, split)
        for number, (records, _) in enumerate(self.shards(source, split)):
            if "in_place" in self._source(source):
                self._in_place(source).verify(records)
                continue
            for row, record in enumerate(records):
                try:
                    stretch = self._stretch(record, row, opened=self._shard(own, source, number=number))
                    for name, size in member_sizes(record, self.shape(source)).items():
                        stretch.part(name, 0, stop=size)
                except OSError as error:
                    raise UnreadableError(
                        record["key"].decode(),
                        file=str(own.folder / shard_name(number)),
                        cause=f"{reason(error)}; build the store again",
                    ) from error
        return own.num_stretches

    def close(self) -> None:
        """Close the shards that were opened."""
        self._open.clear()
        self._tables.clear()

    def _in_place(self, source: str) -> InPlace:
        folder, row = (self._root or address(self.path)) / source / FOLDER, self._source(source)
        place = InPlace(source=source, row=row, load=lambda name, dtype: load_table(folder / name, dtype))
        return self._places.setdefault(source, place)

    def _record(self, source: str, split: str, *, index: int) -> np.void:
        number, row = self._index(source, split).find(index)
        record: np.void = self.shard(source, split, number=number)[0][row]
        return record

    def _source(self, source: str) -> dict[str, Any]:
        rows: dict[str, dict[str, Any]] = self.manifest["sources"]
        if source not in rows:
            raise DataError(f"data store {str(self.path)!r} has no source {source!r}; it has {', '.join(rows)}")
        return rows[source]

    def _index(self, source: str, split: str) -> SplitIndex:
        found = self._indices.get((source, split))
        if found is None:
            self._source(source)
            if split not in SPLITS:
                raise DataError(f"split is one of {SPLITS}, got {split!r}")
            root, name = self._root or address(self.path), f"{source}/{split}/{INDEX}"
            content = read_sealed(root, name, manifest=self.manifest, patience=self.patience)
            found = SplitIndex(root / source / split, content, tables=self._tables)
            self._indices[source, split] = found
        return found

    def _shard(self, own: SplitIndex, source: str, *, number: int) -> _Open:
        """A shard, opened and looked through once; another thread may close it meanwhile, whoever holds it still
        reads."""
        path = own.folder / shard_name(number)

        def opened() -> _Open:
            shard = Shard(path, index_bytes=int(own.rows[number]["bytes"]))
            damaged = dict(self._damaged(own.records(number), shard, source=source))
            return _Open(source=source, shard=shard, sums=own.sums(number), damaged=damaged)

        return self._open.get(str(path), opened)

    def _stretch(self, record: np.void, row: int, *, opened: _Open) -> Stretch:
        """A stretch made ready, kept with its shard as far as there is room."""
        found = opened.ready.get(row)
        if found is None:
            if record["key"] in opened.damaged:
                raise DamagedError(opened.damaged[record["key"]])
            source = opened.source
            variables, levels = self.variables(source)
            facts = {"source": source, "modality": self.modality(source), "variables": variables, "levels": levels}
            found = Stretch(record, opened.shard, sums=opened.sums, facts=facts, shape=self.shape(source))
            if (len(opened.ready) + 1) * found.kept_bytes > MOST_KEPT:
                opened.ready.clear()
            opened.ready[row] = found
        return found

    def _damaged(self, records: np.ndarray, shard: Shard, *, source: str) -> Iterator[tuple[bytes, str]]:
        """(key, why) of the stretches whose members are not where and what their records say."""
        shape, members = self.shape(source), shard.members()
        if members is None:
            return
        for record in records:
            times = int(record["num_times"])
            wanted = {
                "values": (DTYPES[int(record["code"])].str, (times, *shape)),
                "valid": ("|u1", (times, *shape)),
                "time": ("<f8", (times, 3)),
                "place": ("<f4", (3, *shape[1:])),
            }
            for name in member_sizes(record, shape):
                full = f"{record['key'].decode()}.{name}.npy"
                dtype, size = wanted[name]
                member = Member(offset=int(record[f"{name}_offset"]), dtype=dtype, shape=size)
                if members.get(full) != member:
                    yield record["key"], shard.torn or f"{full} is not where or what its record says"
