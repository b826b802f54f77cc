"""Stretch: a stored stretch made ready once, so that each of its windows is ranged reads, checksums and no more."""

from __future__ import annotations

from typing import Any

import numpy as np

from sci_gpt.data.faults import DamagedError
from sci_gpt.data.shard import BLOCK_BYTES, MEMBERS, Shard, block_sums
from sci_tokenizers.sample import Sample

DTYPES = (np.dtype("<f4"), np.dtype("<i2"), np.dtype("<i4"))
TIME_BYTES = 24  # time, year_phase, day_phase as float64
PLACE_BYTES = 12  # of a cell: latitude, longitude, elevation as float32
_KEPT_TIME = 2 * BLOCK_BYTES  # a window reads one or two blocks of the time axis: one that has no more is kept whole
_TRUE = b"\1"
_OBJECTS = 4096  # about what a stretch takes beside its arrays


class Stretch:
    """A stretch of an open shard. Its place, and a short time axis, are read and compared with their checksums here.

    Attributes:
        kept_bytes: memory that it holds on to.

    Args:
        record: of the store's index.
        shard: that holds it.
        sums: CRC-32C of the blocks of the shard's members.
        facts: of the sample: source, modality, variables, levels.
        shape: (variables, rows, columns).

    Raises:
        OSError: bytes lack, or do not match their checksums (`DamagedError`).
    """

    def __init__(
        self,
        record: np.void,
        shard: Shard,
        *,
        sums: np.ndarray,
        facts: dict[str, Any],
        shape: tuple[int, int, int],
    ) -> None:
        self._shard, self._shape = shard, shape
        self._key, times = record["key"].decode(), int(record["num_times"])
        self._sizes = member_sizes(record, shape)
        self._offsets = {name: int(record[f"{name}_offset"]) for name in self._sizes}
        self._sums = {
            name: sums[int(record[f"{name}_sums"]) :][: -(-size // BLOCK_BYTES)] for name, size in self._sizes.items()
        }
        self._per_time = {name: size // times for name, size in self._sizes.items()}
        self._dtype = DTYPES[int(record["code"])]
        self._scale, self._offset = float(record["scale"]), float(record["offset"])
        place = np.frombuffer(self.part("place", 0, stop=self._sizes["place"]), "<f4")
        latitude, longitude, elevation = place.reshape(3, *shape[1:])
        self._empty = Sample(
            key=self._key,
            values=np.zeros((0, *shape), np.float32),
            valid=np.zeros((0, *shape), bool),
            time=np.zeros(0),
            year_phase=np.zeros(0, np.float32),
            day_phase=np.zeros(0, np.float32),
            step_seconds=float(record["step_seconds"]),
            latitude=latitude,
            longitude=longitude,
            elevation=elevation,
            **facts,
        )
        self._clock = self._read_clock(0, times) if self._sizes["time"] <= _KEPT_TIME else None
        self.kept_bytes = _OBJECTS + place.nbytes + (sum(array.nbytes for array in self._clock) if self._clock else 0)

    def window(self, start: int, stop: int) -> Sample:
        """The times [start, stop): one ranged read per member that is not kept. The values may not be written to.

        Raises:
            OSError: bytes lack, or do not match their checksums (`DamagedError`).
        """
        shape = (stop - start, *self._shape)
        size = self._per_time["values"]
        values = np.frombuffer(self.part("values", start * size, stop=stop * size), self._dtype).reshape(shape)
        if self._dtype != np.float32:
            values = unpack(values, self._scale, offset=self._offset)
        if "valid" in self._sizes:
            size = self._per_time["valid"]
            valid = np.frombuffer(self.part("valid", start * size, stop=stop * size), np.uint8).reshape(shape) != 0
            values = np.where(valid, values, np.float32(0.0))
        else:
            valid = np.ndarray(shape, bool, _TRUE, strides=(0, 0, 0, 0))  # one byte seen everywhere
        if self._clock is None:
            time, year_phase, day_phase = self._read_clock(start, stop)
        else:
            time, year_phase, day_phase = (array[start:stop] for array in self._clock)
        return self._empty.filmed(values, valid, time=time, year_phase=year_phase, day_phase=day_phase)

    def part(self, name: str, start: int, *, stop: int) -> memoryview:
        """Bytes [start, stop) of a member's data, read in whole blocks whose checksums are compared.

        Raises:
            OSError: bytes lack, or a block differs (`DamagedError`).
        """
        first, last = start // BLOCK_BYTES, -(-stop // BLOCK_BYTES)
        begin, end = _whole_blocks(start, stop, size=self._sizes[name])
        raw = self._shard.read(self._offsets[name] + begin, size=end - begin)
        if block_sums(raw) != self._sums[name][first:last].tolist():
            raise DamagedError(f"{self._key}.{name}.npy does not match its checksum")
        return memoryview(raw)[start - begin : stop - begin]

    def _read_clock(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Time, phase of the year and of the day at the times [start, stop)."""
        clock = np.frombuffer(self.part("time", start * TIME_BYTES, stop=stop * TIME_BYTES), "<f8").reshape(-1, 3)
        return clock[:, 0].copy(), clock[:, 1].astype(np.float32), clock[:, 2].astype(np.float32)


def member_sizes(record: np.void, shape: tuple[int, int, int]) -> dict[str, int]:
    """{member: bytes of its data} of a stretch."""
    times = int(record["num_times"])
    sizes = {
        "values": int(record["values_bytes_per_time"]) * times,
        "valid": int(record["valid_bytes_per_time"]) * times,
        "time": TIME_BYTES * times,
        "place": PLACE_BYTES * shape[1] * shape[2],
    }
    return {name: sizes[name] for name in MEMBERS if record[f"{name}_offset"] >= 0}


def window_bytes(record: np.void, shape: tuple[int, int, int], *, start: int, stop: int) -> dict[str, int]:
    """{member: bytes} that the times [start, stop) of a stretch take to read when nothing of it is kept."""
    times, read = int(record["num_times"]), {}
    for name, size in member_sizes(record, shape).items():
        whole = name == "place" or (name == "time" and size <= _KEPT_TIME)
        span = (0, size) if whole else (start * (size // times), stop * (size // times))
        begin, end = _whole_blocks(*span, size=size)
        read[name] = end - begin
    return read


def _whole_blocks(start: int, stop: int, *, size: int) -> tuple[int, int]:
    """The blocks of a member of `size` bytes that hold the bytes [start, stop), as bytes."""
    return start // BLOCK_BYTES * BLOCK_BYTES, min(-(-stop // BLOCK_BYTES) * BLOCK_BYTES, size)


def unpack(stored: np.ndarray, scale: float, *, offset: float) -> np.ndarray:
    """Physical float32 values of integers kept in an archive's own packing."""
    return (stored.astype(np.float64) * scale + offset).astype(np.float32)
