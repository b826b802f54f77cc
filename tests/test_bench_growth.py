"""The memory benchmark's arithmetic: medians after the warm-up and at the end, and a run too short to tell."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.growth import LIMIT, growth, last_step, table


def test_growth_is_between_the_warm_up_and_the_end() -> None:
    """300 MB while it starts, 500 from step 100 on, 520 in the last tenth: 4 %; the peak of one look does not count."""
    looks = [(50, 300.0), (110, 500.0), (150, 500.0), (160, 900.0), (500, 510.0), (920, 520.0), (999, 520.0)]
    before, after, share = growth(looks, steps=1000)
    assert (before, after) == (500.0, 520.0) and share == pytest.approx(0.04) and share > LIMIT
    assert table({1: looks}, steps=1000)[2].split(" | ")[1:4] == ["300", "500", "-"]
    assert table({1: looks}, steps=1000)[2].endswith("| +4.00 % |")


def test_a_run_that_was_not_looked_at_tells_nothing() -> None:
    with pytest.raises(ValueError, match="1 looks after the warm-up and 0 at the end: give more --steps"):
        growth([(150, 500.0)], steps=1000)


@pytest.mark.parametrize("count", [0, 1, 3, 5000])
def test_the_last_whole_line_says_how_far_a_run_is(count: int, tmp_path: Path) -> None:
    """Of a log longer than what is read of it, too, and with a line that is being written."""
    log = tmp_path / "log.jsonl"
    assert last_step(log) == 0
    log.write_text("".join(f'{{"step": {step}, "loss": 1.0}}\n' for step in range(1, count + 1)) + '{"step": 99')
    assert last_step(log) == count
