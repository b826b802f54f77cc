"""Grids of any variables, levels, shapes and gaps: exact round trips, levels told apart, variables that come and go."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sci_gpt.model.init import initialize, standard_normal
from sci_gpt.model.inputs import ModelInputs, to_inputs
from sci_gpt.model.loss import weighted_sums
from sci_gpt.model.shapes import SHAPES
from sci_gpt.model.transformer import ModelSettings, SciGPT, build_model
from sci_gpt.model.widen import widened, with_levels
from sci_tokenizers.grid import GridTokenizer
from sci_tokenizers.packing import collate
from sci_tokenizers.sample import Sample, SampleError
from sci_tokenizers.tokenizer import TokenizerError, TokenizerSettings
from sci_tokenizers.variables import VARIABLE_NAMES, VARIABLES
from toy_samples import toy_sample, toy_statistics

SETTINGS = TokenizerSettings(grid_patch=4, trace_samples=5)
FRAMES, CONTEXT = 6, 3
ROUNDING = 2.0**-24 * (1 + 1e-6)  # of one float32 operation
# variable -> (mean, spread): orders of magnitude apart, and one that varies in its last digits alone
KINDS = {
    "geopotential_height": (5e5, 1.0),
    "specific_humidity": (3e-6, 1e-6),
    "air_temperature": (280.0, 6.0),
    "precipitation_flux": (2e-5, 4e-5),
    "precipitation_amount": (3.0, 5.0),
    "eastward_wind": (0.0, 1e-3),
    "surface_air_pressure": (9e4, 3e3),
}


def film(channels: tuple[tuple[str, float], ...], *, rows: int = 6, columns: int = 9, seed: int = 0) -> Sample:
    """A window of these (variable, level), every one of KINDS or like it, with a seventh of its values missing."""
    random = np.random.default_rng(seed)
    toy = toy_sample("grid", FRAMES)
    shape = (FRAMES, len(channels), rows, columns)
    values = np.empty(shape, np.float32)
    for v, (name, level) in enumerate(channels):  # a channel has its own numbers, whatever the others are
        mean, spread = KINDS.get(name, (0.0, 1.0))
        own = np.random.default_rng([seed, VARIABLE_NAMES.index(name), int(np.nan_to_num(level))])
        values[:, v] = mean + spread * own.standard_normal((FRAMES, rows, columns))
        if VARIABLES[name].transform == "log1p":
            values[:, v] = np.maximum(values[:, v], 0.0)
    valid = np.broadcast_to(random.random((FRAMES, 1, rows, columns)) > 1 / 7, shape).copy()
    return replace(
        toy,
        variables=tuple(name for name, _ in channels),
        levels=tuple(level for _, level in channels),
        values=np.where(valid, values, np.float32(0.0)),
        valid=valid,
        latitude=np.linspace(60.0, 10.0, rows, dtype=np.float32)[:, None].repeat(columns, axis=1),
        longitude=np.linspace(0.0, 40.0, columns, dtype=np.float32)[None].repeat(rows, axis=0),
        elevation=np.zeros((rows, columns), np.float32),
    )


def inputs_of(*samples: Sample, row: int = FRAMES * 6) -> ModelInputs:
    """A row for each."""
    documents = [GridTokenizer(SETTINGS).encode(sample, num_context=CONTEXT, leads=(1, 2)) for sample in samples]
    return to_inputs(collate([[tokens] for tokens in documents], row))


def moved(model: SciGPT) -> SciGPT:
    """Initial weights and noise, the levels' own left at 0."""
    initialize(model, 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".level." not in name:
                parameter.add_(0.05 * standard_normal(1, name, start=0, stop=parameter.numel()).view_as(parameter))
    return model.eval()


@pytest.fixture
def model() -> SciGPT:
    return moved(build_model(SHAPES["tiny"], ModelSettings(tokenizer=SETTINGS)))


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 5),
    st.tuples(st.integers(0, 9), st.integers(0, 9)),
    st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=4, unique=True),
    st.sampled_from([0.0, 0.1, 0.6, 0.97]),
    st.booleans(),
    st.integers(0, 10_000),
)
def test_round_trip_is_exact_to_float32s_rounding(
    patch: int, more: tuple[int, int], names: list[str], missing: float, known: bool, seed: int
) -> None:
    """The bound in GridTokenizer's docstring, over shapes, patches, missing shares and orders of magnitude."""
    random = np.random.default_rng(seed)
    sample = film(tuple((name, np.nan) for name in names), rows=patch + more[0], columns=patch + more[1], seed=seed)
    valid = random.random(sample.values.shape) >= missing
    sample = replace(sample, valid=valid, values=np.where(valid, sample.values, 0.0).astype(np.float32))
    tokenizer = GridTokenizer(replace(SETTINGS, grid_patch=patch))
    statistics = toy_statistics(sample) if known else None
    tokens = tokenizer.encode(sample, num_context=CONTEXT, leads=(1,), statistics=statistics)
    back = tokenizer.decode(tokens, tokens.payload)
    offset = tokenizer.decode(tokens, np.zeros_like(tokens.payload))
    assert back.shape == sample.values.shape
    assert tokens.valid.sum() == valid.sum()
    for v, name in enumerate(names):
        x, found, at = (array[:, v].astype(np.float64)[valid[:, v]] for array in (sample.values, back, offset))
        if VARIABLES[name].transform == "log1p":
            unit = VARIABLES[name].transform_unit
            off = np.abs(np.log1p(x / unit) - np.log1p(at / unit))
            assert (np.abs(found - x) <= ROUNDING * (np.abs(x) + (x + unit) * (off + 1e-6))).all()
        else:
            assert (np.abs(found - x) <= ROUNDING * (np.abs(x) + np.abs(x - at) + 2 * ROUNDING * np.abs(at))).all()


