"""Store: the built corpus on disk, read one window at a time with ranged reads only; nothing is ever unpickled."""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sci_gpt.data.faults import DamagedError, Patience, UnreadableError, is_transient, patiently
from sci_gpt.data.quality import SPAN
from sci_gpt.data.shard import BLOCK_BYTES, MEMBERS, Member, Shard, block_sums, load_table
from sci_gpt.errors import DataError
from sci_tokenizers.sample import Modality, Sample
from sci_tokenizers.statistics import SourceStatistics, statistics_from_json

FORMAT_VERSION = 3
SPLITS = ("train", "valid", "test")

# One row per stretch. Offsets are those of an array's first byte in the shard (-1: no such member); `*_sums` is where
# the CRC-32 of its blocks begin in the shard's checksums; `code` is a row of DTYPES; physical value = stored * scale +
# offset.
RECORD = np.dtype(
    [
        ("key", "S128"),
        ("shard", "<i4"),
        ("num_times", "<i8"),
        ("values_offset", "<i8"),
        ("valid_offset", "<i8"),
        ("time_offset", "<i8"),
        ("place_offset", "<i8"),
        ("values_sums", "<i8"),
        ("valid_sums", "<i8"),
        ("time_sums", "<i8"),
        ("place_sums", "<i8"),
        ("values_bytes_per_time", "<i8"),
        ("valid_bytes_per_time", "<i8"),
        ("code", "u1"),
        ("scale", "<f8"),
        ("offset", "<f8"),
        ("step_seconds", "<f8"),
        ("start_time", "<f8"),
        ("end_time", "<f8"),
        ("missing_share", "<f8"),
    ]
)
DTYPES = (np.dtype("<f4"), np.dtype("<i2"), np.dtype("<i4"))
TIME_BYTES = 24  # time, year_phase, day_phase as float64
PLACE_BYTES = 12  # of a cell: latitude, longitude, elevation as float32
MOST_OPEN = 64  # shards kept open
QUALITY = "quality.npy"  # spans of a split's stretches (dtype quality.SPAN)


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"shard-{number:05d}.tar"


def records_name(number: int) -> str:
    """File name of a shard's fixed-width records."""
    return f"shard-{number:05d}.idx.npy"


def sums_name(number: int) -> str:
    """File name of the checksums of a shard's blocks."""
    return f"shard-{number:05d}.crc.npy"


@dataclass(frozen=True, kw_only=True)
class _Open:
    """A shard that is being read: its file, the checksums of its blocks, and which of its stretches are damaged."""

    source: str
    shard: Shard
    sums: np.ndarray
    damaged: dict[bytes, str]


