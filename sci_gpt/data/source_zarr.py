"""Reads gridded CF Zarr stores into samples, part by part; or only indexes them, to be read where they are."""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from sci_gpt.data.cf_grid import slug
from sci_gpt.data.grid_blocks import contiguous
from sci_gpt.data.in_place import CLOCK, PLACE, ZarrSample, read_block
from sci_gpt.data.source import Part, SourceSettings, locate
from sci_gpt.data.store_writer import Packing
from sci_gpt.data.zarr_chunks import SIZE
from sci_gpt.data.zarr_film import ZarrFilm, amplification, open_film, tile_of
from sci_gpt.errors import DataError
from sci_tokenizers.sample import Modality

LONG_BLOCK = 512  # times: a part holds more tiles only when its blocks stay this long


class ZarrGrid:
    """CF Zarr (v2 or v3; folders or fsspec URLs) -> grid. Several Zarrs of a source are several groups (runs).

    A Zarr is opened and its chunks are listed once for each reader: keep a reader for all the parts of a source.
    """

    modality: ClassVar[Modality] = "grid"
    options: ClassVar[Mapping[str, str]] = {
        "variables": "names of the variables in the Zarr, each (time, y, x) or (time, level, y, x)",
        "names": "{variable: its name in the variable table} (default: its standard_name)",
        "units": "{variable: its unit} (default: its units attribute)",
        "levels": "list of levels in the Zarr's unit, of the variables that have levels (default: all)",
        "level_unit": "unit of the levels (default: their units attribute)",
        "tile": "[rows, columns] of the tiles that are stored or indexed (default: the whole grid)",
        "in_place": "true: nothing is copied, windows are read from the Zarr's own chunks (default: false)",
        "most_amplification": "in place: bytes decoded for each that a time of a tile needs, at most (default: 16)",
        "absent_is_fill": "true: chunks that are not there mean the fill value, though it stands for no missing value",
    }
    required: ClassVar[tuple[str, ...]] = ("variables",)

    def __init__(self) -> None:
        self._films: dict[str, dict[str, ZarrFilm]] = {}

    def read(self, settings: SourceSettings, part: Part) -> Iterator[ZarrSample]:
        """See `Source.read`. Keys are SOURCE/GROUP[-rR-cC]/T: first row, column and time of the sample in
        the Zarr."""
        film = self._opened(settings)[str(part.select["zarr"])]
        first, stop = part.select["times"]
        rows, columns = slice(*part.select["rows"]), slice(*part.select["columns"])
        values, valid = read_block(
            film.arrays, film.channels, times=slice(first, stop), box=(rows, columns), where=settings.where
        )
        high, wide = tile_of(film, settings)
        for row in range(rows.start, rows.stop, high):
            for column in range(columns.start, columns.stop, wide):
                inside = np.s_[:, :, row - rows.start :, column - columns.start :]
                block = [np.ascontiguousarray(array[inside][:, :, :high, :wide]) for array in (values, valid)]
                yield _sample(film, settings, corner=(row, column), first=first, block=(block[0], block[1]))

    def parts(self, settings: SourceSettings) -> list[Part]:
        """Time blocks x bands of tiles of at most `settings.stretch_bytes` as float32; blocks end at gaps.

        Raises:
            DataError: as `Source.read`; or two times of a tile are larger than `stretch_bytes`.
        """
        return [part for film in self._opened(settings).values() for part in _parts(film, settings)]

    def packing(self, settings: SourceSettings) -> Packing | None:
        """The first Zarr's own integers, in the table's unit, where one variable is read and is packed."""
        return next(iter(self._opened(settings).values())).packing

    def is_in_place(self, settings: SourceSettings) -> bool:
        """Whether nothing is copied."""
        return bool(settings.options.get("in_place", False))

    def digest(self, settings: SourceSettings) -> dict[str, str]:
        """SHA-256 by array used (variables and coordinates): of the group's and its own metadata documents and of the
        names and lengths of its chunk files.

        Their contents and times of change are not looked at: a chunk rewritten with other values in as many bytes does
        not show. Fingerprints of other readers' files are of contents; an archive of this size is not read twice.
        """
        found = {}
        for film in self._opened(settings).values():
            for name, sizes in film.tables.items():
                content = hashlib.sha256(film.group.only([name]).digest().encode())
                content.update(json.dumps(sizes.shape).encode() + sizes.tobytes())  # a chunk's name is its place
                found[f"{film.name}/{name}"] = content.hexdigest()
        return found

    def note_in_place(self, settings: SourceSettings, folder: Path) -> dict[str, Any]:
        """Write what reading in place needs beside the index, and return the rest for the manifest.

        Args:
            settings: of the source.
            folder: `STORE/SOURCE/in_place`; made here. Per Zarr a table of times (24 MB for a million), of places,
                and of the lengths of all chunk files of the variables.

        Returns:
            {group: what `in_place.InPlace` opens its Zarr by}.
        """
        folder.mkdir(parents=True)
        notes = {}
        for film in self._opened(settings).values():
            clocks, places = np.zeros(len(film.clock.time), CLOCK), np.zeros(film.latitude.size, PLACE)
            for name in CLOCK.names or ():
                clocks[name] = getattr(film.clock, name)
            places["latitude"], places["longitude"] = film.latitude.ravel(), film.longitude.ravel()
            sizes = np.concatenate([film.tables[name].ravel() for name in film.arrays]).astype(SIZE)
            tables = {"clock": clocks, "place": places, "chunks": sizes}
            for kind, table in tables.items():
                np.save(folder / f"{film.name}.{kind}.npy", table, allow_pickle=False)
            notes[film.name] = {
                "location": film.group.location,
                "metadata_sha256": film.group.digest(),
                "arrays": list(film.group.names),
                "chunks": {name: list(film.tables[name].shape) for name in film.arrays},
                "grid": list(film.latitude.shape),
                "channels": [channel.to_json() for channel in film.channels],
                "crc32": {kind: zlib.crc32(table.tobytes()) for kind, table in tables.items()},
                "amplification": round(amplification(film, tile_of(film, settings)), 2),
            }
        return notes

    def _opened(self, settings: SourceSettings) -> dict[str, ZarrFilm]:
        """{group: film} of the source's Zarrs, each opened once."""
        known = repr(settings)
        if known not in self._films:
            places = zarr_places(settings)
            names = ["grid" if len(places) == 1 else slug(Path(place).stem) for place in places]
            for name, place in zip(names, places, strict=True):
                if names.count(name) > 1 or re.search(r"-r\d+-c\d+$", name):
                    raise DataError(
                        f"{settings.where}: {place} would be group {name!r}, which another Zarr or a tile could be "
                        "too; rename the Zarr"
                    )
            self._films[known] = {
                name: open_film(place, settings, name=name) for name, place in zip(names, places, strict=True)
            }
        return self._films[known]


