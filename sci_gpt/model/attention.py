"""Attention over packed documents: the one place that chooses a kernel by device; no mask of row x row anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from sci_gpt.model.flex import FlexReach, attend_flex
from sci_gpt.model.inputs import DocumentGroup, ModelInputs
from sci_gpt.model.tiles import Tiles, tiles_of

MASK_ENTRIES = 2**24  # no mask of queries x keys is larger


def has_kernel(device: torch.device) -> bool:
    """Whether FlexAttention is compiled to a kernel there, with a backward pass."""
    return device.type == "cuda"


@dataclass(frozen=True, kw_only=True)
class NearGroup:
    """Documents of one shape whose slots lie alike: they attend tile by tile."""

    group: DocumentGroup
    tiles: Tiles


@dataclass(frozen=True, kw_only=True)
class Reach:
    """What the tokens of a batch see in a layer: made once per batch, used by every layer that reaches as far.

    Attributes:
        groups: documents whose tokens see all slots of their frames.
        near: documents whose tokens see a neighbourhood.
        last_frames: of `ModelInputs`.
        flex: the block mask, on a device that has FlexAttention's kernel; None: each document attends by itself.
    """

    groups: tuple[DocumentGroup, ...]
    near: tuple[NearGroup, ...]
    last_frames: Tensor
    flex: FlexReach | None

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return sum(group.index.numel() for group in (*self.groups, *(near.group for near in self.near)))

    @classmethod
    def of(cls, inputs: ModelInputs, *, radius: int | None = None) -> Reach:
        """The reach of a layer.

        Args:
            inputs: the batch.
            radius: farthest patch that is seen, in rows and in columns (around the globe where the document goes
                around); None: all. Documents that lie within it (series and traces always do) see everything.
        """
        flex = FlexReach.of(inputs, radius=radius) if has_kernel(inputs.frame.device) else None
        groups, near = (inputs.groups, ()) if radius is None else _part(inputs, radius)
        return cls(groups=groups, near=near, last_frames=inputs.last_frames, flex=flex)


def _part(inputs: ModelInputs, radius: int) -> tuple[tuple[DocumentGroup, ...], tuple[NearGroup, ...]]:
    """Documents that lie within the radius, and the others by where their slots lie."""
    wide, near = [], []
    for group in inputs.groups:
        alike: dict[Tiles | None, list[int]] = {}
        first = group.index[:, : group.slots]
        rows, columns, periods = (x[first].cpu().numpy() for x in (inputs.row, inputs.column, inputs.period))
        for document, (row, column, period) in enumerate(zip(rows, columns, periods[:, 0].tolist(), strict=True)):
            alike.setdefault(tiles_of(row, column, period=period, radius=radius), []).append(document)
        for tiles, documents in alike.items():
            part = group.take(documents)
            if tiles is None:
                wide.append(part)
            else:
                near.append(NearGroup(group=part, tiles=tiles))
    return tuple(wide), tuple(near)


def frame_causal_mask(first: int, stop: int, *, slots: int, device: torch.device) -> Tensor:
    """Bool ((stop - first) * slots, stop * slots): queries are frames `first` to `stop`, keys all frames before `stop`;
    True where the column's frame is not after the row's.
    """
    frame = torch.arange(stop, device=device).repeat_interleave(slots)
    return frame[first * slots :, None] >= frame[None, :]


def cuts(frames: int, slots: int, *, pieces: int = 1) -> list[int]:
    """Frames at which a causal document's queries are cut: in `pieces`, or in more where a mask would be larger than
    MASK_ENTRIES; a piece of one frame needs none.
    """
    pieces = min(pieces, frames)
    while True:
        ends = [frames * piece // pieces for piece in range(pieces + 1)]
        entries = [(stop - first) * stop * slots**2 for first, stop in pairwise(ends) if stop - first > 1]
        if max(entries, default=0) <= MASK_ENTRIES:
            return ends
        pieces = min(2 * pieces, frames)


def attend(q: Tensor, k: Tensor, *, v: Tensor, reach: Reach, pieces: int = 1) -> Tensor:
    """Each token attends to its own document up to its own frame, as far as `reach` goes; positions outside every
    document give 0.

    Args:
        q, k, v: (T, heads, head_width).
        reach: of this layer.
        pieces: stretches of frames that a document's queries are cut into, each of which meets no key after its own
            last frame: less work, more calls, the same to float rounding.

    Returns:
        (T, heads, head_width).
    """
    if reach.flex is not None:
        return attend_flex(q, k, v=v, reach=reach.flex)
    parts, places = [], []
    for group, of_q, of_k, of_v in _by_document(reach.groups, q, k, v):
        mixed = _attend_wide(of_q, of_k, v=of_v, group=group, pieces=pieces)
        parts.append(rearrange(mixed, "d h t c -> (d t) h c"))
        places.append(group.index.reshape(-1))
    if parts and _laid_out(reach.groups) and not reach.near:
        return torch.cat(parts)
    for near in reach.near:
        parts.append(rearrange(_attend_near(q, k, v=v, near=near), "d f s h c -> (d f s) h c"))
        places.append(near.group.index.reshape(-1))
    if not parts:
        return torch.zeros_like(q) + 0.0 * (q + k + v)
    return torch.zeros_like(q).index_copy(0, torch.cat(places), torch.cat(parts))


def attend_last(q: Tensor, k: Tensor, *, v: Tensor, reach: Reach) -> Tensor:
    """The last frame of each document attends to the whole document, which is all before it: no mask is needed.

    Args:
        q: (A, heads, head_width), of the tokens of `ModelInputs.last_frames`, in that order.
        k, v: (T, heads, head_width), of all tokens.
        reach: of this layer.

    Returns:
        (A, heads, head_width), what `attend` gives for those tokens.
    """
    if reach.near or reach.flex is not None:
        return _attend_last_in_place(q, k, v=v, reach=reach)
    counts = [len(group.index) * group.slots for group in reach.groups]
    parts = []
    for asking, (group, of_k, of_v) in zip(q.split(counts), _by_document(reach.groups, k, v), strict=True):
        of_q = rearrange(asking, "(d s) h c -> d h s c", s=group.slots)
        parts.append(rearrange(F.scaled_dot_product_attention(of_q, of_k, of_v), "d h s c -> (d s) h c"))
    return torch.cat(parts) if parts else torch.zeros_like(q)


def _laid_out(groups: tuple[DocumentGroup, ...]) -> bool:
    return all(group.side_by_side for group in groups)


def _by_document(groups: tuple[DocumentGroup, ...], *tensors: Tensor) -> Iterator[tuple[Any, ...]]:
    """Each group with its part (d, h, t, c) of each tensor (T, h, c): a view where the documents are laid out."""
    if _laid_out(groups):
        cut = [x.split([group.index.numel() for group in groups]) for x in tensors if groups]
        owns = [[rearrange(x, "(d t) h c -> d h t c", d=len(g.index)) for x, g in zip(c, groups)] for c in cut]
        yield from zip(groups, *owns, strict=True)
    else:
        for group in groups:
            yield group, *(rearrange(x[group.index], "d t h c -> d h t c") for x in tensors)


def _attend_last_in_place(q: Tensor, k: Tensor, *, v: Tensor, reach: Reach) -> Tensor:
    """As `attend_last` where documents see a neighbourhood or the kernel takes the whole batch."""
    whole = torch.zeros_like(k).index_copy(0, reach.last_frames, q)
    if reach.flex is not None:
        return attend_flex(whole, k, v=v, reach=reach.flex)[reach.last_frames]
    out = torch.zeros_like(k)
    for group in reach.groups:
        last = group.index[:, -group.slots :]
        of_q, of_k, of_v = (rearrange(x, "d t h c -> d h t c") for x in (whole[last], k[group.index], v[group.index]))
        mixed = rearrange(F.scaled_dot_product_attention(of_q, of_k, of_v), "d h s c -> (d s) h c")
        out = out.index_copy(0, last.reshape(-1), mixed)
    for near in reach.near:
        mixed = _attend_near(whole, k, v=v, near=near, last_only=True)
        last = near.group.index[:, -near.group.slots :]
        out = out.index_copy(0, last.reshape(-1), rearrange(mixed, "d f s h c -> (d f s) h c"))
    return out[reach.last_frames]


def _attend_wide(q: Tensor, k: Tensor, *, v: Tensor, group: DocumentGroup, pieces: int) -> Tensor:
    """All slots of the frames up to a token's own; all are (documents, heads, frames * slots, head_width)."""
    if not group.causal:
        return F.scaled_dot_product_attention(q, k, v)
    if group.slots == 1:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    mixes = []
    for first, stop in pairwise(cuts(group.frames, group.slots, pieces=pieces)):
        several = stop - first > 1
        mask = frame_causal_mask(first, stop, slots=group.slots, device=q.device) if several else None
        start, end = first * group.slots, stop * group.slots
        mixes.append(F.scaled_dot_product_attention(q[:, :, start:end], k[:, :, :end], v[:, :, :end], attn_mask=mask))
    return torch.cat(mixes, dim=2) if len(mixes) > 1 else mixes[0]


