"""A user's table, understood: time column, step, missing codes, variables and units, each guess said in a line."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from sci_gpt.errors import ConfigError, DataError
from sci_gpt.recipes.film import split_header
from sci_gpt.recipes.table_words import fitting_units, known_variable, missing_codes, unit_spelt
from sci_tokenizers.variables import VARIABLES, convert, nearest

# Ways to write a time, tried in this order; digits alone only in a column that is called a time.
_FORMATS = (("%Y/%m/%d", r"\d{4}/\d{1,2}/\d{1,2}"), ("%Y/%m/%d %H:%M", r"\d{4}/\d{1,2}/\d{1,2} \d{1,2}:\d{2}"))
_DIGITS = (("%Y%m%d", r"(1[5-9]|2[01])\d{6}"), ("%Y%m", r"(1[5-9]|2[01])\d{4}"), ("%Y", r"(1[5-9]|2[01])\d{2}"))
_CALLED_TIME = ("time", "date", "datetime", "timestamp", "day", "month", "year", "valid_time")
_MOSTLY = 0.5  # a column is numbers where at least this share of its entries are


@dataclass(frozen=True, kw_only=True)
class TableWords:
    """What the user says of a table; what is left out is guessed.

    Attributes:
        target: the column to forecast.
        covariates: columns whose past helps.
        time: the time column; time_format: of its entries, as `strptime` has it.
        units: {column: unit}.
        columns: {column: variable[:unit]}.
        missing: numbers that stand for a missing value; None: guessed.
    """

    target: str
    covariates: tuple[str, ...] = ()
    time: str | None = None
    time_format: str | None = None
    units: Mapping[str, str] = field(default_factory=dict)
    columns: Mapping[str, str] = field(default_factory=dict)
    missing: tuple[float, ...] | None = None

    @property
    def used(self) -> tuple[str, ...]:
        """The target, then the covariates."""
        return (self.target, *self.covariates)

    def to_options(self) -> dict[str, Any]:
        """Plain values, as a model keeps them to read the next table alike."""
        return {
            "target": self.target,
            "covariates": list(self.covariates),
            "time": self.time,
            "time_format": self.time_format,
            "columns": dict(self.columns),
            "missing": list(self.missing or ()),
        }

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> TableWords:
        """The inverse of `to_options`."""
        plain = {**options, "covariates": tuple(options["covariates"]), "missing": tuple(options["missing"])}
        return cls(**plain)


@dataclass(frozen=True, kw_only=True)
class TableRead:
    """A table as `SeriesFilm` takes it: a DatetimeIndex, the used columns as floats; and the words with every guess."""

    table: pd.DataFrame
    words: TableWords


def read_table(data: pd.DataFrame, words: TableWords, *, say: Callable[[str], None] = print) -> TableRead:
    """Understand a table, saying each guess.

    Args:
        data: a row per time, a column per variable; not changed.
        words: what the user says of it.
        say: takes a line per guess.

    Raises:
        ConfigError: a column that is not there, a variable or unit that cannot be guessed.
        DataError: no time column, times twice or not ascending, a column of text.
    """
    for name in words.used:
        if name not in data.columns:
            raise ConfigError(
                f"column {name!r} is not in the table, which holds {[str(c) for c in data.columns]}; nearest: "
                f"{nearest(name, [str(c) for c in data.columns])!r}"
            )
    if len(set(words.used)) < len(words.used):
        raise ConfigError(f"target and covariates are different columns, got {', '.join(words.used)}")
    times, words = _times(data, words, say=say)
    numbers = {name: _numbers(data[name], name, target=name == words.target, say=say) for name in words.used}
    if words.missing is None:
        words = replace(words, missing=_guess_missing(numbers, say=say))
    cleaned = {name: np.where(np.isin(values, words.missing or ()), np.nan, values) for name, values in numbers.items()}
    columns = {name: _meaning(name, cleaned[name], words=words, say=say) for name in words.used}
    table = pd.DataFrame(cleaned, index=times)
    return TableRead(table=table, words=replace(words, columns=columns, units={}))


def _times(data: pd.DataFrame, words: TableWords, *, say: Callable[[str], None]) -> tuple[pd.DatetimeIndex, TableWords]:
    """The times, ascending, each once; and the words with the time column."""
    if words.time is not None:
        if words.time not in data.columns:
            raise ConfigError(
                f"time column {words.time!r} is not in the table, which holds {[str(c) for c in data.columns]}; "
                "mend --time"
            )
        index, form = _parsed(data[words.time], words.time_format, digits=True)
        if index is None:
            raise DataError(
                f"time column {words.time!r} holds {data[words.time].iloc[0]!r}, which is no time in ISO 8601, "
                "YYYY/MM/DD or YYYYMMDD; say how it is written, as --time-format %d.%m.%Y"
            )
        words = replace(words, time_format=form)
    elif isinstance(data.index, pd.DatetimeIndex):
        index = data.index
    else:
        index, words = _guess_time(data, words, say=say)
    if index.isna().any():
        raise DataError(f"row {int(np.argmax(index.isna())) + 1} has no time; drop such rows")
    if index.has_duplicates:
        twice = index[index.duplicated()][0]
        rows = (np.flatnonzero(index == twice)[:2] + 1).tolist()
        raise DataError(
            f"time {twice} stands in rows {rows[0]} and {rows[1]}; give one station's table, one row per time"
        )
    if not index.is_monotonic_increasing:
        row = int(np.argmax(np.diff(index.asi8) < 0)) + 1
        raise DataError(
            f"times are not ascending: row {row + 1} ({index[row]}) comes after {index[row - 1]}; sort by time"
        )
    return index, words


def _guess_time(
    data: pd.DataFrame, words: TableWords, *, say: Callable[[str], None]
) -> tuple[pd.DatetimeIndex, TableWords]:
    for name in data.columns:
        if name in words.used:
            continue
        called = any(str(name).lower().replace(" ", "_").startswith(word) for word in _CALLED_TIME)
        index, form = _parsed(data[name], words.time_format, digits=called)
        if index is not None:
            say(f"guess: the time column is {str(name)!r} (it begins with {index[0]}); otherwise say --time COL")
            return index, replace(words, time=str(name), time_format=form)
    raise DataError(
        f"no column of {[str(c) for c in data.columns]} holds times in ISO 8601, YYYY/MM/DD or YYYYMMDD; name one, as "
        "--time COL, and how it is written, as --time-format %d.%m.%Y"
    )


def _parsed(column: pd.Series, form: str | None, *, digits: bool) -> tuple[pd.DatetimeIndex | None, str | None]:
    """Times of a column, by the given format or one that all its entries have; None where there is none."""
    if pd.api.types.is_datetime64_any_dtype(column):
        return pd.DatetimeIndex(column), None
    number = pd.api.types.is_numeric_dtype(column)
    if number and (not digits or column.isna().any() or (column % 1 != 0).any()):
        return None, None
    text = column.astype("int64").astype(str) if number else column.astype(str).str.strip()
    forms = [form] if form else [f for f, shape in (_DIGITS if number else _FORMATS) if _all_match(shape, text)]
    if not form and not number:
        forms.append("ISO8601")
        if digits:
            forms += [f for f, shape in _DIGITS if _all_match(shape, text)]
    for one in forms:
        times = pd.to_datetime(text, format=one, errors="coerce")
        if times.notna().all() and len(times):
            return pd.DatetimeIndex(times), None if one == "ISO8601" else one
    return None, None


def _all_match(shape: str, text: pd.Series) -> bool:
    return bool(len(text)) and all(re.fullmatch(shape, entry) is not None for entry in text)


def _numbers(column: pd.Series, name: str, *, target: bool, say: Callable[[str], None]) -> np.ndarray:
    """A column as float64, NaN where empty or a word.

    Raises:
        DataError: most of it is words.
    """
    values = pd.to_numeric(column, errors="coerce").to_numpy(np.float64)
    given = column.notna().to_numpy() & (column.astype(str).str.strip() != "").to_numpy()
    odd = given & ~np.isfinite(values)
    if not (given & ~odd).any() or (given & ~odd).sum() < _MOSTLY * given.sum():
        kind = "target" if target else "covariate"
        first = repr(str(column[odd].iloc[0])) if odd.any() else "nothing"
        raise DataError(f"{kind} {name!r} is no column of numbers (it holds {first}); name one that is")
    if odd.any():
        entries = sorted(set(column[odd].astype(str)))[:3]
        say(
            f"guess: {int(odd.sum())} entries of {name!r} that are no numbers ({', '.join(entries)}) are missing values"
        )
    return np.where(np.isfinite(values), values, np.nan)


def _guess_missing(numbers: Mapping[str, np.ndarray], *, say: Callable[[str], None]) -> tuple[float, ...]:
    found: list[float] = []
    for name, values in numbers.items():
        for code in missing_codes(values):
            count = int((values == code).sum())
            say(f"guess: {code:g} in {name!r} ({count} times) means a missing value; otherwise say --missing none")
            found += [code] if code not in found else []
    return tuple(found)


def _meaning(name: str, values: np.ndarray, *, words: TableWords, say: Callable[[str], None]) -> str:
    """`variable:unit` of a column.

    Raises:
        ConfigError: no variable of the table by that name, or several units that fit.
    """
    label, header_unit = split_header(name)
    variable, _, unit = words.columns.get(name, words.columns.get(label, "")).partition(":")
    if not variable:
        guessed = known_variable(label)
        if guessed is None:
            raise ConfigError(
                f"column {name!r} is no variable of the table (nearest: {nearest(label, VARIABLES)!r}); declare it, as "
                f"--variable {label}:UNIT:ratio, or say which it is, as --columns {label}=VARIABLE:UNIT"
            )
        if guessed != label:
            say(f"guess: {name!r} is {guessed}; otherwise say --columns {label}=VARIABLE")
        variable = guessed
    if variable not in VARIABLES:
        raise ConfigError(
            f"column {name!r}: {variable!r} is no variable of the table (nearest: {nearest(variable, VARIABLES)!r}); "
            f"declare it, as --variable {variable}:UNIT:ratio"
        )
    unit = unit_spelt(words.units.get(name, words.units.get(label, "")) or unit)
    if not unit and header_unit:
        unit = unit_spelt(header_unit)
        say(f"guess: {name!r} is in {unit}, as its header says")
    if unit:
        convert(np.zeros(1), unit, variable=variable, where=f"column {name!r}")  # refuses one that does not convert
        return f"{variable}:{unit}"
    return f"{variable}:{_guess_unit(label, variable, values=values[np.isfinite(values)], say=say)}"


def _guess_unit(label: str, variable: str, *, values: np.ndarray, say: Callable[[str], None]) -> str:
    if not len(values):
        raise DataError(f"column {label!r} holds no number; name one that does")
    fits = fitting_units(variable, values)
    extent = f"{values.min():g}..{values.max():g}"
    if len(fits) == 1:
        say(f"guess: {label!r} is in {fits[0]}, the only unit in which {extent} is {variable}")
        return fits[0]
    reason = f"fits {' and '.join(fits)}" if fits else "fits no unit of it"
    raise ConfigError(f"column {label!r}: {extent} {reason} as {variable}; say which unit, as --units {label}=UNIT")
