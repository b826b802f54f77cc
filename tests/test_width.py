"""The muP rule: what a few steps move is as large in a wide model as in a narrow one; the standard rule's grows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from draw_coordinates import BASE_WIDTH, LAYERS, table
from sci_gpt.config import PretrainConfig
from sci_gpt.data.store import Store
from sci_gpt.model.shapes import SHAPES, ModelShape
from sci_gpt.model.transformer import ModelSettings, SciGPT
from sci_gpt.model.width import rate_factors
from sci_gpt.recipes import parts
from sci_tokenizers.tokenizer import TokenizerSettings
from toy_store import toy_config, write_store

WIDTHS = (32, 128, 512)


def slopes(rule: str) -> dict[str, float]:
    """Power of the width with which each output's change goes."""
    return {
        name: float(np.polyfit(np.log(WIDTHS), np.log(values), 1)[0]) for name, values in table(rule, WIDTHS).items()
    }


def test_changes_are_flat_in_width_under_mup_and_grow_under_the_standard_rule() -> None:
    """Seen: -0.11 to 0.02 against 0.6 to 0.7 (layers) and 0.3 to 0.7 (heads)."""
    mup, standard = slopes("mup"), slopes("standard")
    assert len(mup) == LAYERS + 2
    for name, slope in mup.items():
        assert abs(slope) < 0.2, name
        assert standard[name] > (0.45 if name.startswith("layer") else 0.2), name


def test_at_the_base_width_both_rules_are_one() -> None:
    standard, mup = (table(rule, (BASE_WIDTH,)) for rule in ("standard", "mup"))
    assert standard == mup


def test_hidden_matrices_alone_learn_more_slowly() -> None:
    shape = ModelShape(layers=1, width=64, heads=4, hidden=168)
    with torch.device("meta"):
        model = SciGPT(shape, ModelSettings(tokenizer=TokenizerSettings(), base_width=16))
        plain = SciGPT(SHAPES["70B"], ModelSettings(tokenizer=TokenizerSettings()))
    factors = rate_factors(model)
    block = {f"blocks.0.{name}.weight" for name in ("query", "key", "value", "output", "gate", "up", "down")}
    assert set(factors) == block | {f"heads.{name}.head.hidden.weight" for name in ("grid", "series", "trace")}
    assert set(factors.values()) == {0.25}
    assert {head.head.output_scale for head in model.heads.values()} == {0.25}  # type: ignore[union-attr]
    assert rate_factors(plain) == {}


def test_the_configuration_names_the_rule_and_old_checkpoints_go_on(tmp_path: Path) -> None:
    """What computes the same as before the keys were there is the same run."""
    store = write_store(tmp_path / "store")

    def made(**model: Any) -> PretrainConfig:
        return toy_config(store, tmp_path / "run", model={"size": "tiny"} | model)

    opened = Store.open(store)
    assert parts.identity(made(), opened)["model"] == {
        "size": "tiny",
        "mixture_components": 3,
        "id_table": True,
    }
    assert parts.model_settings(made()).base_width is None and parts.model_settings(made()).radius is None
    changed = made(width_rule="mup", base_width=64, attention={"radius": 6, "global_every": 3})
    found = parts.model_settings(changed)
    assert (found.base_width, found.radius, found.global_every) == (64, 6, 3)
    assert parts.identity(changed, opened)["model"] == changed.model.model_dump(mode="json", exclude={"noise"})
