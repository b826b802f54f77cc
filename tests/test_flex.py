"""FlexAttention as a GPU meets it, as far as a CPU can tell: its gradient, types under autocast, one compiled graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.attention.flex_attention as kernels
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from sci_gpt.model import attention, flex
from sci_gpt.model.flex import FlexReach, attend_flex
from sci_gpt.model.init import initialize
from sci_gpt.model.inputs import ModelInputs, to_inputs
from sci_gpt.model.shapes import SHAPES
from sci_gpt.model.transformer import ModelSettings, SciGPT, build_model
from sci_tokenizers.packing import collate
from sci_tokenizers.table import make_tokenizer
from sci_tokenizers.tokenizer import TokenizerSettings
from test_attention import drawn, packed, reference, seen
from toy_samples import toy_sample

SETTINGS = TokenizerSettings(grid_patch=4, trace_samples=5)


def small_model() -> tuple[SciGPT, ModelInputs]:
    """A trunk of two layers with drawn weights, and a packed row of a grid and a series."""
    model = build_model(SHAPES["tiny"], ModelSettings(tokenizer=SETTINGS))
    initialize(model, 0)
    documents = [
        make_tokenizer(modality, SETTINGS).encode(toy_sample(modality, frames), num_context=4, leads=(1,))
        for modality, frames in (("grid", 6), ("series", 12))
    ]
    return model, to_inputs(collate([documents], 110))


@pytest.mark.parametrize("radius", [None, 2])
def test_the_gradient_is_that_of_plain_loops(radius: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all that lies around the kernel: torch refuses the kernel's own on a CPU, though it has its plain form."""
    monkeypatch.setattr(kernels, "_validate_device", lambda *tensors: None)
    inputs = packed()
    table, tensors = seen(inputs, radius), drawn(inputs)
    weight = drawn(inputs, seed=2)[0]
    wanted = [x.clone().double().requires_grad_() for x in tensors]
    (reference(wanted[0], wanted[1], wanted[2], table=table) * weight).sum().backward()
    given = [x.clone().requires_grad_() for x in tensors]
    found = attend_flex(given[0], given[1], v=given[2], reach=FlexReach.of(inputs, radius=radius))
    (found * weight).sum().backward()
    for mine, theirs in zip(given, wanted, strict=True):
        assert mine.grad is not None and theirs.grad is not None
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5)


class AutocastOfGpus(TorchFunctionMode):
    """What autocast does on a GPU (from torch 2.12 on) and not on a CPU: norms give float32, index_copy takes one type.

    So say the lists in torch's ATen/autocast_mode.h.
    """

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), named: dict[str, Any] | None = None
    ) -> Any:
        name, named = getattr(function, "__name__", ""), named or {}
        if name not in ("rms_norm", "index_copy"):
            return function(*arguments, **named)
        with torch.autocast("cpu", enabled=False):
            if name == "rms_norm":
                arguments, named = tree_map_only(Tensor, torch.Tensor.float, (arguments, named))
            return function(*arguments, **named)


def test_the_trunk_in_bf16_takes_norms_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries and keys then come in float32 beside values in bf16; the kernel takes one type."""
    types: list[set[torch.dtype]] = []

    def kernel(q: Tensor, k: Tensor, v: Tensor, **named: Any) -> Tensor:
        types.append({q.dtype, k.dtype, v.dtype})
        mixed: Any = kernels.flex_attention(q, k, v, **named)
        return mixed

    monkeypatch.setattr(attention, "has_kernel", lambda device: True)
    monkeypatch.setattr(flex, "flex_attention", kernel)
    model, inputs = small_model()
    with torch.no_grad():
        expected = model.trunk(inputs)
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
        with AutocastOfGpus(), torch.autocast("cpu", torch.bfloat16):
            found = model.trunk(inputs)
    assert types == [{torch.float32}] * 2 + [{torch.bfloat16}] * 2
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


def test_a_compiled_trunk_is_one_graph_with_the_kernel_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "has_kernel", lambda device: True)
    model, inputs = small_model()
    with torch.no_grad():
        expected = model.trunk(inputs)
        found = torch.compile(model.trunk, backend="eager", fullgraph=True)(inputs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
