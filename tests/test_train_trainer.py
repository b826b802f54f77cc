"""The trainer's own rules, with real parts around a stand-in engine: agreement, broken steps, signals, records."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sci_gpt.errors import CheckpointError, ConfigError, DataError
from sci_gpt.parallel.engine import StepOutcome
from sci_gpt.parallel.plan import ParallelPlan
from sci_gpt.train.agreement import Report, agree
from sci_gpt.train.checkpoint import committed
from sci_gpt.train.commit import CheckpointWriter
from sci_gpt.train.feed import StepRows
from sci_gpt.train.fragments import Holding
from sci_gpt.train.journal import step_metrics
from sci_gpt.train.resume import Start, where_to_go_on
from sci_gpt.train.schedule import Schedule
from sci_gpt.train.signals import Requests
from sci_gpt.train.trainer import MOST_BROKEN_STEPS, Parts, Settings, Trainer

STEPS = 6
NEW = Start(checkpoint=None, step=0, next_sample=0)


class OneProcess:
    """A world of one."""

    rank, size = 0, 1

    def gather(self, values: list[float]) -> list[list[float]]:
        return [values]


class PlainEngine:
    """Plain gradient descent of one weight; refuses a gradient that is not finite, as Engine does."""

    def __init__(self) -> None:
        self.world = OneProcess()
        self.plan = ParallelPlan(data_parallel=1)
        self.module = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.module.weight)
        self.rate, self.rates = 0.0, list[float]()

    def __call__(self, inputs: Any) -> Tensor:
        weight: Tensor = self.module.weight
        return weight

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> StepOutcome:
        gradient = self.module.weight.grad
        assert gradient is not None
        applied = bool(torch.isfinite(gradient).all())
        if applied:
            self.module.weight.data -= self.rate * gradient
        self.module.weight.grad = None
        return StepOutcome(applied=applied, gradient_norm=float(gradient.norm()))

    def set_learning_rate(self, value: float) -> None:
        self.rate = value
        self.rates.append(value)

    @contextmanager
    def precision(self) -> Iterator[None]:
        yield


class Targets:
    """Objective: squared distance to the batch's target, weight as the batch says."""

    def inputs(self, batch: Any) -> Any:
        return batch

    def weights(self, inputs: Any) -> dict[str, float]:
        return {"series": inputs["weight"]}

    def sums(self, predictions: Tensor, inputs: Any) -> dict[str, Tensor]:
        return {"series": ((predictions - inputs["target"]) ** 2).sum() * inputs["weight"]}


class Steps:
    """Feed: two samples per step; `broken` steps have a target that is no number, `empty` ones weigh nothing."""

    def __init__(self, *, broken: tuple[int, ...] = (), empty: tuple[int, ...] = (), lost: int = 0) -> None:
        self.broken, self.empty, self.lost, self.closed = broken, empty, lost, False
        self.causes = ("a.tar: the shard ends at 512",) * (lost - 1) + ("b.tar: No such file",) * (lost > 0)

    def get(self, step: int, n: int) -> tuple[StepRows, float]:
        step = step + 1
        target = math.nan if step in self.broken else 1.0
        batch: Any = {"target": target, "weight": 0.0 if step in self.empty else 4.0}
        rows = StepRows(
            first=n,
            next_sample=n + 2,
            batches=(batch,),
            samples=(n, n + 1),
            keys=("a", "b"),
            dealt=((n, n + 1),),
            num_tokens=10,
            passed_over=self.lost,
            causes=self.causes,
        )
        return rows, 0.25

    def close(self) -> None:
        self.closed = True