@dataclass(frozen=True, kw_only=True)
class Store:
    """A built corpus. Make it with `Store.open`.

    Attributes:
        path: the store's folder.
        manifest: what was built, from what, under which licences and splits.
        statistics: training statistics, {source: {channel: ChannelStatistics}}.
        patience: how long a failing read is tried again.
    """

    path: Path
    manifest: dict[str, Any]
    statistics: dict[str, SourceStatistics]
    patience: Patience = Patience()
    _records: dict[tuple[str, str], np.ndarray] = field(default_factory=dict, repr=False)
    _spans: dict[tuple[str, str], np.ndarray] = field(default_factory=dict, repr=False)
    _shards: dict[tuple[str, str], list[dict[str, Any]]] = field(default_factory=dict, repr=False)
    _open: dict[Path, _Open] = field(default_factory=dict, repr=False)
    _gone: set[Path] = field(default_factory=set, repr=False)

    @classmethod
    def open(cls, path: Path | str, patience: Patience = Patience()) -> Store:  # noqa: B008  it is frozen
        """Open a store: its manifest and statistics are read; shards are opened when a window is.

        Raises:
            DataError: no store there, an unfinished one, or one of another format version.
        """
        path = Path(path)
        manifest = _read_json(path / "manifest.json", path)
        if manifest.get("format_version") != FORMAT_VERSION:
            raise DataError(
                f"data store {str(path)!r} has format version {manifest.get('format_version')!r}, this code reads "
                f"{FORMAT_VERSION}; build it again with `sci-gpt build`"
            )
        rows = _read_json(path / "statistics.json", path)
        return cls(path=path, manifest=manifest, statistics=statistics_from_json(rows), patience=patience)

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

    def stretches(self, source: str, split: str) -> np.ndarray:
        """Records (dtype RECORD) of a split's stretches, in the order of their index; empty where the split is.

        Raises:
            DataError: no such source or split, or a torn index.
        """
        self._source(source)
        if split not in SPLITS:
            raise DataError(f"split is one of {SPLITS}, got {split!r}")
        if (source, split) not in self._records:
            self._records[source, split] = self._load_records(source, split)
        return self._records[source, split]

    def spans(self, source: str, split: str) -> np.ndarray:
        """Where a rule of quality holds (dtype quality.SPAN), stretch by stretch.

        Raises:
            DataError: no such source or split, or a torn index.
        """
        if (source, split) not in self._spans:
            self.stretches(source, split)
            self._spans[source, split] = load_table(self.path / source / split / QUALITY, SPAN)
        return self._spans[source, split]

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
        records = self.stretches(source, split)
        if not 0 <= index < len(records):
            raise DataError(f"{source}/{split} has {len(records)} stretches, got index {index}")
        record = records[index]
        key = record["key"].decode()
        number = int(record["shard"])
        path = self.path / source / split / shard_name(number)
        num_times = int(record["num_times"])
        if not 0 <= start < stop <= num_times:
            raise DataError(f"{path}: {key} has {num_times} times, got window {start}..{stop}")
        try:
            sample = patiently(
                lambda: self._sample(record, self._shard(source, split, number=number), start=start, stop=stop),
                Patience(attempts=1) if path in self._gone else self.patience,
                again=lambda: self._close(path),
                sleep=time.sleep,
            )
        except UnreadableError:
            raise
        except Exception as error:
            if isinstance(error, (FileNotFoundError, DamagedError)):
                self._gone.add(path)
            self._close(path)  # whatever comes next opens it anew
            if not is_transient(error) and not isinstance(error, (ValueError, DataError)):
                raise
            what = f"{key}: window {start}..{stop} cannot be read"
            raise UnreadableError(what, file=str(path), cause=_cause(error)) from error
        self._gone.discard(path)
        return sample

    def verify(self, source: str, split: str) -> int:
        """Compare every member's checksums; the number of stretches checked.

        Raises:
            DataError: the first member that differs, with file and key.
        """
        for record in self.stretches(source, split):
            path = self.path / source / split / shard_name(int(record["shard"]))
            try:
                opened = self._shard(source, split, number=int(record["shard"]))
                if record["key"] in opened.damaged:
                    raise DamagedError(opened.damaged[record["key"]])
                for name, size in self._sizes(record, source).items():
                    self._part(record, opened, name=name, span=(0, size), total=size)
            except OSError as error:
                raise UnreadableError(
                    record["key"].decode(), file=str(path), cause=f"{_cause(error)}; build the store again"
                ) from error
        return len(self.stretches(source, split))

    def close(self) -> None:
        """Close the shards that were opened."""
        self._open.clear()

    def _source(self, source: str) -> dict[str, Any]:
        rows: dict[str, dict[str, Any]] = self.manifest["sources"]
        if source not in rows:
            raise DataError(f"data store {str(self.path)!r} has no source {source!r}; it has {', '.join(rows)}")
        return rows[source]

    def _load_records(self, source: str, split: str) -> np.ndarray:
        folder = self.path / source / split
        shards: list[dict[str, Any]] = _read_json(folder / "index.json", self.path)["shards"]
        parts = []
        for number, row in enumerate(shards):
            part = load_table(folder / records_name(number), RECORD)
            if len(part) != row["num_stretches"] or zlib.crc32(part.tobytes()) != row["records_crc32"]:
                raise DataError(
                    f"{folder / records_name(number)}: its {len(part)} records are not the {row['num_stretches']} that "
                    "were written; build the store again"
                )
            parts.append(part)
        self._shards[source, split] = shards
        return np.concatenate(parts) if parts else np.zeros(0, RECORD)

    def _shard(self, source: str, split: str, *, number: int) -> _Open:
        """A shard, opened and looked through once."""
        folder = self.path / source / split
        path = folder / shard_name(number)
        found = self._open.get(path)
        if found is None:
            row = self._shards[source, split][number]
            shard = Shard(path, index_bytes=int(row["bytes"]))
            sums = load_table(folder / sums_name(number), np.dtype("<u4"))
            if zlib.crc32(sums.tobytes()) != row["sums_crc32"]:
                raise DamagedError(f"{sums_name(number)} does not match its checksum")
            records = self.stretches(source, split)
            damaged = dict(self._damaged(records[records["shard"] == number], shard, source=source))
            while len(self._open) >= MOST_OPEN:
                self._open.pop(list(self._open)[0], None)
            found = self._open[path] = _Open(source=source, shard=shard, sums=sums, damaged=damaged)
        return found  # another thread may close it meanwhile; whoever holds it still reads

    def _damaged(self, records: np.ndarray, shard: Shard, *, source: str) -> Iterator[tuple[bytes, str]]:
        """(key, why) of the stretches whose members are not where and what their records say."""
        shape = self.shape(source)
        for record in records:
            times = int(record["num_times"])
            wanted = {
                "values": (DTYPES[int(record["code"])].str, (times, *shape)),
                "valid": ("|u1", (times, *shape)),
                "time": ("<f8", (times, 3)),
                "place": ("<f4", (3, *shape[1:])),
            }
            for name in self._sizes(record, source):
                full = f"{record['key'].decode()}.{name}.npy"
                dtype, size = wanted[name]
                member = Member(offset=int(record[f"{name}_offset"]), dtype=dtype, shape=size)
                if shard.members.get(full) != member:
                    yield record["key"], shard.torn or f"{full} is not where or what its record says"

    def _sizes(self, record: np.void, source: str) -> dict[str, int]:
        """{member: bytes of its data} of a stretch."""
        shape, times = self.shape(source), int(record["num_times"])
        sizes = {
            "values": int(record["values_bytes_per_time"]) * times,
            "valid": int(record["valid_bytes_per_time"]) * times,
            "time": TIME_BYTES * times,
            "place": PLACE_BYTES * shape[1] * shape[2],
        }
        return {name: sizes[name] for name in MEMBERS if record[f"{name}_offset"] >= 0}

    def _part(self, record: np.void, opened: _Open, *, name: str, span: tuple[int, int], total: int) -> memoryview:
        """Bytes span[0]..span[1] of a member's `total`, read in whole blocks whose checksums are compared.

        Raises:
            DamagedError: a block differs.
        """
        first, last = span[0] // BLOCK_BYTES, -(-span[1] // BLOCK_BYTES)
        begin, end = first * BLOCK_BYTES, min(last * BLOCK_BYTES, total)
        raw = opened.shard.read(int(record[f"{name}_offset"]) + begin, size=end - begin)
        sums = int(record[f"{name}_sums"])
        if block_sums(raw) != opened.sums[sums + first : sums + last].tolist():
            raise DamagedError(f"{record['key'].decode()}.{name}.npy does not match its checksum")
        return memoryview(raw)[span[0] - begin : span[1] - begin]

    def _sample(self, record: np.void, opened: _Open, *, start: int, stop: int) -> Sample:
        if record["key"] in opened.damaged:
            raise DamagedError(opened.damaged[record["key"]])
        source, frames, times = opened.source, stop - start, int(record["num_times"])
        variables, levels = self.variables(source)
        shape = self.shape(source)

        def rows(name: str, size: int) -> memoryview:
            return self._part(record, opened, name=name, span=(start * size, stop * size), total=times * size)

        values = np.frombuffer(rows("values", int(record["values_bytes_per_time"])), DTYPES[int(record["code"])])
        values = values.reshape(frames, *shape)
        if int(record["code"]) == 0:
            values = values.copy()
        else:
            values = unpack(values, float(record["scale"]), offset=float(record["offset"]))
        valid = np.ones((frames, *shape), bool)
        if record["valid_offset"] >= 0:
            raw = rows("valid", int(record["valid_bytes_per_time"]))
            valid = np.frombuffer(raw, np.uint8).reshape(frames, *shape).astype(bool)
            values[~valid] = 0.0
        clock = np.frombuffer(rows("time", TIME_BYTES), "<f8").reshape(frames, 3)
        size = PLACE_BYTES * shape[1] * shape[2]
        place = np.frombuffer(self._part(record, opened, name="place", span=(0, size), total=size), "<f4")
        latitude, longitude, elevation = place.reshape(3, shape[1], shape[2])
        return Sample(
            key=record["key"].decode(),
            source=source,
            modality=self.modality(source),
            variables=variables,
            levels=levels,
            values=values,
            valid=valid,
            time=clock[:, 0].copy(),
            year_phase=clock[:, 1].astype(np.float32),
            day_phase=clock[:, 2].astype(np.float32),
            step_seconds=float(record["step_seconds"]),
            latitude=latitude,
            longitude=longitude,
            elevation=elevation,
        )

    def _close(self, path: Path) -> None:
        self._open.pop(path, None)


def unpack(stored: np.ndarray, scale: float, *, offset: float) -> np.ndarray:
    """Physical float32 values of integers kept in an archive's own packing."""
    return (stored.astype(np.float64) * scale + offset).astype(np.float32)


def _cause(error: Exception) -> str:
    """What went wrong, without what differs from window to window."""
    return error.strerror if isinstance(error, OSError) and error.strerror else f"{str(error) or type(error).__name__}"


def _read_json(path: Path, store: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(
            f"no data store at {str(store)!r} ({path.name} is missing); make it with `sci-gpt build`"
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}; build the store again") from error
    return content