LEVELS = (("air_temperature", 85000.0), ("air_temperature", 50000.0), ("precipitation_amount", float("nan")))


def test_a_token_of_several_levels_is_not_told_one() -> None:
    """Each variable has its own; the slot has one where all agree."""
    tokens = GridTokenizer(SETTINGS).encode(film(LEVELS), num_context=CONTEXT, leads=(1,))
    assert tokens.log_level is not None and np.isnan(tokens.slot_features[:, 3]).all()
    np.testing.assert_allclose(tokens.log_level[0], np.log([85000.0, 50000.0, np.nan]), rtol=1e-6)
    same = film((LEVELS[0], ("eastward_wind", 85000.0)))
    tokens = GridTokenizer(SETTINGS).encode(same, num_context=CONTEXT, leads=(1,))
    np.testing.assert_allclose(tokens.slot_features[:, 3], np.log(85000.0), rtol=1e-6)


@torch.no_grad()
def test_levels_of_one_variable_are_told_apart(model: SciGPT) -> None:
    """Levels swapped while the values stay: other outputs in trunk and head once their weights are not 0; before that
    the same to the bit, as without levels, and the two levels' questions are one question.
    """
    here = film(LEVELS)
    swapped = replace(here, levels=(50000.0, 85000.0, float("nan")))
    before = [model(inputs_of(sample))["grid"].mean for sample in (here, swapped)]
    assert torch.equal(*before)
    for part in ("embed.grid", "heads.grid.head"):
        weight = model.get_parameter(f"{part}.level.project.weight")
        weight.copy_(torch.linspace(-1.0, 1.0, weight.numel()).view_as(weight))
        after = [model(inputs_of(sample))["grid"].mean for sample in (here, swapped)]
        assert (after[0] - after[1]).abs().max() > 1e-3
        weight.zero_()
    again = model(inputs_of(here))["grid"].mean
    assert torch.equal(again, before[0])


def test_weights_from_before_levels_are_the_same_model(model: SciGPT) -> None:
    old = {name: tensor for name, tensor in model.state_dict().items() if ".level." not in name}
    whole = with_levels(old, model)
    assert whole.keys() == model.state_dict().keys()
    model.load_state_dict(whole, strict=True)
    assert not any(tensor.any() for name, tensor in model.state_dict().items() if ".level." in name)


ALL = (("air_temperature", float("nan")), ("eastward_wind", float("nan")), ("precipitation_amount", float("nan")))


