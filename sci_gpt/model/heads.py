"""Heads: a distribution for each asked value, as a correction (0 at the start) to its anchor."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from sci_gpt.model.embed import LevelEmbedding, QuestionEmbedding
from sci_gpt.model.inputs import PayloadInputs, Together
from sci_gpt.model.layers import RMSNorm
from sci_tokenizers.autoregression import HORIZONS
from sci_tokenizers.memory import MEMORIES

# Weight of the last value (0 for a waveform, its mean) against the anchor before training: a head of series starts at
# persistence, one of grids a third of the way to its anchor, one of traces at 0.85 of its own autoregression.
START_LEAN = {"grid": 0.65, "series": 1.0, "trace": 0.15}
# The correction of a grid or trace has a number for each value of a token, far more than a lean: this factor slows its
# learning, so that a few years of monthly fields or a few records are not learned by heart.
PACE = 0.1
# What `_pile_features` weigh in the pile's logit before training: a dry hour is often followed by another, a wet one
# hardly ever by a dry one, in more frames it may.
_PILE_START = (1.0, 0.0, -3.0, 1.0, 0.0)
_PILE_WIDTH = 1 / 16  # scale of the pile's logistic, in bins: all but 1 / 1,500 of it lies in its bin
_FARTHEST = 8.0  # spreads of the anchor; a last value farther away counts as this far
LOGISTIC = 0.5 * math.log(math.pi**2 / 3.0)  # standard deviation of a logistic of scale 1


@dataclass(frozen=True, kw_only=True)
class GaussianPrediction:
    """Location and log-spread of each value, (U, V, K), in scaled units.

    With `lower` the distribution is censored: what the normal has below the bound lies on it (dry days). The bound is
    -inf where a value has none; None: no value has one.
    """

    mean: Tensor
    log_spread: Tensor
    lower: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class MixturePrediction:
    """A mixture of M logistics over the bins of a series, (U, M) each, in scaled units.

    The last one is the pile: where a variable piles up it lies within one bin, elsewhere it weighs nothing.
    """

    log_weight: Tensor
    mean: Tensor
    log_spread: Tensor


@dataclass(frozen=True, kw_only=True)
class SamplePrediction:
    """Members in scaled units, and which units are asked together: a member is location + hangs . z.

    Attributes:
        location: (M, U, V, K), of each member.
        hangs: (M, U, V, K, N), how each value hangs on the noise: a normal distribution, known as a whole.
        noise: (M, U, N), standard normal z, the same for all units that are asked together.
        pooled_weight: of pooled values in the loss.
    """

    location: Tensor
    hangs: Tensor
    noise: Tensor
    together: Together
    pooled_weight: float

    @property
    def values(self) -> Tensor:
        """A draw of each member, (M, U, V, K)."""
        return self.location + torch.einsum("muvkn,mun->muvk", self.hangs, self.noise)

    @property
    def key(self) -> Tensor:
        """A whole number of each unit (U,), by chance, from the noise that the loss does not draw."""
        return (self.noise[0, :, 0] * 2.0**24).long()

    @property
    def spread(self) -> Tensor:
        """Standard deviation of each member's value beside its location, (M, U, V, K)."""
        return self.hangs.norm(dim=-1)


Prediction = GaussianPrediction | MixturePrediction | SamplePrediction


class Head(nn.Module):
    """Trunk output + question + variable -> hidden -> numbers per value; the last layer starts at 0.

    Args:
        width: of the trunk.
        num_variables: rows of the variable table.
        outputs: numbers per variable of a token.
        levels: as for `PayloadEmbedding`.
        output_scale: factor of the last layer's input (muP: base width / width).
        drawn: more numbers, after the others, whose layer starts drawn and not at 0.
    """

    def __init__(
        self,
        width: int,
        num_variables: int,
        *,
        outputs: int,
        levels: bool = False,
        output_scale: float = 1.0,
        drawn: int = 0,
    ) -> None:
        super().__init__()
        self.output_scale = output_scale
        self.norm = RMSNorm(width)
        self.question = QuestionEmbedding(width)
        self.variable = nn.Parameter(torch.zeros(num_variables, width))
        self.level = LevelEmbedding(width) if levels else None
        self.hidden = nn.Linear(width, width, bias=True)
        self.out = nn.Linear(2 * width, outputs, bias=True)
        self.readout = nn.Linear(2 * width, drawn, bias=False) if drawn else None

    def forward(self, x: Tensor, payload: PayloadInputs) -> Tensor:
        """Trunk output of the modality's tokens (N, width) to (U, V, outputs + drawn)."""
        trunk = self.norm(x)[payload.unit_token] + self.question(payload.question)
        row = payload.variable[payload.unit_token].clamp(min=0)
        asked = trunk[:, None] + F.embedding(row, self.variable)  # u v w
        if self.level is not None:
            asked = asked + self.level(payload.log_level[payload.unit_token])
        known = torch.cat([F.gelu(self.hidden(asked)), asked], dim=-1)
        known = known if self.output_scale == 1.0 else self.output_scale * known
        numbers = self.out(known)
        return numbers if self.readout is None else torch.cat([numbers, self.readout(known)], dim=-1)


