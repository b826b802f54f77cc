"""Pointwise skill from what a batch holds: the model's CRPS against its anchor, persistence and the offset."""

from __future__ import annotations

import torch
from torch import Tensor

from sci_gpt.model.heads import GaussianPrediction, SamplePrediction
from sci_gpt.model.inputs import ModelInputs, PayloadInputs
from sci_gpt.model.loss import crps_members, crps_of, unit_losses
from sci_gpt.model.quantiles import prediction_quantiles
from sci_gpt.model.transformer import SciGPT
from sci_tokenizers.tokenizer import TokenizerSettings

_LEVELS = tuple((i + 0.5) / 20 for i in range(20))


@torch.no_grad()
def batch_scores(model: SciGPT, inputs: ModelInputs, *, settings: TokenizerSettings) -> dict[str, Tensor]:
    """Sums over units, per modality: weight, loss, CRPS of the model, and of three simple forecasts, float64 (6,).

    The last value, the head's own anchor (for series and traces an autoregression of the record's past), and the
    offset.
    In scaled units. Each is dressed with the spread of its errors in this batch, per lead, which flatters it a
    little: the
    line in the log is a sign of life, the evaluation's skill is the one to quote.
    """
    model.eval()
    predictions = model(inputs)
    model.train()
    out: dict[str, Tensor] = {}
    for modality, prediction in predictions.items():
        payload = inputs.payloads[modality]
        truth = payload.values[payload.unit_target]
        valid = payload.valid[payload.unit_target]
        weight = payload.unit_weight.double()
        loss = unit_losses(prediction, payload, settings=settings).double()
        if isinstance(prediction, GaussianPrediction):
            crps = crps_of(prediction, truth)
        elif isinstance(prediction, SamplePrediction):
            crps = crps_members(prediction.location, prediction.spread, truth=truth)
        else:
            levels = torch.tensor(_LEVELS)
            quantiles = prediction_quantiles(prediction, levels, settings=settings)
            below = (truth < quantiles).float()
            crps = 2 * ((below - levels[:, None, None, None]) * (quantiles - truth)).mean(dim=0)
        points = (last_value(payload), payload.unit_anchor, torch.zeros_like(truth))
        scores = [crps, *(_dressed(point, payload) for point in points)]
        sums = [(_unit_mean(score, valid) * weight).sum() for score in scores]
        out[modality] = torch.stack([weight.sum(), (loss * weight).sum(), *sums])
    return out


def last_value(payload: PayloadInputs) -> Tensor:
    """Persistence (U, V, K): the newest value at the asking token; for traces its last sample."""
    values = payload.values[payload.unit_token]
    if payload.memory.shape[-1]:
        return payload.last[payload.unit_token]
    return values[..., -1:].expand_as(values)


def _dressed(point: Tensor, payload: PayloadInputs) -> Tensor:
    """CRPS of a point forecast dressed with the root mean square of its errors, per lead; bounded as the model's is."""
    truth, valid = payload.values[payload.unit_target], payload.valid[payload.unit_target]
    error = torch.where(valid, truth - point, 0.0)
    spread = torch.ones_like(truth)
    for lead in payload.unit_lead.unique():
        here = payload.unit_lead == lead
        spread[here] = torch.sqrt((error[here] ** 2).sum() / valid[here].sum().clamp(min=1)).clamp(min=1e-6)
    lower = payload.unit_lower if payload.unit_lower.shape[-1] else None
    return crps_of(GaussianPrediction(mean=point, log_spread=spread.log(), lower=lower), truth)


def _unit_mean(score: Tensor, valid: Tensor) -> Tensor:
    count = valid.sum(dim=(1, 2))
    return torch.where(valid, score, 0.0).sum(dim=(1, 2)).double() / count.clamp(min=1)


def skill_lines(sums: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """{modality: {"loss", "crps", "skill"}} from summed `batch_scores`; skill = 1 - CRPS / best baseline's CRPS."""
    lines = {}
    for modality, (weight, loss, crps, *simple) in ((m, s.tolist()) for m, s in sums.items()):
        total = max(weight, 1e-12)
        best = min(simple)
        lines[modality] = {"loss": loss / total, "crps": crps / total, "skill": 1.0 - crps / best if best > 0 else 0.0}
    return lines
