"""Initial weights: each element drawn from a counter keyed by (seed, name, element), so no layout changes the start."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

from sci_gpt.model.transformer import SciGPT

LEVELS = "level.project.weight"  # what variables' levels weigh, in embedding and head
_ZERO = (".bias", "variable_gain", "id_table", LEVELS)  # what adds nothing before training
_READOUT = ".head.readout.weight"
_NOISE = 0.1  # standard deviation of 1 + W z, the factor by which noise scales a norm's output before training


def standard_normal(seed: int, name: str, *, start: int, stop: int) -> Tensor:
    """Elements [start, stop) of the named parameter's stream of normal numbers, float32 (Philox counters, inverse
    error function).
    """
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=16).digest()
    generator = np.random.Philox(key=np.frombuffer(digest, np.uint64))
    block = start // 4  # one Philox counter gives four 64-bit words
    generator.advance(block)
    raw = generator.random_raw(stop - block * 4)[start - block * 4 :]
    uniform = ((raw >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return (math.sqrt(2.0) * torch.erfinv(torch.from_numpy(2.0 * uniform - 1.0))).float()


@dataclass(frozen=True, kw_only=True)
class Start:
    """The start of a model's parameters, as a function of (seed, name, element): any range of any of them by itself.

    Linears are normal with 1/sqrt(fan in), residual outputs smaller by sqrt(2 layers), the last layer of a head and all
    biases and variable tables small or 0, norms 1.

    Attributes:
        seed: of the run.
        layers: of the trunk.
        noise: numbers of the noise of a document, frame and member, see `NoiseSettings.width`.
    """

    seed: int
    layers: int
    noise: int

    @classmethod
    def of(cls, model: SciGPT, seed: int) -> Start:
        """The start of a model."""
        return cls(seed=seed, layers=model.shape.layers, noise=model.settings.noise.width)

    def values(self, name: str, shape: Sequence[int], *, start: int = 0, stop: int | None = None) -> Tensor:
        """Flat elements [start, stop) of the parameter `name` of (whole) `shape`, float32."""
        stop = prod(shape) if stop is None else stop
        if name.endswith("norm.weight"):
            return torch.ones(stop - start)
        if name.endswith(_ZERO) or ".head.out." in name:
            return torch.zeros(stop - start)
        if name.endswith(_READOUT):  # all values of a token start to hang on the noise alike: neighbours together
            part = self.noise * shape[1]
            drawn = standard_normal(self.seed, name, start=0, stop=part)[torch.arange(start, stop) % part]
        else:
            drawn = standard_normal(self.seed, name, start=start, stop=stop)
        return drawn * self._spread(name, fan_in=shape[-1])

    def _spread(self, name: str, *, fan_in: int) -> float:
        if name.endswith(("variable_bias", "head.variable")):
            return 0.5  # which variable it is must be as plain to see as when and where
        spread: float = fan_in**-0.5
        if name.endswith(".noise.weight"):
            return _NOISE * spread
        return spread / math.sqrt(2 * self.layers) if name.endswith((".output.weight", ".down.weight")) else spread


@torch.no_grad()
def initialize(model: SciGPT, seed: int) -> None:
    """Draw every parameter of a model whose parameters have memory (see `Start`)."""
    start = Start.of(model, seed)
    for name, parameter in model.named_parameters():
        parameter.copy_(start.values(name, parameter.shape).view_as(parameter))
