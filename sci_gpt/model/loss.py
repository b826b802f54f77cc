"""Loss: per value from its distribution, per token a weighted mean over valid values, per modality a weighted sum."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sci_gpt.model.heads import GaussianPrediction, MixturePrediction, Prediction, SamplePrediction
from sci_gpt.model.inputs import ModelInputs, PayloadInputs, Together
from sci_tokenizers.sample import masked_name
from sci_tokenizers.tokenizer import TokenizerSettings

_SLOT_SUMS = 4  # sums over the slots of a frame in each question's pooled score


def crps_gaussian(mean: Tensor, log_spread: Tensor, *, truth: Tensor) -> Tensor:
    """Closed form CRPS of a normal distribution (Gneiting et al. 2005, eq. 5), elementwise, in the unit of `truth`."""
    spread = log_spread.exp()
    z = (truth - mean) / spread
    density = torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    return spread * (z * torch.erf(z / math.sqrt(2.0)) + 2 * density - 1 / math.sqrt(math.pi))


def crps_censored(mean: Tensor, log_spread: Tensor, *, truth: Tensor, lower: Tensor) -> Tensor:
    """Closed form CRPS of max(normal, lower), elementwise, for truths at or above `lower`, which is finite.

    With z and a the standardised truth and bound, the integral of (F - [x >= z])^2 is that of Phi^2 from a to z and of
    (1 - Phi)^2 from z on: G(z) - G(a) + G(-z), where G(x) is the integral of Phi^2 up to x,
    x Phi(x)^2 + 2 phi(x) Phi(x) - Phi(sqrt(2) x) / sqrt(pi) (as in Jordan, Krueger & Lerch 2019, appendix A). Exactly
    what is left of the tail where the truth lies on the bound.
    """
    spread = log_spread.exp()
    z, a = (torch.maximum(truth, lower) - mean) / spread, (lower - mean) / spread
    return spread * (_squares_up_to(z) - _squares_up_to(a) + _squares_up_to(-z))


def _squares_up_to(x: Tensor) -> Tensor:
    """Integral of the squared normal distribution function up to x."""
    below = torch.special.ndtr(x)
    density = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return below * (x * below + 2 * density) - torch.special.ndtr(math.sqrt(2.0) * x) / math.sqrt(math.pi)


def crps_of(prediction: GaussianPrediction, truth: Tensor) -> Tensor:
    """CRPS of each value's distribution, (U, V, K): a normal's, or a censored normal's where there is a bound."""
    plain = crps_gaussian(prediction.mean, prediction.log_spread, truth=truth)
    if prediction.lower is None:
        return plain
    bounded = torch.isfinite(prediction.lower)
    lower = torch.where(bounded, prediction.lower, truth)  # any finite number: what comes of it is not taken
    censored = crps_censored(prediction.mean, prediction.log_spread, truth=truth, lower=lower)
    return torch.where(bounded, censored, plain)


def mixture_log_probability(prediction: MixturePrediction, centre: Tensor, *, width: float, limit: float) -> Tensor:
    """Log-probability of the bin around each centre under a discretized mixture of logistics (Salimans et al. 2017).

    Args:
        prediction: (U, M).
        centre: (U,), bin centres in scaled units.
        width: of a bin.
        limit: the outermost centres; their bins are open.

    Returns:
        (U,), natural logarithm; exact for the outer bins too, stable in both tails.
    """
    spread = prediction.log_spread.exp()
    upper = (centre[:, None] + width / 2 - prediction.mean) / spread
    lower = (centre[:, None] - width / 2 - prediction.mean) / spread
    inside = F.logsigmoid(upper) + F.logsigmoid(-lower) + torch.log(-torch.expm1(-(width / spread)))
    first, last = centre[:, None] <= -limit + width / 2, centre[:, None] >= limit - width / 2
    bins = torch.where(first, F.logsigmoid(upper), torch.where(last, F.logsigmoid(-lower), inside))
    return torch.logsumexp(prediction.log_weight + bins, dim=-1)


def crps_members(members: Tensor, truth: Tensor) -> Tensor:
    """Fair CRPS of M members (M, ..) against the truth (..): mean|x - y| - sum|xi - xj| / (2 M (M - 1)) (Ferro 2014).

    Elementwise, in the unit of `truth`; its expectation is least for members from the truth's own distribution, however
    few they are.
    """
    count = len(members)
    rank = 2.0 * torch.arange(count, device=members.device, dtype=members.dtype) - count + 1
    # sum over i, j of |xi - xj| = 2 sum_i (2i - M + 1) x_(i): no pairs are formed
    pairs = 2.0 * torch.tensordot(rank, members.sort(dim=0).values, dims=1)
    return (members - truth).abs().mean(dim=0) - pairs / (2.0 * count * (count - 1))


def _walsh(number: Tensor, frame: Tensor) -> Tensor:
    """Signs of the Walsh function `frame` at `number`, +1 or -1: over the frames any two numbers differ as often as
    not, so that sums with these signs show every covariance in turn."""
    bits = number & frame
    for shift in (16, 8, 4, 2, 1):
        bits = bits ^ (bits >> shift)
    return 1.0 - 2.0 * (bits & 1)


