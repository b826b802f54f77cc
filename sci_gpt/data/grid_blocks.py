"""Blocks of a grid: the joined time axis of a group's files, cut in time and into bands of tiles that memory holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sci_gpt.data.calendars import Clock
from sci_gpt.errors import DataError

LEAST_TIMES = 64  # of a stretch that is cut: windows across a cut are lost


@dataclass(frozen=True, kw_only=True)
class GridHeader:
    """What one file says before its values are read.

    Attributes:
        path: the file.
        clock: of its time axis.
        step_seconds: nominal step.
        latitude, longitude: float32 (row, column).
    """

    path: Path
    clock: Clock
    step_seconds: float
    latitude: np.ndarray
    longitude: np.ndarray


@dataclass(frozen=True, kw_only=True)
class GridBlock:
    """Times and rows of a grid that are read together; it holds whole tiles.

    Attributes:
        stretch: name of its stretches, the last part of their keys.
        clock: of its times.
        step_seconds: nominal step.
        runs: (file, first time, one past the last time) within each file, in the order of time.
        latitude, longitude: float32 (row, column) of the whole grid.
        rows: (first, one past the last) row.
        tile: (rows, columns) of a tile.
    """

    stretch: str
    clock: Clock
    step_seconds: float
    runs: tuple[tuple[Path, int, int], ...]
    latitude: np.ndarray
    longitude: np.ndarray
    rows: tuple[int, int]
    tile: tuple[int, int]

    @property
    def values(self) -> int:
        """Number of values of one variable."""
        return len(self.clock.time) * (self.rows[1] - self.rows[0]) * self.latitude.shape[1]

    def tiles(self) -> Iterator[tuple[str, tuple[slice, slice], tuple[slice, slice]]]:
        """(suffix of the group's name, its box in the whole grid, its box in the block) of every tile."""
        height, width = self.tile
        whole = self.tile == self.latitude.shape
        for row in range(*self.rows, height):
            for column in range(0, self.latitude.shape[1], width):
                across = slice(column, column + width)
                inside = slice(row - self.rows[0], row - self.rows[0] + height)
                name = "" if whole else f"-r{row}-c{column}"
                yield name, (slice(row, row + height), across), (inside, across)


def grid_blocks(headers: Sequence[GridHeader], *, tile: Any, stretch_bytes: int, where: str) -> list[GridBlock]:
    """The blocks of one group: contiguous times, cut so that a tile's values take `stretch_bytes` as float32 at most.

    Files go in the order of their first times; a time that two files hold is taken once, from the earlier file.

    Args:
        headers: of the group's files.
        tile: [rows, columns] of a tile, or None for the whole grid.
        stretch_bytes: of a tile in a block, and of a band of tiles that is read together (one tile high at least).
        where: for messages.

    Raises:
        DataError: the files' grids differ, tiles do not divide the grid, or so few times of a tile fit that most
            windows would be cut.
    """
    headers = sorted(headers, key=lambda header: float(header.clock.time[0]))
    first = headers[0]
    for header in headers[1:]:
        if not _same_places(header, first):
            raise DataError(f"{where}: files of one group have different grids; separate them with option group_by")
    clock, file, index = _joined(headers)
    rows, columns = first.latitude.shape
    height, width = (int(side) for side in tile or (rows, columns))
    if min(height, width) < 1 or rows % height or columns % width:
        raise DataError(f"{where}: tiles of {height} x {width} do not divide a grid of {rows} x {columns}")
    most = stretch_bytes // (4 * height * width)
    blocks = []
    for piece, times in enumerate(contiguous(clock.time, first.step_seconds)):
        count = times.stop - times.start
        if most < min(count, LEAST_TIMES):
            raise DataError(
                f"{where}: {most} times of a tile of {height} x {width} take stretch_megabytes "
                f"({stretch_bytes / 1e6:g}), fewer than {LEAST_TIMES}: most windows would be cut; give smaller tiles "
                "in option tile, or a larger stretch_megabytes"
            )
        cuts = np.linspace(times.start, times.stop, -(-count // most) + 1).astype(int).tolist()
        for cut, (start, stop) in enumerate(zip(cuts[:-1], cuts[1:], strict=True)):
            band = height * max(1, stretch_bytes // (4 * height * columns * (stop - start)))
            for row in range(0, rows, band):
                blocks.append(
                    GridBlock(
                        stretch=str(piece) if len(cuts) == 2 else f"{piece}-{cut}",
                        clock=clock.cut(slice(start, stop)),
                        step_seconds=first.step_seconds,
                        runs=tuple(_runs(headers, file[start:stop], index=index[start:stop])),
                        latitude=first.latitude,
                        longitude=first.longitude,
                        rows=(row, min(row + band, rows)),
                        tile=(height, width),
                    )
                )
    return blocks


def contiguous(time: np.ndarray, step_seconds: float) -> list[slice]:
    """Slices of `time` without a gap longer than 1.5 steps."""
    breaks = np.flatnonzero(np.diff(time) > 1.5 * step_seconds) + 1
    edges = [0, *breaks.tolist(), len(time)]
    return [slice(a, b) for a, b in zip(edges[:-1], edges[1:], strict=True)]


def _same_places(one: GridHeader, two: GridHeader) -> bool:
    return np.array_equal(one.latitude, two.latitude) and np.array_equal(one.longitude, two.longitude)


def _joined(headers: Sequence[GridHeader]) -> tuple[Clock, np.ndarray, np.ndarray]:
    """The clock of all times, and for each the number of its file and its place there."""
    time = np.concatenate([header.clock.time for header in headers])
    file = np.repeat(np.arange(len(headers)), [len(header.clock.time) for header in headers])
    index = np.concatenate([np.arange(len(header.clock.time)) for header in headers])
    _, keep = np.unique(time, return_index=True)
    phases = {
        name: np.concatenate([getattr(header.clock, name) for header in headers])[keep]
        for name in ("year_phase", "day_phase")
    }
    return Clock(time=time[keep], **phases), file[keep], index[keep]


def _runs(headers: Sequence[GridHeader], file: np.ndarray, *, index: np.ndarray) -> Iterator[tuple[Path, int, int]]:
    breaks = np.flatnonzero((np.diff(file) != 0) | (np.diff(index) != 1)) + 1
    edges = [0, *breaks.tolist(), len(file)]
    for start, stop in zip(edges[:-1], edges[1:], strict=True):
        yield headers[int(file[start])].path, int(index[start]), int(index[stop - 1]) + 1
