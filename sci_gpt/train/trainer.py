"""Trainer: the loop over steps. It is handed its parts and builds none of them."""

from __future__ import annotations

import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sci_gpt.errors import ConfigError, DataError
from sci_gpt.parallel.engine import Engine, StepOutcome
from sci_gpt.train.agreement import Agreement, Report, agree
from sci_gpt.train.feed import StepRows
from sci_gpt.train.schedule import Schedule
from sci_gpt.train.signals import Requests
from sci_gpt.train.spikes import Spikes
from sci_gpt.train.watchdog import Unwatched

MOST_BROKEN_STEPS = 10
_CAUSES = 5  # named when a run stops

Scores = dict[str, dict[str, float]]


class Objective(Protocol):
    """From a batch to its loss (train/objective.py)."""

    def inputs(self, batch: Any) -> Any:
        """The batch on the device."""

    def weights(self, inputs: Any) -> dict[str, float]:
        """Valid weight per modality, known before the forward pass."""

    def sums(self, predictions: Any, inputs: Any) -> dict[str, Tensor]:
        """Sum of loss x weight per modality."""


class Feed(Protocol):
    """From t and n(t) to this rank's rows (train/feed.py)."""

    def get(self, step: int, n: int) -> tuple[StepRows, float]:
        """The step that follows `step` completed ones and starts at sample n, and the seconds waited for it."""

    def close(self) -> None:
        """End its thread."""


class Watch(Protocol):
    """Who looks whether the run still moves (train/watchdog.py)."""

    def at(self, phase: str, *, step: int, keys: Sequence[str] = (), micro: int = 0) -> None:
        """This rank begins a phase of the step that it works on."""


class Journal(Protocol):
    """Where a run's records go (train/journal.py)."""

    def consumed(self, step: int, rows: StepRows) -> None:
        """This rank's samples of a step (a rank-local record)."""

    def step(self, record: dict[str, Any]) -> None:
        """A completed step: the same record on every rank."""

    def validation(self, step: int, scores: Scores) -> None:
        """Scores of the validation split after a step."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What the trainer works with.

    Attributes:
        engine, feed, objective, journal: see their classes.
        save: (completed steps, next sample) -> None writes a checkpoint, or begins to; called by every rank.
        validate: model -> {modality: {"loss", "skill"}}; called by every rank.
        requests: signals.
        name: of a sample number, for messages.
        check: called after every step; raises what a save that was begun has failed of.
        watch: who looks whether the run still moves.
        spikes: the losses before `step`, for what counts as a spike.
    """

    engine: Engine
    feed: Feed
    objective: Objective
    journal: Journal
    save: Callable[[int, int], None]
    validate: Callable[[nn.Module], Scores]
    requests: Requests
    name: Callable[[int], str]
    check: Callable[[], None] = lambda: None
    watch: Watch = field(default_factory=Unwatched)
    spikes: Spikes = field(default_factory=Spikes)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the run decides.

    Attributes:
        schedule: steps and learning rate.
        factor: of each modality in the loss.
        checkpoint_every, validate_every: steps between them.
        most_passed_over: samples that may be unreadable, over all ranks since the start, before the run stops.
    """

    schedule: Schedule
    factor: dict[str, float]
    checkpoint_every: int
    validate_every: int
    most_passed_over: int


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How far the run came: completed steps, n(t) after them, and whether it was asked to stop before the end."""

    step: int
    next_sample: int
    stopped: bool


@dataclass(frozen=True, kw_only=True)
class _Pending:
    """A step whose loss, and seconds in which it waited for no other, the other ranks do not know yet."""

    rows: StepRows
    agreement: Agreement
    sums: dict[str, float]
    outcome: StepOutcome
    record: dict[str, Any]
    alone: float


