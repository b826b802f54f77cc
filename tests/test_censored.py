"""Bounded variables: the censored normal's CRPS against its integral, bounds where dry cells lie, others untouched."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.special import ndtr

from sci_gpt.model.heads import GaussianPrediction
from sci_gpt.model.inputs import PayloadInputs, to_inputs
from sci_gpt.model.loss import crps_censored, crps_gaussian, crps_of, unit_losses
from sci_gpt.model.quantiles import prediction_quantiles
from sci_gpt.model.shapes import SHAPES
from sci_gpt.model.transformer import ModelSettings, build_model
from sci_tokenizers.packing import collate
from sci_tokenizers.table import make_tokenizer
from sci_tokenizers.tokenizer import TokenizerSettings
from sci_tokenizers.tokens import Tokens
from sci_tokenizers.variables import lower_bound
from toy_samples import toy_sample

NUMBER = partial(st.floats, allow_subnormal=False)  # a test before may have had them flushed to 0

SETTINGS = TokenizerSettings(grid_patch=4, trace_samples=5)
WET = 1  # the toy grid's precipitation


def document(modality: str = "grid", *, seed: int = 0) -> Tokens:
    """A made-up window; the grid's second variable is precipitation, half of it dry."""
    tokenizer = make_tokenizer(modality, SETTINGS)
    sample = toy_sample(modality, 8 * tokenizer.frame_times, seed=seed)
    return tokenizer.encode(sample, num_context=4, leads=(1, 2))


def payload_of(*documents: Tokens) -> PayloadInputs:
    """Of the first's modality."""
    return to_inputs(collate([[tokens] for tokens in documents], 60)).payloads[documents[0].modality]


def predicted(payload: PayloadInputs, *, seed: int = 0) -> GaussianPrediction:
    """Locations about the bounds, with the payload's own bounds."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(payload.unit_token), *payload.values.shape[1:])
    return GaussianPrediction(
        mean=torch.randn(shape, generator=generator),
        log_spread=0.5 * torch.randn(shape, generator=generator),
        lower=payload.unit_lower if payload.unit_lower.shape[-1] else None,
    )


def integral(mean: float, spread: float, *, truth: float, lower: float) -> float:
    """CRPS by quadrature: the integral of (F(x) - [x >= truth])^2, F the distribution of max(normal, lower)."""

    def squared(x: float) -> float:
        below = ndtr((x - mean) / spread) if x >= lower else 0.0
        return float(below - (x >= truth)) ** 2

    ends = sorted({max(lower, mean - 12 * spread), truth, mean, max(mean, truth, lower) + 12 * spread})
    return sum(
        quad(squared, start, stop, epsabs=1e-13, epsrel=1e-13, limit=200)[0]
        for start, stop in zip(ends[:-1], ends[1:], strict=True)
        if stop > lower
    )


@settings(max_examples=60, deadline=None)
@given(NUMBER(-4, 4), NUMBER(-2, 1), NUMBER(-3, 3), st.one_of(st.just(0.0), NUMBER(0, 6)))
def test_censored_crps_is_the_integral(mean: float, log_spread: float, lower: float, above: float) -> None:
    """To 1e-10 in float64, the truth on the bound included."""
    numbers = [torch.tensor(x, dtype=torch.float64) for x in (mean, log_spread, lower + above, lower)]
    found = crps_censored(numbers[0], numbers[1], truth=numbers[2], lower=numbers[3])
    expected = integral(mean, math.exp(log_spread), truth=lower + above, lower=lower)
    assert float(found) == pytest.approx(expected, abs=1e-10)


@settings(max_examples=40, deadline=None)
@given(NUMBER(-4, 4), NUMBER(-2, 1), NUMBER(-8, 8))
def test_plain_crps_is_the_integral(mean: float, log_spread: float, truth: float) -> None:
    """To 1e-10 in float64 (Gneiting and Raftery 2007, eq. 20); a bound far below changes nothing."""
    numbers = [torch.tensor(x, dtype=torch.float64) for x in (mean, log_spread, truth)]
    found = float(crps_gaussian(numbers[0], numbers[1], truth=numbers[2]))
    assert found == pytest.approx(integral(mean, math.exp(log_spread), truth=truth, lower=-1e3), abs=1e-10)
    far = crps_censored(numbers[0], numbers[1], truth=numbers[2], lower=torch.tensor(-1e3, dtype=torch.float64))
    assert found == pytest.approx(float(far), abs=1e-12)


def test_a_dry_forecast_of_a_dry_cell_costs_nothing_and_a_wet_one_does() -> None:
    """Float32: all of the distribution on the bound; and finite gradients however far the location lies below."""
    mean = torch.tensor([-30.0, -2.0, 1.0], requires_grad=True)
    log_spread = torch.zeros(3, requires_grad=True)
    loss = crps_censored(mean, log_spread, truth=torch.zeros(3), lower=torch.zeros(3))
    loss.sum().backward()
    assert loss[0] == 0.0 and 0.0 < loss[1] < 0.01 and loss[2] > 0.5
    assert mean.grad is not None and log_spread.grad is not None
    assert torch.isfinite(mean.grad).all() and torch.isfinite(log_spread.grad).all()
    assert (mean.grad[1:] > 0).all()


def test_a_dry_value_lies_on_its_bound() -> None:
    """Bit by bit: where precipitation is 0 its payload is the bound; temperature has none; the rest is above."""
    tokens, sample = document(seed=3), toy_sample("grid", 8, seed=3)
    payload = payload_of(tokens)
    assert (payload.unit_lower[:, 0] == -torch.inf).all()
    back = make_tokenizer("grid", SETTINGS).decode(tokens, tokens.payload)
    patches = np.zeros((8, 8, 12), bool)  # time, rows and columns of whole patches
    patches[:, :6, :9] = sample.valid[:, WET] & (back[:, WET] == 0.0)
    dry = patches.reshape(8, 2, 4, 3, 4).swapaxes(2, 3).reshape(8 * 6, 16)  # (frame, slot), cell
    wet, there = payload.values[:, WET][payload.unit_target], payload.valid[:, WET][payload.unit_target]
    lower = payload.unit_lower[:, WET]
    assert (wet >= lower)[there].all()
    np.testing.assert_array_equal(((wet == lower) & there).numpy(), dry[payload.unit_target.numpy()])
    assert 20 < dry[4 * 6 :].sum() < 300
    assert ((back[:, WET] == 0.0) == (sample.values[:, WET] == 0.0))[sample.valid[:, WET]].all()


def test_what_is_bounded() -> None:
    """What accumulates or piles up, at its minimum, in transformed units; a plain range is no bound."""
    for name in ("precipitation_amount", "precipitation_flux", "surface_snow_amount", "visibility_in_air"):
        assert lower_bound(name) == 0.0
    for name in (
        "air_temperature",
        "wind_speed",
        "relative_humidity",
        "specific_humidity",
        "digitizer_counts_vertical",
    ):
        assert lower_bound(name) == -np.inf


def test_unbounded_values_cost_what_they_did() -> None:
    """Temperature's CRPS beside precipitation is the plain one to the bit, and gradients reach it alike."""
    payload = payload_of(document(), document(seed=1))
    prediction = predicted(payload)
    plain = replace(prediction, lower=None)
    truth = payload.values[payload.unit_target]
    found, expected = crps_of(prediction, truth), crps_of(plain, truth)
    assert torch.equal(found[:, 0], expected[:, 0])
    there = payload.valid[payload.unit_target][:, WET]
    assert (found[:, WET] < expected[:, WET])[there].any()
    no_rain = replace(payload, valid=payload.valid & (torch.arange(2) != WET)[:, None])
    losses = [unit_losses(p, no_rain, settings=SETTINGS) for p in (prediction, plain)]
    assert torch.equal(*losses)


