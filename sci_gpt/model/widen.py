"""More rows in a model's variable tables, for variables that it has not met; what it says of the others stays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sci_gpt.model.init import LEVELS, standard_normal
from sci_gpt.model.transformer import SciGPT

_TABLES = ("variable_gain", "variable_bias", "head.variable")
_SEED = 0  # of the rows of new variables: the same in every process that loads the model
_SPREAD = 0.5  # as `init.initialize` draws them


def is_table(name: str) -> bool:
    """Is this parameter a table with one row per variable?"""
    return name.endswith(_TABLES)


def with_rows(weights: Mapping[str, Tensor], names: Sequence[str], *, table: Sequence[str]) -> dict[str, Tensor]:
    """Weights whose variable tables have one row per name of `table`, every known variable's row as it was.

    Args:
        weights: a model's, by parameter name.
        names: what the rows of its tables stand for.
        table: what they shall stand for; a name that is not in `names` gets a new row, keyed by that name.
    """
    at = {name: row for row, name in enumerate(names)}
    out = dict(weights)
    for parameter, tensor in weights.items():
        if is_table(parameter) and list(names) != list(table):
            out[parameter] = torch.stack(
                [tensor[at[name]] if name in at else _new_row(parameter, name, like=tensor) for name in table]
            )
    return out


def with_levels(weights: Mapping[str, Tensor], model: SciGPT) -> dict[str, Tensor]:
    """Weights of a model that was saved before variables had levels of their own: 0 for what it lacks of them, as every
    model starts, so that it says what it said.
    """
    own = model.state_dict()
    lacking = {name: torch.zeros_like(own[name]) for name in own if name.endswith(LEVELS) and name not in weights}
    return dict(weights) | lacking


def _new_row(parameter: str, name: str, *, like: Tensor) -> Tensor:
    """(width,): as every row starts, whatever its number, so that two machines give a new variable the same."""
    width = like.shape[1]
    if parameter.endswith("variable_gain"):
        return torch.zeros(width, dtype=like.dtype)
    return (standard_normal(_SEED, f"{parameter}:{name}", start=0, stop=width) * _SPREAD).to(like.dtype)


def widened(model: SciGPT, names: Sequence[str], *, table: Sequence[str]) -> dict[str, Tensor]:
    """`with_rows` of a model's own weights, copies."""
    return {name: tensor.clone() for name, tensor in with_rows(model.state_dict(), names, table=table).items()}
