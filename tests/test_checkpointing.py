"""Activation checkpointing changes memory and time, no gradient; the estimate of memory knows each way of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sci_gpt.errors import ConfigError
from sci_gpt.model.checkpointing import Checkpointing
from sci_gpt.model.init import initialize
from sci_gpt.model.inputs import ModelInputs, to_inputs
from sci_gpt.model.loss import weighted_sums
from sci_gpt.model.shapes import SHAPES
from sci_gpt.model.transformer import ModelSettings, SciGPT, build_model
from sci_gpt.parallel.memory import activation_bytes
from sci_tokenizers.packing import collate
from sci_tokenizers.table import make_tokenizer
from sci_tokenizers.tokenizer import TokenizerSettings
from toy_samples import toy_sample

SETTINGS = TokenizerSettings(grid_patch=4, trace_samples=5)
MODES: tuple[Checkpointing, ...] = ("none", "selective", "full")


class Alive(TorchDispatchMode):
    """Remembers the memory of every tensor that is made, to ask later what of it is still held."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        """Run the operator."""
        result = function(*arguments, **(named or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                self.made[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def num_bytes(self, *, without: set[int]) -> int:
        """Bytes still held."""
        return sum(n for place, (weak, n) in self.made.items() if place not in without and not weak.expired())


@pytest.fixture(scope="module")
def inputs() -> ModelInputs:
    """Packed documents of every modality."""
    tokens = []
    for number, (modality, frames) in enumerate((("grid", 9), ("series", 60), ("trace", 20))):
        tokenizer = make_tokenizer(modality, SETTINGS)
        sample = toy_sample(modality, frames * tokenizer.frame_times, seed=number)
        tokens.append(tokenizer.encode(sample, num_context=frames // 2, leads=(1, 2)))
    return to_inputs(collate([tokens], sum(x.num_tokens for x in tokens) + 5))


def model_of(size: str, **settings: Any) -> SciGPT:
    """Initial weights, and something in the last layers of the heads, whose gradient would else stop there."""
    model = build_model(SHAPES[size], ModelSettings(tokenizer=SETTINGS, **settings))
    initialize(model, 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".out." in name:
                parameter.copy_(torch.linspace(-0.1, 0.1, parameter.numel()).view_as(parameter))
    return model


def loss(model: SciGPT, inputs: ModelInputs) -> torch.Tensor:
    """Of all modalities."""
    return torch.stack(list(weighted_sums(model(inputs), inputs, settings=SETTINGS).values())).sum()


@pytest.mark.parametrize("radius", [None, 1])
def test_gradients_are_the_same(inputs: ModelInputs, radius: int | None) -> None:
    model = model_of("tiny", radius=radius)
    found: dict[str, list[torch.Tensor]] = {}
    for model.checkpointing in MODES:
        model.zero_grad()
        loss(model, inputs).backward()
        found[model.checkpointing] = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert len(found["none"]) == len(list(model.parameters()))
    for mode in ("selective", "full"):
        for mine, theirs in zip(found[mode], found["none"], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("size", ["tiny", "1M"])
def test_the_estimate_of_activations_is_what_is_held(inputs: ModelInputs, size: str) -> None:
    """After the forward pass, and with the layer that the backward pass computes again: what one keeps without."""
    model = model_of(size)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held: dict[str, int] = {}
    for model.checkpointing in MODES:
        with Alive() as alive:
            total = loss(model, inputs)
        held[model.checkpointing] = alive.num_bytes(without=weights)
        total.backward()
    assert held["none"] > 1.3 * held["selective"] > 1.5 * held["full"]
    for mode in MODES:
        again = (held["none"] - held[mode]) / len(model.blocks)
        expected = activation_bytes(SHAPES[size], len(inputs.frame), checkpointing=mode)
        assert expected == pytest.approx(held[mode] + again, rel=0.3)


def test_a_way_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match="one of .'full', 'none', 'selective'., got 'half'"):
        activation_bytes(SHAPES["tiny"], 10, checkpointing="half")  # type: ignore[arg-type]
