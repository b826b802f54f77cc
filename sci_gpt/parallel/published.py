"""Formulas that others published, to compare the plan with: parameters, FLOPs, days and activations of a GPT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True, kw_only=True)
class Gpt:
    """A GPT as Megatron trains it: l layers, width h, a heads, sequences of s tokens, V words."""

    layers: int
    width: int
    heads: int
    sequence: int = 2048
    words: int = 51200

    @property
    def parameters(self) -> float:
        """Narayanan et al. 2021 (arXiv:2104.04473), equation 2: 12 l h^2 (1 + 13 / 12h + (V + s) / 12lh)."""
        l, h = self.layers, self.width  # noqa: E741, as in the paper
        return 12 * l * h**2 * (1 + 13 / (12 * h) + (self.words + self.sequence) / (12 * l * h))

    def flops(self, sequences: int) -> float:
        """Of a step with all layers computed again: equation 3, 96 B s l h^2 (1 + s / 6h + V / 16lh)."""
        l, h, s = self.layers, self.width, self.sequence  # noqa: E741
        return 96.0 * sequences * s * l * h**2 * (1 + s / (6 * h) + self.words / (16 * l * h))

    def activation_bytes(
        self, sequences: int, *, tensor: int = 1, sequence_too: bool = False, recompute: Recompute = "none"
    ) -> float:
        """Of one layer, 16-bit: Korthikanti et al. 2022 (arXiv:2205.05198), table 2.

        Args:
            sequences: b, of a micro-batch.
            tensor: t, devices among which a layer is divided.
            sequence_too: norms and dropouts are divided too (Megatron's sequence parallelism).
            recompute: selective computes attention's scores again, full keeps the layer's input alone, undivided.
        """
        unit = float(self.sequence * sequences * self.width)
        if recompute == "full":
            return 2 * unit
        scores = 0.0 if recompute == "selective" else 5 * self.heads * self.sequence / self.width
        if sequence_too:
            return unit * (34 + scores) / tensor
        return unit * (10 + (24 + scores) / tensor)


def training_days(*, parameters: float, tokens: float, devices: int, flops_per_device: float) -> float:
    """Narayanan et al. 2021, equation 4: 8 T P / (n X), with all layers computed again."""
    return 8 * tokens * parameters / (devices * flops_per_device) / 86400
