"""Layers of the trunk: RMSNorm, rotary positions, the block of attention and SwiGLU."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from sci_gpt.model.attention import Reach, attend, attend_last
from sci_gpt.model.inputs import ModelInputs
from sci_gpt.model.shapes import ModelShape


class RMSNorm(nn.Module):
    """x / rms(x) * weight (Zhang & Sennrich 2019)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) to the same shape."""
        return F.rms_norm(x, (x.shape[-1],), self.weight, eps=1e-6)


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """cos and sin of the rotary angles of each token, (T, head_width / 2): half of the pairs turn with the frame, a
    quarter
    each with the patch row and column (Su et al. 2021, on three axes). Where a document goes around the globe the
    columns' frequencies are whole turns a period, so that only differences of columns around the globe count."""

    cos: Tensor
    sin: Tensor

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
        return cls(cos=angle.cos(), sin=angle.sin())

    def take(self, index: Tensor) -> Rotary:
        """The angles of those tokens."""
        return Rotary(cos=self.cos[index], sin=self.sin[index])

    def turn(self, x: Tensor) -> Tensor:
        """Rotate (T, heads, head_width)."""
        first, second = x.chunk(2, dim=-1)
        cos, sin = self.cos[:, None].to(x.dtype), self.sin[:, None].to(x.dtype)
        return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


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


class Block(nn.Module):
    """Pre-norm attention with normalised queries and keys, then SwiGLU (Shazeer 2020)."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.heads = shape.heads
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

    def forward(
        self,
        x: Tensor,
        *,
        rotary: Rotary,
        reach: Reach,
        asked: Tensor | None = None,
        pieces: int = 1,
    ) -> Tensor:
        """(T, width) to (T, width); with `asked`, the positions of `ModelInputs.last_frames`, to theirs alone (A,
        width). `pieces` as in `attend`.
        """
        normed = self.attention_norm(x)
        asking = normed if asked is None else normed[asked]
        q, k, v = (
            rearrange(f(of), "t (h c) -> t h c", h=self.heads)
            for f, of in ((self.query, asking), (self.key, normed), (self.value, normed))
        )
        q_angles = rotary if asked is None else rotary.take(asked)
        q, k = q_angles.turn(self.query_norm(q)), rotary.turn(self.key_norm(k))
        if asked is None:
            mixed = attend(q, k, v=v, reach=reach, pieces=pieces)
        else:
            mixed = attend_last(q, k, v=v, reach=reach)
        x = (x if asked is None else x[asked]) + self.output(rearrange(mixed, "t h c -> t (h c)"))
        normed = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))
