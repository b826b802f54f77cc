"""The table of sizes: parameters as the names say, heads that kernels like, plans of the largest without allocating."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sci_gpt.model.shapes import SHAPES
from sci_gpt.model.transformer import ModelSettings, SciGPT
from sci_gpt.parallel.memory import model_state_bytes
from sci_gpt.recipes.plan import plan
from sci_tokenizers.tokenizer import TokenizerSettings
from toy_store import toy_config, write_store

NAMED = {"30M": 30e6, "125M": 125e6, "350M": 350e6, "1.3B": 1.3e9, "7B": 7e9, "13B": 13e9, "70B": 70e9}


@pytest.mark.parametrize("size", NAMED)
def test_a_size_has_the_parameters_of_its_name(size: str) -> None:
    """Of the whole model, on the meta device."""
    with torch.device("meta"):
        model = SciGPT(SHAPES[size], ModelSettings(tokenizer=TokenizerSettings()))
    assert model.num_parameters == pytest.approx(NAMED[size], rel=0.05)
    assert SHAPES[size].head_width in (64, 128)


def test_the_largest_size_is_planned_without_its_weights(tmp_path: Path) -> None:
    """280 GB of weights are not there; what they and the rows would take is."""
    store = write_store(tmp_path / "store")
    layout = {"processes": 2, "zero_stage": 3, "dtype": "bf16"}
    kept = {}
    for mode in ("none", "selective", "full"):
        parallel = layout | {"activation_checkpointing": mode}
        found = plan(toy_config(store, tmp_path / "run", model={"size": "70B"}, parallel=parallel))
        kept[mode] = found["bytes_per_process"]["activations"]
    total = found["parameters"]["total"]
    assert total == pytest.approx(70e9, rel=0.05)
    assert found["bytes_per_process"]["model_states"] == model_state_bytes(total, 2, 3, dtype="bf16")
    # 6 FLOPs a parameter and token, a little more for attention; heads work on few tokens
    assert found["flops_per_step"] == pytest.approx(6 * total * found["tokens_per_step"], rel=0.02)
    assert kept["none"] > 1.5 * kept["selective"] > 4.5 * kept["full"]
