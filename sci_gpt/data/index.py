"""Index: one row per shard, held by every rank; fixed-width records per shard, read only while its windows are."""

from __future__ import annotations

import json
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

import numpy as np

from sci_gpt.data.addresses import Address, load_table
from sci_gpt.data.faults import DamagedError
from sci_gpt.data.quality import SPAN
from sci_gpt.errors import DataError

# One row per stretch of a shard, in its order. Offsets are those of an array's first byte in the shard (-1: no such
# member); `*_sums` is where the CRC-32 of its blocks begin in the shard's checksums; `code` is a row of store.DTYPES;
# physical value = stored * scale + offset.
RECORD = np.dtype(
    [
        ("key", "S128"),
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
SUM = np.dtype("<u4")  # CRC-32 of a block of a member's data
# What a rank holds of a shard: its row of index.json, whose name is that of its number.
SHARD = np.dtype(
    [
        ("num_stretches", "<i8"),
        ("num_times", "<i8"),
        ("num_spans", "<i8"),
        ("bytes", "<i8"),
        ("records_crc32", "<u4"),
        ("sums_crc32", "<u4"),
        ("quality_crc32", "<u4"),
    ]
)
INDEX = "index.json"
Kept = TypeVar("Kept")


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"shard-{number:05d}.tar"


def records_name(number: int) -> str:
    """File name of a shard's fixed-width records."""
    return f"shard-{number:05d}.idx.npy"


def sums_name(number: int) -> str:
    """File name of the checksums of a shard's blocks."""
    return f"shard-{number:05d}.crc.npy"


def quality_name(number: int) -> str:
    """File name of the spans of a shard's stretches in which a rule of quality holds, stretches counted within it."""
    return f"shard-{number:05d}.quality.npy"


class Recent(Generic[Kept]):
    """The few things that were asked for last; safe to use from threads.

    Args:
        most: kept at a time.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._kept: OrderedDict[Hashable, Kept] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Kept]) -> Kept:
        """What is kept under the key; made where nothing is (twice where two threads ask at once)."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        made = make()
        with self._lock:
            self._kept[key] = made
            while len(self._kept) > self.most:
                self._kept.popitem(last=False)
        return made

    def drop(self, key: Hashable) -> None:
        """Forget one; whoever holds it still can use it."""
        with self._lock:
            self._kept.pop(key, None)

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._kept.clear()


class SplitIndex:
    """The index of one split of one source.

    Attributes:
        rows: dtype SHARD, a row per shard.

    Args:
        folder: of the split.
        content: of its index.json.
        tables: the tables that are kept, shared by all splits of a store.

    Raises:
        DataError: the content is no index, or a shard is not named for its row.
    """

    def __init__(self, folder: Address, content: bytes, *, tables: Recent[np.ndarray]) -> None:
        self.folder, self._name, self._tables = folder, str(folder), tables
        try:
            listed = json.loads(content)["shards"]
            names = [row["shard"] for row in listed]
            self.rows = np.array([tuple(row[name] for name in SHARD.names or ()) for row in listed], SHARD)
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise DataError(
                f"{folder / INDEX}: expected a row of {', '.join(SHARD.names or ())} per shard, got "
                f"{type(error).__name__}: {error}; build the store again"
            ) from error
        for number, name in enumerate(names):
            if name != shard_name(number):
                raise DataError(
                    f"{folder / INDEX}: expected {shard_name(number)!r} in row {number}, got {name!r}; build the "
                    "store again"
                )
        self._bases = np.concatenate([[0], np.cumsum(self.rows["num_stretches"])])

    @property
    def num_stretches(self) -> int:
        """Stretches of the split."""
        return int(self._bases[-1])

    def find(self, index: int) -> tuple[int, int]:
        """(shard, row of its records) of a stretch."""
        shard = int(np.searchsorted(self._bases, index, side="right")) - 1
        return shard, index - int(self._bases[shard])

    def records(self, shard: int) -> np.ndarray:
        """Records (dtype RECORD) of a shard's stretches.

        Raises:
            OSError, or an error of the remote library: they cannot be read.
            DamagedError: they are not those that were written.
        """
        return self._table(shard, records_name(shard), dtype=RECORD, crc="records_crc32")

    def spans(self, shard: int) -> np.ndarray:
        """Spans (dtype quality.SPAN) of a shard's stretches, counted within it; raises as `records` does."""
        if not self.rows[shard]["num_spans"]:
            return np.zeros(0, SPAN)  # as most shards': nothing is asked for
        return self._table(shard, quality_name(shard), dtype=SPAN, crc="quality_crc32")

    def sums(self, shard: int) -> np.ndarray:
        """Checksums (dtype SUM) of a shard's blocks; raises as `records` does."""
        return self._table(shard, sums_name(shard), dtype=SUM, crc="sums_crc32")

    def _table(self, shard: int, name: str, *, dtype: np.dtype[Any], crc: str) -> np.ndarray:
        def load() -> np.ndarray:
            try:
                table = load_table(self.folder / name, dtype)
            except FileNotFoundError as error:
                raise DamagedError(f"{name} is missing") from error
            if zlib.crc32(table.data) != self.rows[shard][crc]:
                raise DamagedError(f"{name} does not match its checksum: its {len(table)} rows are not those written")
            return table

        return self._tables.get((self._name, name), load)