def pooled_crps(errors: Tensor, *, weight: Tensor, together: Together) -> Tensor:
    """Fair CRPS (U,) of sums over values that are asked together, which scores of single values say nothing of.

    Inside a token: the Walsh functions of each variable's K cells, divided by the root of the summed squared weights
    (of unit variance for white errors). Over the slots of a frame: these sums once more, with the signs of `_SLOT_SUMS`
    Walsh functions of the slots, the plain sum always and others in each frame, divided by the root of the slots. Both
    also for the variables mixed with such signs. The mean over the scores of each of the two, added.

    Args:
        errors: (M, U, V, K), members less the truth.
        weight: (U, V, K) of each value, 0 where the truth is missing.
        together: which units make one question; all units of a question have the same second part.
    """
    mix = _walsh(torch.arange(errors.shape[2], device=errors.device), together.frame[:, None])  # u v
    size = weight.square().sum(dim=2).sqrt()  # u v
    cells = torch.arange(errors.shape[3], device=errors.device)
    inside = torch.einsum("qk,muvk->umqv", _walsh(cells, cells[:, None]), errors * weight)
    inside = inside / torch.where(size > 0, size, 1.0)[:, None, None]
    part = _mean_crps(inside, present=size > 0, mix=mix)
    count = int(together.group.max()) + 1 if len(weight) else 0
    slots = weight.new_zeros(count, mix.shape[1]).index_add(0, together.group, (size > 0).to(weight.dtype))
    first = mix.new_zeros(count, mix.shape[1]).index_copy(0, together.group, mix)
    for number in range(_SLOT_SUMS):
        function = together.frame * (_SLOT_SUMS - 1) + number if number else torch.zeros_like(together.frame)
        signed = inside * _walsh(together.slot, function)[:, None, None, None]
        sums = inside.new_zeros(count, *inside.shape[1:]).index_add(0, together.group, signed)
        sums = sums / slots.clamp(min=1).sqrt()[:, None, None]
        part = part + _mean_crps(sums, present=slots > 0, mix=first)[together.group] / _SLOT_SUMS
    return part


def _mean_crps(sums: Tensor, *, present: Tensor, mix: Tensor) -> Tensor:
    """Mean fair CRPS (G,) of the sums (G, M, Q, V) of the variables that are present (G, V), and of their mixture with
    the signs (G, V)."""
    share = mix * present / present.sum(dim=1, keepdim=True).clamp(min=1).sqrt()
    mixed = torch.einsum("gmqv,gv->gmq", sums, share)
    flat = torch.cat([sums, mixed[..., None]], dim=3).transpose(0, 1)  # m g q (v + 1)
    counted = torch.cat([present, present.any(dim=1, keepdim=True)], dim=1)[:, None]  # g 1 (v + 1)
    scores = crps_members(flat, torch.zeros_like(flat[0])) * counted
    return scores.sum(dim=(1, 2)) / (counted.sum(dim=(1, 2)) * scores.shape[1]).clamp(min=1)


def unit_losses(prediction: Prediction, payload: PayloadInputs, *, settings: TokenizerSettings) -> Tensor:
    """Loss of each unit (U,): the weighted mean over its valid values; 0 where nothing is valid.

    Series: cross-entropy of the id's bin (nats). Grids and traces: CRPS in spreads of the anchor where that is known
        (traces),
    else in scaled units (grids). Members (all modalities): fair CRPS in spreads of the anchor, plus `pooled_weight`
        times `pooled_crps`, in the same unit.
    """
    truth, weight = payload.targets()
    if isinstance(prediction, MixturePrediction):
        loss = -mixture_log_probability(
            prediction, truth[:, 0, 0], width=settings.series_bin_width, limit=settings.series_limit
        )
        return torch.where(weight[:, 0, 0] > 0, loss, 0.0)
    spread, pooled = payload.unit_spread.exp(), torch.zeros_like(payload.unit_weight)
    if isinstance(prediction, SamplePrediction):
        errors = torch.where(weight > 0, (prediction.values - truth) / spread, 0.0)
        loss = crps_members(errors, torch.zeros_like(truth))
        pooled = prediction.pooled_weight * pooled_crps(errors, weight=weight, together=prediction.together)
    else:
        assert isinstance(prediction, GaussianPrediction)
        loss = crps_of(prediction, truth) / spread
    total = weight.sum(dim=(1, 2))
    single = torch.where(weight > 0, loss * weight, 0.0).sum(dim=(1, 2)) / torch.where(total > 0, total, 1.0)
    return single + torch.where(total > 0, pooled, 0.0)


def weighted_sums(
    predictions: dict[str, Prediction], inputs: ModelInputs, *, settings: TokenizerSettings
) -> dict[str, Tensor]:
    """Sum over units of loss x weight, per modality present; masked units under their own name (`masked_name`)."""
    sums: dict[str, Tensor] = {}
    for modality, prediction in predictions.items():
        payload = inputs.payloads[modality]
        weighted = unit_losses(prediction, payload, settings=settings) * payload.unit_weight
        sums |= _parted(modality, weighted, payload=payload)
    return sums


def valid_weights(inputs: ModelInputs) -> dict[str, float]:
    """Sum of unit weights per modality present: known before the forward pass, summed over ranks once per step."""
    weights: dict[str, float] = {}
    for modality, payload in inputs.payloads.items():
        weights |= {name: float(x) for name, x in _parted(modality, payload.unit_weight, payload=payload).items()}
    return weights


def _parted(modality: str, per_unit: Tensor, *, payload: PayloadInputs) -> dict[str, Tensor]:
    """Sum over the next-frame units of a modality, and beside it over the masked ones where there are any."""
    if not len(payload.hidden_values):
        return {modality: per_unit.sum()}
    masked = payload.unit_lead == 0
    return {
        modality: torch.where(masked, 0.0, per_unit).sum(),
        masked_name(modality): torch.where(masked, per_unit, 0.0).sum(),
    }
