"""Store: the built corpus on disk, read one window at a time with ranged reads only; nothing is ever unpickled."""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sci_gpt.errors import DataError
from sci_tokenizers.sample import Modality, Sample, SampleError
from sci_tokenizers.statistics import SourceStatistics, statistics_from_json

FORMAT_VERSION = 2
SPLITS = ("train", "valid", "test")

# One row per stretch. Offsets are those of an array's first byte in the shard (-1: no such member); `checksum_*` are
# CRC-32 of the whole member's data; `code` is a row of DTYPES; physical value = stored * scale + offset.
RECORD = np.dtype(
    [
        ("key", "S128"),
        ("shard", "<i4"),
        ("num_times", "<i8"),
        ("values_offset", "<i8"),
        ("valid_offset", "<i8"),
        ("time_offset", "<i8"),
        ("place_offset", "<i8"),
        ("values_bytes_per_time", "<i8"),
        ("valid_bytes_per_time", "<i8"),
        ("code", "u1"),
        ("scale", "<f8"),
        ("offset", "<f8"),
        ("step_seconds", "<f8"),
        ("start_time", "<f8"),
        ("end_time", "<f8"),
        ("missing_share", "<f8"),
        ("checksum_values", "<u4"),
        ("checksum_valid", "<u4"),
        ("checksum_time", "<u4"),
    ]
)
DTYPES = (np.dtype("<f4"), np.dtype("<i2"), np.dtype("<i4"))
TIME_BYTES = 24  # time, year_phase, day_phase as float64


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"shard-{number:05d}.tar"


def records_name(number: int) -> str:
    """File name of a shard's fixed-width records."""
    return f"shard-{number:05d}.idx.npy"


@dataclass(frozen=True, kw_only=True)
class Store:
    """A built corpus. Make it with `Store.open`.

    Attributes:
        path: the store's folder.
        manifest: what was built, from what, under which licences and splits.
        statistics: training statistics, {source: {channel: ChannelStatistics}}.
    """

    path: Path
    manifest: dict[str, Any]
    statistics: dict[str, SourceStatistics]
    _records: dict[tuple[str, str], np.ndarray] = field(default_factory=dict, repr=False)
    _files: dict[Path, int] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, path: Path | str) -> Store:
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
        return cls(path=path, manifest=manifest, statistics=statistics_from_json(rows))

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

    def keys(self, source: str, split: str) -> list[str]:
        """Keys of a split's stretches (SOURCE/GROUP[/PART])."""
        return [key.decode() for key in self.stretches(source, split)["key"]]

    def read(self, source: str, split: str, *, index: int, start: int, stop: int) -> Sample:
        """The times [start, stop) of a stretch as a sample: one ranged read per member.

        Raises:
            DataError: no such window, or a broken shard; the message holds file, key and cause.
        """
        records = self.stretches(source, split)
        if not 0 <= index < len(records):
            raise DataError(f"{source}/{split} has {len(records)} stretches, got index {index}")
        record = records[index]
        key = record["key"].decode()
        shard = self.path / source / split / shard_name(int(record["shard"]))
        num_times = int(record["num_times"])
        if not 0 <= start < stop <= num_times:
            raise DataError(f"{shard}: {key} has {num_times} times, got window {start}..{stop}")
        try:
            return self._sample(record, shard, source=source, start=start, stop=stop)
        except (OSError, SampleError, ValueError) as error:
            raise DataError(f"{shard}: {key}: window {start}..{stop} cannot be read: {error}") from error

    def verify(self, source: str, split: str) -> int:
        """Compare every member's checksum; the number of stretches checked.

        Raises:
            DataError: the first member that differs, with file and key.
        """
        shape = self.shape(source)
        for record in self.stretches(source, split):
            shard = self.path / source / split / shard_name(int(record["shard"]))
            num_times = int(record["num_times"])
            sizes = {
                "values": (DTYPES[int(record["code"])].itemsize * int(np.prod(shape)) * num_times),
                "valid": int(np.prod(shape)) * num_times,
                "time": TIME_BYTES * num_times,
            }
            for member, size in sizes.items():
                offset = int(record[f"{member}_offset"])
                if offset >= 0 and zlib.crc32(self._pread(shard, offset, size=size)) != int(
                    record[f"checksum_{member}"]
                ):
                    raise DataError(
                        f"{shard}: {record['key'].decode()}.{member}.npy does not match its checksum; "
                        "build the store again"
                    )
        return len(self.stretches(source, split))

    def close(self) -> None:
        """Close the shards that were opened."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _source(self, source: str) -> dict[str, Any]:
        rows: dict[str, dict[str, Any]] = self.manifest["sources"]
        if source not in rows:
            raise DataError(f"data store {str(self.path)!r} has no source {source!r}; it has {', '.join(rows)}")
        return rows[source]

    def _load_records(self, source: str, split: str) -> np.ndarray:
        folder = self.path / source / split
        shards = _read_json(folder / "index.json", self.path)["shards"]
        parts = []
        for row in shards:
            path = folder / row["records"]
            try:
                part = np.load(path, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError) as error:
                raise DataError(f"{path}: records cannot be read: {error}; build the store again") from error
            if part.dtype != RECORD or len(part) != row["num_stretches"]:
                raise DataError(
                    f"{path}: expected {row['num_stretches']} records, got {len(part)}; build the store again"
                )
            parts.append(part)
        return np.concatenate(parts) if parts else np.zeros(0, RECORD)

    def _sample(self, record: np.void, shard: Path, *, source: str, start: int, stop: int) -> Sample:
        variables, levels = self.variables(source)
        shape = self.shape(source)
        frames = stop - start
        dtype = DTYPES[int(record["code"])]
        size = int(record["values_bytes_per_time"])
        raw = self._pread(shard, int(record["values_offset"]) + start * size, size=frames * size)
        values = np.frombuffer(raw, dtype).reshape(frames, *shape)
        if int(record["code"]) == 0:
            values = values.copy()
        else:
            values = unpack(values, float(record["scale"]), offset=float(record["offset"]))
        if record["valid_offset"] >= 0:
            size = int(record["valid_bytes_per_time"])
            raw = self._pread(shard, int(record["valid_offset"]) + start * size, size=frames * size)
            valid = np.frombuffer(raw, np.uint8).reshape(frames, *shape).astype(bool)
            values[~valid] = 0.0
        else:
            valid = np.ones((frames, *shape), bool)
        raw = self._pread(shard, int(record["time_offset"]) + start * TIME_BYTES, size=frames * TIME_BYTES)
        clock = np.frombuffer(raw, "<f8").reshape(frames, 3)
        place_bytes = 3 * 4 * shape[1] * shape[2]
        place = np.frombuffer(self._pread(shard, int(record["place_offset"]), size=place_bytes), "<f4")
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

    def _pread(self, shard: Path, offset: int, *, size: int) -> bytes:
        if shard not in self._files:
            opened = os.open(shard, os.O_RDONLY)
            if self._files.setdefault(shard, opened) != opened:  # another thread was first
                os.close(opened)
        raw = os.pread(self._files[shard], size, offset)
        if len(raw) != size:
            raise OSError(f"{size} bytes at {offset} expected, the shard holds {len(raw)}")
        return raw


def unpack(stored: np.ndarray, scale: float, *, offset: float) -> np.ndarray:
    """Physical float32 values of integers kept in an archive's own packing."""
    return (stored.astype(np.float64) * scale + offset).astype(np.float32)


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