def zarr_places(settings: SourceSettings) -> list[str]:
    """Folders (absolute) and URLs of a source's Zarrs, in the order of `files`.

    Raises:
        DataError: a pattern that nothing matches, or a file that is no Zarr.
    """
    found = []
    for pattern in settings.files:
        if "://" in pattern:
            found.append(pattern.rstrip("/"))
            continue
        for path in locate(replace(settings, files=(pattern,))):
            if not path.is_dir():
                raise DataError(f"{path} is a file, expected the folder of a Zarr group; give the folder in `files`")
            found.append(str(path.resolve()))
    if not found:
        raise DataError(f"{settings.where}: `files` is empty; list at least one Zarr")
    return list(dict.fromkeys(found))


def _parts(film: ZarrFilm, settings: SourceSettings) -> Iterator[Part]:
    (rows, columns), (high, wide) = film.latitude.shape, tile_of(film, settings)
    one = len(film.channels) * high * wide * 4
    longest = settings.stretch_bytes // one
    if longest < 2:
        raise DataError(
            f"{settings.where}: two times of a tile of {high} x {wide} and {len(film.channels)} channels take "
            f"{2 * one} bytes, a part at most {settings.stretch_bytes}; choose smaller tiles"
        )
    num_times = len(film.clock.time)
    tiles = max(1, longest // min(LONG_BLOCK, num_times))
    across = min(tiles, columns // wide)
    down = min(tiles // across, rows // high) if across == columns // wide else 1
    length = max(2, longest // (across * down))
    chunk = max(array.chunks[0] for array in film.arrays.values())
    for piece in contiguous(film.clock.time, film.step_seconds):
        for first, stop in _blocks(piece, length, chunk=chunk):
            for row in range(0, rows, down * high):
                for column in range(0, columns, across * wide):
                    box = (min(row + down * high, rows), min(column + across * wide, columns))
                    cells = (box[0] - row) * (box[1] - column)
                    yield Part(
                        name=f"{film.name}-t{first}-r{row}-c{column}",
                        select={
                            "zarr": film.name,
                            "times": [first, stop],
                            "rows": [row, box[0]],
                            "columns": [column, box[1]],
                        },
                        bytes=(stop - first) * len(film.channels) * cells * 4,
                    )


def _blocks(piece: slice, length: int, *, chunk: int) -> list[tuple[int, int]]:
    """(first, stop) of blocks of at most `length` times, about equally long, cut between chunks where that is no longer
    than a block."""
    chunk = chunk if chunk <= length else 1
    step = length // chunk * chunk
    edges, start = [piece.start], piece.start
    while piece.stop - start > length:
        count = -(-(piece.stop - start) // step)
        cut = start + (piece.stop - start) // count
        start = cut // chunk * chunk if cut // chunk * chunk > start else cut
        edges.append(start)
    return list(zip(edges, [*edges[1:], piece.stop], strict=True))


def _sample(
    film: ZarrFilm,
    settings: SourceSettings,
    *,
    corner: tuple[int, int],
    first: int,
    block: tuple[np.ndarray, np.ndarray],
) -> ZarrSample:
    """One tile's block of times, with its places and its place in the Zarr."""
    values, valid = block
    rows, columns = values.shape[2:]
    times = slice(first, first + len(values))
    box = (slice(corner[0], corner[0] + rows), slice(corner[1], corner[1] + columns))
    whole = (rows, columns) == film.latitude.shape
    place = film.name if whole else f"{film.name}-r{corner[0]}-c{corner[1]}"
    return ZarrSample(
        key=f"{settings.name}/{place}/{first}",
        source=settings.name,
        modality="grid",
        variables=tuple(channel.variable for channel in film.channels),
        levels=tuple(np.nan if channel.level is None else channel.level for channel in film.channels),
        values=values,
        valid=valid,
        time=film.clock.time[times],
        year_phase=film.clock.year_phase[times],
        day_phase=film.clock.day_phase[times],
        step_seconds=film.step_seconds,
        latitude=film.latitude[box],
        longitude=film.longitude[box],
        elevation=np.full((rows, columns), np.nan, np.float32),
        first=first,
    )
