"""Sequence parallelism: the trunk's tokens are divided, and in attention its heads (Ulysses, Jacobs et al. 2023)."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from sci_gpt.model.attention import Reach, attend
from sci_gpt.model.layers import Block
from sci_gpt.model.transformer import SciGPT
from sci_gpt.parallel.groups import Groups


def divide(model: SciGPT, groups: Groups) -> None:
    """Give each process of a sequence group its share of the tokens between embeddings and heads.

    Embeddings and heads see all tokens of the rows on every process. Each then computes the whole loss and propagates
    one part in `sequence_parallel` of it (`ParallelPlan.loss_multiplier`), so that sums over the group are right for
    the ends and, with the gradient that `_Gather` gives, for the trunk.

    Raises:
        ConfigError: heads that the plan does not divide.
    """
    if groups.sequence is None:
        return
    groups.plan.check_model(model.shape)
    tokens = Tokens(groups.sequence, rank=groups.position.sequence, size=groups.plan.sequence_parallel)
    model.scatter, model.gather = tokens.scatter, tokens.gather
    mix = Ulysses(groups.sequence, size=groups.plan.sequence_parallel)
    for block in cast("list[Block]", list(model.blocks)):
        block.mix = mix


class Tokens:
    """Tokens of a batch, all of them or those of this process: equal runs, the last padded with zeros."""

    def __init__(self, group: Any, *, rank: int, size: int) -> None:
        self.group, self.rank, self.size = group, rank, size

    def scatter(self, x: Tensor) -> Tensor:
        """(T, ...) to this process's (ceil(T / size), ...); a token's gradient is there on its own process alone."""
        share = -(-len(x) // self.size)
        own = x[self.rank * share : (self.rank + 1) * share]
        missing = share - len(own)
        return torch.cat([own, own.new_zeros(missing, *own.shape[1:])]) if missing else own

    def gather(self, x: Tensor) -> Tensor:
        """(ceil(T / size), ...) to all processes' tokens, the padding at the end."""
        whole: Tensor = _Gather.apply(x, self.group, self.rank, self.size)
        return whole


class Ulysses:
    """Attention of divided tokens: each process has some heads of all tokens for its length."""

    def __init__(self, group: Any, *, size: int) -> None:
        self.group, self.size = group, size

    def __call__(self, q: Tensor, k: Tensor, *, v: Tensor, reach: Reach, pieces: int = 1) -> Tensor:
        """As `attention.attend`, with (T / size, heads, head_width) of this process's tokens."""
        together = torch.stack([q.to(v.dtype), k.to(v.dtype), v])
        parted = rearrange(together, "k t (s h) c -> s k t h c", s=self.size)
        whole = rearrange(_swap(parted, self.group), "s k t h c -> k (s t) h c")
        count = reach.num_tokens
        mixed = attend(whole[0, :count], whole[1, :count], v=whole[2, :count], reach=reach, pieces=pieces)
        mixed = F.pad(mixed, (0, 0, 0, 0, 0, whole.shape[1] - count))
        back = _swap(rearrange(mixed, "(s t) h c -> s t h c", s=self.size), self.group)
        return rearrange(back, "s t h c -> t (s h) c")


def _swap(x: Tensor, group: Any) -> Tensor:
    """Part s of the first axis goes to process s of the group, whose part it takes in exchange."""
    swapped: Tensor = _Swap.apply(x, group)
    return swapped


class _Swap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:  # signature of torch.autograd.Function
        ctx.group = group
        return _exchange(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _exchange(gradient, ctx.group), None


def _exchange(x: Tensor, group: Any) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x, group=group)
    return out


class _Gather(torch.autograd.Function):
    """All tokens from each process's; the gradient of its own is `size` times its part of theirs, which are equal."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: Any, rank: int, size: int
    ) -> Tensor:  # signature of torch.autograd.Function
        ctx.rank, ctx.size = rank, size
        x = x.contiguous()
        whole = x.new_empty(size * len(x), *x.shape[1:])
        dist.all_gather_into_tensor(whole, x, group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return gradient.chunk(ctx.size)[ctx.rank] * ctx.size, None, None, None
