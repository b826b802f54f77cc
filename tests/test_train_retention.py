"""Which checkpoints stay: the last, one every so many steps, the best by the validation loss in their state."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from sci_gpt.config import CheckpointConfig
from sci_gpt.config_file import parse_config
from sci_gpt.errors import ConfigError
from sci_gpt.train.checkpoint import committed, step_of
from sci_gpt.train.commit import CheckpointWriter
from sci_gpt.train.retention import Retention, validation_loss
from test_train_checkpoint import holding

LOSSES = {10: None, 20: 0.9, 30: 0.5, 40: 0.7, 50: 0.5, 60: 0.8, 70: 0.6}


@pytest.mark.parametrize(
    ("rule", "stay"),
    [
        (Retention(last=2), {60, 70}),
        (Retention(last=9), set(LOSSES)),
        (Retention(last=1, every=30), {30, 60, 70}),
        (Retention(last=1, best=1), {50, 70}),  # of equal ones the newest
        (Retention(last=1, best=3), {30, 50, 70}),
        (Retention(last=1, best=9), {20, 30, 40, 50, 60, 70}),  # never one without a validation, but as one of the last
        (Retention(last=2, every=20, best=2), {20, 30, 40, 50, 60, 70}),
    ],
)
def test_what_any_rule_asks_for_stays(rule: Retention, stay: set[int]) -> None:
    assert rule.kept(LOSSES) == stay
    assert len(stay) <= rule.most(70)


def test_at_most_so_many_stay() -> None:
    """30 and 60 by their number, three best, two last."""
    assert Retention(last=2, every=30, best=3).most(70) == 2 + 3 + 2
    assert Retention(last=2).most(10**6) == 2


def save(run: Path, step: int, loss: float | None, **rule: Any) -> list[int]:
    """A checkpoint by a writer of its own, as after a restart; the steps that are there afterwards."""
    writer = CheckpointWriter(run, rank=0, size=1, session="s", retention=Retention(**rule))
    validation = None if loss is None else {"step": step, "loss": loss}
    writer.save(step, holding(0, 1), state={"step": step, "validation": validation})
    return [step_of(path) or 0 for path in committed(run)]


def test_the_best_stays_over_restarts(tmp_path: Path) -> None:
    kept = [save(tmp_path, step, loss, last=1, best=1) for step, loss in LOSSES.items()]
    assert kept == [[10], [20], [30], [30, 40], [50], [50, 60], [50, 70]]


def test_one_every_so_many_steps_stays(tmp_path: Path) -> None:
    assert [save(tmp_path, step, None, last=1, every=20) for step in (10, 20, 30, 40, 50)][-1] == [20, 40, 50]


def test_a_damaged_state_is_not_among_the_best_and_ends_no_run(tmp_path: Path) -> None:
    save(tmp_path, 10, 0.1, last=1, best=1)
    (tmp_path / "checkpoints" / "step-00000010" / "state.json").write_text("{}")
    assert save(tmp_path, 20, 0.9, last=1, best=1) == [20]


def test_the_number_that_ranks_is_weighed_as_in_training() -> None:
    """(1 x 0.5 + 3 x 0.1) / (1 + 3) = 0.2; trace has no validation windows and counts in neither sum."""
    factor = {"grid": 1.0, "series": 3.0, "trace": 2.0}
    scores = {"grid": {"loss": 0.5, "skill": 0.0}, "series": {"loss": 0.1, "skill": 0.0}}
    assert validation_loss(scores, factor) == pytest.approx(0.2)
    assert validation_loss({}, factor) is None
    assert validation_loss({"grid": {"loss": 0.5}}, factor | {"grid": 0.0}) is None
    assert validation_loss({"grid": {"loss": math.nan}}, factor) is None


def test_keep_every_must_fall_on_checkpoints() -> None:
    assert parse_config({"every": 8, "keep_every": 24}, CheckpointConfig, where="here").keep_every == 24
    with pytest.raises(ConfigError, match="keep_every is a multiple of every, got 20 and 8"):
        parse_config({"every": 8, "keep_every": 20}, CheckpointConfig, where="here")
