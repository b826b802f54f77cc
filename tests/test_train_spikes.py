"""Loss spikes and slow ranks: what counts as one, the rows and ranks that are named, and what the log keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from sci_gpt.train.agreement import Report, agree
from sci_gpt.train.journal import Progress, recent_losses, step_metrics
from sci_gpt.train.spikes import Spikes
from sci_gpt.train.trainer import seconds_of_ranks
from test_train_trainer import Memory, OneProcess, PlainEngine, Steps, Targets, trainer


class Jumps(Targets):
    """The loss of every step is 1.0 or 1.1 in turn, but 3.0 in the steps named; its gradient is 0."""

    def __init__(self, *jumps: int) -> None:
        self.jumps, self.step = jumps, 0

    def sums(self, predictions: Tensor, inputs: Any) -> dict[str, Tensor]:
        self.step += 1
        loss = 3.0 if self.step in self.jumps else 1.0 + 0.1 * (self.step % 2)
        return {"series": (0.0 * predictions).sum() + 4.0 * loss}


class OtherRank(OneProcess):
    """The second of two ranks: a loss of its own in the step before, and twice the seconds."""

    size = 2

    def __init__(self, loss: float) -> None:
        self.loss = loss

    def gather(self, values: list[float]) -> list[list[float]]:
        other = [0.0] * len(values)
        other[1], other[4], other[-1] = values[1], self.loss, 2.0 * values[-1]  # series weight, loss, seconds
        return [values, other]


def run(jumps: tuple[int, ...], *, losses: tuple[float | None, ...] = (), steps: int = 30) -> Memory:
    memory = Memory()
    training = trainer(Steps(), memory, steps=steps)
    object.__setattr__(training.parts, "objective", Jumps(*jumps))
    object.__setattr__(training.parts, "spikes", Spikes(losses))
    training.run()
    return memory


def test_a_spike_is_named_with_its_rows_and_is_in_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    """Losses 1.0 and 1.1 in turn: median 1.0 or 1.05 or 1.1, MAD 0.05; the limit is below 1.1 + 10 x 1.4826 x 0.1."""
    memory = run((25,))
    spikes = [record["step"] for record in memory.records if "spike" in record]
    assert spikes == [25]
    spike = memory.records[24]["spike"]
    assert spike["rows"] == ["sample 48 (somewhere)", "sample 49 (somewhere)"] and spike["rank"] == 0
    assert 1.1 < spike["limit"] < 1.1 + 1.4826 and spike["share"] == 1.0
    said = capsys.readouterr().err
    assert said.count("is a spike") == 1
    assert "step 25: the loss 3 is a spike, above" in said and "in the rows of sample 48 (somewhere)" in said


def test_too_few_losses_or_a_falling_loss_are_no_spike() -> None:
    assert not any("spike" in record for record in run((15,)).records)
    falling = Spikes()
    assert [falling.add(10.0 / (1 + step)) for step in range(200)] == [None] * 200


def test_a_run_that_goes_on_knows_the_losses_before_it() -> None:
    before = (1.0, 1.1) * 15
    assert [record["step"] for record in run((3,), losses=before, steps=5).records if "spike" in record] == [3]
    assert not any("spike" in record for record in run((3,), steps=5).records)


def test_the_limit_by_hand() -> None:
    """1, 2, .., 21: median 11, distances 0, 1, 1, .., 10, 10 with median 5: 11 + 10 x 1.4826 x 5."""
    losses = [None, *map(float, range(1, 22))]
    assert Spikes(losses).limit() == pytest.approx(85.13)
    assert Spikes(losses).add(85.0) is None and Spikes(losses).add(86.0) == pytest.approx(85.13)
    constant = Spikes([2.0] * 30)
    assert constant.add(2.03) is None and constant.add(2.05) == pytest.approx(2.04)
    assert constant.add(None) is None


def test_the_rank_with_most_of_the_loss_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    memory, engine = Memory(), PlainEngine()
    engine.world = OtherRank(36.0)  # against 4 x 3.0 of the first
    feed = Steps()
    get = feed.get

    def two(step: int, n: int) -> Any:
        rows, waited = get(step, n)
        object.__setattr__(rows, "dealt", ((n,), (n + 1,)))
        return rows, waited

    feed.get = two  # type: ignore[method-assign]
    training = trainer(feed, memory, steps=2, engine=engine)
    object.__setattr__(training.parts, "objective", Jumps(1, 2))
    object.__setattr__(training.parts, "spikes", Spikes([1.0] * 20))
    training.run()
    spike = memory.records[0]["spike"]
    assert spike["rank"] == 1 and spike["rows"] == ["sample 1 (somewhere)"]
    assert spike["share"] == pytest.approx(36.0 / (36.0 + 12.0))
    assert "most of it, 75 %, is of rank 1, in the rows of sample 1" in capsys.readouterr().err


def test_seconds_of_the_ranks_are_in_the_log() -> None:
    memory, engine = Memory(), PlainEngine()
    engine.world = OtherRank(4.0)
    trainer(Steps(), memory, steps=3, engine=engine).run()
    for record in memory.records:
        seconds = record["step_seconds"]
        assert seconds["slowest"] == 1 and seconds["max"] == pytest.approx(2.0 * seconds["min"])
        assert seconds["mean"] == pytest.approx(1.5 * seconds["min"]) and seconds["min"] > 0.0
        assert step_metrics(record)["step_seconds/slowest"] == 1.0
    assert seconds_of_ranks((3.0, 1.0, 5.0)) == {"min": 1.0, "mean": 3.0, "max": 5.0, "slowest": 2}


def test_every_rank_s_seconds_and_losses_come_with_the_agreement() -> None:
    world: Any = OtherRank(2.5)
    result = agree(world, Report(previous_loss={"series": 0.5}, previous_alone=0.25))
    assert result.previous_alone == (0.25, 0.5)
    assert [share["series"] for share in result.previous_share] == [0.5, 2.5]
    assert result.previous_loss["series"] == 3.0


def test_the_progress_line_names_a_rank_only_where_it_is_notably_slower() -> None:
    def line(*steps: tuple[float, float, int]) -> str:
        progress = Progress(100, every_seconds=1000.0)
        record = {"step": 40, "tokens": 500, "wait_seconds": 0.5, "loss": 1.25}
        for mean, most, slowest in steps:
            progress.step(record | {"step_seconds": {"min": mean, "mean": mean, "max": most, "slowest": slowest}})
        return progress.line(record, 4.0)

    slow = [(1.0, 1.5, 3)] * 4
    assert line(*slow, (1.0, 1.0, 0)).endswith(" | slowest rank 3 (1.4 x the mean)")
    assert "slowest" not in line(*slow), "four steps tell nothing"
    assert "slowest" not in line(*[(1.0, 1.1, 3)] * 5)
    assert "slowest" not in line(*slow, *[(1.0, 1.5, 0)] * 4), "now this rank, now that"


def test_the_last_losses_are_read_from_the_end_of_a_long_log(tmp_path: Path) -> None:
    assert recent_losses(tmp_path, 3) == []
    lines = [json.dumps({"step": n, "loss": n / 2, "padding": "x" * 300}) for n in range(3000)]
    lines.insert(2999, json.dumps({"step": 2998, "validation": {}}))
    lines.append(json.dumps({"step": 3000, "loss": None}))
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + '\n{"step": 3001, "lo')
    assert recent_losses(tmp_path, 3) == [1499.0, 1499.5, None]
