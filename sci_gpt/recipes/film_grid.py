"""Fields as films: an xarray Dataset or DataArray on a grid in, the same with lead_time and quantile out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import cftime
import numpy as np
import xarray as xr

from sci_gpt.data.calendars import Clock, clock
from sci_gpt.data.cf_grid import YEAR_SECONDS, coordinate, film, interval_ends, table_name, table_unit
from sci_gpt.data.grid_blocks import contiguous
from sci_gpt.errors import ConfigError, DataError
from sci_gpt.recipes.film import Column, Film, Label, Notes, extend_values
from sci_tokenizers.sample import Modality, Sample

_EPOCH = "seconds since 1970-01-01"
_LEAD_UNITS = (("days", 86400.0), ("hours", 3600.0), ("seconds", 1.0))


@dataclass(frozen=True, kw_only=True)
class Field:
    """One variable of the dataset: its dimensions and how it is read and written back."""

    column: Column
    rows: str
    columns: str


class GridFilm(Film):
    """Variables on a grid with time, latitude and longitude (CF names or units), each a context of its own.

    Times may be numpy's, cftime's of any calendar, or numbers with CF units; what lies before a gap is not used. Cells
    that hold no value in the whole context (land under a sea surface) stay missing in the forecast.
    """

    modality: ClassVar[Modality] = "grid"

    def __init__(self, data: xr.Dataset | xr.DataArray, *, notes: Notes, options: Mapping[str, Any]) -> None:
        self._single = isinstance(data, xr.DataArray)
        if isinstance(data, xr.DataArray):
            data = data.to_dataset(name=data.name or "variable")
        self._given = data
        self._data = _numbered(data)
        self._notes = notes
        names = _field_names(self._data, notes)
        self._axis = coordinate(self._data, self._data[names[0]], kind="time", where="the dataset")
        self._fields = []
        self.contexts = []
        for name in names:
            field, sample = self._read(name)
            self._fields.append(field)
            self.contexts.append(sample)
        self._ends, self._step = interval_ends(self._data, self._data[names[0]], axis=self._axis, where="the dataset")

    def extend(self, context: Sample, num_times: int) -> Sample:
        """See Film."""
        times = self._clock(num_times)
        return extend_values(context, time=times.time, year_phase=times.year_phase, day_phase=times.day_phase)

    def answer(
        self, answers: Sequence[np.ndarray], labels: tuple[float, ...], *, kind: Label = "quantile"
    ) -> xr.Dataset | xr.DataArray:
        """Dimensions lead_time, quantile (or sample), rows, columns; names, units, attributes and places as given."""
        num_leads = answers[0].shape[1]
        variables = {
            field.column.name: self._variable(field, steps, kind=kind)
            for field, steps in zip(self._fields, answers, strict=True)
        }
        fields = set(variables)
        attributes = {**self._given.attrs, "Conventions": self._given.attrs.get("Conventions", "CF-1.8")}
        data = xr.Dataset(
            variables, coords={**self._coordinates(num_leads), kind: _labels(kind, labels)}, attrs=attributes
        )
        for name, variable in self._given.variables.items():  # places, levels, grid mapping: all that has no time
            if name not in data.variables and name not in fields and self._axis not in variable.dims:
                if set(variable.dims) <= set(data.dims):
                    data[name] = variable
                    if name in self._given.coords:
                        data = data.set_coords(name)
        return data[self._fields[0].column.name] if self._single else data

    def _read(self, name: str) -> tuple[Field, Sample]:
        where = f"variable {name!r}"
        variable, options = self._data[name], self._options(name)
        table, unit = table_name(variable, options), table_unit(variable, options)
        read = film(self._data, variable, options={"name": table, "unit": unit}, where=where)
        latitude = self._data[coordinate(self._data, variable, kind="latitude", where=where)]
        longitude = self._data[coordinate(self._data, variable, kind="longitude", where=where)]
        dims = [str(dim) for dim in variable.dims if dim in {*latitude.dims, *longitude.dims}]
        if latitude.ndim == 1:
            dims = [str(latitude.dims[0]), str(longitude.dims[0])]
        cut = contiguous(read.clock.time, read.step_seconds)[-1]
        sample = Sample(
            key=where,
            source=self._notes.source or "",
            modality="grid",
            variables=(table,),
            levels=(np.nan,),
            values=read.values[cut, None],
            valid=read.valid[cut, None],
            time=read.clock.time[cut],
            year_phase=read.clock.year_phase[cut],
            day_phase=read.clock.day_phase[cut],
            step_seconds=read.step_seconds,
            latitude=read.latitude,
            longitude=read.longitude,
            elevation=np.full(read.latitude.shape, np.nan, np.float32),
        )
        return Field(column=Column(name=name, variable=table, unit=unit), rows=dims[0], columns=dims[1]), sample

    def _options(self, name: str) -> dict[str, Any]:
        variable, _, unit = self._notes.columns.get(name, "").partition(":")
        return {key: value for key, value in (("name", variable), ("unit", unit)) if value}

    def _variable(self, field: Field, steps: np.ndarray, *, kind: Label) -> xr.Variable:
        values = field.column.write(steps[:, :, 0]).astype(np.float32)  # (labels, leads, row, column)
        attributes = {
            name: value for name, value in self._given[field.column.name].attrs.items() if name != "cell_methods"
        }
        dims = ("lead_time", kind, field.rows, field.columns)
        return xr.Variable(dims, values.swapaxes(0, 1), attributes | {"units": field.column.unit})

    def _coordinates(self, num_leads: int) -> dict[str, xr.Variable]:
        stamps = self._stamps(num_leads)
        last = self._last()
        elapsed = np.array([(stamp - last).total_seconds() for stamp in stamps])
        unit, seconds = next(row for row in _LEAD_UNITS if self._step >= row[1] or row[1] == 1.0)
        time = self._given[self._axis]
        given: Any = stamps
        if np.issubdtype(time.dtype, np.datetime64):
            given = np.array([np.datetime64(stamp.isoformat(), "ns") for stamp in stamps])
            last = np.datetime64(last.isoformat(), "ns")
        elif np.issubdtype(time.dtype, np.number):
            given, last = (
                cftime.date2num(dates, time.attrs["units"], calendar=self._calendar) for dates in (stamps, self._last())
            )
        clock_attributes = {name: time.attrs[name] for name in ("units", "calendar") if name in time.attrs}
        return {
            "lead_time": xr.Variable(
                "lead_time",
                elapsed / seconds,
                {"standard_name": "forecast_period", "units": unit, "long_name": "lead time"},
            ),
            "time": xr.Variable(
                "lead_time", given, {**clock_attributes, "standard_name": "time", "long_name": "valid time"}
            ),
            "forecast_reference_time": xr.Variable(
                (),
                last,
                {**clock_attributes, "standard_name": "forecast_reference_time", "long_name": "last time known"},
            ),
        }

    @property
    def _calendar(self) -> str:
        return str(self._data[self._axis].attrs.get("calendar", "standard"))

    def _last(self) -> Any:
        coordinate_ = self._data[self._axis]
        return cftime.num2date(coordinate_.values[-1], coordinate_.attrs["units"], calendar=self._calendar)

    def _stamps(self, num_times: int) -> list[Any]:
        """The next times as cftime dates of the data's own calendar."""
        last, months = self._last(), round(self._step / (YEAR_SECONDS / 12))
        if self._step in (YEAR_SECONDS, YEAR_SECONDS / 12):
            return [_add_months(last, months * k) for k in range(1, num_times + 1)]
        seconds = cftime.date2num(last, _EPOCH, calendar=self._calendar)
        steps = seconds + self._step * np.arange(1, num_times + 1)
        return list(cftime.num2date(steps, _EPOCH, calendar=self._calendar))

    def _clock(self, num_times: int) -> Clock:
        units = str(self._data[self._axis].attrs["units"])
        # A mean over an interval is known at its end: the same distance after the stamp as in the last one given.
        late = self._ends[-1] - float(self._data[self._axis].values[-1])
        numbers = (
            np.asarray(cftime.date2num(self._stamps(num_times), units, calendar=self._calendar), np.float64) + late
        )
        return clock(numbers, units, calendar=self._calendar, where="the dataset")


