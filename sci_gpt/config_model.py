"""Parts of the configuration tree: what decides a model, when a run saves, and how it is watched."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Node(BaseModel):
    """A part of the tree: frozen, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class WatchConfig(Node):
    """A run in which nothing moves for `hang_seconds` says where every process stands, and ends; a step, a validation
    or a save must not take as long."""

    hang_seconds: float = Field(default=300.0, gt=0)


class TokenizerConfig(Node):
    """Sizes of tokens: grid patch side, samples per trace frame, ids and limit of the series quantizer (its bounds)."""

    grid_patch: int = Field(default=8, ge=1)
    trace_samples: int = Field(default=5, ge=1)
    series_ids: int = Field(default=4096, ge=8, le=2**18)
    series_limit: float = Field(default=15.0, ge=1e-30, le=1e19)


class AttentionConfig(Node):
    """Tokens of a grid see `radius` patches (null: all) in rows and columns, in every `global_every`-th layer all."""

    radius: int | None = Field(default=None, ge=0)
    global_every: int = Field(default=2, ge=2)


class NoiseConfig(Node):
    """Noise for coherent samples (docs/model.md). width 0: none, the model predicts marginals; members: in training;
    pooled_weight: of the CRPS of pooled values in the loss."""

    width: int = Field(default=0, ge=0)
    members: int = Field(default=2, ge=2)
    pooled_weight: float = Field(default=1.0, ge=0)


class ModelConfig(Node):
    """Shape of the transformer (`size` names a row of sci_gpt/model/shapes.py), its series head, attention and noise.

    id_table: an id of a series has an embedding of its own beside that of its value.
    width_rule: mup scales hidden learning rates and outputs by base_width / width, so that a rate tuned there holds.
    """

    size: str
    mixture_components: int = Field(default=3, ge=1)
    id_table: bool = True
    attention: AttentionConfig = AttentionConfig()
    width_rule: Literal["standard", "mup"] = "standard"
    base_width: int = Field(default=128, ge=8)
    noise: NoiseConfig = NoiseConfig()


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
