"""Floating-point operations of a training step, exactly: each matrix product of the model, forward and backward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

from torch import nn

from sci_gpt.model.attention import Reach, cuts
from sci_gpt.model.embed import PayloadEmbedding
from sci_gpt.model.heads import GaussianHead, Head, MixtureHead
from sci_gpt.model.inputs import ModelInputs
from sci_gpt.model.tiles import Tiles
from sci_gpt.model.transformer import SciGPT


@dataclass(frozen=True, kw_only=True)
class PayloadWork:
    """What a modality's own parts work through.

    Attributes:
        rows: tokens x variables of the embedding.
        units: asked units.
        answers: units x variables.
    """

    rows: float
    units: float
    answers: float


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a batch (or, in the mean, a document) gives the model to do.

    Attributes:
        positions: of tokens, empty ones included: the context is embedded at all.
        tokens: positions in a document: the trunk runs over these.
        wide_pairs: queries x keys that a layer multiplies which sees all slots.
        near_pairs: the same of a layer that sees a neighbourhood.
        payloads: by modality.
    """

    positions: float
    tokens: float
    wide_pairs: float
    near_pairs: float
    payloads: Mapping[str, PayloadWork]


def document_pairs(frames: int, slots: int, *, causal: bool = True, tiles: Tiles | None = None) -> int:
    """Queries x keys that attention on a CPU multiplies for one document, masked ones included.

    A causal document is counted whole where one mask covers it: the kernel computes the masked half too. Where it is
    cut into pieces of frames (`attention.cuts`), each piece meets the frames up to its last.

    Args:
        frames, slots: of the document.
        causal: a token sees no later frame.
        tiles: of a layer that sees a neighbourhood; None: all slots.
    """
    if tiles is not None:
        near = tiles.mask.numel()
        return near * (frames * (frames + 1) // 2 if causal else frames**2)
    if slots == 1 or not causal:
        return (frames * slots) ** 2
    return slots**2 * sum((stop - first) * stop for first, stop in pairwise(cuts(frames, slots)))


def work_of(inputs: ModelInputs, *, radius: int | None = None) -> Work:
    """The work of a batch, for a model whose local layers see `radius` patches (None: there are none)."""
    wide = sum(
        len(group.index) * document_pairs(group.frames, group.slots, causal=group.causal) for group in inputs.groups
    )
    reach = Reach.of(inputs, radius=radius)
    near = [(part.group, part.tiles) for part in reach.near] + [(group, None) for group in reach.groups]
    return Work(
        positions=len(inputs.frame),
        tokens=sum(group.index.numel() for group in inputs.groups),
        wide_pairs=wide,
        near_pairs=sum(
            len(group.index) * document_pairs(group.frames, group.slots, causal=group.causal, tiles=tiles)
            for group, tiles in near
        ),
        payloads={
            modality: PayloadWork(
                rows=payload.variable.numel(),
                units=len(payload.unit_token),
                answers=len(payload.unit_token) * payload.variable.shape[1],
            )
            for modality, payload in inputs.payloads.items()
        },
    )


def training_flops(model: SciGPT, work: Work) -> dict[str, float]:
    """FLOPs of a forward and a backward pass by part: context, embed, trunk, attention, heads.

    A product of (n, a) and (a, b) is 2 n a b; its backward pass takes as much for the weight and, where the input has a
    gradient, as much again. Attention takes 2 products of pairs x width forward and 5 backward (the scores are computed
    again), the masked pairs included: that is what `torch.utils.flop_counter` counts of the same kernels. Norms,
    rotations, activations and the loss are not counted, nor what activation checkpointing computes again.

    Args:
        model: it may be on the meta device.
        work: of a batch, or the mean of a document.
    """
    shape, layers = model.shape, len(model.blocks)
    wide = sum(number % model.settings.global_every == 0 for number in range(1, layers + 1))
    wide = layers if model.settings.radius is None else wide
    pairs = wide * work.wide_pairs + (layers - wide) * work.near_pairs
    matrices = 4 * shape.width**2 + 3 * shape.width * shape.hidden
    found = {
        "context": work.positions * _fed(model.context.project),
        "embed": 0.0,
        "trunk": 6.0 * work.tokens * layers * matrices,
        "attention": (2 + 5) * 2.0 * pairs * shape.width,
        "heads": 0.0,
    }
    for modality, payload in work.payloads.items():
        embed = cast(PayloadEmbedding, model.embed[modality])
        found["embed"] += payload.rows * (_fed(embed.project) + _of_levels(embed))
        found["heads"] += _head_flops(model, modality, work=payload)
    return found


def _head_flops(model: SciGPT, modality: str, *, work: PayloadWork) -> float:
    outer = cast("GaussianHead | MixtureHead", model.heads[modality])
    head = outer.head
    question = work.units * _fed(head.question.project)
    multiplied = head.hidden.in_features * head.hidden.out_features + head.out.in_features * head.out.out_features
    # what leans on memories and recent errors are products with what has no gradient
    leaning = outer.num_leaning * 4.0 * work.answers
    return question + work.answers * (6.0 * multiplied + _of_levels(head)) + leaning


def _fed(linear: nn.Linear) -> float:
    """For each row of a product whose input has no gradient."""
    return 4.0 * linear.in_features * linear.out_features


def _of_levels(module: PayloadEmbedding | Head) -> float:
    """For each variable of a token."""
    return 0.0 if module.level is None else _fed(module.level.project)
