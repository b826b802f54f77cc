"""Where a variable piles up (dry hours) the head of series has weight for that one value, and only there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sci_gpt.model.heads import GaussianHead, MixtureHead, MixturePrediction
from sci_gpt.model.init import initialize
from sci_gpt.model.inputs import ModelInputs, to_inputs
from sci_gpt.model.loss import mixture_log_probability, unit_losses
from sci_gpt.model.quantiles import prediction_quantiles
from sci_gpt.model.shapes import SHAPES
from sci_gpt.model.transformer import ModelSettings, SciGPT, build_model
from sci_gpt.recipes.load import load_model
from sci_tokenizers.packing import collate
from sci_tokenizers.sample import Sample
from sci_tokenizers.table import make_tokenizer
from sci_tokenizers.tokenizer import TokenizerSettings
from sci_tokenizers.tokens import Tokens
from sci_tokenizers.variables import VARIABLE_INDEX
from toy_model import make_run
from toy_samples import toy_sample, toy_statistics

SETTINGS = TokenizerSettings(grid_patch=4, trace_samples=5)
FRAMES, CONTEXT = 20, 12
RAIN, WIND = 1, 2  # slots of the toy station's variables


def rain(*, dry: float) -> Sample:
    """The toy station, nothing missing, with this share of dry hours over the window, and wind of one speed in them."""
    sample = toy_sample("series", FRAMES, missing=0.0)
    values = sample.values.copy()
    shower = 0.5 + np.arange(FRAMES) / 10.0
    is_dry = np.arange(FRAMES) / FRAMES % 0.25 < dry / 4
    values[:, RAIN, 0, 0] = np.where(is_dry, 0.0, shower)
    values[is_dry, WIND] = 5.0
    return replace(sample, values=values)


def encode(sample: Sample, *, known: bool = True) -> Tokens:
    """Tokens with CONTEXT frames of context, of a known source or of one never seen."""
    tokenizer = make_tokenizer("series", SETTINGS)
    statistics = toy_statistics(sample) if known else None
    return tokenizer.encode(sample, num_context=CONTEXT, leads=(1, 2), statistics=statistics)


def inputs_of(sample: Sample) -> ModelInputs:
    """The sample's document as a batch of one row."""
    tokens = encode(sample)
    return to_inputs(collate([[tokens]], tokens.num_tokens))


@pytest.mark.parametrize("known", [True, False], ids=["known source", "unseen source"])
def test_the_pile_is_the_commonest_value_of_the_context_where_it_is_common(known: bool) -> None:
    sample = rain(dry=0.6)
    tokens = encode(sample, known=known)
    dry = sample.values[:CONTEXT, RAIN, 0, 0] == 0
    assert 0.4 < dry.mean() < 0.8
    assert (tokens.payload[:CONTEXT][dry, RAIN, 0, 0] == tokens.pile[RAIN, 0]).all()
    others = [slot for slot in range(tokens.num_slots) if slot != RAIN]
    assert np.isnan(tokens.pile[others]).all(), "a wind of one speed is no pile: the table says so of rain alone"
    assert np.isnan(encode(rain(dry=0.0), known=known).pile).all(), "every value once is no pile"


def test_what_comes_after_the_context_does_not_move_the_pile() -> None:
    sample = rain(dry=0.6)
    values = sample.values.copy()
    values[CONTEXT:, RAIN] = 3.0
    np.testing.assert_array_equal(encode(sample).pile, encode(replace(sample, values=values)).pile)


def pile_bias(model: SciGPT) -> tuple[Tensor, slice]:
    """The head's last bias, and which of it leans on `heads._pile_features`."""
    head, first = model.heads["series"], model.settings.mixture_components
    assert isinstance(head, MixtureHead)
    bias = head.head.out.bias
    assert bias is not None
    return bias, slice(first, first + 5)


def model_with_pile(logit: float) -> SciGPT:
    """An untrained model whose pile has this logit more than at the start."""
    model = build_model(SHAPES["tiny"], ModelSettings(tokenizer=SETTINGS))
    initialize(model, 0)
    with torch.no_grad():
        bias, rows = pile_bias(model)
        bias[rows] += logit * torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0])
    return model


def test_only_a_variable_that_piles_up_has_weight_there() -> None:
    """With a heavy pile the median of rain is the dry value; the others' weight for it is exactly nothing."""
    inputs = inputs_of(rain(dry=0.6))
    payload = inputs.payloads["series"]
    wet = payload.variable[payload.unit_token, 0] == VARIABLE_INDEX["precipitation_amount"]
    with torch.no_grad():
        found = model_with_pile(9.0)(inputs)["series"]
    assert isinstance(found, MixturePrediction)
    assert (found.log_weight[wet, -1].exp() > 0.9).all()
    assert (found.log_weight[~wet, -1] == -torch.inf).all()
    torch.testing.assert_close(found.log_weight.exp().sum(dim=-1), torch.ones(len(wet)))
    median = prediction_quantiles(found, torch.tensor([0.5]), settings=SETTINGS)[0, :, 0, 0]
    pile = payload.pile[payload.unit_token, 0][wet]
    assert ((median[wet] - pile).abs() < SETTINGS.series_bin_width / 4).all()
    inside = mixture_log_probability(
        replace(
            found, log_weight=torch.log_softmax(torch.tensor([-99.0, -99.0, -99.0, 0.0]), dim=0).expand(len(wet), 4)
        ),
        payload.pile[payload.unit_token, 0].nan_to_num(),
        width=SETTINGS.series_bin_width,
        limit=SETTINGS.series_limit,
    )
    assert (inside[wet].exp() > 0.998).all(), "the pile lies within one bin"


def test_gradients_are_finite_with_and_without_a_pile() -> None:
    model = model_with_pile(0.0)
    inputs = inputs_of(rain(dry=0.6))
    prediction = model(inputs)["series"]
    unit_losses(prediction, inputs.payloads["series"], settings=SETTINGS).sum().backward()
    bias, rows = pile_bias(model)
    assert bias.grad is not None
    assert bias.grad.isfinite().all()
    assert (bias.grad[rows] != 0).all(), "staying at the pile, coming to it, over how long, from how far"


def test_the_anchor_alone_is_what_untrained_heads_say_without_a_lean(tmp_path: Path) -> None:
    """`anchor()` has no trunk; with one it would say the same."""
    loaded = load_model(make_run(tmp_path).output)
    anchor, whole = loaded.anchor(), loaded.untrained()
    for head in whole.model.heads.values():
        assert isinstance(head, GaussianHead | MixtureHead)
        head.start_lean = 0.0
    sample = rain(dry=0.6)
    one, two, moved, start, trunkless = (
        model.predictor.quantiles([sample], num_context=CONTEXT, leads=(1, 2), levels=(0.1, 0.5, 0.9))[0]
        for model in (anchor, whole, loaded, loaded.untrained(), loaded.untrained(trunk=False))
    )
    assert len(anchor.model.blocks) == 0 < len(whole.model.blocks)
    np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(start, trunkless)
    assert not np.array_equal(one, moved)


@pytest.mark.parametrize("missing", [0.0, 1.1])
def test_a_context_without_values_has_no_pile(missing: float) -> None:
    sample = rain(dry=1.0)
    tokens = encode(replace(sample, valid=np.full_like(sample.valid, missing < 1)))
    assert np.isnan(tokens.pile[RAIN, 0]) == (missing > 1)
