"""Engine: one model under DeepSpeed with torch's AdamW: forward, backward, a step that may be refused."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from sci_gpt.parallel.groups import Groups
from sci_gpt.parallel.plan import ParallelPlan
from sci_gpt.parallel.world import World

_LINEAR = nn.functional.linear  # torch's own


@dataclass(frozen=True, kw_only=True)
class AdamWSettings:
    """AdamW with decoupled weight decay on matrices only; `clip` is the largest global gradient norm."""

    learning_rate: float
    betas: tuple[float, float]
    epsilon: float
    weight_decay: float
    clip: float


@dataclass(frozen=True, kw_only=True)
class StepOutcome:
    """What an optimizer step did: `applied` is False where the gradient was not finite on some rank (same on all)."""

    applied: bool
    gradient_norm: float


class Engine:
    """A model cut as the plan says. The model itself is single-device code and does not know it.

    Owns the optimizer. Private names of DeepSpeed stand in this file, weights.py and train/fragments.py only.

    Args:
        model: single-device code.
        plan: how it is cut.
        optimizer: of every parameter.
        world: the processes.
        rate_factors: by parameter name, what its learning rate is multiplied by; 1 where not named.
        groups: of the plan, with which the model was cut (`weights.place`); None: nothing is cut but by ZeRO.

    Raises:
        ValueError: a parameter without dimensions, a factor of one that is not there, or a plan with tensor or
            sequence axes without its groups.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        plan: ParallelPlan,
        optimizer: AdamWSettings,
        world: World,
        rate_factors: Mapping[str, float] = MappingProxyType({}),
        groups: Groups | None = None,
    ) -> None:
        # Imported here, after World.start has chosen DeepSpeed's accelerator.
        import deepspeed

        plan.check(world.size)
        self.plan, self.world, self.groups, self._clip = plan, world, groups, optimizer.clip
        if groups is None and plan.data_parallel != plan.world_size:
            raise ValueError("a plan with tensor or sequence axes needs the groups with which the model was cut")
        for name, parameter in model.named_parameters():
            if parameter.dim() == 0:
                raise ValueError(f"parameter {name!r} has no dimension, which DeepSpeed cannot cut: give it shape (1,)")
        adam = torch.optim.AdamW(
            _groups(model, optimizer, rate_factors=rate_factors),
            lr=optimizer.learning_rate,
            betas=optimizer.betas,
            eps=optimizer.epsilon,
        )
        config = plan.deepspeed_config(clip=optimizer.clip)
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        # DeepSpeed's bf16 optimizer prints its memory on stdout, where progress lines are.
        with contextlib.redirect_stdout(sys.stderr):
            self.deepspeed: Any = deepspeed.initialize(
                model=model,
                config=config,
                optimizer=adam,
                dist_init_required=False,
                mpu=None if groups is None else groups.mpu,
            )[0]
        self.adam = adam
        for name, buffer in self.module.named_buffers():  # bf16 has rounded them: frequencies of places and times
            buffer.data = buffers[name].to(world.device)

    @property
    def module(self) -> nn.Module:
        """The model itself (whole weights in it only below ZeRO 3)."""
        module: nn.Module = self.deepspeed.module
        return module

    def __call__(self, *arguments: Any) -> Any:
        """The model's forward pass."""
        with self.precision():
            return self.deepspeed(*arguments)

    def precision(self) -> AbstractContextManager[None]:
        """For a forward pass: matrix products in bf16 where the plan says so; inputs and sums stay fp32."""
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.plan.dtype == "bf16")

    def backward(self, loss: Tensor) -> None:
        """Back-propagate one micro-batch's loss, already multiplied by `plan.loss_multiplier` / global weight."""
        self.deepspeed.backward(loss)

    def step(self) -> StepOutcome:
        """End a micro-batch; on the last one of the step clip and update, unless the gradient is not finite.

        The norm is that of the reduced gradient, so every rank sees the same one and takes or refuses the step alike.
        """
        if self.plan.zero_stage == 0:
            return self._step_undivided()
        self.deepspeed.step()
        norm = self.deepspeed.get_global_grad_norm()
        applied = bool(self.deepspeed.was_step_applied())
        return StepOutcome(applied=applied, gradient_norm=float("nan") if norm is None else float(norm))

    def set_learning_rate(self, value: float) -> None:
        """The rate of the next step, for every group, times the group's factor."""
        for group in self.adam.param_groups:
            group["lr"] = value * group["rate_factor"]

    def close(self) -> None:
        """Drop DeepSpeed's hooks and buffers, and what it would leave to later models of this process: the mpu, and at
        ZeRO 3 a linear function of its own, whose bf16 gradients are rounded otherwise.
        """
        # Imported here as in the constructor.
        from deepspeed.utils import groups

        self.deepspeed.destroy()
        groups.mpu = None
        nn.functional.linear = _LINEAR

    def _step_undivided(self) -> StepOutcome:
        norm = float("nan")
        if boundary := self.deepspeed.is_gradient_accumulation_boundary():
            parameters = [parameter for parameter in self.module.parameters() if parameter.grad is not None]
            norm = float(nn.utils.clip_grad_norm_(parameters, self._clip))
            if norm != norm or norm == float("inf"):
                for parameter in parameters:
                    parameter.grad = None  # AdamW passes over parameters without a gradient
        self.deepspeed.step()
        return StepOutcome(applied=bool(boundary) and norm < float("inf"), gradient_norm=norm)


def _groups(model: nn.Module, optimizer: AdamWSettings, *, rate_factors: Mapping[str, float]) -> list[dict[str, Any]]:
    """What is trained by (weight decay, factor of the rate): matrices first, then vectors, which are not decayed."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if unknown := sorted(set(rate_factors) - set(trained)):
        raise ValueError(f"rate_factors names {unknown[0]!r}, which the model does not train")
    groups: dict[tuple[bool, float], dict[str, Any]] = {}
    for matrix in (True, False):
        for name, parameter in trained.items():
            shape = getattr(parameter, "ds_shape", parameter.shape)  # what ZeRO 3 divided has no shape left
            if (len(shape) > 1) is matrix:
                factor = rate_factors.get(name, 1.0)
                decay = optimizer.weight_decay if matrix else 0.0
                fresh = {
                    "params": [],
                    "weight_decay": decay,
                    "rate_factor": factor,
                    "lr": factor * optimizer.learning_rate,
                }
                groups.setdefault((matrix, factor), fresh)["params"].append(parameter)
    return list(groups.values())
