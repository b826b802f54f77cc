"""Reads windows of a source that was indexed in place: from the chunks of its own Zarr, as the build read them."""

from __future__ import annotations

import re
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from sci_gpt.data.faults import DamagedError, Patience, UnreadableError, is_transient, patiently, reason
from sci_gpt.data.series_sample import converted, in_range, unpacked
from sci_gpt.data.zarr_chunks import SIZE, ZarrGroup
from sci_gpt.errors import DataError
from sci_tokenizers.sample import Sample

IN_PLACE = 255  # a record's `code`: its values are in the Zarr, from the time `values_offset` on
FOLDER = "in_place"  # of a source: the tables of its Zarrs
CLOCK = np.dtype([("time", "<f8"), ("year_phase", "<f4"), ("day_phase", "<f4")])  # a row per time of the Zarr
PLACE = np.dtype([("latitude", "<f4"), ("longitude", "<f4")])  # a row per cell
_SLAB = 1 << 20  # values that are converted at once: float64 copies stay small beside the sample


@dataclass(frozen=True, kw_only=True)
class Channel:
    """One entry of a sample's variable axis: where it is in the Zarr, and how its values are understood.

    Attributes:
        array: name of the Zarr array, (time, y, x) or (time, level, y, x).
        row: number on the level axis, None where there is none.
        variable: name in the variable table.
        level: Pa or m, None where there is none.
        unit: of the unpacked values.
        fills: stored values that stand for missing ones.
        scale, offset: unpacked = stored * scale + offset.
    """

    array: str
    row: int | None
    variable: str
    level: float | None
    unit: str
    fills: tuple[float, ...]
    scale: float
    offset: float

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Channel:
        """The channel that `to_json` gave."""
        return cls(**{**row, "fills": tuple(row["fills"])})

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"fills": list(self.fills)}


@dataclass(frozen=True, kw_only=True)
class ZarrSample(Sample):
    """A sample that remembers where on the time axis of its Zarr it begins.

    Attributes:
        first: number of its first time on that axis.
    """

    first: int

    def window(self, start: int, stop: int) -> ZarrSample:
        """The times [start, stop) as a sample (views, no copy)."""
        cut = super().window(start, stop)
        return replace(self, **{name: getattr(cut, name) for name in _TIMED}, first=self.first + start)


_TIMED = ("values", "valid", "time", "year_phase", "day_phase")


