"""Heads: a distribution for each asked value, as a correction (0 at the start) to its anchor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sci_gpt.model.embed import QuestionEmbedding
from sci_gpt.model.inputs import PayloadInputs
from sci_gpt.model.layers import RMSNorm
from sci_tokenizers.tokenizer import MEMORIES


@dataclass(frozen=True, kw_only=True)
class GaussianPrediction:
    """Location and log-spread of each value, (U, V, K), in scaled units."""

    mean: Tensor
    log_spread: Tensor


@dataclass(frozen=True, kw_only=True)
class MixturePrediction:
    """A mixture of M logistics over the bins of a series, (U, M) each, in scaled units."""

    log_weight: Tensor
    mean: Tensor
    log_spread: Tensor


Prediction = GaussianPrediction | MixturePrediction


class Head(nn.Module):
    """Trunk output + question + variable -> hidden -> numbers per value; the last layer starts at 0.

    Args:
        width: of the trunk.
        num_variables: rows of the variable table.
        outputs: numbers per variable of a token.
    """

    def __init__(self, width: int, num_variables: int, outputs: int) -> None:
        super().__init__()
        self.norm = RMSNorm(width)
        self.question = QuestionEmbedding(width)
        self.variable = nn.Parameter(torch.zeros(num_variables, width))
        self.hidden = nn.Linear(width, width, bias=True)
        self.out = nn.Linear(2 * width, outputs, bias=True)

    def forward(self, x: Tensor, payload: PayloadInputs) -> Tensor:
        """Trunk output of the modality's tokens (N, width) to (U, V, outputs)."""
        trunk = self.norm(x)[payload.unit_token] + self.question(payload.question)
        row = payload.variable[payload.unit_token].clamp(min=0)
        asked = trunk[:, None] + F.embedding(row, self.variable)  # u v w
        return self.out(torch.cat([F.gelu(self.hidden(asked)), asked], dim=-1))


class GaussianHead(nn.Module):
    """Head of grids and traces: a location and a spread per value."""

    def __init__(self, width: int, num_variables: int, *, num_values: int, num_memories: int) -> None:
        super().__init__()
        self.num_values = num_values
        self.num_memories = num_memories
        self.head = Head(width, num_variables, 2 * num_values + num_memories)

    def forward(self, x: Tensor, payload: PayloadInputs) -> GaussianPrediction:
        """(N, width) to (U, V, K) predictions."""
        sizes = [self.num_values, self.num_values, self.num_memories]
        correction, log_spread, lean = self.head(x, payload).split(sizes, dim=-1)
        remembered = torch.einsum("uvkj,uvj->uvk", payload.memory[payload.unit_token], lean)
        # A cautious start: the spread is wider than the anchor's own errors until training says otherwise.
        spread = payload.unit_spread + (0.5 + log_spread).clamp(-6.0, 6.0)
        return GaussianPrediction(
            mean=payload.unit_anchor + remembered + correction * payload.unit_spread.exp(),
            log_spread=spread,
        )


class MixtureHead(nn.Module):
    """Head of series: M logistics; their starting places are spread a little so that they can part."""

    def __init__(self, width: int, num_variables: int, components: int) -> None:
        super().__init__()
        self.components = components
        self.head = Head(width, num_variables, 3 * components + len(MEMORIES))
        start = torch.linspace(-0.5, 0.5, components) if components > 1 else torch.zeros(1)
        self.register_buffer("start", start, persistent=False)

    def forward(self, x: Tensor, payload: PayloadInputs) -> MixturePrediction:
        """(N, width) to (U, M) predictions (a series token holds one value)."""
        sizes = [self.components, self.components, self.components, len(MEMORIES)]
        logit, correction, log_spread, lean = self.head(x, payload)[:, 0].split(sizes, dim=-1)
        remembered = (payload.memory[payload.unit_token][:, 0, 0] * lean).sum(dim=-1, keepdim=True)
        anchor = payload.unit_anchor[:, 0] + remembered
        return MixturePrediction(
            log_weight=torch.log_softmax(logit, dim=-1),
            mean=anchor + self.start + correction,
            log_spread=(log_spread - 1.0).clamp(-7.0, 5.0),
        )
