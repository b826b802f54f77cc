"""Embeddings: payload values by modality, and the physical context of every token as Fourier features."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sci_gpt.model.inputs import PayloadInputs
from sci_tokenizers.autoregression import HORIZONS
from sci_tokenizers.memory import MEMORIES
from sci_tokenizers.packing import QUESTION_FEATURES, TOKEN_FEATURES

# Periodic quantities by period; the others are logarithms or lengths, seen through a few slow waves and as they are.
_PERIOD = {
    "latitude": 360.0,
    "longitude": 360.0,
    "year_phase": 1.0,
    "day_phase": 1.0,
    "next_year_phase": 1.0,
    "next_day_phase": 1.0,
}
_HARMONICS = 3
_WAVES = (0.15, 0.45, 1.35)
_SPAN = {"elevation": 1000.0}
_VALUE_WAVES = (0.5, 1.0, 2.0)


class FourierFeatures(nn.Module):
    """Quantities (N, Q), NaN where unknown, to (N, out_features): sin and cos of each, 0 where unknown, plus a known
    flag.
    """

    frequency: Tensor
    linear: Tensor

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        self.names = names
        # Constants are computed where they are, also for a model whose parameters have no memory yet.
        frequency = torch.zeros(len(names), _HARMONICS, device="cpu")
        linear = torch.zeros(len(names), device="cpu")
        for i, name in enumerate(names):
            if name in _PERIOD:
                frequency[i] = torch.arange(1, _HARMONICS + 1, device="cpu") * (2 * math.pi / _PERIOD[name])
            else:
                frequency[i] = torch.tensor(_WAVES, device="cpu") / _SPAN.get(name, 1.0)
                linear[i] = 0.1 / _SPAN.get(name, 1.0)
        self.register_buffer("frequency", frequency, persistent=False)
        self.register_buffer("linear", linear, persistent=False)
        self.out_features = len(names) * (2 * _HARMONICS + 2)

    def forward(self, quantities: Tensor) -> Tensor:
        """See the class."""
        known = torch.isfinite(quantities)
        clean = torch.where(known, quantities, 0.0)
        angle = clean[..., None] * self.frequency
        waves = torch.cat([angle.sin(), angle.cos()], dim=-1) * known[..., None]
        flat = torch.cat([waves.flatten(-2), clean * self.linear, known.float()], dim=-1)
        return flat


class ValueFeatures(nn.Module):
    """A scaled number as features: itself, squashed, and slow waves, so that near values look alike."""

    out_features = 2 + 2 * len(_VALUE_WAVES)

    def forward(self, values: Tensor) -> Tensor:
        """(N,) to (N, out_features)."""
        waves = [f(values * wave) for wave in _VALUE_WAVES for f in (torch.sin, torch.cos)]
        return torch.stack([values, torch.tanh(values), *waves], dim=-1)


class LevelEmbedding(nn.Module):
    """The level of each variable of a token as `outputs` numbers: 0 where it has none, and all before training."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.features = FourierFeatures(("log_level",))
        self.project = nn.Linear(self.features.out_features, outputs, bias=False)

    def forward(self, log_level: Tensor) -> Tensor:
        """(N, V) to (N, V, outputs)."""
        return self.project(self.features(log_level[..., None]))


class PayloadEmbedding(nn.Module):
    """Payload of one modality to the trunk's width: the variables' embeddings are summed over what is there.

    Args:
        num_values: K of a token; 1 (series) goes through `ValueFeatures`.
        num_variables: rows of the variable table; per-variable weights are one stacked parameter, indexed.
        width: of the trunk.
        num_ids: rows of a table of ids, of which an id's row is added to its value's embedding; 0: no table. The table
            starts at 0: an id is first known by its value alone, and learns what its neighbours do not share.
        levels: a token may hold one variable at several levels: each variable's level is embedded with it.
    """

    id_table: nn.Parameter | None

    def __init__(
        self, num_values: int, num_variables: int, *, width: int, num_ids: int = 0, levels: bool = False
    ) -> None:
        super().__init__()
        self.id_table = nn.Parameter(torch.zeros(num_ids, width)) if num_ids else None
        self.value_features = ValueFeatures() if num_values == 1 else None
        inputs = ValueFeatures.out_features if num_values == 1 else num_values
        self.num_memories = len(MEMORIES) if num_values == 1 else 0
        self.project = nn.Linear(inputs + num_values + 2 + self.num_memories + len(HORIZONS), width, bias=False)
        self.variable_gain = nn.Parameter(torch.zeros(num_variables, width))
        self.variable_bias = nn.Parameter(torch.zeros(num_variables, width))
        self.level = LevelEmbedding(2 * width) if levels else None

    def forward(self, payload: PayloadInputs) -> Tensor:
        """(N, width).

        Raises:
            ValueError: an id that the table does not have (on a CPU; elsewhere looking would wait for the device).
        """
        valid = payload.valid.float()
        values = payload.values * valid
        if self.value_features is not None:
            values = self.value_features(values[..., 0]) * valid
        else:
            values = torch.asinh(values)  # an onset may stand a thousand context spreads high
        scale = payload.log_scale
        known = torch.isfinite(scale)
        size = torch.stack([torch.where(known, scale, 0.0) * 0.1, known.float()], dim=-1)
        present = (payload.variable >= 0)[..., None].float()
        row = payload.variable.clamp(min=0)
        past = payload.memory.flatten(2)[..., : self.num_memories]
        projected = self.project(torch.cat([values, valid, size, past, payload.volatility], dim=-1))
        gain, bias = F.embedding(row, self.variable_gain), F.embedding(row, self.variable_bias)
        if self.level is not None:  # a gain, since sums of values and sums of levels would not say which is whose
            level_gain, level_bias = self.level(payload.log_level).chunk(2, dim=-1)
            gain, bias = gain + level_gain, bias + level_bias
        embedded = projected * (1.0 + gain) + bias
        summed = (embedded * present).sum(dim=1)
        return summed if self.id_table is None else summed + self._of_ids(payload.ids) * valid[:, 0, :1]

    def _of_ids(self, ids: Tensor) -> Tensor:
        """Rows (N, width) of the table."""
        assert self.id_table is not None
        rows = len(self.id_table)
        if ids.device.type == "cpu" and not torch.compiler.is_compiling():
            wrong = ids[(ids < 0) | (ids >= rows)]
            if len(wrong):
                raise ValueError(
                    f"id {int(wrong[0])} is not within 0..{rows - 1}, the ids of this model's series; encode with its "
                    "tokenizer settings (series_ids)"
                )
        return F.embedding(ids, self.id_table)


class ContextEmbedding(nn.Module):
    """Place, time, step and the next frame's question of every token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.features = FourierFeatures(TOKEN_FEATURES)
        self.project = nn.Linear(self.features.out_features, width, bias=True)

    def forward(self, features: Tensor) -> Tensor:
        """(T, features) to (T, width)."""
        return self.project(self.features(features))


class QuestionEmbedding(nn.Module):
    """How far ahead a unit is asked, and the phase of the year and day of the answer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.features = FourierFeatures(QUESTION_FEATURES)
        self.project = nn.Linear(self.features.out_features, width, bias=True)

    def forward(self, question: Tensor) -> Tensor:
        """(U, features) to (U, width)."""
        return self.project(self.features(question))