def read_block(
    arrays: Mapping[str, Any], channels: tuple[Channel, ...], *, times: slice, box: tuple[slice, slice], where: str
) -> tuple[np.ndarray, np.ndarray]:
    """Values of some times and cells, as a build stores them and as a window reads them.

    Args:
        arrays: {name: Zarr array}.
        channels: those wanted, in the order of the variable axis.
        times: on the time axis, start and stop within it.
        box: rows and columns.
        where: names the Zarr in messages.

    Returns:
        float32 values (0 where not valid) and bool valid, both (time, channel, row, column), in the table's units.

    Raises:
        OSError: a chunk is missing, has another length than it had, or cannot be decoded.
        DataError: a unit that does not convert.
    """
    num, rows, columns = times.stop - times.start, box[0].stop - box[0].start, box[1].stop - box[1].start
    values = np.zeros((num, len(channels), rows, columns), np.float32)
    valid = np.zeros(values.shape, bool)
    for name in dict.fromkeys(channel.array for channel in channels):
        mine = [(number, channel) for number, channel in enumerate(channels) if channel.array == name]
        levels = [channel.row for _, channel in mine if channel.row is not None]
        try:
            raw = arrays[name].oindex[(times, levels, *box) if levels else (times, *box)]
        except Exception as error:
            if is_transient(error) or isinstance(error, (DataError, MemoryError, TypeError, AttributeError)):
                raise  # whatever else a codec raises is about the bytes that it was given
            raise DamagedError(f"array {name!r} cannot be decoded: {' '.join(str(error).split())[:120]}") from error
        raw = np.asarray(raw).reshape(num, len(mine), rows, columns)
        step = max(1, _SLAB // (rows * columns))
        for at, (number, channel) in enumerate(mine):
            for start in range(0, num, step):
                cut = slice(start, start + step)
                known = unpacked(raw[cut, at], fills=channel.fills, scale=channel.scale, offset=channel.offset)
                known = converted(known, channel.unit, variable=channel.variable, where=where)
                valid[cut, number] = in_range(known, channel.variable)
                values[cut, number] = np.where(valid[cut, number], known, 0.0).astype(np.float32)
    return values, valid


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """A Zarr whose windows are being read: its arrays, its clock and its places (row, column)."""

    group: ZarrGroup
    arrays: Mapping[str, Any]
    tables: Mapping[str, np.ndarray]
    channels: tuple[Channel, ...]
    clock: np.ndarray
    place: np.ndarray


@dataclass(frozen=True, kw_only=True)
class InPlace:
    """The Zarrs of one source of a store.

    Attributes:
        source: its name.
        row: its row of the manifest.
        load: (file name, dtype) -> a table of the source's folder `in_place`.
    """

    source: str
    row: Mapping[str, Any]
    load: Callable[[str, np.dtype[Any]], np.ndarray]
    _open: dict[str, _Opened] = field(default_factory=dict, repr=False)
    _gone: set[str] = field(default_factory=set, repr=False)

    def read(self, record: np.void, patience: Patience, *, start: int, stop: int) -> Sample:
        """The times [start, stop) of a stretch, read from the Zarr's chunks; tried again as `Store.read` does.

        Raises:
            DataError: the Zarr's metadata are not those that were built from.
            UnreadableError: the window cannot be read; Zarr, key and cause are named.
        """
        name, corner = self._tile(record)
        if not 0 <= start < stop <= record["num_times"]:
            raise DataError(f"{record['key'].decode()} has {record['num_times']} times, got window {start}..{stop}")
        location, key = str(self._notes(name)["location"]), record["key"].decode()
        try:
            sample = patiently(
                lambda: self._sample(record, self._opened(name), corner=corner, start=start, stop=stop),
                Patience(attempts=1) if name in self._gone else patience,
                again=lambda: self._close(name),
                sleep=time.sleep,
            )
        except Exception as error:
            self._close(name)
            if isinstance(error, DataError) or not is_transient(error):
                raise
            if isinstance(error, (FileNotFoundError, DamagedError)):
                self._gone.add(name)
            what = f"{key}: window {start}..{stop} cannot be read"
            raise UnreadableError(what, file=location, cause=reason(error)) from error
        self._gone.discard(name)
        return sample

    def verify(self, records: np.ndarray) -> int:
        """Compare the lengths of all chunk files of some stretches' Zarrs with those that were built from.

        Returns:
            The number of stretches.

        Raises:
            DataError: metadata differ.
            UnreadableError: the first array with a chunk that is missing, new, or of another length.
        """
        for name in dict.fromkeys(self._tile(record)[0] for record in records):
            try:
                opened = self._opened(name)
                for array, sizes in opened.tables.items():
                    differs = opened.group.chunk_sizes(array) != sizes
                    if differs.any():
                        at = ", ".join(map(str, np.argwhere(differs)[0].tolist()))
                        raise DamagedError(f"chunk ({at}) of array {array!r} is missing or not what was built from")
            except OSError as error:
                what = f"source {self.source!r}, {name}"
                raise UnreadableError(what, file=str(self._notes(name)["location"]), cause=str(error)) from error
        return len(records)

    def _notes(self, name: str) -> dict[str, Any]:
        notes: dict[str, Any] = self.row["in_place"][name]
        return notes

    def _tile(self, record: np.void) -> tuple[str, tuple[int, int]]:
        """Name of the Zarr that a stretch is in, and its first row and column there."""
        name = record["key"].decode().split("/")[1]
        found = re.fullmatch(r"(.+)-r(\d+)-c(\d+)", name)
        if name in self.row["in_place"] or found is None:
            return name, (0, 0)
        return found[1], (int(found[2]), int(found[3]))

    def _opened(self, name: str) -> _Opened:
        found = self._open.get(name)
        if found is None:
            found = self._open[name] = self._opening(name)
        return found

    def _opening(self, name: str) -> _Opened:
        notes = self._notes(name)
        group = ZarrGroup.open(notes["location"], notes["arrays"])
        if group.digest() != notes["metadata_sha256"]:
            raise DataError(
                f"{notes['location']}: its metadata are not those that source {self.source!r} was built from (shape, "
                "chunks, packing or attributes differ); build the store again"
            )
        loaded = {kind: self.load(f"{name}.{kind}.npy", dtype) for kind, dtype in TABLES.items()}
        for kind, table in loaded.items():
            if zlib.crc32(table.tobytes()) != notes["crc32"][kind]:
                raise DataError(
                    f"{FOLDER}/{name}.{kind}.npy of source {self.source!r} is damaged; build the store again"
                )
        tables, start = {}, 0
        for array, shape in notes["chunks"].items():
            stop = start + int(np.prod(shape))
            tables[array], start = loaded["chunks"][start:stop].reshape(shape), stop
        return _Opened(
            group=group,
            arrays={array: group.array(array, tables) for array in tables},
            tables=tables,
            channels=tuple(map(Channel.from_json, notes["channels"])),
            clock=loaded["clock"],
            place=loaded["place"].reshape(notes["grid"]),
        )

    def _sample(
        self, record: np.void, opened: _Opened, *, corner: tuple[int, int], start: int, stop: int
    ) -> ZarrSample:
        first, (rows, columns) = int(record["values_offset"]), self.row["shape"][1:]
        times = slice(first + start, first + stop)
        box = (slice(corner[0], corner[0] + rows), slice(corner[1], corner[1] + columns))
        values, valid = read_block(
            opened.arrays, opened.channels, times=times, box=box, where=f"source {self.source!r}"
        )
        clock, place = opened.clock[times], opened.place[box]
        return ZarrSample(
            key=record["key"].decode(),
            source=self.source,
            modality=self.row["modality"],
            variables=tuple(channel.variable for channel in opened.channels),
            levels=tuple(np.nan if channel.level is None else channel.level for channel in opened.channels),
            values=values,
            valid=valid,
            time=clock["time"].copy(),
            year_phase=clock["year_phase"].copy(),
            day_phase=clock["day_phase"].copy(),
            step_seconds=float(record["step_seconds"]),
            latitude=place["latitude"].copy(),
            longitude=place["longitude"].copy(),
            elevation=np.full(place.shape, np.nan, np.float32),
            first=times.start,
        )

    def _close(self, name: str) -> None:
        self._open.pop(name, None)


TABLES = {"clock": CLOCK, "place": PLACE, "chunks": SIZE}  # files GROUP.KIND.npy in FOLDER
