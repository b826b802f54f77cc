"""Layers of the trunk: RMSNorm, rotary positions, frame-causal attention over packed documents, SwiGLU."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

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

    def take(self, index: Tensor) -> Rotary:
        """The angles of those tokens."""
        return Rotary(cos=self.cos[index], sin=self.sin[index])

    def turn(self, x: Tensor) -> Tensor:
        """Rotate (T, heads, head_width)."""
        first, second = x.chunk(2, dim=-1)
        cos, sin = self.cos[:, None].to(x.dtype), self.sin[:, None].to(x.dtype)
        return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def frame_causal_mask(frames: int, slots: int, *, device: torch.device) -> Tensor:
    """Bool (frames * slots, frames * slots): True where the column's frame is not after the row's."""
    frame = torch.arange(frames, device=device).repeat_interleave(slots)
    return frame[:, None] >= frame[None, :]


def attend(q: Tensor, k: Tensor, *, v: Tensor, groups: tuple[DocumentGroup, ...], pieces: int = 1) -> Tensor:
    """Each document attends by itself, frame-causally; positions outside every document give 0.

    Args:
        q, k, v: (T, heads, head_width).
        groups: documents by shape; there is no T x T mask anywhere.
        pieces: stretches of frames that a document's queries are cut into, each of which meets no key after its own
            last frame: less work, more calls, the same to float rounding.

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
            ends = [group.frames * piece // pieces * group.slots for piece in range(pieces + 1)]
            mixes = [
                F.scaled_dot_product_attention(
                    of_q[:, :, start:end], of_k[:, :, :end], of_v[:, :, :end], attn_mask=mask[start:end, :end]
                )
                for start, end in pairwise(ends)
                if end > start
            ]
            mixed = torch.cat(mixes, dim=2) if len(mixes) > 1 else mixes[0]
        parts.append(rearrange(mixed, "d h t c -> (d t) h c"))
        places.append(group.index.reshape(-1))
    if not parts:
        return torch.zeros_like(q) + 0.0 * (q + k + v)
    return torch.zeros_like(q).index_copy(0, torch.cat(places), torch.cat(parts))


def attend_last(q: Tensor, k: Tensor, *, v: Tensor, groups: tuple[DocumentGroup, ...]) -> Tensor:
    """The last frame of each document attends to the whole document, which is all before it: no mask is needed.

    Args:
        q: (A, heads, head_width), of the tokens of `ModelInputs.last_frames`, in that order.
        k, v: (T, heads, head_width), of all tokens.
        groups: documents by shape.

    Returns:
        (A, heads, head_width), what `attend` gives for those tokens.
    """
    parts, first = [], 0
    for group in groups:
        of_k, of_v = (rearrange(x[group.index], "d t h c -> d h t c") for x in (k, v))
        count = len(group.index) * group.slots
        of_q = rearrange(q[first : first + count], "(d s) h c -> d h s c", s=group.slots)
        parts.append(rearrange(F.scaled_dot_product_attention(of_q, of_k, of_v), "d h s c -> (d s) h c"))
        first += count
    return torch.cat(parts) if parts else torch.zeros_like(q)


class Held(Protocol):
    """Keys and values of earlier frames of a layer, see `cache.KeyValueCache`."""

    def mix(self, q: Tensor, k: Tensor, *, v: Tensor) -> Tensor | None:
        """Keep k and v; what q, of one more frame, attends to; None where k and v are the first (attend as usual)."""


class Block(nn.Module):
    """Pre-norm attention with normalised queries and keys, then SwiGLU (Shazeer 2020)."""

    def __init__(self, shape: ModelShape, *, noise: int = 0) -> None:
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
        self.noise = nn.Linear(noise, 2 * shape.width, bias=False) if noise else None

    def forward(
        self,
        x: Tensor,
        *,
        rotary: Rotary,
        groups: tuple[DocumentGroup, ...],
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
            mixed = attend(q, k, v=v, groups=groups, pieces=pieces)
        else:
            mixed = attend_last(q, k, v=v, groups=groups)
        x = (x if asked is None else x[asked]) + self.output(rearrange(mixed, "t h c -> t (h c)"))
        normed = self.mlp_norm(x)
        if second is not None:
            normed = normed * (second if asked is None else second[asked])
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))
