"""Reads station tables (CSV: a row per time, or a row per year with twelve months) into series, one per station."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from sci_gpt.data.calendars import posix_clock
from sci_gpt.data.cf_grid import YEAR_SECONDS, slug
from sci_gpt.data.series_sample import Station, converted, in_range, regular_samples
from sci_gpt.data.source import Part, SourceSettings, locate
from sci_gpt.errors import DataError
from sci_tokenizers.sample import Modality, Sample

_ROWS = 200_000  # of a table that is looked through in pieces
_STEPS = {"hour": 3600.0, "day": 86400.0, "week": 7 * 86400.0}


class CsvSeries:
    """CSV -> series. Values are placed on a regular axis; times that the table does not hold are missing."""

    modality: ClassVar[Modality] = "series"
    options: ClassVar[Mapping[str, str]] = {
        "columns": "{column: {variable, unit}}",
        "step": "hour | day | week | month | seconds",
        "time": "name of the time column, or a list of columns [year, month, day, hour]",
        "time_format": "strftime format of the time column (default: ISO 8601)",
        "year_months": "{year: COLUMN, months: [twelve columns]}, for a table with a row per year; one variable",
        "station": "name of the station column (default: the whole table is one station)",
        "stations": "{station: {latitude, longitude, elevation}}",
        "wind": "{speed: COLUMN, direction: COLUMN, unit}: stored as eastward_wind and northward_wind",
        "missing": "list of numbers that mean missing",
        "utc_offset_hours": "offset of the table's clock from UTC (default 0), without daylight saving",
        "known_after_hours": "hours from a row's stamp to the end of the interval that it sums or averages (default 0)",
        "max_gap_steps": "a longer run of missing times breaks the stretch (default 100)",
        "separator": "between fields (default ,)",
        "comment": "character that begins a comment",
        "skip_rows": "lines before the header (default 0)",
    }
    required: ClassVar[tuple[str, ...]] = ("columns", "step")

    def parts(self, settings: SourceSettings) -> list[Part]:
        """See `Source.parts`: files that share a station are one part, without stations all files."""
        paths = locate(settings)
        station = settings.options.get("station")
        together: list[tuple[list[Path], set[str]]] = []
        for path in paths:
            here = _stations(path, settings) if station is not None and len(paths) > 1 else {""}
            joined, apart = [path], []
            for files, names in together:
                if names & here:
                    joined, here = files + joined, here | names
                else:
                    apart.append((files, names))
            together = [*apart, (joined, here)]
        # A value takes about eight characters. In the order of the files.
        together.sort(key=lambda row: paths.index(row[0][0]))
        return [
            Part(
                name=", ".join(path.name for path in files),
                select={"paths": files},
                bytes=sum(path.stat().st_size for path in files) // 2,
            )
            for files, _ in together
        ]

    def read(self, settings: SourceSettings, part: Part) -> Iterator[Sample]:
        """See `Source.read`."""
        table = pd.concat([read_table(path, settings.options) for path in part.select["paths"]], ignore_index=True)
        yield from table_samples(table, settings)


def _stations(path: Path, settings: SourceSettings) -> set[str]:
    """The stations of a file, read in pieces."""
    column = str(settings.options["station"])
    found: set[str] = set()
    for piece in _read_csv(path, settings.options, chunksize=_ROWS):
        if column not in piece.columns:
            raise DataError(f"{path}: no column {column!r}; the table has {', '.join(map(str, piece.columns))}")
        found.update(piece[column].astype(str).unique())
    return found


def read_table(path: Path, options: Mapping[str, Any]) -> pd.DataFrame:
    """The CSV as it is.

    Raises:
        DataError: it cannot be read.
    """
    return pd.concat(_read_csv(path, options), ignore_index=True)


def _read_csv(path: Path, options: Mapping[str, Any], *, chunksize: int | None = None) -> Iterator[pd.DataFrame]:
    """The CSV in pieces of `chunksize` rows, or whole."""
    try:
        found = pd.read_csv(
            path,
            sep=str(options.get("separator", ",")),
            comment=options.get("comment"),
            skiprows=int(options.get("skip_rows", 0)),
            skipinitialspace=True,
            low_memory=False,
            chunksize=chunksize,
        )
        yield from [found] if isinstance(found, pd.DataFrame) else found
    except (OSError, ValueError, pd.errors.ParserError) as error:
        raise DataError(
            f"{path} cannot be read as a table: {' '.join(str(error).split())[:120]}; give a whole file"
        ) from error


def table_samples(table: pd.DataFrame, settings: SourceSettings) -> Iterator[Sample]:
    """Samples of a table in memory; options as in `CsvSeries.options`, `settings.files` is not used.

    Raises:
        DataError: a column, variable or unit that cannot be used; times off the regular step.
    """
    options = settings.options
    if "year_months" in options:
        table = _melt(table, settings)
    needed = [str(column) for column in options["columns"]]
    needed += [str(options["wind"][part]) for part in ("speed", "direction")] if "wind" in options else []
    needed += [str(options["station"])] if "station" in options else []
    for column in needed:
        if column not in table.columns:
            raise DataError(
                f"{settings.where}: no column {column!r}; the table has {', '.join(map(str, table.columns))}"
            )
    names, values = _values(table, settings)
    seconds = _seconds(table, settings)
    stations = (
        table[str(options["station"])].astype(str).to_numpy() if "station" in options else np.array([""] * len(table))
    )
    for name in dict.fromkeys(stations.tolist()):
        rows = np.flatnonzero(stations == name)
        yield from _station_samples(settings, name, names=names, values=values[rows], seconds=seconds[rows])


def _station_samples(
    settings: SourceSettings, name: str, *, names: tuple[str, ...], values: np.ndarray, seconds: np.ndarray
) -> Iterator[Sample]:
    options = settings.options
    places = options.get("stations", {})
    if name and places and name not in places:
        raise DataError(f"{settings.where}: station {name!r} is not in option stations ({', '.join(places)})")
    name = name or next(iter(places), "station")
    place = places.get(name, {})
    steps, step_seconds, axis_seconds = _regular(seconds, settings)
    rows_of_steps = steps
    steps, keep = np.unique(steps, return_index=True)  # a time that stands twice is taken once, its first row
    _refuse_shared(seconds, keep[np.searchsorted(steps, rows_of_steps)], where=f"{settings.where}, {name}")
    station = Station(
        key=f"{settings.name}/{slug(name)}",
        source=settings.name,
        variables=names,
        levels=(float("nan"),) * len(names),
        step_seconds=step_seconds,
        max_gap_steps=int(options.get("max_gap_steps", 100)),
        **{part: float(place.get(part, "nan")) for part in ("latitude", "longitude", "elevation")},
    )
    yield from regular_samples(station, steps, values=values[keep], clock=posix_clock(axis_seconds))


def _refuse_shared(seconds: np.ndarray, first: np.ndarray, *, where: str) -> None:
    """Raise where rows of different times stand for one step, whose first row is `first`: all but one would be lost."""
    other = np.flatnonzero(seconds != seconds[first])
    if len(other):
        one, two = (np.datetime64(round(seconds[row]), "s") for row in (first[other[0]], other[0]))
        raise DataError(
            f"{where}: rows at {one} and {two} stand for one and the same step; correct option step, or keep one row "
            "of each step"
        )


def _values(table: pd.DataFrame, settings: SourceSettings) -> tuple[tuple[str, ...], np.ndarray]:
    """Names, and float64 (rows, variable) in the table's units, NaN where missing."""
    names, columns = [], []
    for column, row in settings.options["columns"].items():
        where = f"{settings.where}, column {column!r}"
        if not isinstance(row, Mapping) or set(row) != {"variable", "unit"}:
            raise DataError(f"{where}: expected {{variable: NAME, unit: UNIT}}, got {row!r}")
        numbers = _numbers(table[str(column)], settings)
        columns.append(converted(numbers, str(row["unit"]), variable=str(row["variable"]), where=where))
        names.append(str(row["variable"]))
    if "wind" in settings.options:
        rule = settings.options["wind"]
        speed = converted(
            _numbers(table[str(rule["speed"])], settings),
            str(rule["unit"]),
            variable="wind_speed",
            where=f"{settings.where}, column {rule['speed']!r}",
        )
        speed[~in_range(speed, "wind_speed")] = np.nan
        eastward, northward = wind_components(speed, _numbers(table[str(rule["direction"])], settings))
        names += ["eastward_wind", "northward_wind"]
        columns += [eastward, northward]
    return tuple(names), np.stack(columns, axis=1)


