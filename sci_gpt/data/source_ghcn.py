"""Reads GHCN-Daily station files (.dly, fixed width) into daily series, one per station."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from sci_gpt.data.calendars import posix_clock
from sci_gpt.data.cf_grid import slug
from sci_gpt.data.series_sample import Station, converted, regular_samples
from sci_gpt.data.source import Part, SourceSettings, locate
from sci_gpt.errors import DataError
from sci_tokenizers.sample import Modality, Sample

# Element -> (variable, unit, units per stored integer): GHCN-Daily readme.txt, section III.
ELEMENTS: dict[str, tuple[str, str, float]] = {
    "TMAX": ("air_temperature_daily_maximum", "degC", 0.1),
    "TMIN": ("air_temperature_daily_minimum", "degC", 0.1),
    "PRCP": ("precipitation_amount", "mm", 0.1),
    "AWND": ("wind_speed", "m s-1", 0.1),
}


@dataclass(frozen=True, kw_only=True)
class DlyTable:
    """One .dly file.

    Attributes:
        station: its identifier.
        first_day: days since 1970 of the first row of the arrays.
        values: {element: float64 (day,)} in the file's own integers, NaN where missing, flagged or presumed.
    """

    station: str
    first_day: int
    values: dict[str, np.ndarray]


class GhcnDaily:
    """GHCN-Daily .dly -> series. Values that failed a quality check or are "missing presumed zero" are missing."""

    modality: ClassVar[Modality] = "series"
    options: ClassVar[Mapping[str, str]] = {
        "elements": f"list of elements, of {', '.join(ELEMENTS)} (default TMAX, TMIN, PRCP)",
        "stations": "{station: {latitude, longitude, elevation}}",
        "utc_offset_hours": "offset of the observation day from UTC (default 0)",
        "max_gap_steps": "a longer run of missing days breaks the stretch (default 100)",
    }
    required: ClassVar[tuple[str, ...]] = ()

    def parts(self, settings: SourceSettings) -> list[Part]:
        """See `Source.parts`: a station's file each."""
        for name in _elements(settings):
            if name not in ELEMENTS:
                raise DataError(f"{settings.where}: element {name!r} is none of {', '.join(ELEMENTS)}")
        # A day of an element takes eight characters.
        return [
            Part(name=path.name, select={"path": path}, bytes=path.stat().st_size // 2) for path in locate(settings)
        ]

    def read(self, settings: SourceSettings, part: Part) -> Iterator[Sample]:
        """See `Source.read`."""
        path, elements = part.select["path"], _elements(settings)
        table = read_dly(path)
        columns = []
        for name in elements:
            variable, unit, scale = ELEMENTS[name]
            if name not in table.values:
                raise DataError(f"{path}: no element {name!r}; the file has {', '.join(table.values)}")
            columns.append(converted(table.values[name] * scale, unit, variable=variable, where=f"{path}, {name}"))
        place = settings.options.get("stations", {}).get(table.station, {})
        station = Station(
            key=f"{settings.name}/{slug(table.station)}",
            source=settings.name,
            variables=tuple(ELEMENTS[name][0] for name in elements),
            levels=(float("nan"),) * len(elements),
            step_seconds=86400.0,
            max_gap_steps=int(settings.options.get("max_gap_steps", 100)),
            **{axis: float(place.get(axis, "nan")) for axis in ("latitude", "longitude", "elevation")},
        )
        days = np.arange(len(columns[0])) + table.first_day
        # Totals and extremes of a day are known when it is over.
        seconds = (days + 1) * 86400.0 - float(settings.options.get("utc_offset_hours", 0.0)) * 3600.0
        yield from regular_samples(station, days, values=np.stack(columns, axis=1), clock=posix_clock(seconds))


def _elements(settings: SourceSettings) -> list[str]:
    return [str(name) for name in settings.options.get("elements", ("TMAX", "TMIN", "PRCP"))]


def read_dly(path: Path) -> DlyTable:
    """All elements of a .dly file on one daily axis.

    Raises:
        DataError: it cannot be read, holds several stations, or a line is not of the format.
    """
    try:
        lines = [line for line in path.read_text(encoding="ascii").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as GHCN-Daily: {error}") from error
    if not lines:
        raise DataError(f"{path}: no line; expected GHCN-Daily .dly")
    rows: list[tuple[str, int, list[float]]] = []
    for number, line in enumerate(lines, start=1):
        try:
            month = (int(line[11:15]) - 1970) * 12 + int(line[15:17]) - 1
            rows.append((line[17:21], month, _days(line.ljust(269), month)))
        except ValueError as error:
            raise DataError(f"{path}: line {number} is not of the .dly format: {line[:40]!r}") from error
    stations = {line[:11] for line in lines}
    if len(stations) != 1:
        raise DataError(f"{path}: expected one station, got {', '.join(sorted(stations))}")
    first, last = _month_start(min(row[1] for row in rows)), _month_start(max(row[1] for row in rows) + 1)
    values: dict[str, np.ndarray] = {}
    for element, month, days in rows:
        start = _month_start(month) - first
        values.setdefault(element, np.full(last - first, np.nan))[start : start + len(days)] = days
    return DlyTable(station=stations.pop(), first_day=first, values=values)


def _days(line: str, month: int) -> list[float]:
    days = []
    for day in range(_month_start(month + 1) - _month_start(month)):
        field = line[21 + 8 * day : 29 + 8 * day]
        value, measurement, quality = int(field[:5]), field[5], field[6]
        days.append(float("nan") if value == -9999 or quality != " " or measurement == "P" else float(value))
    return days


def _month_start(month: int) -> int:
    """Days since 1970 of the first day of a month, counted from January 1970."""
    return int(np.datetime64(month, "M").astype("datetime64[D]").astype(np.int64))