def test_gradients_of_bounded_and_unbounded_values_are_finite() -> None:
    payload = payload_of(document())
    drawn = predicted(payload)
    mean, log_spread = drawn.mean.clone().requires_grad_(), drawn.log_spread.clone().requires_grad_()
    prediction = GaussianPrediction(mean=mean, log_spread=log_spread, lower=drawn.lower)
    unit_losses(prediction, payload, settings=SETTINGS).sum().backward()
    for tensor in (mean, log_spread):
        assert tensor.grad is not None and torch.isfinite(tensor.grad).all()
        assert (tensor.grad[:, WET] != 0).any()


def test_quantiles_do_not_lie_below_the_bound() -> None:
    payload = payload_of(document())
    prediction = predicted(payload)
    levels = torch.tensor([0.05, 0.5, 0.95])
    found = prediction_quantiles(prediction, levels, settings=SETTINGS)
    plain = prediction_quantiles(replace(prediction, lower=None), levels, settings=SETTINGS)
    assert torch.equal(found[:, :, 0], plain[:, :, 0])
    assert torch.equal(found[:, :, WET], torch.maximum(plain[:, :, WET], payload.unit_lower[:, WET]))
    assert (plain[:, :, WET] < payload.unit_lower[:, WET]).any()


@torch.no_grad()
@pytest.mark.parametrize("modality", ["grid", "series", "trace"])
def test_bounds_are_there_only_where_a_head_uses_them(modality: str) -> None:
    """A batch without a bounded variable carries none, and the model's predictions of it have none."""
    payload = payload_of(document(modality))
    assert payload.unit_lower.shape[-1] == (16 if modality == "grid" else 0)
    tokens = document()
    dry = replace(tokens, variable=np.zeros_like(tokens.variable))  # both rows: air temperature
    inputs = to_inputs(collate([[dry]], 60))
    assert inputs.payloads["grid"].unit_lower.shape[-1] == 0
    model = build_model(SHAPES["tiny"], ModelSettings(tokenizer=SETTINGS))
    for parameter in model.parameters():
        parameter.zero_()
    assert model(inputs)["grid"].lower is None
    assert model(to_inputs(collate([[dry], [tokens]], 60)))["grid"].lower is not None


def test_a_bound_is_that_of_the_time_asked_for() -> None:
    """A climatology moves the offset from frame to frame, and with it the bound in scaled units."""
    tokens = document()
    offset = np.arange(8, dtype=np.float32)[:, None, None, None] * np.ones_like(tokens.offset)
    payload = payload_of(replace(tokens, offset=offset))
    frames = payload.unit_target // tokens.num_slots
    expected = -frames.float() / tokens.scale[0, WET]
    torch.testing.assert_close(payload.unit_lower[:, WET], expected[:, None].expand(-1, 16), rtol=1e-6, atol=1e-6)