def _attend_near(q: Tensor, k: Tensor, *, v: Tensor, near: NearGroup, last_only: bool = False) -> Tensor:
    """A neighbourhood in the frames up to a token's own: tiles of queries gather the keys around them.

    Returns:
        (documents, frames, slots, heads, head_width); with `last_only` of the last frame alone.
    """
    group, tiles = near.group, near.tiles
    index = rearrange(group.index, "d (f s) -> d f s", s=group.slots)
    frames = range(group.frames - 1 if last_only else 0, group.frames)
    chunks = [
        _attend_tiles(q, k, v=v, index=index, frames=frames, tiles=part, causal=group.causal) for part in _chunks(near)
    ]
    whole = torch.cat(chunks, dim=2)  # d f n a h c
    return rearrange(whole, "d f n a h c -> d f (n a) h c")[:, :, tiles.place.to(q.device)]


def _chunks(near: NearGroup) -> Iterator[Tiles]:
    """So many tiles at once that their mask has at most MASK_ENTRIES, or one."""
    entries = near.tiles.mask[0].numel() * near.group.frames * len(near.group.index)
    step = max(1, MASK_ENTRIES // entries)
    for start in range(0, len(near.tiles.mask), step):
        yield near.tiles.part(start, start + step)


def _attend_tiles(
    q: Tensor, k: Tensor, *, v: Tensor, index: Tensor, frames: range, tiles: Tiles, causal: bool
) -> Tensor:
    """Some tiles of queries and the keys around them, frame by frame: (documents, frames, tiles, a, heads, c).

    Args:
        q, k, v: of all tokens.
        index: (documents, frames, slots), their positions.
        frames: that ask.
        tiles: n tiles of a queries and b keys each.
        causal: a frame sees none after it.
    """
    documents = len(index)
    queries, keys = tiles.queries.to(q.device), tiles.keys.to(q.device)
    of_k, of_v = (rearrange(x[index[:, :, keys]], "d f n b h c -> (d n) h (f b) c") for x in (k, v))
    mask = repeat(tiles.mask.to(q.device), "n a b -> (d n) 1 a (f b)", d=documents, f=index.shape[1])
    mixes = []
    for frame in frames:
        end = (frame + 1) * keys.shape[1] if causal else of_k.shape[2]
        of_q = rearrange(q[index[:, frame, queries]], "d n a h c -> (d n) h a c")
        mixed = F.scaled_dot_product_attention(of_q, of_k[:, :, :end], of_v[:, :, :end], attn_mask=mask[..., :end])
        mixes.append(rearrange(mixed, "(d n) h a c -> d n a h c", d=documents))
    return torch.stack(mixes, dim=1)