def _located(payload: PayloadInputs, correction: Tensor, *, lean: Tensor, start: float) -> Tensor:
    """Anchor + spread x (what the head leans on + correction), (U, V, K).

    Differences are counted in the anchor's spreads and compressed or cut, so that a record which its own past foretells
    within a hundredth of its changes does not drown the gradient of the others.

    Args:
        payload: of the modality.
        correction: (U, V, K), 0 at the start.
        lean: (U, V, 1 + J): what is added to `start`, then the weight of each memory; 0 before training.
        start: weight of the last value against the anchor, see START_LEAN.
    """
    token, spread = payload.unit_token, payload.unit_spread.exp()
    leans = lean.shape[-1] - payload.memory.shape[-1]  # one, or one per component
    away = ((payload.last[token] - payload.unit_anchor) / spread).clamp(-_FARTHEST, _FARTHEST)
    memory = torch.asinh(payload.memory[token] / spread[..., None])
    leaning = (start + lean[..., :leans]) * away + torch.einsum("uvkj,uvj->uvk", memory, lean[..., leans:])
    return payload.unit_anchor + spread * (leaning + correction)


def _spread(payload: PayloadInputs, log_spread: Tensor, *, recent: Tensor) -> Tensor:
    """Logarithm of the spread, (U, V, K): the anchor's own at the start.

    Recent errors may move it, and it may be drawn towards the scale of the document: a spread seen in a short past
        is noisy.
    """
    moved = torch.einsum("uvh,uvh->uv", payload.volatility[payload.unit_token], recent[..., 1:])[..., None]
    drawn = payload.unit_spread.clamp(-2.0, 2.0) * recent[..., :1]
    return payload.unit_spread + (drawn + moved + log_spread).clamp(-6.0, 6.0)


def _pile_features(payload: PayloadInputs) -> Tensor:
    """What the logit of the pile is linear in, (U, 5): a value stays there or comes to it, over how many frames, and
    from how far.
    """
    pile, last = (own[payload.unit_token][:, 0] for own in (payload.pile, payload.last[:, :, 0]))
    away = torch.asinh((last - pile).nan_to_num().abs())
    stays, ahead = (away == 0).to(away.dtype), payload.unit_lead.clamp(min=1).to(away.dtype).log()
    return torch.stack([stays, stays * ahead, 1 - stays, (1 - stays) * ahead, away], dim=-1)


class GaussianHead(nn.Module):
    """Head of grids and traces: a location and a spread per value.

    Args:
        width, num_variables: as for `Head`.
        modality: whose values it predicts: decides memories, levels, START_LEAN.
        num_values: K of a token.
        output_scale: as for `Head`.
        noise: numbers in the noise of a `SampleHead`.
    """

    def __init__(
        self,
        width: int,
        num_variables: int,
        *,
        modality: str,
        num_values: int,
        output_scale: float = 1.0,
        noise: int = 0,
    ) -> None:
        super().__init__()
        num_memories = 0 if modality == "trace" else len(MEMORIES)
        self.start_lean, self.pace = START_LEAN[modality], PACE
        self.sizes = [num_values, num_values, 1 + num_memories, 1 + len(HORIZONS)]
        self.num_leaning = num_values * num_memories + len(HORIZONS)  # products per answer of `_located` and `_spread`
        self.head = Head(
            width,
            num_variables,
            outputs=sum(self.sizes),
            levels=modality == "grid",
            output_scale=output_scale,
            drawn=num_values * noise,
        )

    def forward(self, x: Tensor, payload: PayloadInputs) -> GaussianPrediction:
        """(N, width) to (U, V, K) predictions."""
        return self.distribution(self.head(x, payload), payload)

    def distribution(self, numbers: Tensor, payload: PayloadInputs) -> GaussianPrediction:
        """What the last layer gave, (U, V, outputs), as locations and spreads (U, V, K)."""
        correction, log_spread, lean, recent = numbers.split(self.sizes, dim=-1)
        return GaussianPrediction(
            mean=_located(payload, self.pace * correction, lean=lean, start=self.start_lean),
            log_spread=_spread(payload, log_spread, recent=recent),
            lower=payload.unit_lower if payload.unit_lower.shape[-1] else None,
        )


