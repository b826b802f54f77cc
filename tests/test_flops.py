"""FLOPs of a training step by formula equal what torch counts of it; the plan counts its windows the same way."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from sci_gpt.config import MixtureEntry
from sci_gpt.model import attention
from sci_gpt.model.flops import Work, training_flops, work_of
from sci_gpt.model.init import initialize
from sci_gpt.model.inputs import ModelInputs, to_inputs
from sci_gpt.model.loss import weighted_sums
from sci_gpt.model.shapes import SHAPES
from sci_gpt.model.transformer import ModelSettings, SciGPT, build_model
from sci_gpt.recipes.plan import document_work
from sci_tokenizers.masked import masked_tokens
from sci_tokenizers.packing import collate
from sci_tokenizers.sample import Sample
from sci_tokenizers.table import make_tokenizer
from sci_tokenizers.tokenizer import TokenizerSettings
from toy_samples import toy_sample

SETTINGS = TokenizerSettings(grid_patch=2, trace_samples=5)  # grids of 3 x 5 patches
CONTEXT, LEADS = 3, (1, 2)


def forward_flops(q: Any, k: Any, v: Any, *rest: Any, **named: Any) -> int:
    """torch counts this kernel for CUDA only."""
    count: int = sdpa_flop_count(q, k, v)
    return count


def backward_flops(gradient: Any, q: Any, k: Any, v: Any, *rest: Any, **named: Any) -> int:
    """As `forward_flops`."""
    count: int = sdpa_backward_flop_count(gradient, q, k, v)
    return count


ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: forward_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: backward_flops,
}


def document(modality: str, frames: int, *, seed: int) -> Sample:
    """A window of so many frames."""
    return toy_sample(modality, frames * make_tokenizer(modality, SETTINGS).frame_times, seed=seed)


def packed(*samples: Sample) -> ModelInputs:
    """One row, with some empty positions."""
    tokens = [make_tokenizer(x.modality, SETTINGS).encode(x, num_context=CONTEXT, leads=LEADS) for x in samples]
    return to_inputs(collate([tokens], sum(x.num_tokens for x in tokens) + 11))


def counted(model: SciGPT, inputs: ModelInputs) -> float:
    """What torch counts of a forward and a backward pass."""
    with FlopCounterMode(display=False, custom_mapping=ON_CPU) as counter:
        torch.stack(list(weighted_sums(model(inputs), inputs, settings=SETTINGS).values())).sum().backward()
    return float(counter.get_total_flops())


@pytest.mark.parametrize("radius", [None, 1])
@pytest.mark.parametrize("entries", [2**24, 3000])
def test_flops_are_those_that_torch_counts(radius: int | None, entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed documents of every modality, with masks in one piece and cut, and with local layers."""
    monkeypatch.setattr(attention, "MASK_ENTRIES", entries)
    settings = ModelSettings(tokenizer=SETTINGS, radius=radius)
    model = build_model(replace(SHAPES["100k"], layers=3), settings)
    initialize(model, 0)
    inputs = packed(
        document("grid", 6, seed=0), document("series", 9, seed=1), document("trace", 7, seed=2),
        document("grid", 6, seed=3),
    )  # fmt: skip
    found = training_flops(model, work_of(inputs, radius=radius))
    assert sum(found.values()) == counted(model, inputs)
    assert min(found.values()) > 0
    with torch.device("meta"):
        large = SciGPT(SHAPES["100k"], settings)
    assert training_flops(large, work_of(inputs))["heads"] == found["heads"]


@pytest.mark.parametrize("modality", ["grid", "series", "trace"])
def test_the_plans_work_is_that_of_a_window(modality: str) -> None:
    """A full row of the source's documents."""
    entry = MixtureEntry(source="toy", weight=1.0, frames=8, stride=1, context_frames=(CONTEXT, CONTEXT), leads=LEADS)
    sample = document(modality, entry.frames, seed=1)
    tokens = make_tokenizer(modality, SETTINGS).encode(sample, num_context=CONTEXT, leads=LEADS)
    batch = collate([[tokens]], tokens.num_tokens)
    found = document_work(entry, sample.modality, shape=sample.values.shape[1:], settings=SETTINGS, radius=1)
    assert found == work_of(to_inputs(batch), radius=1)


@pytest.mark.parametrize("modality", ["grid", "series", "trace"])
def test_the_plans_work_is_that_of_masked_windows_in_their_share(
    modality: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masked documents attend to all frames and ask for what they hide: the mean of as many as the plan draws."""
    monkeypatch.setattr(attention, "MASK_ENTRIES", 300)  # a causal document is cut into pieces of frames
    entry = MixtureEntry(source="toy", weight=1.0, frames=8, stride=1, context_frames=(CONTEXT, CONTEXT), leads=LEADS)
    sample = document(modality, entry.frames, seed=1)

    def planned(masked: float) -> Work:
        shared = entry.model_copy(update={"masked": masked})
        return document_work(shared, sample.modality, shape=sample.values.shape[1:], settings=SETTINGS, radius=1)

    tokens = [
        masked_tokens(make_tokenizer(modality, SETTINGS), sample, key=key, num_context=CONTEXT, leads=LEADS)
        for key in range(16)
    ]
    works = [work_of(to_inputs(collate([[one]], one.num_tokens)), radius=1) for one in tokens]
    none, all_of_them, third = planned(0.0), planned(1.0), planned(1 / 3)
    assert all_of_them == replace(works[0], payloads=all_of_them.payloads)
    assert all_of_them.payloads[modality].units == np.mean([one.payloads[modality].units for one in works])
    assert all_of_them.payloads[modality].answers == np.mean([one.payloads[modality].answers for one in works])
    for name in ("wide_pairs", "near_pairs"):
        ahead, masked = getattr(none, name), getattr(all_of_them, name)
        assert masked > ahead, name
        assert getattr(third, name) == pytest.approx((2 * ahead + masked) / 3), name
