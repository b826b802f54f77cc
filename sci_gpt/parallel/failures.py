"""Failures: the work that they cost, and how often to save (Young 1974, Daly 2006)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sci_gpt.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Shares of the run's time, at one interval between checkpoints (seconds).

    Attributes:
        interval: seconds of computing between two saves.
        saving: share spent waiting for saves.
        lost: share of work done again after failures, half an interval each, and of starting again.
    """

    interval: float
    saving: float
    lost: float

    @property
    def total(self) -> float:
        """Both."""
        return self.saving + self.lost


def young(save_seconds: float, *, seconds_between_failures: float) -> float:
    """Best interval to first order: sqrt(2 C M) (Young 1974, doi:10.1145/361147.361115)."""
    _check(save_seconds, seconds_between_failures)
    return math.sqrt(2 * save_seconds * seconds_between_failures)


def daly(save_seconds: float, *, seconds_between_failures: float) -> float:
    """Best interval to higher order (Daly 2006, doi:10.1016/j.future.2004.11.016, equation 37): for C < 2 M
    sqrt(2 C M) (1 + sqrt(C / 2M) / 3 + (C / 2M) / 9) - C, else M.
    """
    _check(save_seconds, seconds_between_failures)
    if save_seconds >= 2 * seconds_between_failures:
        return seconds_between_failures
    ratio = save_seconds / (2 * seconds_between_failures)
    first = math.sqrt(2 * save_seconds * seconds_between_failures)
    return first * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save_seconds


def losses(
    interval: float, *, save_seconds: float, seconds_between_failures: float, restart_seconds: float = 0.0
) -> Losses:
    """What failures and saves cost: C / tau for saving, (tau / 2 + R) / M for each failure (Young's first order).

    Raises:
        ConfigError: an interval or a mean time of 0 or less.
    """
    _check(save_seconds, seconds_between_failures)
    if interval <= 0:
        raise ConfigError(f"an interval between checkpoints is more than 0 s, got {interval}")
    return Losses(
        interval=interval,
        saving=save_seconds / interval,
        lost=(interval / 2 + restart_seconds) / seconds_between_failures,
    )


def _check(save_seconds: float, seconds_between_failures: float) -> None:
    if save_seconds < 0 or seconds_between_failures <= 0:
        raise ConfigError(
            "a save takes 0 s or more and the mean time between failures is more than 0 s, got "
            f"{save_seconds} and {seconds_between_failures}"
        )
