"""Floating-point operations of a training step, exactly: each matrix product of the model, forward and backward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from sci_gpt.model.attention import Reach, cuts
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
        positions: of tokens, empty ones included: matrix products run over all.
        wide_pairs: queries x keys that a layer multiplies which sees all slots.
        near_pairs: the same of a layer that sees a neighbourhood.
        payloads: by modality.
    """

    positions: float
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
    context, pairs = model.context.project, wide * work.wide_pairs + (layers - wide) * work.near_pairs
    matrices = 4 * shape.width**2 + 3 * shape.width * shape.hidden
    found = {
        "context": 4.0 * work.positions * context.in_features * context.out_features,  # its input has no gradient
        "embed": 0.0,
        "trunk": 6.0 * work.positions * layers * matrices,
        "attention": (2 + 5) * 2.0 * pairs * shape.width,
        "heads": 0.0,
    }
    for modality, payload in work.payloads.items():
        embed = model.embed[modality].project
        found["embed"] += 4.0 * payload.rows * embed.in_features * embed.out_features
        found["heads"] += _head_flops(model, modality, work=payload)
    return found


def _head_flops(model: SciGPT, modality: str, *, work: PayloadWork) -> float:
    outer = model.heads[modality]
    head = outer.head
    question = 4.0 * work.units * head.question.project.in_features * head.question.project.out_features
    multiplied = head.hidden.in_features * head.hidden.out_features + head.out.in_features * head.out.out_features
    # what leans on memories and recent errors are products with what has no gradient
    leaning = outer.num_leaning * 4.0 * work.answers
    return question + 6.0 * work.answers * multiplied + leaning
