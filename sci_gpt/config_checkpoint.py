"""The part of the configuration tree that says when a run saves itself, and which checkpoints stay."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from sci_gpt.config_model import Node


class CheckpointConfig(Node):
    """Save every `every` steps; keep the last `keep`, those at multiples of `keep_every` steps (null: none), and the
    `keep_best` with the lowest validation loss (docs/checkpoints.md says which number that is).

    asynchronous: training goes on while a copy in memory (12 bytes per parameter, over all processes) is written.
    """

    every: int = Field(ge=1)
    keep: int = Field(default=2, ge=1)
    keep_every: int | None = Field(default=None, ge=1)
    keep_best: int = Field(default=0, ge=0)
    asynchronous: bool = True

    @model_validator(mode="after")
    def _saves_what_it_keeps(self) -> Self:
        if self.keep_every is not None and self.keep_every % self.every:
            raise ValueError(
                f"keep_every is a multiple of every, got {self.keep_every} and {self.every}: no checkpoint is saved at "
                "the steps between"
            )
        return self
