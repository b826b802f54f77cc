"""FlexAttention over a whole packed batch: block masks from document, frame and place, one kernel for all documents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from sci_gpt.model.inputs import ModelInputs

BLOCK = 128  # tokens along a side of a block, FlexAttention's own
_TILE = (8, 16)  # patch rows and columns: a block's worth of neighbours
_NEVER = 2**31 - 1  # a frame after all


@dataclass(frozen=True, kw_only=True)
class FlexReach:
    """What the tokens of a batch see, as FlexAttention takes it; made once per batch.

    Attributes:
        order: int64 (T,), token positions document by document, frame by frame, in tiles where a radius is given.
        document: int64 (N,), in that order, -1 outside every document; N is T filled up to whole blocks.
        frame: int64 (N,).
        until: int64 (N,), last frame that the token sees.
        mask: the blocks and the rule within them.
    """

    order: Tensor
    document: Tensor
    frame: Tensor
    until: Tensor
    mask: BlockMask

    @classmethod
    def of(cls, inputs: ModelInputs, *, radius: int | None = None) -> FlexReach:
        """See `attention.Reach.of`."""
        document, causal = _documents(inputs)
        keys = [inputs.row, inputs.column]
        if radius is not None:
            keys += [inputs.column // _TILE[1], inputs.row // _TILE[0]]
        order = _lexsort([*keys, inputs.frame, document])
        fill = -len(order) % BLOCK
        document = F.pad(document[order], (0, fill), value=-1)
        row, column, period, frame = (
            F.pad(x[order], (0, fill)) for x in (inputs.row, inputs.column, inputs.period, inputs.frame)
        )
        until = torch.where(F.pad(causal[order], (0, fill)), frame, _NEVER)
        place = (row, column, period) if radius is not None else None
        rule = _rule(document, frame, until=until, place=place, radius=radius or 0)
        live, full = _blocks(document, frame, until=until, place=place, radius=radius or 0)
        return cls(order=order, document=document, frame=frame, until=until, mask=_block_mask(live, full, rule=rule))


def attend_flex(q: Tensor, k: Tensor, *, v: Tensor, reach: FlexReach) -> Tensor:
    """As `attention.attend`, in one kernel.

    A value that is no number is set to 0 before the kernel, where a masked neighbour would else meet it as 0 x NaN; the
    tokens of its own document that may see it get NaN: those of its frame and later ones, at any radius.

    Args:
        q, k, v: (T, heads, head_width); the kernel computes in v's dtype (autocast leaves normed q and k in float32).
        reach: of this layer.

    Returns:
        (T, heads, head_width) in q's dtype, 0 outside every document.
    """
    fill = len(reach.document) - len(reach.order)
    lost = ~(torch.isfinite(q) & torch.isfinite(k) & torch.isfinite(v)).flatten(1).all(dim=1)[reach.order]
    lost = F.pad(lost, (0, fill))
    of_q, of_k, of_v = (
        rearrange(F.pad(_clean(x.to(v.dtype))[reach.order], (0, 0, 0, 0, 0, fill)), "t h c -> 1 h t c").contiguous()
        for x in (q, k, v)
    )
    kernel: Any = _compiled() if q.is_cuda else flex_attention
    mixed: Tensor = kernel(of_q, of_k, of_v, block_mask=reach.mask)
    mixed = rearrange(mixed, "1 h t c -> t h c")
    inside = reach.document >= 0
    mixed = torch.where(inside[:, None, None], mixed, 0.0)
    number = reach.document + 1
    first_lost = torch.full_like(number, _NEVER).scatter_reduce(
        0, number, torch.where(lost, reach.frame, _NEVER), "amin"
    )
    poisoned = inside & (first_lost[number] <= reach.until) & (first_lost[number] < _NEVER)
    mixed = torch.where(poisoned[:, None, None], torch.nan, mixed)[: len(reach.order)]
    return torch.zeros_like(q).index_copy(0, reach.order, mixed.to(q.dtype))


def _clean(x: Tensor) -> Tensor:
    return torch.where(torch.isfinite(x), x, 0.0)


@cache
def _compiled() -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(flex_attention)
    return compiled


def _documents(inputs: ModelInputs) -> tuple[Tensor, Tensor]:
    """Number of each token's document, -1 outside, and whether it is causal, (T,) each."""
    document = torch.full_like(inputs.frame, -1)
    causal = torch.ones_like(inputs.frame, dtype=torch.bool)
    first = 0
    for group in inputs.groups:
        numbers = torch.arange(first, first + len(group.index), device=document.device)
        document[group.index] = numbers[:, None]
        causal[group.index] = group.causal
        first += len(group.index)
    return document, causal