class Memory:
    """Journal and checkpoints in memory."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.saves: list[tuple[int, int]] = []
        self.eaten: list[int] = []
        self.scores: list[int] = []

    def consumed(self, step: int, rows: StepRows) -> None:
        self.eaten += rows.samples

    def step(self, record: dict[str, Any]) -> None:
        self.records.append(record)

    def validation(self, step: int, scores: Any) -> None:
        self.scores.append(step)

    def save(self, step: int, next_sample: int) -> None:
        self.saves.append((step, next_sample))


def trainer(
    feed: Steps,
    memory: Memory,
    *,
    steps: int = STEPS,
    requests: Requests | None = None,
    engine: Any = None,
    start: Start = NEW,
) -> Trainer:
    engine = engine or PlainEngine()
    return Trainer(
        Parts(
            engine=engine,
            feed=feed,
            objective=Targets(),
            journal=memory,
            save=memory.save,
            validate=lambda model: {},
            requests=requests or Requests(),
            name=lambda n: f"sample {n} (somewhere)",
        ),
        Settings(
            schedule=Schedule(peak=0.1, steps=steps, warmup_steps=0, cooldown_steps=0),
            factor={"grid": 1.0, "series": 0.5, "trace": 1.0},
            checkpoint_every=4,
            validate_every=3,
            most_passed_over=20,
        ),
        step=start.step,
        next_sample=start.next_sample,
    )


def test_records_saves_and_validations_come_when_due() -> None:
    memory, feed = Memory(), Steps()
    outcome = trainer(feed, memory).run()
    assert (outcome.step, outcome.next_sample, outcome.stopped) == (6, 12, False)
    assert memory.saves == [(4, 8), (6, 12)] and memory.scores == [3, 6] and feed.closed
    assert memory.eaten == list(range(12))
    assert [record["step"] for record in memory.records] == [1, 2, 3, 4, 5, 6]
    # loss (w - 1)^2 from w = 0: gradient -2 (1 - w), rate 0.1, so the distance shrinks by 0.8 a step
    assert [record["loss"] for record in memory.records] == pytest.approx([0.64**k for k in range(6)], rel=1e-5)
    assert memory.records[0]["losses"] == {"series": pytest.approx(1.0)}
    assert memory.records[0]["wait_seconds"] == 0.25 and memory.records[0]["tokens"] == 10


def test_a_broken_step_is_skipped_counted_and_its_rows_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    memory = Memory()
    trainer(Steps(broken=(3,)), memory).run()
    applied = [record["applied"] for record in memory.records]
    assert applied == [True, True, False, True, True, True]
    assert memory.records[2]["loss"] is None
    assert memory.records[2]["broken_rows"] == ["sample 4 (somewhere)", "sample 5 (somewhere)"]
    # the step after it goes on from the weights before it
    assert memory.records[3]["loss"] == pytest.approx(0.64**2, rel=1e-5)
    assert "step 3 is skipped on all ranks: the loss is not finite in the rows of sample 4" in capsys.readouterr().err


def test_a_broken_loss_with_a_finite_gradient_is_refused_too() -> None:
    class Added(Targets):
        """The loss is infinite, but only by a number added to it: its gradient is finite."""

        def sums(self, predictions: Tensor, inputs: Any) -> dict[str, Tensor]:
            return {name: value + math.inf for name, value in super().sums(predictions, inputs).items()}

    memory, engine = Memory(), PlainEngine()
    run = trainer(Steps(), memory, steps=2, engine=engine)
    run.parts = replace(run.parts, objective=Added())
    run.run()
    assert [record["applied"] for record in memory.records] == [False, False]
    assert float(engine.module.weight.detach()) == 0.0


def test_ten_broken_steps_in_a_row_stop_the_run() -> None:
    memory = Memory()
    with pytest.raises(
        ConfigError, match="10 steps in a row, the last of them step 12, .*last checkpoint is of step 8"
    ):
        trainer(Steps(broken=tuple(range(3, 40))), memory, steps=40).run()
    assert [record["applied"] for record in memory.records] == [True] * 2 + [False] * MOST_BROKEN_STEPS


def test_nine_broken_steps_do_not_stop_it() -> None:
    memory = Memory()
    assert trainer(Steps(broken=tuple(range(3, 12))), memory, steps=14).run().step == 14


def test_a_step_without_a_valid_value_moves_nothing_and_is_not_broken() -> None:
    memory = Memory()
    trainer(Steps(empty=(2, 3)), memory).run()
    assert [record["applied"] for record in memory.records] == [True, False, False, True, True, True]
    assert all("broken_rows" not in record for record in memory.records)
    assert memory.records[3]["loss"] == pytest.approx(0.64, rel=1e-5)


def test_too_many_samples_passed_over_stop_the_run_with_a_summary() -> None:
    memory = Memory()
    summary = (
        "24 samples could not be read, more than the 20 of reading.most_passed_over .up to step 4.; on rank 0: "
        "20 x a.tar: the shard ends at 512; 4 x b.tar: No such file; .*the last checkpoint is of step 0"
    )
    with pytest.raises(DataError, match=summary):
        trainer(Steps(lost=6), memory).run()
    # the third step's record is written when the fourth agrees: every one of them is counted for the tracker
    counted = [(step_metrics(row)["passed_over"], step_metrics(row)["passed_over_so_far"]) for row in memory.records]
    assert counted == [(6.0, 6.0), (6.0, 12.0), (6.0, 18.0)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_finishes_the_step_and_saves(number: int) -> None:
    memory, requests = Memory(), Requests()
    with requests.listening():
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # it may come twice
        outcome = trainer(Steps(), memory, requests=requests).run()
    assert (outcome.step, outcome.stopped) == (1, True)
    assert memory.saves == [(1, 2)] and [record["loss"] for record in memory.records] == [1.0]


def test_sigusr2_saves_and_goes_on() -> None:
    memory, requests = Memory(), Requests()
    with requests.listening():
        os.kill(os.getpid(), signal.SIGUSR2)
        outcome = trainer(Steps(), memory, requests=requests).run()
    assert outcome.step == STEPS and memory.saves == [(1, 2), (4, 8), (6, 12)]


def test_a_worker_whose_launcher_is_gone_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCI_GPT_PARENT", str(os.getppid()))
    assert not Requests().stop
    monkeypatch.setenv("SCI_GPT_PARENT", "1" if os.getppid() != 1 else "2")
    assert Requests().stop


class ThreeRanks(OneProcess):
    """The other two ranks report what they are told to."""

    def __init__(self, others: list[list[float]]) -> None:
        self.others = others

    def gather(self, values: list[float]) -> list[list[float]]:
        return [values, *self.others]


def test_all_ranks_reports_are_summed_flags_are_any_and_the_wait_is_the_slowest() -> None:
    captured: list[list[float]] = []

    class Recorder(OneProcess):
        def gather(self, values: list[float]) -> list[list[float]]:
            captured.append(values)
            return [values]

    recorder: Any = Recorder()
    agree(recorder, Report(weight={"trace": 2.0}, passed_over=1, stop=True, wait_seconds=3.0, previous_broken=True))
    agree(recorder, Report(weight={"grid": 1.0}, previous_loss={"grid": 5.0}, wait_seconds=7.0))
    world: Any = ThreeRanks(captured)
    result = agree(world, Report(weight={"grid": 0.5, "trace": 1.0}, previous_loss={"grid": 2.0}, save=True))
    assert result.weight == {"grid": 1.5, "series": 0.0, "trace": 3.0}
    assert result.previous_loss == {"grid": 7.0, "series": 0.0, "trace": 0.0}
    assert (result.passed_over, result.stop, result.save, result.wait_seconds) == (1, True, True, 7.0)
    assert result.previous_broken == (1,)
    assert result.global_weight({"grid": 2.0, "series": 1.0, "trace": 0.5}) == 2.0 * 1.5 + 0.5 * 3.0


def test_masked_losses_are_agreed_on_under_their_own_names() -> None:
    """By hand, over two ranks; the masked objective of a modality has the modality's factor."""
    captured: list[list[float]] = []

    class Recorder(OneProcess):
        def gather(self, values: list[float]) -> list[list[float]]:
            captured.append(values)
            return [values]

    recorder: Any = Recorder()
    agree(recorder, Report(weight={"grid": 1.0, "trace/masked": 3.0}, previous_loss={"trace/masked": 6.0}))
    world: Any = ThreeRanks(captured)
    mine = Report(weight={"trace": 2.0, "trace/masked": 0.5}, previous_loss={"grid": 4.0, "trace/masked": 1.0})
    result = agree(world, mine)
    assert result.weight == {"grid": 1.0, "series": 0.0, "trace": 2.0, "trace/masked": 3.5}
    assert result.previous_loss == {"grid": 4.0, "series": 0.0, "trace": 0.0, "trace/masked": 7.0}
    assert result.global_weight({"grid": 2.0, "series": 1.0, "trace": 0.5}) == 2.0 * 1.0 + 0.5 * (2.0 + 3.5)


