"""Layers of the trunk: RMSNorm, rotary positions, the block of attention and SwiGLU."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from sci_gpt.model.attention import Reach, attend, attend_last
from sci_gpt.model.inputs import ModelInputs
from sci_gpt.model.shapes import ModelShape

_EPSILON = 1e-6


def _step_by_step(x: Tensor) -> bool:
    """On a CPU and not compiled: every operation is a pass over memory of its own."""
    return x.is_cpu and not torch.compiler.is_compiling()


class _Norm(torch.autograd.Function):
    """RMSNorm on a CPU, which has no kernel of its own: a third less passes over the values than autograd makes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:  # signature of torch.autograd.Function
        """x / rms(x) * weight, over the last axis."""
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = torch.rsqrt(length * length / x.shape[-1] + _EPSILON)
        unit = x * scale
        ctx.save_for_backward(unit, scale, weight)
        return unit * weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of x and weight."""
        unit, scale, weight = ctx.saved_tensors
        product = gradient * unit
        along = (product @ weight)[..., None] / unit.shape[-1]
        of_x = torch.addcmul(gradient * weight, unit, along, value=-1.0).mul_(scale)
        return of_x, product.flatten(0, -2).sum(0)


class RMSNorm(nn.Module):
    """x / rms(x) * weight (Zhang & Sennrich 2019)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) to the same shape."""
        return self.normed(x, self.weight)

    @staticmethod
    def normed(x: Tensor, weight: Tensor) -> Tensor:
        """x (..., width) / rms(x) * weight (width)."""
        if _step_by_step(x) and x.dtype == weight.dtype == torch.float32:
            normed: Tensor = _Norm.apply(x, weight)
            return normed
        return F.rms_norm(x, (x.shape[-1],), weight, eps=_EPSILON)


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """The rotary angles of each token as complex numbers of length 1, (T, head_width / 2): half of the pairs turn with
    the frame, a quarter each with the patch row and column (Su et al. 2021, on three axes).

    Where a document goes around the globe the columns' frequencies are whole turns a period, so that only differences
    of columns around the globe count.
    """

    phase: Tensor

    @classmethod
    def of(cls, inputs: ModelInputs, head_width: int) -> Rotary:
        """Angles from the tokens' frame, row and column."""
        pairs = head_width // 2
        shares = (
            (inputs.frame, pairs // 2),
            (inputs.row, pairs // 4),
            (inputs.column, pairs - pairs // 2 - pairs // 4),
        )
        angles = []
        for position, count in shares:
            frequency = 1000.0 ** (-torch.arange(count, device=position.device, dtype=torch.float32) / count)
            angles.append(position[:, None].float() * frequency)
        for period in inputs.periods:
            turns = torch.tensor(whole_turns(period, angles[-1].shape[1]), device=inputs.column.device)
            around = (inputs.column[:, None] * turns % period).float() * (2 * math.pi / period)
            angles[-1] = torch.where((inputs.period == period)[:, None], around, angles[-1])
        angle = torch.cat(angles, dim=1)
        return cls(phase=torch.polar(torch.ones_like(angle), angle))

    def take(self, index: Tensor) -> Rotary:
        """The angles of those tokens."""
        return Rotary(phase=self.phase[index])

    def turn(self, x: Tensor) -> Tensor:
        """Rotate (T, heads, head_width), neighbouring channels as a pair.

        On a CPU in one pass of complex numbers, which a compiler does not fuse.
        """
        phase = self.phase[:, None]
        if _step_by_step(x):
            pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
            return torch.view_as_real(pairs * phase).flatten(-2).to(x.dtype)
        first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = phase.real.to(x.dtype), phase.imag.to(x.dtype)
        return torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1).flatten(-2)


def whole_turns(period: int, count: int) -> list[int]:
    """Turns around the globe of `count` rotary pairs, falling: the whole numbers nearest to the plain frequencies.

    From the slowest pair on each takes more turns than the one before, so that all differ; none takes more than half
    the period (beyond that waves repeat), where fewer differ if the period is short.
    """
    turns: list[int] = []
    for pair in reversed(range(count)):
        plain = round(1000.0 ** (-pair / count) * period / (2 * math.pi))
        most = max(1, period // 2 - pair)
        turns.insert(0, min(max(plain, turns[0] + 1 if turns else 1), most))
    return turns


class Held(Protocol):
    """Keys and values of earlier frames of a layer, see `cache.KeyValueCache`."""

    def mix(self, q: Tensor, k: Tensor, *, v: Tensor) -> Tensor | None:
        """Keep k and v; what q, of one more frame, attends to; None where k and v are the first (attend as usual)."""


class Mix(Protocol):
    """Attention of all tokens of a batch, as `attention.attend`."""

    def __call__(self, q: Tensor, k: Tensor, *, v: Tensor, reach: Reach, pieces: int = 1) -> Tensor:
        """(T, heads, head_width) of each to the same."""


class Block(nn.Module):
    """Pre-norm attention with normalised queries and keys, then SwiGLU (Shazeer 2020)."""

    def __init__(self, shape: ModelShape, *, noise: int = 0) -> None:
        super().__init__()
        self.heads = shape.heads
        self.mix: Mix = attend  # where tokens are divided among processes: what brings them together
        self.attention_norm = RMSNorm(shape.width)
        self.query = nn.Linear(shape.width, shape.width, bias=False)
        self.key = nn.Linear(shape.width, shape.width, bias=False)
        self.value = nn.Linear(shape.width, shape.width, bias=False)
        self.output = nn.Linear(shape.width, shape.width, bias=False)
        self.query_norm = RMSNorm(shape.head_width)
        self.key_norm = RMSNorm(shape.head_width)
        self.mlp_norm = RMSNorm(shape.width)
        self.gate = nn.Linear(shape.width, shape.hidden, bias=False)
        self.up = nn.Linear(shape.width, shape.hidden, bias=False)
        self.down = nn.Linear(shape.hidden, shape.width, bias=False)
        self.noise = nn.Linear(noise, 2 * shape.width, bias=False) if noise else None

    def forward(
        self,
        x: Tensor,
        *,
        rotary: Rotary,
        reach: Reach,
        asked: Tensor | None = None,
        pieces: int = 1,
        noise: Tensor | None = None,
        held: Held | None = None,
    ) -> Tensor:
        """(T, width) to (T, width); with `asked`, the positions of `ModelInputs.last_frames`, to theirs alone (A,
        width). `pieces` as in `attend`; `noise` (T, noise width) scales what the norms give by 1 + W z; `held` keeps
        keys and values of earlier frames (`cache.KeyValueCache`).
        """
        first, second = (
            (None, None) if noise is None or self.noise is None else (1.0 + self.noise(noise)).chunk(2, dim=-1)
        )
        normed = self.attention_norm(x) if first is None else self.attention_norm(x) * first
        asking = normed if asked is None else normed[asked]
        q, k, v = (
            rearrange(f(of), "t (h c) -> t h c", h=self.heads)
            for f, of in ((self.query, asking), (self.key, normed), (self.value, normed))
        )
        q_angles = rotary if asked is None else rotary.take(asked)
        q, k = q_angles.turn(self.query_norm(q)), rotary.turn(self.key_norm(k))
        if held is not None and (kept := held.mix(q, k, v=v)) is not None:
            mixed = kept
        elif asked is None:
            mixed = self.mix(q, k, v=v, reach=reach, pieces=pieces)
        else:
            mixed = attend_last(q, k, v=v, reach=reach)
        x = (x if asked is None else x[asked]) + self.output(rearrange(mixed, "t h c -> t (h c)"))
        normed = self.mlp_norm(x)
        if second is not None:
            normed = normed * (second if asked is None else second[asked])
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))
