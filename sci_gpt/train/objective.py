"""The training objective of a batch: valid weights before the forward pass, weighted loss sums after it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sci_gpt.model.heads import Prediction
from sci_gpt.model.inputs import ModelInputs, NoiseSettings
from sci_gpt.model.loss import valid_weights, weighted_sums
from sci_gpt.model.noise import noisy_inputs
from sci_tokenizers.packing import Batch
from sci_tokenizers.tokenizer import TokenizerSettings


@dataclass(frozen=True, kw_only=True)
class NextFrame:
    """Objective "next frame": a token predicts the payload some frames ahead; in masked documents a hidden token its
    own. Losses and weights of the two have names of their own (`sample.masked_name`).
    """

    settings: TokenizerSettings
    device: torch.device
    noise: NoiseSettings = NoiseSettings()
    seed: int = 0

    def inputs(self, batch: Batch) -> ModelInputs:
        """A batch on the device, with the noise of its samples where the model takes any."""
        return noisy_inputs(batch, self.device, noise=self.noise, seed=self.seed)

    def weights(self, inputs: ModelInputs) -> dict[str, float]:
        """Valid weight per modality."""
        return valid_weights(inputs)

    def sums(self, predictions: dict[str, Prediction], inputs: ModelInputs) -> dict[str, Tensor]:
        """Sum of loss x weight per modality, fp32 scalars (the distribution is evaluated in fp32 under bf16 too)."""
        return weighted_sums({name: _in_fp32(one) for name, one in predictions.items()}, inputs, settings=self.settings)


def _in_fp32(prediction: Any) -> Any:
    numbers = {name: value.float() for name, value in vars(prediction).items() if isinstance(value, Tensor)}
    return replace(prediction, **numbers)
