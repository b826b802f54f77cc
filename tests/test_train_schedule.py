"""The schedule: warm-up, stable, cooldown, as a pure function of the step."""

from __future__ import annotations

import pytest

from sci_gpt.errors import ConfigError
from sci_gpt.train.schedule import Schedule

SCHEDULE = Schedule(peak=2.0, steps=20, warmup_steps=4, cooldown_steps=10)


def test_warm_up_is_linear_and_starts_above_zero() -> None:
    assert [SCHEDULE.learning_rate(step) for step in range(5)] == [0.5, 1.0, 1.5, 2.0, 2.0]


def test_cooldown_is_linear_to_zero_after_the_last_step() -> None:
    # ten steps left at step 10: 10/10 of the peak, then 9/10, ... and 1/10 in the last step
    rates = [SCHEDULE.learning_rate(step) for step in range(10, 20)]
    assert rates == pytest.approx([2.0 * left / 10 for left in range(10, 0, -1)])


def test_the_stable_part_does_not_depend_on_the_length() -> None:
    longer = Schedule(peak=2.0, steps=200, warmup_steps=4, cooldown_steps=10)
    assert [SCHEDULE.learning_rate(s) for s in range(10)] == [longer.learning_rate(s) for s in range(10)]


def test_without_warm_up_and_cooldown_the_rate_is_the_peak() -> None:
    flat = Schedule(peak=3.0, steps=5, warmup_steps=0, cooldown_steps=0)
    assert {flat.learning_rate(step) for step in range(5)} == {3.0}


@pytest.mark.parametrize("step", [-1, 20])
def test_a_step_outside_is_refused(step: int) -> None:
    with pytest.raises(ValueError, match=rf"0\.\.19, got {step}"):
        SCHEDULE.learning_rate(step)


def test_parts_longer_than_the_whole_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"warmup_steps 12 \+ cooldown_steps 10 exceed steps 20"):
        Schedule(peak=1.0, steps=20, warmup_steps=12, cooldown_steps=10)


def test_a_negative_part_is_refused() -> None:
    with pytest.raises(ConfigError, match="warmup_steps=-1"):
        Schedule(peak=1.0, steps=20, warmup_steps=-1, cooldown_steps=0)