def _lexsort(keys: list[Tensor]) -> Tensor:
    """Order by the last key, then the one before, and so on."""
    order = torch.arange(len(keys[0]), device=keys[0].device)
    for key in keys:
        order = order[torch.argsort(key[order], stable=True)]
    return order


def _rule(
    document: Tensor, frame: Tensor, *, until: Tensor, place: tuple[Tensor, ...] | None, radius: int
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """FlexAttention's mask_mod. A position outside every document sees itself, so that no row is empty."""

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:  # signature of mask_mod
        same = (document[query] == document[key]) & (document[query] >= 0)
        return (same & (until[query] >= frame[key])) | (query == key)

    if place is None:
        return seen
    row, column, period = place

    def near(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:  # signature of mask_mod
        between = (column[query] - column[key]).abs()
        around = torch.where(period[query] > 0, torch.minimum(between, period[query] - between), between)
        close = ((row[query] - row[key]).abs() <= radius) & (around <= radius)
        return seen(batch, head, query, key) & close

    return near


def _blocks(
    document: Tensor, frame: Tensor, *, until: Tensor, place: tuple[Tensor, ...] | None, radius: int
) -> tuple[Tensor, Tensor]:
    """Which blocks of queries (rows) and keys (columns) hold a pair that is seen (perhaps), and which hold no other.

    From the least and greatest document, frame and place of each block alone: (N / BLOCK)^2 comparisons.
    """
    low, high = _span(torch.where(document < 0, _NEVER, document))[0], _span(document)[1]
    frame_low, frame_high = _span(frame)
    until_low, until_high = _span(until)
    live = (low[:, None] <= high) & (low <= high[:, None]) & (until_high[:, None] >= frame_low)
    one = _span(document)[0] == high  # of one document, or outside all
    full = one[:, None] & one & (high[:, None] == high) & (high >= 0) & (until_low[:, None] >= frame_high)
    if place is not None:
        row, column, period = place
        row_low, row_high = _span(row)
        column_low, column_high = _span(column)
        gap = _gap(row_low, row_high, shift=torch.zeros_like(row_low)[:, None])
        turn = torch.where(one, _span(period)[1], 0)[:, None]
        across = torch.stack([_gap(column_low, column_high, shift=turn * times) for times in (-1, 0, 1)]).amin(dim=0)
        live &= (gap <= radius) & (across <= radius)
        wide = torch.maximum(row_high[:, None] - row_low, row_high - row_low[:, None])
        long = torch.maximum(column_high[:, None] - column_low, column_high - column_low[:, None])
        full &= (wide <= radius) & (long <= radius)
    return live | torch.eye(len(live), dtype=torch.bool, device=live.device), full


def _span(x: Tensor) -> tuple[Tensor, Tensor]:
    blocks = x.view(-1, BLOCK)
    return blocks.amin(dim=1), blocks.amax(dim=1)


def _gap(low: Tensor, high: Tensor, *, shift: Tensor) -> Tensor:
    """Distance between each two intervals [low, high], the second moved by `shift`; 0 where they meet."""
    return torch.maximum(low[:, None] - high - shift, low + shift - high[:, None]).clamp(min=0)


def _block_mask(live: Tensor, full: Tensor, *, rule: Callable[..., Tensor]) -> BlockMask:
    partial = live & ~full

    def listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
        first = torch.argsort(blocks.int(), dim=1, descending=True, stable=True)
        return blocks.sum(dim=1, dtype=torch.int32)[None, None], first.int()[None, None]

    count, index = listed(partial)
    full_count, full_index = listed(full & live)
    return BlockMask.from_kv_blocks(count, index, full_count, full_index, BLOCK_SIZE=BLOCK, mask_mod=rule)
