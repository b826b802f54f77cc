"""Configurations of studies, many trainings each: a sweep over sizes and token budgets, and a transfer to new data."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from sci_gpt.config import Node, Where


def _refuse_twice(what: str, values: tuple[object, ...]) -> None:
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"{what} {value!r} stands {values.count(value)} times; each stands once")


class SizeConfig(Node):
    """One model of a sweep: a row of sci_gpt/model/shapes.py and its learning rate (left out: the pretraining's)."""

    size: str
    learning_rate: float | None = Field(default=None, gt=0)


class SweepConfig(Node):
    """`sci-gpt sweep`: every size trained on every token budget, with every seed.

    pretrain: the run that the points are derived from; it has one phase. Only size, learning rate, steps, schedule
    (its shares of warm-up and cooldown are kept), seed and the folders differ.
    tokens: budgets, positions of all modalities together; a budget is rounded to whole steps.
    validation_windows: per source, scored once at a point's end.
    title: of the figures; say there what a small sweep is not.
    """

    name: str
    output: Path
    pretrain: Path
    sizes: tuple[SizeConfig, ...] = Field(min_length=1)
    tokens: tuple[int, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    validation_windows: int = Field(ge=1)
    title: str
    overrides: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _named_once(self) -> Self:
        _refuse_twice("size", tuple(size.size for size in self.sizes))
        _refuse_twice("tokens", self.tokens)
        _refuse_twice("seed", self.seeds)
        if min(self.tokens) < 1 or min(self.seeds) < 0:
            raise ValueError(f"tokens are positive and seeds 0 or more, got {list(self.tokens)}, {list(self.seeds)}")
        return self


class TransferTask(Node):
    """One source that the pretraining has not seen, in windows; its training split gives the examples.

    max_steps, rows_per_step: of every adaptation, the same for both arms.
    """

    source: str
    max_steps: int = Field(ge=1)
    rows_per_step: int = Field(default=8, ge=1)
    frames: int = Field(ge=2)
    context_frames: tuple[int, int]
    leads: tuple[int, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        low, high = self.context_frames
        if not 1 <= low <= high < self.frames or high + max(self.leads) > self.frames:
            raise ValueError(
                f"source {self.source!r}: context_frames {list(self.context_frames)} and the lead {max(self.leads)} do "
                f"not fit in {self.frames} frames"
            )
        if list(self.leads) != sorted(set(self.leads)) or self.leads[0] < 1:
            raise ValueError(f"source {self.source!r}: leads are ascending and positive, got {list(self.leads)}")
        return self


class TransferConfig(Node):
    """`sci-gpt transfer`: a pretrained model and one from scratch, adapted to the same few examples.

    pretrain: the configuration of the pretraining; its run is trained if it is not there.
    data: the store that holds the tasks' sources.
    examples: how many windows of the training split each arm gets, at most.
    valid_share: of the examples, set aside to choose the learning rate and to stop early; never of the test split.
    learning_rates: each arm chooses its own among these.
    patience, validate_every: of early stopping, the same for both arms.
    test_windows: at most so many windows of the test split are scored.
    """

    name: str
    output: Path
    pretrain: Path
    data: Where
    tasks: tuple[TransferTask, ...] = Field(min_length=1)
    examples: tuple[int, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = Field(min_length=1)
    learning_rates: tuple[float, ...] = Field(min_length=1)
    valid_share: float = Field(default=0.25, gt=0, lt=1)
    patience: int = Field(default=3, ge=1)
    validate_every: int = Field(default=10, ge=1)
    test_windows: int = Field(default=64, ge=1)
    bootstrap: int = Field(default=1000, ge=100)
    interval: float = Field(default=0.9, gt=0, lt=1)
    threads: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _named_once(self) -> Self:
        _refuse_twice("task", tuple(task.source for task in self.tasks))
        _refuse_twice("examples", self.examples)
        _refuse_twice("seed", self.seeds)
        _refuse_twice("learning rate", self.learning_rates)
        if min(self.examples) < 4 or list(self.examples) != sorted(self.examples):
            raise ValueError(f"examples are ascending, 4 or more (some validate), got {list(self.examples)}")
        if min(self.learning_rates) <= 0 or min(self.seeds) < 0:
            raise ValueError(
                f"learning_rates are positive and seeds 0 or more, got {list(self.learning_rates)}, {list(self.seeds)}"
            )
        return self
