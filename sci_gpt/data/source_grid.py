"""Reads gridded CF netCDF files (analyses, climate models) into samples: whole grids or tiles of them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import xarray as xr

from sci_gpt.data.calendars import Clock, clock
from sci_gpt.data.series_sample import converted, in_range
from sci_gpt.data.source import SourceSettings, locate
from sci_gpt.data.store_writer import Packing
from sci_gpt.errors import DataError
from sci_tokenizers.sample import Modality, Sample
from sci_tokenizers.variables import VARIABLES, UnknownVariableError

_SECONDS = {"second": 1.0, "minute": 60.0, "hour": 3600.0, "day": 86400.0}
YEAR_SECONDS = 365.2425 * 86400.0


@dataclass(frozen=True, kw_only=True)
class GridFilm:
    """One variable of one file, in the order (time, row, column).

    Attributes:
        values: float32 (time, row, column), in the variable table's unit; 0 where not valid.
        valid: bool, same shape.
        clock: of the time axis, each time the end of its interval where the file says that values are interval means.
        step_seconds: nominal step.
        latitude, longitude: float32 (row, column), as the file has them: row 0 is the file's first row.
    """

    values: np.ndarray
    valid: np.ndarray
    clock: Clock
    step_seconds: float
    latitude: np.ndarray
    longitude: np.ndarray


class NetcdfGrid:
    """CF netCDF -> grid. Files that share a group are one film, in the order of their times."""

    modality: ClassVar[Modality] = "grid"
    options: ClassVar[Mapping[str, str]] = {
        "variable": "name of the variable in the file",
        "name": "its name in the variable table (default: its standard_name)",
        "unit": "its unit (default: its units attribute)",
        "group_by": "global attribute that names the group (run) of a file, or 'file' (default: all files are one)",
        "tile": "[rows, columns] of the tiles that are stored (default: the whole grid)",
    }
    required: ClassVar[tuple[str, ...]] = ("variable",)

    def read(self, settings: SourceSettings) -> Iterator[Sample]:
        """See `Source.read`."""
        films: dict[str, list[GridFilm]] = {}
        for path in locate(settings):
            group, film = self._film(path, settings)
            films.setdefault(group, []).append(film)
        name = self._table_name(settings)
        for group, parts in films.items():
            film = concatenate(parts, f"{settings.where}, {group}")
            yield from self._samples(film, settings, group=group, name=name)

    def packing(self, settings: SourceSettings) -> Packing | None:
        """The first file's own integers, in the table's unit, where the file is packed."""
        path = locate(settings)[0]
        with open_netcdf(path) as dataset:
            variable = pick(dataset, str(settings.options["variable"]), where=str(path))
            if "scale_factor" not in variable.attrs or variable.dtype.kind != "i":
                return None
            name, unit = table_name(variable, settings.options), table_unit(variable, settings.options)
            zero, one, origin = converted(
                np.array([0.0, 1.0, float(variable.attrs.get("add_offset", 0.0))]), unit, variable=name, where=str(path)
            )
            dtype = variable.dtype.newbyteorder("<").str
            scale, offset = float(variable.attrs["scale_factor"]) * float(one - zero), float(origin)
            return Packing(dtype=dtype, scale=scale, offset=offset)

    def _table_name(self, settings: SourceSettings) -> str:
        with open_netcdf(locate(settings)[0]) as dataset:
            return table_name(pick(dataset, str(settings.options["variable"]), where=settings.where), settings.options)

    def _film(self, path: Path, settings: SourceSettings) -> tuple[str, GridFilm]:
        with open_netcdf(path) as dataset:
            variable = pick(dataset, str(settings.options["variable"]), where=str(path))
            rule = settings.options.get("group_by")
            if rule is None:
                group = "grid"
            elif rule == "file":
                group = path.stem
            elif rule in dataset.attrs:
                group = str(dataset.attrs[rule])
            else:
                raise DataError(f"{path}: no global attribute {rule!r}; name another in option group_by")
            return slug(group), film(dataset, variable, options=settings.options, where=str(path))

    def _samples(self, film: GridFilm, settings: SourceSettings, *, group: str, name: str) -> Iterator[Sample]:
        rows, columns = film.latitude.shape
        tile_rows, tile_columns = settings.options.get("tile", (rows, columns))
        if rows % tile_rows or columns % tile_columns:
            raise DataError(
                f"{settings.where}: tiles of {tile_rows} x {tile_columns} do not divide a grid of {rows} x {columns}"
            )
        whole = (tile_rows, tile_columns) == (rows, columns)
        for part, cut in enumerate(contiguous(film.clock.time, film.step_seconds)):
            for row in range(0, rows, tile_rows):
                for column in range(0, columns, tile_columns):
                    box = (slice(row, row + tile_rows), slice(column, column + tile_columns))
                    place = group if whole else f"{group}-r{row}-c{column}"
                    yield Sample(
                        key=f"{settings.name}/{place}/{part}",
                        source=settings.name,
                        modality="grid",
                        variables=(name,),
                        levels=(float("nan"),),
                        values=film.values[cut, None, box[0], box[1]],
                        valid=film.valid[cut, None, box[0], box[1]],
                        time=film.clock.time[cut],
                        year_phase=film.clock.year_phase[cut],
                        day_phase=film.clock.day_phase[cut],
                        step_seconds=film.step_seconds,
                        latitude=film.latitude[box],
                        longitude=film.longitude[box],
                        elevation=np.full((tile_rows, tile_columns), np.nan, np.float32),
                    )


def open_netcdf(path: Path) -> xr.Dataset:
    """Open a netCDF file as it is stored: times are numbers, packed values integers (see `physical_values`).

    Raises:
        DataError: it cannot be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of attributes that point to variables which the file does not hold
            dataset = xr.open_dataset(path, decode_times=False, mask_and_scale=False, decode_coords="all")
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read as netCDF: {' '.join(str(error).split())[:120]}; give a whole file"
        ) from error
    return dataset


