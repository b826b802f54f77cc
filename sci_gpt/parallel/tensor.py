"""Tensor parallelism: each process keeps some attention heads and MLP columns of every block (Shoeybi et al. 2019)."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from sci_gpt.model.layers import Block, RMSNorm
from sci_gpt.model.transformer import SciGPT
from sci_gpt.parallel.groups import Groups

_ROWS = ("query", "key", "value", "gate", "up")  # weights divided along outputs: each process has some heads, columns
_COLUMNS = ("output", "down")  # divided along inputs: each process has a part of every sum


class TensorSlice(NamedTuple):
    """What of a parameter this process holds: `width` entries from `offset` along `dim`, of a whole of `shape`."""

    dim: int
    offset: int
    width: int
    shape: tuple[int, ...]


def slice_of(parameter: Tensor) -> TensorSlice | None:
    """The slice that a divided parameter is, None for a whole one."""
    return getattr(parameter, "tensor_slice", None)


def divide(model: SciGPT, groups: Groups) -> None:
    """Cut every block of a model; parameters keep their names. On the meta device nothing is copied.

    Per layer and micro-batch four sums over the group: two forward (what attention and MLP give), two backward (the
    gradients of what goes into them). The weights that every process has whole, but uses for its own heads alone (norms
    of queries and keys) or before them (noise), have their gradients summed too; they are small.

    Raises:
        ConfigError: heads or columns that the plan does not divide.
    """
    if groups.tensor is None:
        return
    groups.plan.check_model(model.shape)
    for block in cast("list[Block]", list(model.blocks)):
        for name in _ROWS:
            _shrink(getattr(block, name), groups, dim=0)
        for name in _COLUMNS:
            setattr(block, name, SummedLinear(_shrink(getattr(block, name), groups, dim=1), groups.tensor))
        block.heads //= groups.plan.tensor_parallel
        for norm in (block.attention_norm, block.mlp_norm):
            norm.register_forward_hook(_Entering(groups.tensor))
        block.query_norm = SharedNorm(block.query_norm, groups.tensor)
        block.key_norm = SharedNorm(block.key_norm, groups.tensor)
        if block.noise is not None:
            setattr(block, "noise", SharedLinear(block.noise, groups.tensor))  # noqa: B010  another class by design


class SummedLinear(nn.Module):
    """A linear layer of which each process has some inputs: the partial results are summed over the group."""

    def __init__(self, linear: nn.Linear, group: Any) -> None:
        super().__init__()
        self.weight, self.group = linear.weight, group

    def forward(self, x: Tensor) -> Tensor:
        """(..., own inputs) to (..., outputs), the same on every process."""
        summed: Tensor = _Sum.apply(F.linear(x, self.weight), self.group)
        return summed


class SharedLinear(nn.Module):
    """A linear layer that every process has whole and uses for its own share: the weight's gradients are summed."""

    def __init__(self, linear: nn.Linear, group: Any) -> None:
        super().__init__()
        self.weight, self.group = linear.weight, group

    def forward(self, x: Tensor) -> Tensor:
        """As `nn.Linear` without bias."""
        return F.linear(x, _copy(self.weight, self.group))


class SharedNorm(RMSNorm):
    """An RMSNorm that every process has whole and uses for its own heads: the weight's gradients are summed."""

    def __init__(self, norm: RMSNorm, group: Any) -> None:
        nn.Module.__init__(self)
        self.weight, self.group = norm.weight, group

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) to the same shape."""
        return self.normed(x, _copy(self.weight, self.group))


class _Entering:
    """A forward hook of what comes before divided layers: their gradients of it are summed."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:  # signature of torch's hooks
        return _copy(output, self.group)


class _Copy(torch.autograd.Function):
    """The same tensor on every process; the gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:  # signature of torch.autograd.Function
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        summed = gradient.contiguous().clone()
        dist.all_reduce(summed, group=ctx.group)
        return summed, None


class _Sum(torch.autograd.Function):
    """The sum of the processes' tensors; each gets the whole gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:  # signature of torch.autograd.Function
        summed = x.contiguous().clone()  # selective checkpointing keeps x, which may not change
        dist.all_reduce(summed, group=group)
        return summed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _copy(x: Tensor, group: Any) -> Tensor:
    copied: Tensor = _Copy.apply(x, group)
    return copied


def _shrink(linear: nn.Linear, groups: Groups, *, dim: int) -> nn.Linear:
    """Keep this process's part of a weight along `dim`, and mark it: DeepSpeed counts a parameter without the mark once
    per group in the gradient's norm, and that is what parameters that all have whole must have."""
    whole = linear.weight
    width = whole.shape[dim] // groups.plan.tensor_parallel
    offset = groups.position.tensor * width
    part = nn.Parameter(whole.detach().narrow(dim, offset, width).clone(), requires_grad=whole.requires_grad)
    mark(part, TensorSlice(dim=dim, offset=offset, width=width, shape=tuple(whole.shape)))
    linear.weight = part
    return linear


def mark(parameter: nn.Parameter, tensor_slice: TensorSlice) -> None:
    """Say what a parameter is a slice of, to this package and to DeepSpeed."""
    marked: Any = parameter
    marked.tensor_slice, marked.tensor_model_parallel = tensor_slice, True
