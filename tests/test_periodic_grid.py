"""A grid that goes around the globe has no seam: rolled by whole patches it gives rolled outputs; others have one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from sci_gpt.model.init import initialize, standard_normal
from sci_gpt.model.inputs import ModelInputs, to_inputs
from sci_gpt.model.layers import Rotary, whole_turns
from sci_gpt.model.shapes import SHAPES
from sci_gpt.model.transformer import ModelSettings, SciGPT, build_model
from sci_tokenizers.grid import GridTokenizer
from sci_tokenizers.packing import collate
from sci_tokenizers.sample import Sample
from sci_tokenizers.sphere import goes_around
from sci_tokenizers.tokenizer import TokenizerSettings
from sci_tokenizers.tokens import TokensError
from toy_samples import toy_sample

PATCH, ROWS, COLUMNS, FRAMES, CONTEXT = 4, 2, 6, 6, 4
SETTINGS = TokenizerSettings(grid_patch=PATCH, trace_samples=5)


def field(longitude: np.ndarray) -> Sample:
    """A window of 8 rows by as many columns as there are longitudes, with gaps."""
    toy = toy_sample("grid", FRAMES)
    shape = (FRAMES, len(toy.variables), ROWS * PATCH, len(longitude))
    random = np.random.default_rng(3)
    values = (280.0 + 6.0 * random.standard_normal(shape)).astype(np.float32)
    valid = random.random(shape) > 0.1
    rows = np.linspace(70.0, -70.0, ROWS * PATCH, dtype=np.float32)[:, None].repeat(len(longitude), axis=1)
    return replace(
        toy,
        values=np.where(valid, values, 0.0).astype(np.float32),
        valid=valid,
        latitude=rows,
        longitude=longitude.astype(np.float32)[None].repeat(len(rows), axis=0),
        elevation=np.zeros_like(rows),
    )


def globe() -> Sample:
    """24 columns once around."""
    return field(np.arange(COLUMNS * PATCH) * 15.0)


def rolled(sample: Sample, patches: int) -> Sample:
    """The same film with its columns, and all that belongs to them, begun elsewhere."""
    names = ("values", "valid", "latitude", "longitude", "elevation")
    return replace(sample, **{name: np.roll(getattr(sample, name), patches * PATCH, axis=-1) for name in names})


def inputs_of(*samples: Sample) -> ModelInputs:
    """One row per sample."""
    tokenizer = GridTokenizer(SETTINGS)
    documents = [tokenizer.encode(sample, num_context=CONTEXT, leads=(1, 2)) for sample in samples]
    return to_inputs(collate([[tokens] for tokens in documents], FRAMES * ROWS * COLUMNS))


@pytest.fixture(scope="module")
def model() -> SciGPT:
    """Every parameter drawn, so that no path is closed."""
    model = build_model(SHAPES["100k"], ModelSettings(tokenizer=SETTINGS))
    initialize(model, 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.1 * standard_normal(1, name, start=0, stop=parameter.numel()).view_as(parameter))
    return model.eval()


def turned(outputs: torch.Tensor, patches: int) -> torch.Tensor:
    """(F S, ..) with the columns of patches rolled."""
    film = outputs.view(-1, ROWS, COLUMNS, *outputs.shape[1:])
    return film.roll(patches, dims=2).reshape(outputs.shape)


@torch.no_grad()
@pytest.mark.parametrize("patches", [1, 4])
def test_a_rolled_globe_gives_rolled_outputs(model: SciGPT, patches: int) -> None:
    """Trunk and predictions, to float rounding; the plain angles, which have a seam, differ by far more."""
    one, other = inputs_of(globe()), inputs_of(rolled(globe(), patches))
    assert one.periods == (COLUMNS,)
    trunk = model.trunk(one)
    torch.testing.assert_close(model.trunk(other), turned(trunk, patches), rtol=1e-4, atol=1e-4)
    before, after = model(one)["grid"], model(other)["grid"]
    for name in ("mean", "log_spread"):
        torch.testing.assert_close(getattr(after, name), turned(getattr(before, name), patches), rtol=1e-4, atol=1e-4)
    seams = [model.trunk(replace(inputs, periods=())) for inputs in (one, other)]
    assert (seams[1] - turned(seams[0], patches)).abs().max() > 0.01


@torch.no_grad()
def test_a_region_does_not_wrap(model: SciGPT) -> None:
    """The same numbers over 240 degrees: begun elsewhere they are another field."""
    region = field(np.arange(COLUMNS * PATCH) * 10.0)
    one, other = inputs_of(region), inputs_of(rolled(region, 2))
    assert one.periods == other.periods == ()
    assert (model.trunk(other) - turned(model.trunk(one), 2)).abs().max() > 0.01


def test_angles_of_what_does_not_go_around_are_the_plain_ones() -> None:
    """Bit by bit, beside a document that goes around, whose columns alone turn otherwise."""
    region = field(np.arange(COLUMNS * PATCH) * 10.0)
    both, width = inputs_of(region, globe()), SHAPES["100k"].head_width
    mixed = Rotary.of(both, width)
    plain = Rotary.of(replace(both, period=torch.zeros_like(both.period), periods=()), width)
    tokens, columns = FRAMES * ROWS * COLUMNS, slice(width // 2 - width // 8, None)
    found, expected = mixed.phase, plain.phase
    assert torch.equal(found[:tokens], expected[:tokens])
    assert torch.equal(found[tokens:, : columns.start], expected[tokens:, : columns.start])
    assert not torch.equal(found[tokens:, columns], expected[tokens:, columns])


def test_turns_are_whole_near_the_plain_frequencies_and_differ() -> None:
    """0.25 degrees in patches of 8: 180 columns; the plain frequencies are 1000^(-k / 8) radians a column."""
    assert whole_turns(180, 8) == [29, 12, 6, 5, 4, 3, 2, 1]  # plain: 28.6, 12.1, 5.1, 2.1, 0.9, ..
    for period in range(1, 40):
        for count in (2, 3, 8):
            turns = whole_turns(period, count)
            assert turns == sorted(turns, reverse=True) and turns[-1] == 1
            assert turns[0] <= max(1, period // 2)
            assert len(set(turns)) == min(count, max(1, period // 2))


def test_which_grids_go_around() -> None:
    degrees = np.arange(24) * 15.0
    rows = np.linspace(80.0, -80.0, 5)[:, None].repeat(24, axis=1)

    def around(longitude: np.ndarray) -> bool:
        columns = longitude.astype(np.float32)[None].repeat(5, axis=0)
        return goes_around(rows[:, : len(longitude)], columns)

    assert around(degrees) and around(degrees - 180.0) and around(np.roll(degrees, 7)) and around(degrees[::-1])
    assert around((np.arange(24) + 0.5) * 15.0)
    assert not around(degrees[:-1]) and not around(degrees * 0.5) and not around(np.linspace(0.0, 360.0, 24))
    assert not around(np.concatenate([degrees[:12], degrees[12:] + 5.0]))
    tilted = np.tile(degrees, (5, 1)) + np.arange(5)[:, None]
    assert not goes_around(rows, tilted)
    assert not goes_around(np.full((5, 24), np.nan), np.tile(degrees, (5, 1)))


def test_a_seam_inside_a_patch_is_no_period() -> None:
    """22 columns around in patches of 4: the last patch is half empty, and the distance across it is not a patch."""
    sample = field(np.arange(22) * 360.0 / 22)
    assert GridTokenizer(SETTINGS).encode(sample, num_context=CONTEXT, leads=(1,)).period == 0


def test_columns_outside_their_period_are_refused() -> None:
    tokens = GridTokenizer(SETTINGS).encode(globe(), num_context=CONTEXT, leads=(1,))
    assert tokens.period == COLUMNS
    with pytest.raises(TokensError, match="columns are within 0..4 of a period of 5, got 0..5"):
        replace(tokens, period=5)