def pick(dataset: xr.Dataset, name: str, *, where: str) -> xr.DataArray:
    """A variable of the file by name.

    Raises:
        DataError: the file does not have it; its variables are listed.
    """
    if name not in dataset.data_vars:
        raise DataError(f"{where}: no variable {name!r}; the file has {', '.join(map(str, dataset.data_vars))}")
    return dataset[name]


def table_name(variable: xr.DataArray, options: Mapping[str, Any]) -> str:
    """The variable's name in the variable table: option `name`, or the file's standard_name or own name.

    Raises:
        DataError: it is not in the table; the nearest is named.
    """
    name = str(options.get("name") or variable.attrs.get("standard_name") or variable.name)
    if name not in VARIABLES:
        raise DataError(str(UnknownVariableError(name, f"variable {variable.name!r}")))
    return name


def table_unit(variable: xr.DataArray, options: Mapping[str, Any]) -> str:
    """The unit of the file's values: option `unit`, or the file's units attribute.

    Raises:
        DataError: neither is there.
    """
    unit = options.get("unit") or variable.attrs.get("units")
    if unit is None:
        raise DataError(f"variable {variable.name!r} has no units attribute; name its unit in option 'unit'")
    return str(unit)


def physical_values(variable: xr.DataArray) -> np.ndarray:
    """Values of a variable, float64, fill values NaN and packing undone as its attributes say (CF section 8.1).

    A variable whose packing has been undone already has no such attributes and comes back as it is.
    """
    raw = np.asarray(variable.values)
    values = raw.astype(np.float64)
    for name in ("_FillValue", "missing_value"):
        for fill in np.atleast_1d(variable.attrs.get(name, [])):
            values[raw == fill] = np.nan
    scale, offset = (
        float(variable.attrs.get(name, default)) for name, default in (("scale_factor", 1), ("add_offset", 0))
    )
    return values * scale + offset


