"""Quantiles of predicted distributions, in scaled units: what forecasts and scores are made of."""

from __future__ import annotations

import torch
from torch import Tensor

from sci_gpt.model.heads import MixturePrediction, Prediction, SamplePrediction
from sci_tokenizers.tokenizer import TokenizerSettings

_BISECTIONS = 22  # 30 / 2^22: finer than float32 shows at the edge of the range


def prediction_quantiles(prediction: Prediction, levels: Tensor, *, settings: TokenizerSettings) -> Tensor:
    """Quantiles (levels, U, V, K) of each unit's values.

    A Gaussian's are closed, and none lies below its bound; members' are interpolated between them. A mixture's are
    found by bisection of its distribution function on the range of the bins: a quantile beyond the outermost centres is
    that centre (the bins there are open).
    """
    if isinstance(prediction, SamplePrediction):
        return torch.quantile(prediction.values, levels.to(prediction.values.dtype), dim=0)
    if not isinstance(prediction, MixturePrediction):
        z = torch.special.ndtri(levels.double()).float()
        quantiles = prediction.mean + z[:, None, None, None] * prediction.log_spread.exp()
        return quantiles if prediction.lower is None else torch.maximum(quantiles, prediction.lower)
    count = prediction.mean.shape[0]
    low = torch.full((len(levels), count), -settings.series_limit)
    high = torch.full((len(levels), count), settings.series_limit)
    weight, spread = prediction.log_weight.exp(), prediction.log_spread.exp()
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        reached = (weight * torch.sigmoid((middle[..., None] - prediction.mean) / spread)).sum(-1) >= levels[:, None]
        low, high = torch.where(reached, low, middle), torch.where(reached, middle, high)
    return ((low + high) / 2)[:, :, None, None]
