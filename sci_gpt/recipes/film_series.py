"""Tables as films: a pandas DataFrame with times and named columns in, a long DataFrame of quantiles out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from sci_gpt.data.calendars import posix_clock
from sci_gpt.data.cf_grid import nominal_step
from sci_gpt.errors import ConfigError, DataError
from sci_gpt.recipes.film import Column, Film, Label, Notes, column_of, extend_values, refuse_missing, split_header
from sci_gpt.recipes.table_guess import TableWords, read_table
from sci_tokenizers.sample import Modality, Sample
from sci_tokenizers.variables import VARIABLES

TABLE_OPTION = "table"  # of a source that was finetuned on a table: how that was read, so that the next is read alike
# How far (in steps) a row may lie from the regular axis that the table's step makes, and still stand for that time.
_SNAP = 0.25
# A table whose regular axis would be longer than this many times its rows has no step to speak of.
_SPARSE = 20


class SeriesFilm(Film):
    """One station's table: a row per time, a column per variable; absent rows and empty cells are missing values.

    Columns of a variable's name, or named in the notes, hold numbers; columns of words under other names are left out.

    The step is the median of the differences; steps of 28-31 days are calendar months, of 365-366 days years.
    """

    modality: ClassVar[Modality] = "series"

    def __init__(self, data: pd.DataFrame, *, notes: Notes, options: Mapping[str, Any]) -> None:
        data = _headed(data)
        if TABLE_OPTION in options and not notes.columns:
            read = read_table(data, TableWords.from_options(options[TABLE_OPTION]), say=lambda line: None)
            data, notes = read.table, replace(notes, columns=read.words.columns, time=None)
        table, self._zone = _timed(data, notes.time)
        self._columns = _columns(table, notes)
        self._axis = _regular_axis(table.index)
        nearest = self._axis.get_indexer(table.index, method="nearest")
        step = (self._axis[-1] - self._axis[0]) / (len(self._axis) - 1)
        far = np.abs(self._axis[nearest] - table.index) > step * _SNAP
        if far.any():
            raise DataError(f"time {table.index[far][0]} lies between two steps of {step}; give a table with one step")
        _refuse_shared(table.index, nearest, step=step)
        values = np.zeros((len(self._axis), len(self._columns), 1, 1), np.float32)
        valid = np.zeros(values.shape, bool)
        for v, column in enumerate(self._columns):
            values[nearest, v, 0, 0], valid[nearest, v, 0, 0] = column.read(_numbers(table[column.name], column))
        times = posix_clock(_seconds(self._axis))
        place = np.array(notes.place, np.float32).reshape(3, 1, 1)
        self.contexts = [
            Sample(
                key="table",
                source=notes.source or "",
                modality="series",
                variables=tuple(column.variable for column in self._columns),
                levels=tuple(column.level for column in self._columns),
                values=values,
                valid=valid,
                time=times.time,
                year_phase=times.year_phase,
                day_phase=times.day_phase,
                step_seconds=nominal_step(np.diff(times.time), "the table's time axis"),
                latitude=place[0],
                longitude=place[1],
                elevation=place[2],
            )
        ]

    def extend(self, context: Sample, num_times: int) -> Sample:
        """See Film."""
        times = posix_clock(_seconds(self._future(num_times)))
        return extend_values(context, time=times.time, year_phase=times.year_phase, day_phase=times.day_phase)

    def answer(
        self, answers: Sequence[np.ndarray], labels: tuple[float, ...], *, kind: Label = "quantile"
    ) -> pd.DataFrame:
        """Columns time, lead (steps), variable (the table's column, without its unit), quantile (or sample), value,
        unit (as in the table)."""
        steps = answers[0][..., 0, 0]  # (labels, leads, variable)
        future = self._future(steps.shape[1])
        if self._zone is not None:
            future = future.tz_localize("UTC").tz_convert(self._zone)
        parts = []
        for v, column in enumerate(self._columns):
            values = column.write(steps[:, :, v]).T  # (leads, labels)
            parts.append(
                pd.DataFrame(
                    {
                        "time": future.repeat(len(labels)),
                        "lead": np.repeat(np.arange(1, len(future) + 1), len(labels)),
                        "variable": split_header(column.name)[0],
                        kind: np.tile(labels, len(future)),
                        "value": values.reshape(-1),
                        "unit": column.unit,
                    }
                )
            )
        return pd.concat(parts, ignore_index=True)

    def _future(self, num_times: int) -> pd.DatetimeIndex:
        return pd.date_range(self._axis[-1], periods=num_times + 1, freq=self._axis.freq)[1:]


def _headed(data: pd.DataFrame) -> pd.DataFrame:
    """The table with its columns' names as text.

    Raises:
        DataError: two columns of one name.
    """
    table = data.set_axis([str(header) for header in data.columns], axis="columns")
    twice = table.columns[table.columns.duplicated()]
    if len(twice):
        raise DataError(
            f"column {twice[0]!r} stands {list(table.columns).count(twice[0])} times in the table; rename or drop all "
            "but one"
        )
    return table


def _refuse_shared(index: pd.DatetimeIndex, nearest: np.ndarray, *, step: pd.Timedelta) -> None:
    """Raise where two rows stand for one time of the regular axis: one would overwrite the other.

    Raises:
        DataError: the first such rows.
    """
    shared = np.flatnonzero(np.diff(nearest) == 0)
    if len(shared):
        one, other = index[shared[0]], index[shared[0] + 1]
        raise DataError(
            f"rows at {one} and {other} stand for one and the same step of {step}; drop one of them, or average the "
            "rows of a step"
        )


def _numbers(cells: pd.Series, column: Column) -> np.ndarray:
    """Float64, NaN where a cell is empty.

    Raises:
        DataError: a cell that holds something else than a number.
    """
    numbers = pd.to_numeric(cells, errors="coerce")
    words = cells[(numbers.isna() & cells.notna() & (cells.astype(str).str.strip() != "")).to_numpy()]
    if len(words):
        more = f" (and {len(words) - 1} more such cells)" if len(words) > 1 else ""
        raise DataError(
            f"column {column.name!r}, read as {column.variable}, holds {words.iloc[0]!r} at {words.index[0]}{more}, "
            "which is no number; empty cells that are missing, or leave the column out"
        )
    return numbers.to_numpy(np.float64, na_value=np.nan)


def _timed(data: pd.DataFrame, name: str | None) -> tuple[pd.DataFrame, object | None]:
    """The table indexed by its times as UTC without a zone, ascending; and the zone that they were given in."""
    table = data.copy()
    if name is not None:
        if name not in table.columns:
            raise ConfigError(
                f"time column {name!r} is not in the table, which holds {list(table.columns)}; mend --time"
            )
        table = table.set_index(_dates(table[name], name)).drop(columns=name)
    elif not isinstance(table.index, pd.DatetimeIndex):
        name = next((c for c in table.columns if _holds_times(table[c])), None)
        if name is None:
            raise DataError(f"no column of {list(table.columns)} holds times; name one, as --time COL")
        table = table.set_index(_dates(table[name], name)).drop(columns=name)
    if table.index.isna().any():
        raise DataError(f"row {int(np.argmax(table.index.isna()))} has no time; drop such rows")
    zone = table.index.tz
    if zone is not None:
        table.index = table.index.tz_convert("UTC").tz_localize(None)
    table = table.sort_index()
    if table.index.has_duplicates:
        twice = table.index[table.index.duplicated()][0]
        raise DataError(f"time {twice} stands in more than one row; give one station's table, one row per time")
    if len(table) < 2:
        raise DataError(f"a table of {len(table)} rows has no step; give at least two times")
    return table, zone


def _holds_times(column: pd.Series) -> bool:
    if pd.api.types.is_datetime64_any_dtype(column):
        return True
    if pd.api.types.is_numeric_dtype(column) or not len(column):
        return False
    return bool(pd.to_datetime(column.head(3), errors="coerce", format="ISO8601").notna().all())


def _dates(column: pd.Series, name: str) -> pd.DatetimeIndex:
    try:
        return pd.DatetimeIndex(pd.to_datetime(column, format=None if column.dtype.kind == "M" else "ISO8601"))
    except (ValueError, TypeError) as error:
        raise DataError(f"time column {name!r} is not in ISO 8601 (2024-01-31T18:00:00): {error}") from error


def _columns(table: pd.DataFrame, notes: Notes) -> list[Column]:
    """Those that the notes name, or every column of numbers or of a variable's name."""
    named = {header: split_header(header) for header in table.columns}
    refuse_missing(notes, list(named))
    columns = []
    for header, (name, unit) in named.items():
        meant = name.partition("@")[0] in VARIABLES
        if notes.columns or meant or pd.api.types.is_numeric_dtype(table[header]):
            column = column_of(header if notes.columns else name, unit, notes=notes)
            columns += [replace(column, name=header)] if column else []
    if not columns:
        raise DataError(f"no column of {list(table.columns)} holds numbers; name some, as --columns COL=VARIABLE:UNIT")
    return columns


def _regular_axis(index: pd.DatetimeIndex) -> pd.DatetimeIndex:
    """The regular axis from the first time to the last, by the table's median step."""
    step = pd.Series(index).diff().median()
    days = step / pd.Timedelta(days=1)
    offset: pd.DateOffset | pd.Timedelta = step
    if 27.5 <= days <= 31.5:
        offset = pd.DateOffset(months=1)
    elif 364.5 <= days <= 366.5:
        offset = pd.DateOffset(years=1)
    count = (index[-1] - index[0]) / step + 2
    if count > _SPARSE * len(index) + _SPARSE:
        raise DataError(
            f"{len(index)} rows at a median step of {step} span {index[-1] - index[0]}; give a regular table"
        )
    axis = pd.date_range(index[0], index[-1] + step / 2, freq=offset)
    return axis if len(axis) > 1 else pd.date_range(index[0], periods=2, freq=offset)


def _seconds(index: pd.DatetimeIndex) -> np.ndarray:
    """Seconds since 1970, float64, whatever the index's resolution."""
    return (index - pd.Timestamp(0)).to_numpy("timedelta64[ns]").astype(np.float64) / 1e9
