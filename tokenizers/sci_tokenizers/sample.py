"""Sample: what a source yields, a film of physical values with its time, place and variables; it checks itself."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from sci_tokenizers.variables import VARIABLES, UnknownVariableError

Modality = Literal["grid", "series", "trace"]
MODALITIES: tuple[str, ...] = get_args(Modality)


def masked_name(modality: str) -> str:
    """What the masked objective of a modality is called in records, beside the modality itself for the next frame."""
    return f"{modality}/masked"


LOSSES: tuple[str, ...] = (*MODALITIES, *(masked_name(name) for name in MODALITIES))


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
        clipped: bool (time,), where a reader saw the recorder at its limit in a raw record whose filtered values no
            longer show it; None where nobody looked. It judges quality and is stored as spans, not with the values.
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
    clipped: np.ndarray | None = None

    def __post_init__(self) -> None:
        self._check_place()
        self._check_film()

    def filmed(
        self, values: np.ndarray, valid: np.ndarray, *, time: np.ndarray, year_phase: np.ndarray, day_phase: np.ndarray
    ) -> Sample:
        """Other times of the same place: what both have in common was checked when this sample was made.

        Raises:
            SampleError: what is new breaks a rule.
        """
        film = {"values": values, "valid": valid, "time": time, "year_phase": year_phase, "day_phase": day_phase}
        other = object.__new__(Sample)
        other.__dict__.update(self.__dict__, **film)
        if values.shape[1:] != self.values.shape[1:]:
            raise SampleError(f"{self._where}: a time has shape {self.values.shape[1:]}, got {values.shape[1:]}")
        other._check_film()
        return other

    @property
    def _where(self) -> str:
        return f"sample {self.key!r} of source {self.source!r}"

    def _check_place(self) -> None:
        """What does not depend on time: modality, variables, shapes, place."""
        if self.modality not in MODALITIES:
            raise SampleError(f"{self._where}: modality is one of {MODALITIES}, got {self.modality!r}")
        for name in self.variables:
            if name not in VARIABLES:
                raise UnknownVariableError(name, self._where)
        if self.values.ndim != 4:
            raise SampleError(f"{self._where}: values are (time, variable, row, column), got shape {self.values.shape}")
        _, variables, rows, columns = self.values.shape
        for name in ("latitude", "longitude", "elevation"):
            if getattr(self, name).shape != (rows, columns):
                raise SampleError(f"{self._where}: {name} has shape {(rows, columns)}, got {getattr(self, name).shape}")
        if len(self.variables) != variables or len(self.levels) != variables:
            raise SampleError(
                f"{self._where}: {variables} variables, got names {self.variables} and levels {self.levels}"
            )
        if self.modality == "series" and (rows, columns) != (1, 1):
            raise SampleError(f"{self._where}: a series has one place, got {rows} x {columns}")
        if not self.step_seconds > 0:
            raise SampleError(f"{self._where}: step_seconds must be positive, got {self.step_seconds}")
        latitude = self.latitude[np.isfinite(self.latitude)]
        if latitude.size and np.abs(latitude).max() > 90:
            raise SampleError(
                f"{self._where}: latitude is within -90..90 degrees, got {latitude.flat[np.abs(latitude).argmax()]}"
            )

    def _check_film(self) -> None:
        """What has a time axis: shapes, types, increasing time, finite values."""
        values, valid, time = self.values, self.valid, self.time
        times = values.shape[0]
        if valid.shape != values.shape:
            raise SampleError(f"{self._where}: valid has shape {values.shape}, got {valid.shape}")
        if not time.shape == self.year_phase.shape == self.day_phase.shape == (times,):
            shapes = time.shape, self.year_phase.shape, self.day_phase.shape
            raise SampleError(f"{self._where}: time, year_phase and day_phase have shape {(times,)}, got {shapes}")
        if values.dtype != np.float32 or valid.dtype != np.bool_:
            raise SampleError(f"{self._where}: values are float32 and valid bool, got {values.dtype} and {valid.dtype}")
        if self.clipped is not None and (self.clipped.shape != (times,) or self.clipped.dtype != np.bool_):
            raise SampleError(
                f"{self._where}: clipped is bool of shape {(times,)}, got {self.clipped.dtype} {self.clipped.shape}"
            )
        if not np.logical_and.reduce(time[1:] > time[:-1]):
            steps = np.diff(time)
            at = int(np.argmin(steps))
            raise SampleError(
                f"{self._where}: time must increase, but step {at} -> {at + 1} goes {steps[at]} s; sort the record by "
                "time and keep one value of each time"
            )
        if not np.logical_and.reduce(np.isfinite(values), axis=None):
            raise SampleError(f"{self._where}: values must be finite (0 where not valid)")

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
            clipped=None if self.clipped is None else self.clipped[cut],
        )