def tiles(rows: int, columns: int, *, tile: tuple[int, int]) -> list[tuple[slice, slice]]:
    """Boxes of at most `tile` rows x columns that cover a grid; the last ones are shifted back to stay whole."""
    height, width = min(tile[0], rows), min(tile[1], columns)
    tops = [min(top, rows - height) for top in range(0, rows, height)]
    lefts = [min(left, columns - width) for left in range(0, columns, width)]
    return [(slice(top, top + height), slice(left, left + width)) for top in tops for left in lefts]


def _labels(kind: Label, labels: tuple[float, ...]) -> xr.Variable:
    if kind == "sample":  # CF's name for a member of an ensemble
        attributes = {"standard_name": "realization", "long_name": "number of the sample", "units": "1"}
        return xr.Variable(kind, np.array(labels, np.int64), attributes)
    return xr.Variable(kind, np.array(labels), {"long_name": "quantile level", "units": "1"})


def _add_months(date: Any, months: int) -> Any:
    year, month = divmod(date.year * 12 + date.month - 1 + months, 12)
    first = date.replace(year=year, month=month + 1, day=1)
    return first.replace(day=min(date.day, first.daysinmonth))


def _numbered(data: xr.Dataset) -> xr.Dataset:
    """The dataset with its times (and their bounds) as numbers with CF units."""
    numbered = {}
    for name, variable in data.variables.items():
        values = variable.values
        if np.issubdtype(values.dtype, np.datetime64):
            seconds = (values - np.datetime64(0, "s")) / np.timedelta64(1, "s")
            numbered[name] = (variable.dims, seconds, {**variable.attrs, "units": _EPOCH, "calendar": "standard"})
        elif values.dtype == object and values.size and isinstance(values.flat[0], cftime.datetime):
            calendar = values.flat[0].calendar
            seconds = np.asarray(cftime.date2num(values, _EPOCH, calendar=calendar), np.float64)
            numbered[name] = (variable.dims, seconds, {**variable.attrs, "units": _EPOCH, "calendar": calendar})
    return data.assign(numbered) if numbered else data


def _field_names(data: xr.Dataset, notes: Notes) -> list[str]:
    """The variables that the notes name, else all that have a time, a row and a column."""
    for name in notes.columns:
        if name not in data.data_vars:
            raise ConfigError(
                f"variable {name!r} is not in the dataset, which holds {[str(v) for v in data.data_vars]}"
            )
    if notes.columns:
        return list(notes.columns)
    bounds = {data[name].attrs.get("bounds") for name in data.variables} | {"time_bnds", "time_bounds"}
    names = [str(name) for name in data.data_vars if data[name].ndim >= 3 and name not in bounds]
    if not names:
        raise DataError(f"no variable of {[str(v) for v in data.data_vars]} is on time, latitude and longitude")
    return names