@torch.no_grad()
def test_variables_may_differ_from_sample_to_sample(model: SciGPT) -> None:
    """Beside documents of three variables, and of one, a document of two says what it says alone."""
    three, two, one = film(ALL), film((ALL[2], ALL[0]), seed=1), film((ALL[1],), seed=2)
    alone = model(inputs_of(two))["grid"]
    units = len(alone.mean)
    mixed = model(inputs_of(three, two, one))["grid"]
    assert mixed.mean.shape[1] == 3
    torch.testing.assert_close(mixed.mean[units : 2 * units, :2], alone.mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mixed.log_spread[units : 2 * units, :2], alone.log_spread, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_variable_dropped_was_never_there(model: SciGPT) -> None:
    """Marked as no variable in the payload, whatever its values: embedding and trunk as without it."""
    payload = inputs_of(film(ALL)).payloads["grid"]
    dropped = replace(payload, variable=torch.where(torch.tensor([True, False, True]), payload.variable, -1))
    never = inputs_of(film((ALL[0], ALL[2]))).payloads["grid"]
    embed = model.embed["grid"]
    torch.testing.assert_close(embed(dropped), embed(never), rtol=1e-5, atol=1e-5)
    assert (embed(payload) - embed(never)).abs().max() > 0.1


@torch.no_grad()
def test_the_order_of_variables_does_not_matter(model: SciGPT) -> None:
    order = [2, 0, 1]
    one, other = (model(inputs_of(film(channels)))["grid"] for channels in (ALL, tuple(ALL[v] for v in order)))
    torch.testing.assert_close(other.mean, one.mean[:, order], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(other.log_spread, one.log_spread[:, order], rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("at_end", [True, False], ids=["behind the others", "before the others"])
def test_a_new_variable_leaves_what_is_said_of_the_others(model: SciGPT, at_end: bool) -> None:
    """A model with one more row in its tables: predictions and loss of the others to the bit, and the new one answers
    beside them.
    """
    table = [*VARIABLE_NAMES, "new"] if at_end else ["new", *VARIABLE_NAMES]
    wider = build_model(SHAPES["tiny"], ModelSettings(tokenizer=SETTINGS, num_variables=len(table)))
    wider.load_state_dict(widened(model, VARIABLE_NAMES, table=table))
    inputs = inputs_of(film(ALL), film(LEVELS[:2], seed=1))
    payload = inputs.payloads["grid"]
    shift = 0 if at_end else 1
    renamed = replace(payload, variable=torch.where(payload.variable >= 0, payload.variable + shift, -1))
    same = replace(inputs, payloads={"grid": renamed})
    before, after = model(inputs), wider(same)
    there = payload.variable[payload.unit_token] >= 0  # what stands for a variable that a token lacks says nothing
    for name in ("mean", "log_spread"):
        assert torch.equal(getattr(before["grid"], name)[there], getattr(after["grid"], name)[there])
    losses = [weighted_sums(p, i, settings=SETTINGS)["grid"] for p, i in ((before, inputs), (after, same))]
    assert torch.equal(*losses)
    asked = replace(renamed, variable=torch.where(renamed.variable == renamed.variable[0, 0], table.index("new"), -1))
    answer = wider(replace(inputs, payloads={"grid": asked}))["grid"]
    assert torch.isfinite(answer.mean).all() and not torch.equal(answer.mean, after["grid"].mean)


def test_a_grid_smaller_than_a_patch_is_refused() -> None:
    sample = film(ALL[:1], rows=3, columns=9)
    with pytest.raises(TokenizerError, match=r"3 x 9 cells is smaller than a patch of 4 x 4; give a larger region, or"):
        GridTokenizer(SETTINGS).encode(sample, num_context=CONTEXT, leads=(1,))


def test_times_out_of_order_are_refused() -> None:
    sample = film(ALL[:1])
    with pytest.raises(SampleError, match=r"step 0 -> 1 goes -86400.0 s; sort the record by time and keep one value"):
        replace(sample, time=sample.time[[1, 0, 2, 3, 4, 5]])


def test_a_patch_half_off_the_earth_has_the_place_of_its_known_half() -> None:
    """Cells of unknown place do not count in the slot's mean place; a slot without any has none."""
    sample = film(ALL[:1], rows=8, columns=8)
    latitude = sample.latitude.copy()
    latitude[:, 2:] = np.nan
    tokens = GridTokenizer(SETTINGS).encode(replace(sample, latitude=latitude), num_context=CONTEXT, leads=(1,))
    assert tokens.slot_features[0, 0] == pytest.approx(sample.latitude[:4, 0].mean(), rel=1e-6)
    assert np.isnan(tokens.slot_features[1, 0])
    assert np.isfinite(tokens.weight).all()


@pytest.mark.parametrize("level", [0.0, 1.0, 280.1, 300.7, 1e6])
def test_a_constant_context_has_no_spread_but_what_float32_tells(level: float) -> None:
    """Rounding of its mean is no spread: the scale is 1, as of zeros, and half a unit more stays a small number."""
    sample = toy_sample("grid", 8, missing=0.0)
    values = np.full_like(sample.values, np.float32(level))
    values[5:] += np.float32(0.5)
    for name in ("air_temperature", "precipitation_amount"):  # as it is, and as log1p
        film = replace(sample, values=values, variables=(name, name), levels=(85000.0, 50000.0))
        tokens = GridTokenizer(TokenizerSettings(grid_patch=4)).encode(film, num_context=3, leads=(1,))
        assert (tokens.scale == 1).all() and np.abs(tokens.payload).max() <= 0.51
    told = replace(sample, values=np.float32(300.0) + np.float32(0.01) * (sample.values > 0).cumsum(0, np.float32))
    tokens = GridTokenizer(TokenizerSettings(grid_patch=4)).encode(told, num_context=3, leads=(1,))
    assert (tokens.scale < 0.1).all() and (tokens.scale > 0).all()
