"""CF conventions of gridded files: units, packing, fill values, calendars, interval ends, places; files to films."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from sci_gpt.data.calendars import Clock, clock
from sci_gpt.data.series_sample import converted, in_range, unpacked
from sci_gpt.data.store_writer import Packing
from sci_gpt.errors import DataError
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
    scale, offset = scale_and_offset(variable)
    return unpacked(np.asarray(variable.values), fills=fill_values(variable), scale=scale, offset=offset)


def fill_values(variable: xr.DataArray) -> list[Any]:
    """The stored values that stand for missing ones, by the attributes `_FillValue` and `missing_value`."""
    return [fill for name in ("_FillValue", "missing_value") for fill in np.atleast_1d(variable.attrs.get(name, []))]


def scale_and_offset(variable: xr.DataArray) -> tuple[float, float]:
    """The variable's packing: value = stored * scale + offset; (1, 0) where it is not packed."""
    return float(variable.attrs.get("scale_factor", 1)), float(variable.attrs.get("add_offset", 0))


def packing_of(variable: xr.DataArray, options: Mapping[str, Any], *, where: str) -> Packing | None:
    """The variable's own integers, in the table's unit; None where it is not packed.

    Raises:
        DataError: its name or unit is not in the tables.
    """
    if "scale_factor" not in variable.attrs or variable.dtype.kind != "i":
        return None
    scale, offset = scale_and_offset(variable)
    name, unit = table_name(variable, options), table_unit(variable, options)
    zero, one, origin = converted(np.array([0.0, 1.0, offset]), unit, variable=name, where=where)
    dtype = variable.dtype.newbyteorder("<").str
    return Packing(dtype=dtype, scale=scale * float(one - zero), offset=float(origin))


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
    axes = grid_axes(dataset, variable, where=where)
    name = table_name(variable, options)
    values = converted(axes.values(variable), table_unit(variable, options), variable=name, where=where)
    valid = in_range(values, name)
    times, step = film_clock(dataset, variable, axis=axes.time, where=where)
    latitude, longitude = axes.places(dataset)
    return GridFilm(
        values=np.where(valid, values, 0.0).astype(np.float32),
        valid=valid,
        clock=times,
        step_seconds=step,
        latitude=latitude,
        longitude=longitude,
    )


@dataclass(frozen=True, kw_only=True)
class GridAxes:
    """Names of a variable's dimensions and of the coordinates that tell where it is.

    Attributes:
        time, rows, columns: dimensions.
        others: further dimensions, of length 1.
        latitude, longitude: coordinates on rows, columns or both.
    """

    time: str
    rows: str
    columns: str
    others: tuple[str, ...]
    latitude: str
    longitude: str

    def values(self, variable: xr.DataArray) -> np.ndarray:
        """Physical values of the variable, or of a cut of it: float64 (time, row, column), as the file has them."""
        array = variable.isel(dict.fromkeys(self.others, 0)).transpose(self.time, self.rows, self.columns)
        return physical_values(array)

    def places(self, dataset: xr.Dataset) -> tuple[np.ndarray, np.ndarray]:
        """Latitude and longitude, float32 (row, column)."""
        parts = [
            part.reset_coords(drop=True).copy(data=physical_values(part))
            for part in (dataset[self.latitude], dataset[self.longitude])
        ]
        latitude, longitude = (
            np.asarray(part.transpose(self.rows, self.columns).values, np.float32) for part in xr.broadcast(*parts)
        )
        return latitude, longitude


def grid_axes(dataset: xr.Dataset, variable: xr.DataArray, *, where: str) -> GridAxes:
    """The axes of a variable.

    Raises:
        DataError: no time, latitude or longitude is found, or a further dimension is longer than 1.
    """
    axis = coordinate(dataset, variable, kind="time", where=where)
    latitude = dataset[coordinate(dataset, variable, kind="latitude", where=where)]
    longitude = dataset[coordinate(dataset, variable, kind="longitude", where=where)]
    dims = [str(dim) for dim in variable.dims if dim in {*latitude.dims, *longitude.dims}]
    others = tuple(str(dim) for dim in variable.dims if dim not in dims and dim != axis)
    long = [dim for dim in others if variable.sizes[dim] > 1]
    if long:
        raise DataError(
            f"{where}: variable {variable.name!r} has a further dimension {long[0]!r} of {variable.sizes[long[0]]}"
        )
    if len(dims) != 2:
        raise DataError(f"{where}: variable {variable.name!r} is on {dims}, expected one row and one column dimension")
    if latitude.ndim == 1:
        dims = [str(latitude.dims[0]), str(longitude.dims[0])]
    return GridAxes(
        time=axis,
        rows=dims[0],
        columns=dims[1],
        others=others,
        latitude=str(latitude.name),
        longitude=str(longitude.name),
    )


def film_clock(dataset: xr.Dataset, variable: xr.DataArray, *, axis: str, where: str) -> tuple[Clock, float]:
    """The clock of a variable's times, each when its value is known, and the nominal step in seconds.

    Raises:
        DataError: as `interval_ends`; a unit or calendar that CF does not know.
    """
    times, step = interval_ends(dataset, variable, axis=axis, where=where)
    attributes = dataset[axis].attrs
    calendar = str(attributes.get("calendar", "standard"))
    return clock(times, str(attributes["units"]), calendar=calendar, where=where), step


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
        at = int(steps.argmin())
        raise DataError(
            f"{where}: times must increase, but step {at} -> {at + 1} goes {steps.min()} s; sort the file by time and "
            "keep one field of each time"
        )
    usual = float(np.median(steps))
    if 27.9 <= usual / 86400.0 <= 31.1:
        return YEAR_SECONDS / 12
    if 359.0 <= usual / 86400.0 <= 366.5:
        return YEAR_SECONDS
    return usual


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
