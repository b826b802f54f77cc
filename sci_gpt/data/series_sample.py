"""Makes series samples on a regular time axis from irregular rows: missing times stay, long gaps break the stretch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from sci_gpt.data.calendars import Clock
from sci_gpt.errors import DataError
from sci_tokenizers.sample import Sample
from sci_tokenizers.variables import VARIABLES, UnitError, UnknownVariableError, convert


@dataclass(frozen=True, kw_only=True)
class Station:
    """What the rows of one series share.

    Attributes:
        key: SOURCE/GROUP.
        source: name of the source.
        variables, levels: names in the variable table, and levels (NaN where there is none).
        step_seconds: nominal step.
        max_gap_steps: a longer run of missing times breaks the stretch.
        latitude, longitude, elevation: degrees and m; NaN where unknown.
    """

    key: str
    source: str
    variables: tuple[str, ...]
    levels: tuple[float, ...]
    step_seconds: float
    max_gap_steps: int = 100
    latitude: float = float("nan")
    longitude: float = float("nan")
    elevation: float = float("nan")


def unpacked(raw: np.ndarray, *, fills: Iterable[float], scale: float, offset: float) -> np.ndarray:
    """float64 raw * scale + offset, NaN where a stored value is one of the `fills` (CF section 8.1)."""
    values = raw.astype(np.float64)
    for fill in fills:
        values[raw == fill] = np.nan
    return values * scale + offset


def in_range(values: np.ndarray, variable: str) -> np.ndarray:
    """Bool: finite and within the variable's valid range (undeclared fill values lie outside)."""
    row = VARIABLES[variable]
    with np.errstate(invalid="ignore"):
        return np.asarray(np.isfinite(values) & (values >= row.minimum) & (values <= row.maximum))


def converted(values: np.ndarray, unit: str, *, variable: str, where: str) -> np.ndarray:
    """Values (any shape) in the variable table's unit, float64.

    Raises:
        DataError: the variable is not in the table or the unit does not convert.
    """
    try:
        return convert(values, unit, variable=variable, where=where)
    except (UnknownVariableError, UnitError) as error:
        raise DataError(str(error)) from error


def regular_samples(station: Station, steps: np.ndarray, *, values: np.ndarray, clock: Clock) -> Iterator[Sample]:
    """Stretches of a series on a regular axis.

    Args:
        station: what the rows share.
        steps: int64 (rows,), strictly increasing number of each row on the regular axis.
        values: float64 (rows, variable) in the table's units, NaN where missing.
        clock: of the whole regular axis, from step `steps[0]` to `steps[-1]`.
    """
    valid = np.stack([in_range(values[:, i], name) for i, name in enumerate(station.variables)], axis=1)
    kept = np.flatnonzero(valid.any(axis=1))
    if not len(kept):
        raise DataError(
            f"{station.key}: no value of {', '.join(station.variables)} is present and within its valid range; "
            "check the file, its fill values and its unit"
        )
    breaks = np.flatnonzero(np.diff(steps[kept]) > station.max_gap_steps) + 1
    for part, rows in enumerate(np.split(kept, breaks)):
        first, last = int(steps[rows[0]]), int(steps[rows[-1]])
        shape = (last - first + 1, len(station.variables), 1, 1)
        full, known = np.zeros(shape, np.float32), np.zeros(shape, bool)
        at = steps[rows] - first
        full[at, :, 0, 0] = np.where(valid[rows], values[rows], 0.0)
        known[at, :, 0, 0] = valid[rows]
        cut = slice(first - int(steps[0]), last - int(steps[0]) + 1)
        place = {
            name: np.full((1, 1), getattr(station, name), np.float32) for name in ("latitude", "longitude", "elevation")
        }
        yield Sample(
            key=f"{station.key}/{part}",
            source=station.source,
            modality="series",
            variables=station.variables,
            levels=station.levels,
            values=full,
            valid=known,
            time=clock.time[cut],
            year_phase=clock.year_phase[cut],
            day_phase=clock.day_phase[cut],
            step_seconds=station.step_seconds,
            **place,
        )
