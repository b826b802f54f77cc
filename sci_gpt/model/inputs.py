"""Model inputs: a packed batch as tensors, with the attention groups that its documents form."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sci_tokenizers.packing import Batch


@dataclass(frozen=True, kw_only=True)
class PayloadInputs:
    """The tensors of `sci_tokenizers.packing.Payload`, same names and shapes."""

    index: Tensor
    values: Tensor
    valid: Tensor
    last: Tensor
    memory: Tensor
    volatility: Tensor
    weight: Tensor
    ids: Tensor
    variable: Tensor
    log_scale: Tensor
    log_level: Tensor
    pile: Tensor
    unit_token: Tensor
    unit_target: Tensor
    unit_anchor: Tensor
    unit_spread: Tensor
    unit_lower: Tensor
    unit_lead: Tensor
    unit_weight: Tensor
    question: Tensor
    hidden_values: Tensor
    hidden_valid: Tensor
    hidden_weight: Tensor

    def targets(self) -> tuple[Tensor, Tensor]:
        """Answers of the units (U, V, K), scaled, and the weight of each value, 0 where it is not valid."""
        values, valid, weight = self.values, self.valid, self.weight
        if len(self.hidden_values):
            values = torch.cat([values, self.hidden_values])
            valid = torch.cat([valid, self.hidden_valid])
            weight = torch.cat([weight, self.hidden_weight])
        return values[self.unit_target], weight[self.unit_target] * valid[self.unit_target]


@dataclass(frozen=True, kw_only=True)
class DocumentGroup:
    """Documents of one shape: token positions (documents, frames * slots) in the flat batch, and that shape.

    `causal`: a token sees no frame after its own; else it sees all frames of its document. `side_by_side`: the groups
    of the batch follow each other, and so do the documents of each, with nothing between them.
    """

    index: Tensor
    frames: int
    slots: int
    causal: bool = True
    side_by_side: bool = False

    def take(self, documents: list[int]) -> DocumentGroup:
        """Some of the documents."""
        return replace(self, index=self.index[documents], side_by_side=False)


@dataclass(frozen=True, kw_only=True)
class NoiseSettings:
    """How a trunk is conditioned on noise.

    Attributes:
        width: numbers of the noise of a document, frame and member that the trunk takes, and as many others that the
            head takes; 0: the model predicts marginals and has no parameters for noise.
        members: samples per document in training, at least 2.
        pooled_weight: weight of the CRPS of pooled values (see `loss.pooled_crps`) beside that of single values.
    """

    width: int = 0
    members: int = 2
    pooled_weight: float = 1.0

    @property
    def drawn(self) -> int:
        """Numbers in the noise of a document, frame and member: the trunk's, then the head's."""
        return 2 * self.width


@dataclass(frozen=True, kw_only=True)
class Together:
    """Which units of a modality are asked together (the same document, origin and lead), int64 (U,) each.

    Attributes:
        group: number of the document, origin and lead.
        slot: of the unit in its frame.
        frame: of the origin in its document.
    """

    group: Tensor
    slot: Tensor
    frame: Tensor


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Noise of M members: values (M, T, `NoiseSettings.drawn`), the same for all slots of a frame, the trunk's numbers
    before the head's; and {modality: Together}."""

    values: Tensor
    together: dict[str, Together]


@dataclass(frozen=True, kw_only=True)
class ModelInputs:
    """A batch of T token positions as tensors; positions without a token are in no group and no payload.

    Attributes:
        frame, row, column: int64 (T,).
        period: int64 (T,), columns once around the globe, 0 where a document does not go around.
        periods: the periods there are, ascending, 0 left out: known on the host.
        features: float32 (T, features).
        payloads: {modality: PayloadInputs}.
        groups: documents by shape.
        noise: of a model that is conditioned on noise, else None.
    """

    frame: Tensor
    row: Tensor
    column: Tensor
    period: Tensor
    periods: tuple[int, ...]
    features: Tensor
    payloads: dict[str, PayloadInputs]
    groups: tuple[DocumentGroup, ...]
    noise: Noise | None = None

    def repeated(self, count: int) -> ModelInputs:
        """The places of `count` copies of each document, copy by copy: (count * T,); payloads stay as they are."""
        size = len(self.frame)
        groups = tuple(
            replace(group, index=torch.cat([group.index + copy * size for copy in range(count)]))
            for group in self.groups
        )
        tensors: dict[str, Any] = {
            name: value.repeat(count, *[1] * (value.dim() - 1))
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, groups=groups, **tensors)

    def by_document(self) -> tuple[Tensor, ModelInputs]:
        """The positions that hold a token, document after document and group after group, int64; and where and when
        the tokens are in that order, without features and payloads: how the layers lay a batch out.
        """
        order = torch.cat([group.index.reshape(-1) for group in self.groups]) if self.groups else self.frame[:0]
        groups, first = [], 0
        for group in self.groups:
            index = torch.arange(first, first + group.index.numel(), device=order.device).view_as(group.index)
            groups.append(replace(group, index=index, side_by_side=True))
            first += index.numel()
        laid = {name: getattr(self, name)[order] for name in ("frame", "row", "column", "period")}
        return order, replace(self, features=self.features[:0], payloads={}, groups=tuple(groups), noise=None, **laid)

    @property
    def last_frames(self) -> Tensor:
        """Positions of the tokens of each document's last frame, group by group, int64 (A,)."""
        parts = [group.index[:, -group.slots :].reshape(-1) for group in self.groups]
        return torch.cat(parts) if parts else self.frame[:0]


def to_inputs(batch: Batch, device: torch.device | str = "cpu") -> ModelInputs:
    """Tensors of a batch on `device`."""
    shapes: dict[tuple[int, int, bool], list[int]] = {}
    for (start, frames, slots), causal in zip(batch.spans, batch.causal, strict=True):
        shapes.setdefault((frames, slots, causal), []).append(start)
    groups = tuple(
        DocumentGroup(
            index=torch.from_numpy(np.asarray(starts)[:, None] + np.arange(frames * slots)).to(device),
            frames=frames,
            slots=slots,
            causal=causal,
        )
        for (frames, slots, causal), starts in shapes.items()
    )
    return ModelInputs(
        frame=torch.from_numpy(batch.frame).to(device),
        row=torch.from_numpy(batch.row).to(device),
        column=torch.from_numpy(batch.column).to(device),
        period=torch.from_numpy(batch.period).to(device),
        periods=tuple(np.unique(batch.period[batch.period > 0]).tolist()),
        features=torch.from_numpy(batch.features).to(device),
        payloads={
            modality: PayloadInputs(
                **{f.name: torch.from_numpy(getattr(payload, f.name)).to(device) for f in fields(PayloadInputs)}
            )
            for modality, payload in batch.payloads.items()
        },
        groups=groups,
    )
