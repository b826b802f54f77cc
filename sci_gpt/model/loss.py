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
_LEAST = 1e-12  # variance that a sum has at least


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


def crps_members(location: Tensor, spread: Tensor, *, truth: Tensor) -> Tensor:
    """Fair CRPS of M members, each a normal distribution, against the truth (..): mean E|xi - y| less the sum of
    E|xi - xj| over i < j, by M (M - 1) (Ferro 2014; closed forms of Grimit et al. 2006, eq. 3).

    Elementwise, in the unit of `truth`; its expectation is least for members whose draws have the truth's own
    distribution, however few they are. What is drawn inside a member is integrated out, not sampled.

    Args:
        location, spread: (M, ..), spreads above 0.
    """
    count = len(location)
    first, second = torch.triu_indices(count, count, offset=1, device=location.device)
    apart = torch.hypot(spread[first], spread[second])
    pairs = _mean_absolute(location[first] - location[second], apart).sum(dim=0)
    return _mean_absolute(location - truth, spread).mean(dim=0) - pairs / (count * (count - 1))


def _mean_absolute(mean: Tensor, spread: Tensor) -> Tensor:
    """E|x| of a normal x."""
    z = mean / spread
    return mean * torch.erf(z / math.sqrt(2.0)) + spread * torch.exp(-0.5 * z * z) * math.sqrt(2 / math.pi)


def _walsh(number: Tensor, frame: Tensor) -> Tensor:
    """Signs of the Walsh function `frame` at `number`, +1 or -1: over the frames any two numbers differ as often as
    not, so that sums with these signs show every covariance in turn."""
    bits = number & frame
    for shift in (16, 8, 4, 2, 1):
        bits = bits ^ (bits >> shift)
    return 1.0 - 2.0 * (bits & 1)


def _signs(number: Tensor, key: Tensor) -> Tensor:
    """+1 or -1 by the bits of a hash of two whole numbers (multiply and shift, modulo 2^32)."""
    mixed = number * 0x9E3779B1 + key
    for factor in (0x2C1B3C6D, 0x297A2D39):
        mixed = mixed & 0xFFFFFFFF
        mixed = (mixed ^ (mixed >> 15)) * factor
    return 1.0 - 2.0 * ((mixed >> 16) & 1)


def pooled_crps(errors: Tensor, hangs: Tensor, *, weight: Tensor, together: Together, key: Tensor) -> Tensor:
    """Fair CRPS (U,) of sums over values that are asked together, which scores of single values say nothing of.

    Inside a token: the Walsh functions of each variable's K cells, divided by the root of the summed squared weights
    (of unit variance for white errors). Over the slots of a frame: these sums once more, with the signs of `_SLOT_SUMS`
    Walsh functions of the slots, the plain sum always and others in each frame, divided by the root of the slots.
    Beside both stand sums of all of them with signs by chance: of how one goes with another none of them tells.

    Args:
        errors: (M, U, V, K), members' locations less the truth.
        hangs: (M, U, V, K, N), how the values hang on the noise that all units of a question share.
        weight: (U, V, K) of each value, 0 where the truth is missing.
        together: which units make one question; all units of a question have the same second part.
        key: int64 (U,), of the signs by chance, the same for all units of a question.
    """
    known = torch.cat([errors[..., None], hangs], dim=-1) * weight[..., None]  # location and hangs sum alike
    size = weight.square().sum(dim=2).sqrt()  # u v
    known = known.transpose(0, 1) / torch.where(size > 0, size, 1.0)[:, None, :, None, None]  # u m v k (1 + n)
    cells = torch.arange(errors.shape[3], device=errors.device)
    inside = _walsh(cells, cells[:, None]) @ known
    part = _mean_crps(inside[:, None], present=size > 0, key=key)
    count = int(together.group.max()) + 1 if len(weight) else 0
    slots = weight.new_zeros(count, size.shape[1]).index_add(0, together.group, (size > 0).to(weight.dtype))
    sums = []
    for number in range(_SLOT_SUMS):
        function = together.frame * (_SLOT_SUMS - 1) + number if number else torch.zeros_like(together.frame)
        signed = inside * _walsh(together.slot, function)[:, None, None, None, None]
        total = inside.new_zeros(count, *inside.shape[1:]).index_add(0, together.group, signed)
        sums.append(total / slots.clamp(min=1).sqrt()[:, None, :, None, None])
    own = key.new_zeros(count).index_copy(0, together.group, key)
    return part + _mean_crps(torch.stack(sums, dim=1), present=slots > 0, key=own)[together.group]


def _mean_crps(sums: Tensor, *, present: Tensor, key: Tensor) -> Tensor:
    """Mean fair CRPS (G,) of the sums (G, F, M, V, Q, 1 + N) of the variables that are present (G, V), plus that of Q
    sums of all F V Q with signs of the key (G,), divided by the root of F V Q."""
    _, functions, _, variables, count, _ = sums.shape
    number = torch.arange(functions * variables * count, device=sums.device).view(functions, variables, count)
    signs = _signs(number, key[:, None, None, None]) * present[:, None, :, None]
    signs = signs / (functions * count * present.sum(dim=1).clamp(min=1))[:, None, None, None].sqrt()
    cells = torch.arange(count, device=sums.device)
    mixed = _walsh(cells, cells[:, None]) @ torch.einsum("gfmvqn,gfvq->gmqn", sums, signs)
    single = _crps_of_sums(sums.movedim(2, 0)) * present[:, None, :, None]
    shown = present.sum(dim=1).clamp(min=1) * functions * count
    return single.sum(dim=(1, 2, 3)) / shown + _crps_of_sums(mixed.movedim(1, 0)).mean(dim=1) * present.any(dim=1)


def _crps_of_sums(sums: Tensor) -> Tensor:
    """Fair CRPS (..) of sums (M, .., 1 + N), location less truth and how they hang on the noise."""
    spread = (sums[..., 1:].square().sum(dim=-1) + _LEAST).sqrt()
    return crps_members(sums[..., 0], spread, truth=torch.zeros_like(spread[0]))


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
        errors = torch.where(weight > 0, (prediction.location - truth) / spread, 0.0)
        loss = crps_members(errors, prediction.spread / spread, truth=torch.zeros_like(truth))
        hangs = torch.where((weight > 0)[..., None], prediction.hangs / spread[..., None], 0.0)
        pooled = prediction.pooled_weight * pooled_crps(
            errors, hangs, weight=weight, together=prediction.together, key=prediction.key
        )
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