def wind_components(speed: np.ndarray, direction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eastward and northward wind from speed and the direction that the wind comes from (degrees clockwise from north).

    A calm has no direction: both components are 0. A wind without a direction is missing.
    """
    angle = np.deg2rad(direction)
    calm = speed == 0.0
    return np.where(calm, 0.0, -speed * np.sin(angle)), np.where(calm, 0.0, -speed * np.cos(angle))


def _numbers(column: pd.Series, settings: SourceSettings) -> np.ndarray:
    values = pd.to_numeric(column, errors="coerce").to_numpy(np.float64, copy=True)
    for code in settings.options.get("missing", ()):
        values[values == float(code)] = np.nan
    return values


def _seconds(table: pd.DataFrame, settings: SourceSettings) -> np.ndarray:
    """Seconds since 1970 UTC at which each row is known."""
    options = settings.options
    rule = options.get("time")
    if rule is None:
        raise DataError(f"{settings.where}: reader 'csv_series' needs option time (or year_months)")
    missing = [column for column in ([rule] if isinstance(rule, str) else rule) if column not in table.columns]
    if missing:
        raise DataError(
            f"{settings.where}: no time column {missing[0]!r}; the table has {', '.join(map(str, table.columns))}"
        )
    try:
        if isinstance(rule, str):
            column = table[rule]
            text = column.astype(str) if "time_format" in options else column
            stamps = pd.to_datetime(text, format=options.get("time_format", "ISO8601"), utc=True)
        else:
            parts = dict(zip(("year", "month", "day", "hour"), (table[str(column)] for column in rule), strict=False))
            stamps = pd.to_datetime(pd.DataFrame({"day": 1} | parts), utc=True)
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{settings.where}: times of {rule!r} cannot be read: {' '.join(str(error).split())[:200]}"
        ) from error
    if stamps.isna().any():
        raise DataError(f"{settings.where}: row {int(stamps.isna().to_numpy().argmax())} has no time in {rule!r}")
    seconds = stamps.dt.tz_localize(None).to_numpy().astype("datetime64[us]").astype(np.int64) / 1e6
    hours = float(options.get("known_after_hours", 0.0)) - float(options.get("utc_offset_hours", 0.0))
    return np.asarray(seconds + hours * 3600.0, np.float64)


def _regular(seconds: np.ndarray, settings: SourceSettings) -> tuple[np.ndarray, float, np.ndarray]:
    """Number of each row on the regular axis, the nominal step, and seconds of the whole axis."""
    step = settings.options["step"]
    if step == "month":
        months = seconds.astype("datetime64[s]").astype("datetime64[M]").astype(np.int64)
        axis = np.arange(months.min(), months.max() + 1).astype("datetime64[M]").astype("datetime64[s]")
        return months, YEAR_SECONDS / 12, axis.astype(np.int64).astype(np.float64)
    length = _STEPS.get(step) if isinstance(step, str) else float(step)
    if length is None or not length > 0:
        raise DataError(f"{settings.where}: option step is one of {[*_STEPS, 'month']} or seconds, got {step!r}")
    first = float(seconds.min())
    position = (seconds - first) / length
    steps = np.rint(position).astype(np.int64)
    off = np.abs(position - steps)
    if off.max() > 0.25:
        at = np.datetime64(int(seconds[off.argmax()]), "s")
        raise DataError(f"{settings.where}: time {at} is off the regular step of {length:g} s; correct option step")
    return steps, length, first + length * np.arange(steps.max() + 1)


def _melt(table: pd.DataFrame, settings: SourceSettings) -> pd.DataFrame:
    """A row per month from a row per year; a monthly mean is known when the next month begins."""
    rule = settings.options["year_months"]
    absent = [column for column in (rule["year"], *rule["months"]) if column not in table.columns]
    if absent or len(rule["months"]) != 12:
        raise DataError(f"{settings.where}: year_months wants a year and twelve month columns; missing: {absent}")
    (column,) = settings.options["columns"]
    years = np.repeat(table[rule["year"]].to_numpy(np.int64), 12)
    ends = ((years - 1970) * 12 + np.tile(np.arange(12), len(table)) + 1).astype("datetime64[M]")
    values = table[list(rule["months"])].to_numpy().reshape(-1)
    return pd.DataFrame({str(settings.options.get("time", "time")): ends.astype("datetime64[s]"), str(column): values})
