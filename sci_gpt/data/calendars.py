"""Times of any calendar on the corpus calendar: seconds since 1970, phase of the year, phase of the day."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cftime
import numpy as np

from sci_gpt.errors import DataError

REAL_CALENDARS = ("standard", "gregorian", "proleptic_gregorian")


@dataclass(frozen=True, kw_only=True)
class Clock:
    """A time axis on the corpus calendar.

    Attributes:
        time: float64 (time,), seconds since 1970-01-01 UTC; a year of a no-leap, 360-day or Julian calendar is
            stretched to the real year of the same number.
        year_phase, day_phase: float32 (time,) in [0, 1), of the sample's own calendar.
    """

    time: np.ndarray
    year_phase: np.ndarray
    day_phase: np.ndarray

    def cut(self, times: slice) -> Clock:
        """The clock of some of its times."""
        return Clock(time=self.time[times], year_phase=self.year_phase[times], day_phase=self.day_phase[times])


def posix_clock(seconds: np.ndarray) -> Clock:
    """The clock of real UTC times, given as seconds since 1970 (float64)."""
    seconds = np.asarray(seconds, np.float64)
    years = _year_of(seconds)
    start, end = _year_start(years), _year_start(years + 1)
    return Clock(
        time=seconds,
        year_phase=_phase((seconds - start) / (end - start)),
        day_phase=_phase(np.mod(seconds, 86400.0) / 86400.0),
    )


def clock(numbers: np.ndarray, units: str, *, calendar: str, where: str) -> Clock:
    """The clock of CF times: `numbers` in `units` ("days since 1850-01-01") of a CF calendar.

    Raises:
        DataError: a unit or calendar that CF does not know; a time that is not finite.
    """
    numbers = np.asarray(numbers, np.float64)
    if not np.isfinite(numbers).all():
        at = int(np.argmin(np.isfinite(numbers)))
        raise DataError(f"{where}: time {at} is {numbers[at]}, not a time; drop what has no time, or mend the axis")
    try:
        dates = cftime.num2date(numbers, units, calendar=calendar)
    except (ValueError, OverflowError) as error:
        raise DataError(f"{where}: time unit {units!r} of calendar {calendar!r} cannot be read: {error}") from error
    return clock_of_dates(list(np.atleast_1d(dates)))


def clock_of_dates(dates: Sequence[Any]) -> Clock:
    """The clock of cftime dates (any calendar), all of one calendar."""
    years = np.array([date.year for date in dates], np.int64)
    of_day = np.array(
        [date.hour * 3600 + date.minute * 60 + date.second + date.microsecond / 1e6 for date in dates], np.float64
    )
    of_year = (np.array([date.dayofyr for date in dates], np.float64) - 1.0) * 86400.0 + of_day
    lengths = {year: _days_in(int(year), dates[0].calendar) for year in np.unique(years)}
    phase = of_year / (86400.0 * np.array([lengths[year] for year in years], np.float64))
    start, end = _year_start(years), _year_start(years + 1)
    return Clock(time=start + phase * (end - start), year_phase=_phase(phase), day_phase=_phase(of_day / 86400.0))


def _days_in(year: int, calendar: str) -> int:
    if calendar == "360_day":
        return 360
    if calendar in ("noleap", "365_day"):
        return 365
    if calendar in ("all_leap", "366_day"):
        return 366
    return 366 if cftime.is_leap_year(year, calendar) else 365


def _year_of(seconds: np.ndarray) -> np.ndarray:
    days = np.floor(seconds / 86400.0).astype(np.int64).astype("datetime64[D]")
    return np.asarray(days.astype("datetime64[Y]").astype(np.int64) + 1970)


def _year_start(years: np.ndarray) -> np.ndarray:
    """Seconds since 1970 of the start of (proleptic Gregorian) years."""
    days = (np.asarray(years, np.int64) - 1970).astype("datetime64[Y]").astype("datetime64[D]").astype(np.int64)
    return np.asarray(days, np.float64) * 86400.0


def _phase(values: np.ndarray) -> np.ndarray:
    """float32 in [0, 1): rounding to float32 may reach 1, which is 0."""
    phase = np.asarray(values, np.float32)
    return np.where(phase >= 1.0, np.float32(0.0), phase)