def film(dataset: xr.Dataset, variable: xr.DataArray, *, options: Mapping[str, Any], where: str) -> GridFilm:
    """One variable as (time, row, column) in the table's unit, with its clock and places.

    Args:
        dataset: opened by `open_netcdf`: times as numbers in the unit of their attributes.
        variable: with dimensions time, y, x in any order; other dimensions must have length 1.
        options: `name` and `unit` as in `NetcdfGrid.options`.
        where: for messages.

    Raises:
        DataError: no time, latitude or longitude; a unit or calendar that does not convert; a name not in the table.
    """
    array, latitude, longitude, axis = canonical(dataset, variable, where=where)
    name = table_name(variable, options)
    values = converted(array, table_unit(variable, options), variable=name, where=where)
    valid = in_range(values, name)
    times, step = interval_ends(dataset, variable, axis=axis, where=where)
    attributes = dataset[axis].attrs
    calendar = str(attributes.get("calendar", "standard"))
    return GridFilm(
        values=np.where(valid, values, 0.0).astype(np.float32),
        valid=valid,
        clock=clock(times, str(attributes["units"]), calendar=calendar, where=where),
        step_seconds=step,
        latitude=latitude,
        longitude=longitude,
    )


def canonical(
    dataset: xr.Dataset, variable: xr.DataArray, *, where: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
    """Values (time, row, column) as in the file, latitude and longitude float32 (row, column), name of the time axis.

    Raises:
        DataError: no time, latitude or longitude is found, or a further dimension is longer than 1.
    """
    axis = coordinate(dataset, variable, kind="time", where=where)
    latitude = dataset[coordinate(dataset, variable, kind="latitude", where=where)]
    longitude = dataset[coordinate(dataset, variable, kind="longitude", where=where)]
    dims = [dim for dim in variable.dims if dim in {*latitude.dims, *longitude.dims}]
    others = [dim for dim in variable.dims if dim not in dims and dim != axis]
    long = [dim for dim in others if variable.sizes[dim] > 1]
    if long:
        raise DataError(
            f"{where}: variable {variable.name!r} has a further dimension {long[0]!r} of {variable.sizes[long[0]]}"
        )
    if len(dims) != 2:
        raise DataError(f"{where}: variable {variable.name!r} is on {dims}, expected one row and one column dimension")
    if latitude.ndim == 1:
        dims = [str(latitude.dims[0]), str(longitude.dims[0])]
    array = variable.isel(dict.fromkeys(others, 0)).transpose(axis, *dims)
    whole = [part.reset_coords(drop=True).copy(data=physical_values(part)) for part in (latitude, longitude)]
    places = [np.asarray(part.transpose(*dims).values, np.float32) for part in xr.broadcast(*whole)]
    return physical_values(array), places[0], places[1], axis


def interval_ends(dataset: xr.Dataset, variable: xr.DataArray, *, axis: str, where: str) -> tuple[np.ndarray, float]:
    """Times at which the values are known, in the axis's own unit, and the nominal step in seconds.

    A mean over an interval is known at the interval's end: the bounds where the file has them, half a step later than
    the stamp where it only says so in cell_methods.

    Raises:
        DataError: the axis has no units, or its times do not increase.
    """
    coordinate = dataset[axis]
    units = str(coordinate.attrs.get("units", ""))
    match = re.match(r"\s*(second|minute|hour|day)s?\s+since\s", units)
    if match is None:
        raise DataError(f"{where}: time axis {axis!r} has units {units!r}, expected 'days since ...' (or hours, ..)")
    unit_seconds = _SECONDS[match.group(1)]
    times = np.asarray(coordinate.values, np.float64)
    step = nominal_step(np.diff(times) * unit_seconds, f"{where}: time axis {axis!r}")
    bounds = coordinate.attrs.get("bounds") or coordinate.encoding.get("bounds")
    methods = str(variable.attrs.get("cell_methods", ""))
    averaged = re.search(r"\b(mean|sum|maximum|minimum)\b", methods) is not None
    if bounds in dataset.variables and averaged:
        ends = np.asarray(dataset[bounds].values, np.float64).max(axis=1)
        if (ends >= times).all() and (np.diff(ends) > 0).all() and (ends - times).max() * unit_seconds <= 1.1 * step:
            return ends, step
    return (times + 0.5 * step / unit_seconds if averaged else times), step


def nominal_step(steps: np.ndarray, where: str) -> float:
    """The usual step in seconds; months and years of any calendar get their mean Gregorian length.

    Raises:
        DataError: times do not increase.
    """
    if not len(steps):
        return 86400.0
    if steps.min() <= 0:
        raise DataError(f"{where}: times must increase, but step {int(steps.argmin())} goes {steps.min()} s")
    usual = float(np.median(steps))
    if 27.9 <= usual / 86400.0 <= 31.1:
        return YEAR_SECONDS / 12
    if 359.0 <= usual / 86400.0 <= 366.5:
        return YEAR_SECONDS
    return usual


def contiguous(time: np.ndarray, step_seconds: float) -> list[slice]:
    """Slices of `time` without a gap longer than 1.5 steps."""
    breaks = np.flatnonzero(np.diff(time) > 1.5 * step_seconds) + 1
    edges = [0, *breaks.tolist(), len(time)]
    return [slice(a, b) for a, b in zip(edges[:-1], edges[1:], strict=True)]


def concatenate(parts: list[GridFilm], where: str) -> GridFilm:
    """Films of one group as one, in the order of time; a time that two files hold is taken once (the earlier file's).

    Raises:
        DataError: their grids differ.
    """
    parts = sorted(parts, key=lambda part: float(part.clock.time[0]))
    first = parts[0]
    for part in parts[1:]:
        if not (np.array_equal(part.latitude, first.latitude) and np.array_equal(part.longitude, first.longitude)):
            raise DataError(f"{where}: files of one group have different grids; separate them with option group_by")
    if len(parts) == 1:
        return first
    time = np.concatenate([part.clock.time for part in parts])
    _, keep = np.unique(time, return_index=True)
    pieces = {
        name: np.concatenate([getattr(part.clock, name) for part in parts])[keep]
        for name in ("time", "year_phase", "day_phase")
    }
    return GridFilm(
        values=np.concatenate([part.values for part in parts])[keep],
        valid=np.concatenate([part.valid for part in parts])[keep],
        clock=Clock(**pieces),
        step_seconds=first.step_seconds,
        latitude=first.latitude,
        longitude=first.longitude,
    )


def slug(name: str) -> str:
    """A name as a part of a key: letters, digits, `_` and `-`."""
    return re.sub(r"[^A-Za-z0-9_\-]+", "-", name).strip("-") or "unnamed"


def coordinate(dataset: xr.Dataset, variable: xr.DataArray, *, kind: str, where: str) -> str:
    """Name of the variable's time, latitude or longitude coordinate, by CF standard_name, axis, units or usual name."""
    names = {"time": ("time",), "latitude": ("latitude", "lat"), "longitude": ("longitude", "lon")}[kind]
    units = {"time": " since ", "latitude": "degrees_north", "longitude": "degrees_east"}[kind]
    found: list[str] = []
    for name in dataset.variables:
        candidate = dataset[name]
        if name == variable.name or not candidate.dims or not set(candidate.dims) <= set(variable.dims):
            continue
        attributes = candidate.attrs
        if kind == "time" and (candidate.ndim != 1 or candidate.dims[0] != name):
            continue
        if attributes.get("standard_name") == kind or str(name).lower() in names:
            found.insert(0, str(name))
        elif units in str(attributes.get("units", "")):
            found.append(str(name))
    if not found:
        raise DataError(f"{where}: variable {variable.name!r} has no {kind} coordinate (a CF standard_name or units)")
    return found[0]
