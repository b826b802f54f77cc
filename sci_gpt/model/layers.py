"""Layers of the trunk: RMSNorm, rotary positions, frame-causal attention over packed documents, SwiGLU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from sci_gpt.model.inputs import DocumentGroup, ModelInputs
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
    each with the patch row and column (Su et al. 2021, on three axes)."""

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
        angle = torch.cat(angles, dim=1)
        return cls(cos=angle.cos(), sin=angle.sin())

    def turn(self, x: Tensor) -> Tensor:
        """Rotate (T, heads, head_width)."""
        first, second = x.chunk(2, dim=-1)
        cos, sin = self.cos[:, None].to(x.dtype), self.sin[:, None].to(x.dtype)
        return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def frame_causal_mask(frames: int, slots: int, *, device: torch.device) -> Tensor:
    """Bool (frames * slots, frames * slots): True where the column's frame is not after the row's."""
    frame = torch.arange(frames, device=device).repeat_interleave(slots)
    return frame[:, None] >= frame[None, :]


def attend(q: Tensor, k: Tensor, *, v: Tensor, groups: tuple[DocumentGroup, ...]) -> Tensor:
    """Each document attends by itself, frame-causally; positions outside every document give 0.

    Args:
        q, k, v: (T, heads, head_width).
        groups: documents by shape; there is no T x T mask anywhere.

    Returns:
        (T, heads, head_width).
    """
    parts, places = [], []
    for group in groups:
        of_q, of_k, of_v = (rearrange(x[group.index], "d t h c -> d h t c") for x in (q, k, v))
        if group.slots == 1:
            mixed = F.scaled_dot_product_attention(of_q, of_k, of_v, is_causal=True)
        else:
            mask = frame_causal_mask(group.frames, group.slots, device=q.device)
            mixed = F.scaled_dot_product_attention(of_q, of_k, of_v, attn_mask=mask)
        parts.append(rearrange(mixed, "d h t c -> (d t) h c"))
        places.append(group.index.reshape(-1))
    if not parts:
        return torch.zeros_like(q) + 0.0 * (q + k + v)
    return torch.zeros_like(q).index_copy(0, torch.cat(places), torch.cat(parts))


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

    def forward(self, x: Tensor, *, rotary: Rotary, groups: tuple[DocumentGroup, ...]) -> Tensor:
        """(T, width) to (T, width)."""
        normed = self.attention_norm(x)
        q, k, v = (rearrange(f(normed), "t (h c) -> t h c", h=self.heads) for f in (self.query, self.key, self.value))
        q, k = rotary.turn(self.query_norm(q)), rotary.turn(self.key_norm(k))
        x = x + self.output(rearrange(attend(q, k, v=v, groups=groups), "t h c -> t (h c)"))
        normed = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))
