"""Statistics of one channel on the training split, and the seasonal climatology that they hold."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


def harmonics(year_phase: np.ndarray, day_phase: np.ndarray, *, num_year: int, num_day: int) -> np.ndarray:
    """Design matrix of a climatology: 1, cos and sin of the first harmonics of the year, then of the day.

    Args:
        year_phase, day_phase: (time,) in [0, 1).
        num_year, num_day: harmonics kept of each cycle.

    Returns:
        float64 (time, 1 + 2 num_year + 2 num_day).
    """
    columns = [np.ones(len(year_phase))]
    for phase, count in ((year_phase, num_year), (day_phase, num_day)):
        angle = 2 * np.pi * np.asarray(phase, np.float64)
        for k in range(1, count + 1):
            columns += [np.cos(k * angle), np.sin(k * angle)]
    return np.stack(columns, axis=1)


@dataclass(frozen=True, kw_only=True)
class ChannelStatistics:
    """What the training split says of one channel (variable and level) of one source, in the variable's transformed
    unit.

    Attributes:
        count: valid values seen.
        mean, std: over all valid values.
        step_std: standard deviation of one-step differences (both ends valid).
        num_year, num_day: harmonics of the climatology.
        climatology: coefficients of `harmonics`, least squares over the training split.
        minimum, maximum: extremes seen.
    """

    count: int
    mean: float
    std: float
    step_std: float
    num_year: int
    num_day: int
    climatology: tuple[float, ...]
    minimum: float
    maximum: float

    def climatology_at(self, year_phase: np.ndarray, day_phase: np.ndarray) -> np.ndarray:
        """The climatology at these phases, float64 (time,), in the variable's transformed unit."""
        return harmonics(year_phase, day_phase, num_year=self.num_year, num_day=self.num_day) @ np.asarray(
            self.climatology
        )

    def to_json(self) -> dict[str, Any]:
        """Plain numbers for `statistics.json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ChannelStatistics:
        """The inverse of `to_json`."""
        return cls(**{**data, "climatology": tuple(data["climatology"])})
