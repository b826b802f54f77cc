"""Learning rate as a pure function of the step: linear warm-up, stable, linear cooldown to zero."""

from __future__ import annotations

from dataclasses import dataclass

from sci_gpt.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Warm-up, stable, cooldown (Hu et al. 2024, MiniCPM, arXiv:2404.06395).

    The stable part knows nothing of the run's length: a run can be prolonged from a checkpoint before its cooldown, and
    one run gives the points of several lengths. The cooldown is linear to zero (Bergsma et al. 2025, arXiv:2502.15938).

    Attributes:
        peak: rate of the stable part.
        steps: whole length;  warmup_steps, cooldown_steps: of it.

    Raises:
        ConfigError: the parts do not fit in the whole.
    """

    peak: float
    steps: int
    warmup_steps: int
    cooldown_steps: int

    def __post_init__(self) -> None:
        if self.steps < 1 or self.warmup_steps < 0 or self.cooldown_steps < 0:
            raise ConfigError(
                f"a schedule has at least 1 step and no negative part, got steps={self.steps}, "
                f"warmup_steps={self.warmup_steps}, cooldown_steps={self.cooldown_steps}"
            )
        if self.warmup_steps + self.cooldown_steps > self.steps:
            raise ConfigError(
                f"warmup_steps {self.warmup_steps} + cooldown_steps {self.cooldown_steps} exceed steps {self.steps}; "
                "shorten one of them"
            )

    def learning_rate(self, step: int) -> float:
        """Rate of the update after `step` completed steps (0 .. steps - 1).

        The first update has peak / warmup_steps, the last one peak / cooldown_steps: none is zero.

        Raises:
            ValueError: the step is outside the schedule.
        """
        if not 0 <= step < self.steps:
            raise ValueError(f"the schedule has steps 0..{self.steps - 1}, got {step}")
        rate = self.peak
        if step < self.warmup_steps:
            rate = self.peak * (step + 1) / self.warmup_steps
        remaining = self.steps - step
        if remaining <= self.cooldown_steps:
            rate = self.peak * remaining / self.cooldown_steps
        return rate