class Trainer:
    """Runs steps until the schedule ends or a signal comes.

    Args:
        parts, settings: see their classes.
        step, next_sample: where to go on: completed steps and n(t), of the checkpoint that the engine holds.
    """

    def __init__(self, parts: Parts, settings: Settings, *, step: int = 0, next_sample: int = 0) -> None:
        self.parts, self.settings = parts, settings
        self.step, self.next_sample = step, next_sample
        self._pending: _Pending | None = None
        # Of the processes that see the same rows one speaks for all.
        self._leads = parts.engine.plan.is_lead(parts.engine.world.rank)
        self._alone = 0.0  # seconds of the step in progress in which this rank waited for no other
        self._broken_in_a_row = 0
        self._saved_step = step
        self._passed_over = 0
        self._causes: Counter[str] = Counter()

    def run(self) -> Outcome:
        """Train; a checkpoint of the last completed step is saved, or being saved, when this returns.

        Raises:
            ConfigError: ten steps in a row had a loss or gradient that was not finite.
            DataError: more samples could not be read than `most_passed_over`.
            CheckpointError: a checkpoint could not be written.
        """
        settings, stopped = self.settings, False
        while self.step < settings.schedule.steps and not stopped:
            agreement = self._train_step()
            self.parts.check()
            last = self.step == settings.schedule.steps
            stopped = agreement.stop and not last
            validate = last or self.step % settings.validate_every == 0
            save = last or stopped or agreement.save or self.step % settings.checkpoint_every == 0
            if validate or save or self._broken_in_a_row >= MOST_BROKEN_STEPS:
                self._settle()
            if self._broken_in_a_row >= MOST_BROKEN_STEPS:
                raise ConfigError(self._too_many_broken())
            if validate:
                self._at("validation")
                with self.parts.engine.precision():
                    scores = self.parts.validate(self.parts.engine.module)
                self.parts.journal.validation(self.step, scores)
            if save:
                self._at("saving")
                self.parts.save(self.step, self.next_sample)
                self._saved_step = self.step
        self.parts.feed.close()
        return Outcome(step=self.step, next_sample=self.next_sample, stopped=stopped)

    def _train_step(self) -> Agreement:
        begun = time.monotonic()
        self._at("reading the rows")
        rows, waited = self.parts.feed.get(self.step, self.next_sample)
        inputs = [self.parts.objective.inputs(batch) for batch in rows.batches]
        self._alone = time.monotonic() - begun
        self._at("agreeing on the step", rows.keys)
        agreement = agree(self.parts.engine.world, self._report(rows, inputs, waited=waited))
        self._complete(agreement)
        self._passed_over += agreement.passed_over
        self._causes.update(rows.causes)
        if self._passed_over > self.settings.most_passed_over:
            raise DataError(self._too_many_passed_over())
        rate = self.settings.schedule.learning_rate(self.step)
        sums, outcome = self._optimize(inputs, agreement, rate=rate, keys=rows.keys)
        self.step += 1
        self.next_sample = rows.next_sample
        self._broken_in_a_row = 0 if outcome.applied or self._weightless(agreement) else self._broken_in_a_row + 1
        if self._leads:
            self.parts.journal.consumed(self.step, rows)
        record = {
            "step": self.step,
            "next_sample": self.next_sample,
            "tokens": rows.num_tokens,
            "passed_over": agreement.passed_over,
            "passed_over_so_far": self._passed_over,
            "learning_rate": rate,
            "gradient_norm": outcome.gradient_norm if math.isfinite(outcome.gradient_norm) else None,
            "applied": outcome.applied,
            "wait_seconds": agreement.wait_seconds,
            "seconds": time.monotonic() - begun,
        }
        self._pending = _Pending(
            rows=rows, agreement=agreement, sums=sums, outcome=outcome, record=record, alone=self._alone
        )
        return agreement

    def _report(self, rows: StepRows, inputs: list[Any], *, waited: float) -> Report:
        weight: dict[str, float] = {}
        for one in inputs:
            for modality, value in self.parts.objective.weights(one).items():
                weight[modality] = weight.get(modality, 0.0) + value
        return Report(
            weight=weight if self._leads else {},
            passed_over=rows.passed_over if self._leads else 0,
            stop=self.parts.requests.stop,
            save=self.parts.requests.take_save(),
            wait_seconds=waited,
            previous_loss=self._previous_loss(),
            previous_broken=self._previous_broken(),
            previous_alone=self._pending.alone if self._pending else 0.0,
        )

    def _at(self, phase: str, keys: Sequence[str] = (), *, micro: int = 0) -> None:
        working = phase not in ("validation", "saving")  # these two follow a step that is completed
        self.parts.watch.at(phase, step=self.step + working, keys=keys, micro=micro)

    def _optimize(
        self, inputs: list[Any], agreement: Agreement, *, rate: float, keys: Sequence[str]
    ) -> tuple[dict[str, float], StepOutcome]:
        """Forward, backward and update; loss sums of this rank per modality.

        A rank back-propagates its weighted sum x data_parallel x accumulation / global weight; DeepSpeed divides
        by both: the gradient is that of (weighted sum over all ranks) / (weight over all ranks) at every layout.
        """
        engine, factor = self.parts.engine, self.settings.factor
        if self._weightless(agreement):  # nothing valid on any rank; all of them see that, so none waits for another
            return {}, StepOutcome(applied=False, gradient_norm=0.0)
        engine.set_learning_rate(rate)
        scale = engine.plan.loss_multiplier / agreement.global_weight(factor)
        totals: dict[str, float] = {}
        outcome = StepOutcome(applied=False, gradient_norm=math.nan)
        for micro, one in enumerate(inputs, start=1):
            self._at("forward pass", keys, micro=micro)
            begun = time.monotonic()
            sums = self.parts.objective.sums(engine(one), one)
            local = {modality: float(value.detach()) for modality, value in sums.items()}
            self._alone += time.monotonic() - begun
            self._at("backward pass and update", keys, micro=micro)
            for modality, value in local.items():
                totals[modality] = totals.get(modality, 0.0) + value
            loss = torch.stack([factor[name.split("/")[0]] * value for name, value in sums.items()]).sum() * scale
            if not all(math.isfinite(value) for value in local.values()):
                loss = loss * math.nan  # a broken loss may have a finite gradient: make all ranks see it in the norm
            engine.backward(loss)
            outcome = engine.step()
        return totals, outcome

    def _weightless(self, agreement: Agreement) -> bool:
        return agreement.global_weight(self.settings.factor) <= 0.0

    def _previous_broken(self) -> bool:
        return self._pending is not None and not all(math.isfinite(v) for v in self._pending.sums.values())

    def _previous_loss(self) -> dict[str, float]:
        return self._pending.sums if self._leads and self._pending and not self._previous_broken() else {}

    def _settle(self) -> None:
        """Exchange the last step's loss now, for whoever needs the record before the next step (a collective)."""
        if self._pending is not None:
            report = Report(
                previous_loss=self._previous_loss(),
                previous_broken=self._previous_broken(),
                previous_alone=self._pending.alone,
            )
            self._complete(agree(self.parts.engine.world, report))

    def _complete(self, agreement: Agreement) -> None:
        """The previous step's loss is known: write its record."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        weight, factor = pending.agreement.weight, self.settings.factor
        broken = bool(agreement.previous_broken) or not (pending.outcome.applied or self._weightless(pending.agreement))
        record = dict(pending.record)
        whole = pending.agreement.global_weight(factor)
        finite = whole > 0 and not agreement.previous_broken
        losses = agreement.previous_loss
        record["loss"] = sum(factor[m.split("/")[0]] * losses[m] for m in losses) / whole if finite else None
        record["losses"] = {m: losses[m] / weight[m] for m in losses if weight.get(m, 0.0) > 0} if finite else {}
        record["weights"] = weight
        record["step_seconds"] = seconds_of_ranks(agreement.previous_alone)
        if broken:
            ranks = agreement.previous_broken or range(self.parts.engine.plan.world_size)
            record["broken_rows"] = names = self._names(pending.rows, ranks)
            what = "loss" if agreement.previous_broken else "gradient"
            self._warn(f"step {record['step']} is skipped on all ranks: the {what} is not finite in the rows of", names)
        limit = self.parts.spikes.add(record["loss"])
        if limit is not None:
            brought = [sum(factor[m.split("/")[0]] * share[m] for m in share) for share in agreement.previous_share]
            most = brought.index(max(brought))
            names = self._names(pending.rows, (most,))
            record["spike"] = {"limit": limit, "rank": most, "share": brought[most] / sum(brought), "rows": names}
            self._warn(
                f"step {record['step']}: the loss {record['loss']:.4g} is a spike, above {limit:.4g}; most of it, "
                f"{100 * brought[most] / sum(brought):.0f} %, is of rank {most}, in the rows of",
                names,
            )
        self.parts.journal.step(record)

    def _names(self, rows: StepRows, ranks: Sequence[int]) -> list[str]:
        """Of the rows of ranks; those of one tensor or sequence group have the same."""
        places = sorted({self.parts.engine.plan.position(rank).data for rank in ranks})
        return [self.parts.name(n) for place in places for n in rows.dealt[place]]

    def _warn(self, message: str, names: Sequence[str]) -> None:
        """Once for the whole run, not by every rank."""
        if self.parts.engine.world.rank == 0:
            rows = f"{', '.join(names[:8])}{' ...' if len(names) > 8 else ''}"
            print(f"warning: {message} {rows}", file=sys.stderr, flush=True)

    def _too_many_passed_over(self) -> str:
        """How many, where and why, the most frequent causes on this rank first."""
        known = [f"{count} x {cause}" for cause, count in self._causes.most_common(_CAUSES)]
        more = len(self._causes) - _CAUSES
        known += [f"{more} more causes"] if more > 0 else []
        return (
            f"{self._passed_over} samples could not be read, more than the {self.settings.most_passed_over} of "
            f"reading.most_passed_over (up to step {self.step + 1}); on rank {self.parts.engine.world.rank}: "
            f"{'; '.join(known) or 'none, the other ranks name theirs'}; mend the files or build the store again, or "
            f"raise the limit; the last checkpoint is of step {self._saved_step}"
        )

    def _too_many_broken(self) -> str:
        return (
            f"{MOST_BROKEN_STEPS} steps in a row, the last of them step {self.step}, had a loss or gradient that is "
            "not finite; lower optimizer.learning_rate, or look at the rows named above; the last checkpoint is of "
            f"step {self._saved_step}"
        )


def seconds_of_ranks(alone: Sequence[float]) -> dict[str, float]:
    """A step's seconds over the ranks: {"min", "mean", "max", "slowest"}, the last a rank.

    A whole step lasts equally long everywhere, because each rank waits for the others in its backward pass. Counted is
    therefore what a rank does by itself: waiting for its rows, bringing them to the device, the forward pass. (Where
    ranks meet inside the forward pass, as at ZeRO 3, part of a slow rank's excess shows on the others, too.)
    """
    slowest = max(range(len(alone)), key=lambda rank: alone[rank])
    return {"min": min(alone), "mean": sum(alone) / len(alone), "max": alone[slowest], "slowest": slowest}