class BothObjectives(Targets):
    """The distance counted once as next-frame, and three times as masked, with a quarter of the weight."""

    def weights(self, inputs: Any) -> dict[str, float]:
        return {"series": inputs["weight"], "series/masked": 0.25 * inputs["weight"]}

    def sums(self, predictions: Tensor, inputs: Any) -> dict[str, Tensor]:
        whole = super().sums(predictions, inputs)["series"]
        return {"series": whole, "series/masked": 0.25 * 3.0 * whole}


def test_masked_losses_are_recorded_beside_the_others() -> None:
    """The first step, from weight 0 to target 1: each objective's mean, unweighted, and the mean of both."""
    memory = Memory()
    both = trainer(Steps(), memory, steps=1)
    both.parts = replace(both.parts, objective=BothObjectives())
    both.run()
    record = memory.records[0]
    assert record["losses"] == pytest.approx({"series": 1.0, "series/masked": 3.0})
    assert record["weights"] == pytest.approx({"grid": 0.0, "series": 4.0, "trace": 0.0, "series/masked": 1.0})
    assert record["loss"] == pytest.approx((4.0 * 1.0 + 1.0 * 3.0) / 5.0)
    assert {"loss/series", "loss/series/masked"} <= set(step_metrics(record))


class Unequal(OneProcess):
    """A world of two, whose other rank holds 28 of the series weight and had a loss sum of 6 in every step."""

    size = 2

    def gather(self, values: list[float]) -> list[list[float]]:
        other = [0.0] * len(values)
        other[1], other[4] = 28.0, 6.0  # series weight, series loss of the step before
        return [values, other]


