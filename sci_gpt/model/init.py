"""Initial weights: each element drawn from a counter keyed by (seed, name, element), so no layout changes the start."""

from __future__ import annotations

import hashlib
import math

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


@torch.no_grad()
def initialize(model: SciGPT, seed: int) -> None:
    """Draw every parameter: linears normal with 1/sqrt(fan in), residual outputs smaller by sqrt(2 layers), the last
    layer of
    a head and all biases and variable tables small or 0, norms 1."""
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.fill_(1.0)
        elif name.endswith(_ZERO) or ".head.out." in name:
            parameter.zero_()
        else:
            spread = _spread(name, parameter, layers=model.shape.layers)
            drawn = standard_normal(seed, name, start=0, stop=parameter.numel())
            if name.endswith(_READOUT):  # all values of a token start to hang on the noise alike: neighbours together
                part = model.settings.noise.width * parameter.shape[1]
                drawn = drawn[:part].repeat(parameter.numel() // part)
            parameter.copy_((drawn * spread).view_as(parameter))


def _spread(name: str, parameter: Tensor, *, layers: int) -> float:
    if name.endswith(("variable_bias", "head.variable")):
        return 0.5  # which variable it is must be as plain to see as when and where
    spread = parameter.shape[-1] ** -0.5
    if name.endswith(".noise.weight"):
        return _NOISE * spread
    return spread / math.sqrt(2 * layers) if name.endswith((".output.weight", ".down.weight")) else spread