class SampleHead(GaussianHead):
    """Head of a trunk that is conditioned on noise: a member is location + spread * a . z / |a|, one value each.

    z is a part of the noise of the asking frame and member that the trunk does not see, the same for all its slots; a,
    read out of the trunk, says how each value hangs on it, so that values with like a move together. Alone each value
    is as wide as its spread says, and all of them have a normal distribution that the loss knows without drawing z.
    """

    def member(self, x: Tensor, payload: PayloadInputs) -> tuple[Tensor, Tensor]:
        """One member's locations (U, V, K) and how they hang on the noise (U, V, K, N), in scaled units, from (N,
        width)."""
        numbers = self.head(x, payload)
        at = self.distribution(numbers[..., : sum(self.sizes)], payload)
        hangs = rearrange(numbers[..., sum(self.sizes) :], "u v (k n) -> u v k n", k=self.sizes[0])
        size = hangs.square().sum(dim=-1, keepdim=True).clamp(min=1e-12).sqrt()
        return at.mean, at.log_spread.exp()[..., None] * hangs / size


class MixtureHead(nn.Module):
    """Head of series: logistics whose starting places are spread a little so that they can part, and the pile.

    Args:
        width, num_variables: as for `Head`.
        components: logistics, the pile not counted.
        bin_width: of the quantizer, in scaled units.
        output_scale: as for `Head`.
    """

    def __init__(
        self, width: int, num_variables: int, *, components: int, bin_width: float, output_scale: float = 1.0
    ) -> None:
        super().__init__()
        self.pile_spread = math.log(bin_width * _PILE_WIDTH)
        self.start_lean = START_LEAN["series"]
        self.sizes = [
            components,
            len(_PILE_START),
            components,
            components,
            components + len(MEMORIES),
            1 + len(HORIZONS),
        ]
        self.num_leaning = len(MEMORIES) + len(HORIZONS)  # as in `GaussianHead`
        self.head = Head(width, num_variables, outputs=sum(self.sizes), output_scale=output_scale)
        start = torch.linspace(-0.5, 0.5, components, device="cpu") if components > 1 else torch.zeros(1, device="cpu")
        self.register_buffer("start", start, persistent=False)
        self.register_buffer("pile_start", torch.tensor(_PILE_START, device="cpu"), persistent=False)

    def forward(self, x: Tensor, payload: PayloadInputs) -> MixturePrediction:
        """(N, width) to (U, 1 + components) predictions (a series token holds one value)."""
        logit, pile_lean, correction, log_spread, lean, recent = self.head(x, payload).split(self.sizes, dim=-1)
        spread = _spread(payload, log_spread, recent=recent)[:, 0] - LOGISTIC
        mean = _located(payload, self.start + correction, lean=lean, start=self.start_lean)[:, 0]
        pile = payload.pile[payload.unit_token].to(mean.dtype)
        weight = (_pile_features(payload) * (self.pile_start + pile_lean[:, 0])).sum(dim=-1, keepdim=True)
        weight = weight.masked_fill(pile.isnan(), -torch.inf)
        return MixturePrediction(
            log_weight=torch.log_softmax(torch.cat([logit[:, 0], weight], dim=-1), dim=-1),
            mean=torch.cat([mean, pile.nan_to_num()], dim=-1),
            log_spread=torch.cat([spread, torch.full_like(pile, self.pile_spread)], dim=-1),
        )
