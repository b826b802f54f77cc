"""Film: the contract between a user's data object and the model: contexts as samples, forecasts as the same kind."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import numpy as np

from sci_gpt.errors import ConfigError, DataError
from sci_tokenizers.sample import Modality, Sample
from sci_tokenizers.variables import VARIABLES, UnknownVariableError, convert

Label = Literal["quantile", "sample"]


@dataclass(frozen=True, kw_only=True)
class Notes:
    """What data do not say of themselves.

    Attributes:
        source: the source of the training data that they belong to; None: a source never seen.
        place: latitude and longitude in degrees, elevation in m; NaN where unknown (grids carry their own).
        time: a table's time column; None: its DatetimeIndex, else the first column that holds times.
        columns: {column of a table or variable of a dataset: `variable[@level][:unit]`}; others are left out.
    """

    source: str | None = None
    place: tuple[float, float, float] = (math.nan, math.nan, math.nan)
    time: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)


class Film(ABC):
    """A user's object as the model sees it.

    Attributes:
        modality: of the contexts.
        contexts: what is known, one sample per grid, station or seismometer, in the units of the variable table.
    """

    modality: ClassVar[Modality]
    contexts: list[Sample]

    @abstractmethod
    def __init__(self, data: Any, *, notes: Notes, options: Mapping[str, Any]) -> None:
        """Understand `data`.

        Args:
            data: the user's object; not changed.
            notes: what it does not say of itself.
            options: of the reader through which the model met this modality (a filter's corner, ..).

        Raises:
            DataError, UnitError, UnknownVariableError: it cannot be understood.
        """

    @abstractmethod
    def extend(self, context: Sample, num_times: int) -> Sample:
        """The context followed by `num_times` times of which only the clock is known (values not valid)."""

    @abstractmethod
    def answer(self, answers: Sequence[np.ndarray], labels: tuple[float, ...], *, kind: Label = "quantile") -> Any:
        """The forecast as the same kind of object.

        Args:
            answers: an array (labels, leads, variable, row, column) per context.
            labels: levels of quantiles, or numbers of samples from 0 on.
            kind: which of the two.
        """


@dataclass(frozen=True, kw_only=True)
class Column:
    """One variable of the user's object: name and unit there, variable, level in Pa or m (NaN: none)."""

    name: str
    variable: str
    unit: str
    level: float = math.nan

    def read(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Values in the table's unit (float32, 0 where not valid) and which are valid.

        Raises:
            DataError: most values lie outside the variable's range: the unit must be another one.
        """
        row = VARIABLES[self.variable]
        physical = convert(
            np.asarray(values, np.float64), self.unit, variable=self.variable, where=f"column {self.name!r}"
        )
        finite = np.isfinite(physical)
        inside = finite & (physical >= row.minimum) & (physical <= row.maximum)
        if finite.any() and inside.sum() < finite.sum() / 2:
            raise DataError(
                f"column {self.name!r}: {finite.sum() - inside.sum()} of {finite.sum()} values lie outside "
                f"{row.minimum:g}..{row.maximum:g} {row.unit} when read as {self.unit!r}; name the right unit, "
                f"as in {self.name}={self.variable}:UNIT"
            )
        return np.where(inside, physical, 0.0).astype(np.float32), inside

    def write(self, values: np.ndarray) -> np.ndarray:
        """Values in the table's unit back to the unit of the user's object, float64."""
        zero, one = convert(np.array([0.0, 1.0]), self.unit, variable=self.variable, where=f"column {self.name!r}")
        return (np.asarray(values, np.float64) - zero) / (one - zero)


def column_of(name: str, unit: str | None, *, notes: Notes) -> Column | None:
    """What a name in the user's object means: by the notes where they name columns, else by the variable table.

    Returns:
        None where the notes name other columns only.

    Raises:
        UnknownVariableError: the name (or the notes' variable) is not in the variable table.
        UnitError: its unit does not convert.
        ConfigError: a level that is no number.
    """
    words = name
    if notes.columns:
        if name not in notes.columns:
            return None
        words, _, given = notes.columns[name].partition(":")
        unit = given or unit
    variable, _, level = words.partition("@")
    if variable not in VARIABLES:
        raise UnknownVariableError(variable, f"column {name!r}")
    try:
        height = float(level) if level else math.nan
    except ValueError as error:
        raise ConfigError(
            f"column {name!r}: a level is a number of Pa or m, as in {variable}@85000, got {level!r}"
        ) from error
    column = Column(name=name, variable=variable, unit=unit or VARIABLES[variable].unit, level=height)
    column.write(np.zeros(1))  # a unit that does not convert is refused here, before any value is read
    return column


def refuse_missing(notes: Notes, names: Sequence[str]) -> None:
    """Raise when the notes name columns that are not there.

    Raises:
        ConfigError: the first such column, and those that are there.
    """
    for name in notes.columns:
        if name not in names:
            raise ConfigError(f"column {name!r} is not in the data, which hold {list(names)}; mend --columns")


def split_header(header: str) -> tuple[str, str | None]:
    """A column's name and unit: `air_temperature [degC]` or `air_temperature (degC)`; None where no unit is given."""
    match = re.fullmatch(r"\s*(.*?)\s*[\[(]([^\])]+)[\])]\s*", header)
    return (match.group(1), match.group(2)) if match else (header.strip(), None)


def extend_values(context: Sample, *, time: np.ndarray, year_phase: np.ndarray, day_phase: np.ndarray) -> Sample:
    """The context followed by times whose clock is given and whose values are not valid."""
    shape = (len(time), *context.values.shape[1:])
    return replace(
        context,
        clipped=None,
        values=np.concatenate([context.values, np.zeros(shape, np.float32)]),
        valid=np.concatenate([context.valid, np.zeros(shape, bool)]),
        time=np.concatenate([context.time, time]),
        year_phase=np.concatenate([context.year_phase, year_phase.astype(np.float32)]),
        day_phase=np.concatenate([context.day_phase, day_phase.astype(np.float32)]),
    )
