"""Sample: what a source yields, a film of physical values with its time, place and variables; it checks itself."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from sci_tokenizers.variables import VARIABLES, UnknownVariableError

Modality = Literal["grid", "series", "trace"]
MODALITIES: tuple[str, ...] = get_args(Modality)


class SampleError(ValueError):
    """A sample breaks one of its own rules; the message names the rule, the sample and the offending value."""


def channel_name(variable: str, level: float) -> str:
    """Name of one channel: the variable, and its level where it has one (`air_temperature@85000`)."""
    return variable if np.isnan(level) else f"{variable}@{level:g}"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A contiguous stretch of one place (tile, station, receivers), in the units of the variable table.

    One layout serves all modalities: `values[time, variable, row, column]`.

    ========  ==========================  =========  ===================  ======
    modality  time                        variable   row                  column
    ========  ==========================  =========  ===================  ======
    grid      a field's time              a field    latitude or y        longitude or x
    series    an observation's time       a sensor   1                    1
    trace     a sample of the waveform    component  a receiver           1
    ========  ==========================  =========  ===================  ======

    Attributes:
        key: unique name within the corpus.
        source: name of the source in the data configuration.
        modality: "grid", "series" or "trace".
        variables: names from the variable table, one per variable axis entry.
        levels: vertical coordinate per variable (Pa or m), NaN where there is none.
        values: float32 (time, variable, row, column); 0 where not valid.
        valid: bool, same shape: False where a value is missing.
        time: float64 (time,), seconds since 1970-01-01 UTC on the corpus calendar (a 360-day or no-leap year is
            stretched
            to a real one), strictly increasing.
        year_phase, day_phase: float32 (time,) in [0, 1): phase of the year and of the UTC day in the sample's own
            calendar.
        step_seconds: nominal step of the time axis in seconds.
        latitude, longitude, elevation: float32 (row, column), degrees north, degrees east, m; NaN where unknown.
    """

    key: str
    source: str
    modality: Modality
    variables: tuple[str, ...]
    levels: tuple[float, ...]
    values: np.ndarray
    valid: np.ndarray
    time: np.ndarray
    year_phase: np.ndarray
    day_phase: np.ndarray
    step_seconds: float
    latitude: np.ndarray
    longitude: np.ndarray
    elevation: np.ndarray

    def __post_init__(self) -> None:
        where = f"sample {self.key!r} of source {self.source!r}"
        if self.modality not in MODALITIES:
            raise SampleError(f"{where}: modality is one of {MODALITIES}, got {self.modality!r}")
        for name in self.variables:
            if name not in VARIABLES:
                raise UnknownVariableError(name, where)
        if self.values.ndim != 4:
            raise SampleError(f"{where}: values are (time, variable, row, column), got shape {self.values.shape}")
        times, variables, rows, columns = self.values.shape
        expected = {
            "valid": (times, variables, rows, columns),
            "time": (times,),
            "year_phase": (times,),
            "day_phase": (times,),
            "latitude": (rows, columns),
            "longitude": (rows, columns),
            "elevation": (rows, columns),
        }
        for name, shape in expected.items():
            if getattr(self, name).shape != shape:
                raise SampleError(f"{where}: {name} has shape {shape}, got {getattr(self, name).shape}")
        if len(self.variables) != variables or len(self.levels) != variables:
            raise SampleError(f"{where}: {variables} variables, got names {self.variables} and levels {self.levels}")
        if self.values.dtype != np.float32 or self.valid.dtype != np.bool_:
            raise SampleError(
                f"{where}: values are float32 and valid bool, got {self.values.dtype} and {self.valid.dtype}"
            )
        if self.modality == "series" and (rows, columns) != (1, 1):
            raise SampleError(f"{where}: a series has one place, got {rows} x {columns}")
        if times > 1 and not (np.diff(self.time) > 0).all():
            at = int(np.argmin(np.diff(self.time)))
            raise SampleError(f"{where}: time must increase, but step {at} -> {at + 1} goes {np.diff(self.time)[at]} s")
        if not self.step_seconds > 0:
            raise SampleError(f"{where}: step_seconds must be positive, got {self.step_seconds}")
        latitude = self.latitude[np.isfinite(self.latitude)]
        if latitude.size and np.abs(latitude).max() > 90:
            raise SampleError(
                f"{where}: latitude is within -90..90 degrees, got {latitude.flat[np.abs(latitude).argmax()]}"
            )
        if not np.isfinite(self.values).all():
            raise SampleError(f"{where}: values must be finite (0 where not valid)")

    @property
    def num_times(self) -> int:
        """Length of the time axis."""
        return int(self.values.shape[0])

    @property
    def channels(self) -> tuple[str, ...]:
        """One name per variable axis entry, with the level where there is one."""
        return tuple(channel_name(v, level) for v, level in zip(self.variables, self.levels, strict=True))

    def window(self, start: int, stop: int) -> Sample:
        """The times [start, stop) as a sample (views, no copy)."""
        if not 0 <= start < stop <= self.num_times:
            raise SampleError(f"sample {self.key!r} has {self.num_times} times, got window {start}..{stop}")
        cut = slice(start, stop)
        return replace(
            self,
            values=self.values[cut],
            valid=self.valid[cut],
            time=self.time[cut],
            year_phase=self.year_phase[cut],
            day_phase=self.day_phase[cut],
        )
