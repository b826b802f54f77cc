"""Variables that a saved model declares: their rows find their place in the table of the process that loads it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from sci_gpt.errors import CheckpointError, ConfigError
from sci_gpt.model.widen import with_rows
from sci_tokenizers.variables import BUILT_IN, VARIABLES, UnitError, Variable, declare

# What can be scored point to point; an angle comes as two components, and a category has no order.
KINDS = ("ratio", "interval", "accumulated")
_TRANSFORMS = ("none", "log1p", "asinh")


def parse_variable(words: str) -> Variable:
    """A variable from `name:unit:kind[:transform]`.

    A ratio or accumulated amount is 0 or more; an accumulated one piles up at 0 and is seen through log1p unless a
    transform is named.

    Raises:
        ConfigError: other words, or a kind that is not among `KINDS`.
    """
    parts = [part.strip() for part in words.split(":")]
    if len(parts) not in (3, 4) or not all(parts):
        raise ConfigError(f"--variable is name:unit:kind[:transform], as turbidity:NTU:ratio, got {words!r}")
    name, unit, kind = parts[:3]
    if kind not in KINDS:
        raise ConfigError(
            f"--variable {words!r}: kind is one of {', '.join(KINDS)} (give an angle as two components), got {kind!r}"
        )
    transform = parts[3] if len(parts) == 4 else ("log1p" if kind == "accumulated" else "none")
    if transform not in _TRANSFORMS:
        raise ConfigError(f"--variable {words!r}: transform is one of {', '.join(_TRANSFORMS)}, got {transform!r}")
    return Variable(
        name=name,
        unit=unit,
        kind=kind,  # type: ignore[arg-type]
        transform=transform,  # type: ignore[arg-type]
        piles_up=kind == "accumulated",
        minimum=-math.inf if kind == "interval" else 0.0,
    )


def declare_all(variables: Sequence[Variable]) -> None:
    """Add variables to the table of this process.

    Raises:
        ConfigError: a name that stands for something else already.
    """
    for variable in variables:
        try:
            declare(variable)
        except UnitError as error:
            raise ConfigError(f"--variable {variable.name}: {error}") from error


def own_table(num_variables: int, used: Sequence[str]) -> dict[str, Any]:
    """What a saved model says of its rows: the variables that this code has, and the declared ones that it uses."""
    names = list(VARIABLES)[:num_variables]
    declared = [name for name in names if name not in BUILT_IN and name in used]
    return {
        "variables": [name for name in names if name in BUILT_IN] + declared,
        "declared": [_plain(VARIABLES[name]) for name in declared],
    }


def _plain(variable: Variable) -> dict[str, Any]:
    """Its fields but infinite limits, which JSON has not and which are the default."""
    row = asdict(variable)
    return {name: value for name, value in row.items() if not (isinstance(value, float) and math.isinf(value))}


def for_saving(weights: Mapping[str, Tensor], num_variables: int, *, names: Sequence[str]) -> dict[str, Tensor]:
    """Weights whose tables have the rows of `names` alone, in that order."""
    return with_rows(weights, list(VARIABLES)[:num_variables], table=names)


def in_this_table(
    state: Mapping[str, Any], weights: Mapping[str, Tensor], *, where: str
) -> tuple[dict[str, Tensor], int]:
    """Weights whose rows stand as the variables do in this process, and how many rows there are.

    Raises:
        CheckpointError: the model's variables are not those of this code, or one that it declares is another one here.
    """
    known, declared = list(state.get("variables", BUILT_IN)), state.get("declared", [])
    names = [row["name"] for row in declared]
    own = [name for name in known if name not in names]
    if own != list(BUILT_IN[: len(own)]) or not set(names) <= set(known):
        raise CheckpointError(
            f"{where}: its variable table differs from this code's; load it with {state['code_version']}"
        )
    try:
        for row in declared:
            declare(Variable(**row))
    except (UnitError, TypeError) as error:
        raise CheckpointError(f"{where}: a variable that it declares cannot be had here: {error}") from error
    if not names:
        return dict(weights), len(known)
    table = list(VARIABLES)
    return with_rows(weights, known, table=table), len(table)
