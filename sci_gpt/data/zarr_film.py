"""Opens a CF Zarr for a grid source: checks that it can be read safely and in order, and says where each channel is."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from sci_gpt.data.calendars import Clock, clock
from sci_gpt.data.cf_grid import (
    coordinate,
    fill_values,
    interval_ends,
    packing_of,
    pick,
    scale_and_offset,
    table_name,
    table_unit,
)
from sci_gpt.data.in_place import Channel
from sci_gpt.data.series_sample import converted
from sci_gpt.data.source import SourceSettings
from sci_gpt.data.source_column import level_rows
from sci_gpt.data.store_writer import Packing
from sci_gpt.data.zarr_chunks import ZarrGroup
from sci_gpt.errors import DataError
from sci_tokenizers.sample import channel_name
from sci_tokenizers.variables import units_of

MOST_AMPLIFICATION = 16.0  # bytes of the chunks touched by one time of one tile, for each byte that it needs


@dataclass(frozen=True, kw_only=True)
class ZarrFilm:
    """One Zarr, opened: everything but its values.

    Attributes:
        name: the group of its samples.
        group: its metadata, of the arrays that are used.
        tables: {array: sizes of its chunks}, of the same arrays.
        arrays: {name: Zarr array} of the variables.
        channels: what a sample's variable axis holds.
        clock: of the time axis, each time the end of its interval where the values are means.
        step_seconds: nominal step.
        latitude, longitude: float32 (row, column), as the Zarr has them.
        packing: the Zarr's own integers, where one variable alone is read and is packed.
    """

    name: str
    group: ZarrGroup
    tables: Mapping[str, np.ndarray]
    arrays: Mapping[str, Any]
    channels: tuple[Channel, ...]
    clock: Clock
    step_seconds: float
    latitude: np.ndarray
    longitude: np.ndarray
    packing: Packing | None


def open_film(location: str, settings: SourceSettings, *, name: str) -> ZarrFilm:
    """Open a Zarr: metadata and coordinates are read, chunks are listed.

    Args:
        location: folder or fsspec URL.
        settings: with the options of `source_zarr.ZarrGrid`.
        name: the group of its samples.

    Raises:
        DataError: it cannot be read, could make Python objects, lacks a variable, a coordinate or chunks, has other
            axes than (time[, level], y, x); a name or unit not in the tables; in place: chunks much larger than a tile.
    """
    variables = [str(variable) for variable in np.atleast_1d(settings.options["variables"])]
    try:
        group = ZarrGroup.open(location)
        for variable in variables:
            if variable not in group.names:
                raise DataError(f"{location}: no variable {variable!r}; the Zarr has {', '.join(group.names)}")
        group = group.only(_used(group, variables))
        tables = {array: group.chunk_sizes(array) for array in group.names}
        for array, sizes in tables.items():
            _check_absent(group, array, sizes=sizes, settings=settings, masked=array in variables)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of consolidated metadata, which are not used
            dataset = xr.open_zarr(
                group.guarded(tables), chunks=None, decode_times=False, mask_and_scale=False, consolidated=False
            )
        film = _planned(dataset, settings, group=group, tables=tables, name=name)
    except DataError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise DataError(
            f"{location} cannot be read as Zarr: {' '.join(str(error).split())[:160]}; give a whole CF Zarr group"
        ) from error
    most, factor = float(settings.options.get("most_amplification", MOST_AMPLIFICATION)), 0.0
    if settings.options.get("in_place"):
        factor = amplification(film, tile_of(film, settings))
    if factor > most:
        chunks = ", ".join(f"{array} {values.chunks}" for array, values in film.arrays.items())
        raise DataError(
            f"{settings.where}: {location}: one time of one tile of {tile_of(film, settings)} decodes {factor:.1f} "
            f"bytes for each that it needs, at most {most:g} (chunks: {chunks}); choose larger tiles, rechunk the "
            "Zarr, copy it (in_place: false), or allow more with option most_amplification"
        )
    return film


def tile_of(film: ZarrFilm, settings: SourceSettings) -> tuple[int, int]:
    """Rows and columns of a tile; they divide the grid.

    Raises:
        DataError: they do not.
    """
    rows, columns = film.latitude.shape
    high, wide = (int(size) for size in settings.options.get("tile", (rows, columns)))
    if min(high, wide) < 1 or rows % high or columns % wide:
        raise DataError(f"{settings.where}: tiles of {high} x {wide} do not divide a grid of {rows} x {columns}")
    return high, wide


def amplification(film: ZarrFilm, tile: tuple[int, int]) -> float:
    """Bytes of the chunks that one time of one tile touches, for each byte that it needs; of the worst tile.

    What is decoded counts, not what is read from disk; where chunks lie in shards, those within.
    """
    touched = needed = 0
    for name, array in film.arrays.items():
        rows = [channel.row for channel in film.channels if channel.array == name]
        chunks = array.chunks
        cells = chunks[0]
        if array.ndim == 4:
            cells *= len({row // chunks[1] for row in rows if row is not None}) * chunks[1]
        for length, size, chunk in zip(array.shape[-2:], tile, chunks[-2:], strict=True):
            cells *= max((n + size - 1) // chunk - n // chunk + 1 for n in range(0, length, size)) * chunk
        touched += cells * array.dtype.itemsize
        needed += len(rows) * tile[0] * tile[1] * array.dtype.itemsize
    return touched / needed


def _used(group: ZarrGroup, variables: list[str]) -> list[str]:
    """The variables, their coordinates and the bounds of these."""
    dims = {dim for variable in variables for dim in group.dims(variable)}
    near = [name for name in group.names if name not in variables and set(group.dims(name)) <= dims]
    near = [name for name in near if name in dims or _is_place(group, name)]
    bounds = [str(group.attributes(name).get("bounds")) for name in near]
    return [*variables, *near, *(name for name in bounds if name in group.names)]


def _is_place(group: ZarrGroup, name: str) -> bool:
    """Whether an array looks like a latitude or longitude, as `source_grid.coordinate` would find it."""
    attributes = group.attributes(name)
    known = name.lower() in ("lat", "latitude", "lon", "longitude")
    known |= attributes.get("standard_name") in ("latitude", "longitude")
    return known or attributes.get("units") in ("degrees_north", "degrees_east")


def _check_absent(group: ZarrGroup, name: str, *, sizes: np.ndarray, settings: SourceSettings, masked: bool) -> None:
    """Chunks that are not there are the fill value: refused, unless that stands for missing values or is allowed."""
    absent = int((sizes < 0).sum())
    if not absent or settings.options.get("absent_is_fill"):
        return
    attributes = group.attributes(name)
    fill = np.asarray(group.array(name, {}).fill_value)
    declared = [attributes.get(key) for key in ("_FillValue", "missing_value")]
    if masked and group.document(name).get("zarr_format") == 2 and group.document(name).get("fill_value") is not None:
        return  # xarray takes the fill value of a v2 array for its _FillValue
    if masked and (
        (fill.dtype.kind == "f" and np.isnan(fill)) or any(fill == value for value in declared if value is not None)
    ):
        return  # they are masked; a coordinate has no missing values
    raise DataError(
        f"{group.location}: {absent} of {sizes.size} chunks of {name!r} are not there, and their fill value {fill} "
        "stands for no missing value; bring the chunks, or say with option absent_is_fill that they hold that value"
    )


def _planned(
    dataset: xr.Dataset, settings: SourceSettings, *, group: ZarrGroup, tables: Mapping[str, np.ndarray], name: str
) -> ZarrFilm:
    where, options = group.location, settings.options
    picked = [pick(dataset, str(variable), where=where) for variable in np.atleast_1d(options["variables"])]
    first = picked[0]
    ends: list[np.ndarray] = []
    channels: list[Channel] = []
    for variable in picked:
        axis = coordinate(dataset, variable, kind="time", where=where)
        latitude, longitude = _places(dataset, variable, axis=axis, where=where)
        times, step = interval_ends(dataset, variable, axis=axis, where=where)
        ends.append(times)
        if (variable.dims[0], *variable.dims[-2:]) != (first.dims[0], *first.dims[-2:]) or not np.array_equal(
            times, ends[0]
        ):
            raise DataError(
                f"{where}: variables {first.name!r} and {variable.name!r} are on other axes or known at other times "
                "(one a mean over an interval, one not); make each a source of its own"
            )
        channels += _channels(dataset, variable, options=options, where=where)
    names = [channel_name(c.variable, np.nan if c.level is None else c.level) for c in channels]
    for channel in names:
        if names.count(channel) > 1:
            raise DataError(
                f"{where}: two of the variables are channel {channel!r}; leave one out, or set option names"
            )
    units, calendar = str(dataset[axis].attrs["units"]), str(dataset[axis].attrs.get("calendar", "standard"))
    return ZarrFilm(
        name=name,
        group=group,
        tables=tables,
        arrays={str(variable.name): group.array(str(variable.name), tables) for variable in picked},
        channels=tuple(channels),
        clock=clock(ends[0], units, calendar=calendar, where=where),
        step_seconds=step,
        latitude=latitude,
        longitude=longitude,
        packing=packing_of(first, _own(options, first), where=where) if len(picked) == 1 else None,
    )


def _own(options: Mapping[str, Any], variable: xr.DataArray) -> dict[str, Any]:
    """Options `name` and `unit` of one variable, as the functions of grids take them."""
    return {
        one: options[many][variable.name]
        for one, many in (("name", "names"), ("unit", "units"))
        if variable.name in options.get(many, {})
    }


def _channels(dataset: xr.Dataset, variable: xr.DataArray, *, options: Mapping[str, Any], where: str) -> list[Channel]:
    """The channels of one variable, one per level that is wanted."""
    own = _own(options, variable)
    scale, offset = scale_and_offset(variable)
    shared: dict[str, Any] = {
        "array": str(variable.name),
        "variable": table_name(variable, own),
        "unit": table_unit(variable, own),
        "fills": tuple(float(fill) for fill in fill_values(variable) if np.isfinite(fill)),
        "scale": scale,
        "offset": offset,
    }
    converted(np.zeros(1), shared["unit"], variable=shared["variable"], where=where)
    if variable.ndim == 3:
        return [Channel(row=None, level=None, **shared)]
    dim = str(variable.dims[1])
    if dim not in dataset.variables or dataset[dim].dims != (dim,):
        raise DataError(f"{where}: dimension {dim!r} of {variable.name!r} has no coordinate that says its levels")
    levels = np.asarray(dataset[dim].values, np.float64)
    rows = level_rows(levels, options["levels"], where=where) if "levels" in options else list(range(len(levels)))
    unit = str(options.get("level_unit") or dataset[dim].attrs.get("units", ""))
    unit = {"millibars": "hPa", "millibar": "hPa", "mb": "hPa"}.get(unit, unit)
    kinds = [name for name in ("surface_air_pressure", "geopotential_height") if unit in units_of(name)]
    if not kinds:
        raise DataError(
            f"{where}: levels {dim!r} have unit {unit!r}, expected one of pressure or of height; set option level_unit"
        )
    heights = converted(levels, unit, variable=kinds[0], where=where)
    return [Channel(row=row, level=float(heights[row]), **shared) for row in rows]


def _places(dataset: xr.Dataset, variable: xr.DataArray, *, axis: str, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Latitude and longitude, float32 (row, column); the variable must be (time[, level], y, x)."""
    names = [coordinate(dataset, variable, kind=kind, where=where) for kind in ("latitude", "longitude")]
    latitude, longitude = (dataset[name] for name in names)
    dims = tuple(map(str, variable.dims))
    flat = latitude.dims == (dims[-2],) and longitude.dims == (dims[-1],)
    if len(dims) not in (3, 4) or dims[0] != axis or not (flat or latitude.dims == longitude.dims == dims[-2:]):
        raise DataError(
            f"{where}: variable {variable.name!r} has dimensions {dims}, expected (time[, level], y, x) with "
            f"time {axis!r}, y and x those of {names[0]!r} and {names[1]!r}; write the Zarr again in this order"
        )
    whole = []
    for part in (latitude, longitude):
        scale, offset = scale_and_offset(part)
        whole.append(np.asarray(part.values, np.float64) * scale + offset)  # a coordinate has no missing values
    if flat:
        whole = list(np.meshgrid(*whole, indexing="ij"))
    return whole[0].astype(np.float32), whole[1].astype(np.float32)