def test_a_rank_divides_by_the_weight_of_all_ranks() -> None:
    engine: Any = PlainEngine()
    engine.world, engine.plan = Unequal(), ParallelPlan(data_parallel=2)
    losses: list[float] = []
    back = engine.backward

    def backward(loss: Tensor) -> None:
        losses.append(float(loss.detach()))
        back(loss)

    engine.backward = backward
    memory = Memory()
    trainer(Steps(), memory, steps=1, engine=engine).run()
    # own sum 4 (1 - 0)^2, factor 0.5; times 2 processes (DeepSpeed averages); over 0.5 x (4 + 28)
    assert losses == [pytest.approx(0.5 * 4.0 * 2 / (0.5 * 32.0))]
    # the logged loss is that of both ranks: (4 + 6) / 32, factors cancel with one modality
    assert memory.records[0]["loss"] == pytest.approx(10.0 / 32.0)


def test_a_resumed_run_eats_every_sample_once(tmp_path: Path) -> None:
    class OnDisk(Memory):
        def save(self, step: int, next_sample: int) -> None:
            super().save(step, next_sample)
            writer = CheckpointWriter(tmp_path, rank=0, size=1, session="s")
            state = {"identity": {"seed": 1}, "step": step, "next_sample": next_sample, "phase_starts": [0]}
            writer.save(step, Holding(tensors={}, fragments=[], parameters={}, adam_step=None), state=state)

    memory = OnDisk()
    assert where_to_go_on(tmp_path, {"seed": 1}) == NEW
    trainer(Steps(), memory, steps=4).run()
    start = where_to_go_on(tmp_path, {"seed": 1})
    trainer(Steps(), memory, start=start).run()
    assert memory.eaten == list(range(2 * STEPS))
    assert [record["step"] for record in memory.records] == [1, 2, 3, 4, 5, 6]
    assert [path.name for path in committed(tmp_path)] == ["step-00000004", "step-00000006"]
    with pytest.raises(CheckpointError, match="seed is 1 there and 2 here"):
        where_to_go_on(tmp_path, {"seed": 2})
