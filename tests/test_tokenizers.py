"""The tokenizer contract, for every tokenizer of the table: round trip, no input that knows the future, errors."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sci_tokenizers.autoregression import burg, newest, step_coefficients
from sci_tokenizers.memory import MEMORIES
from sci_tokenizers.quantizer import PAD, Quantizer
from sci_tokenizers.sample import Sample
from sci_tokenizers.statistics import ChannelStatistics
from sci_tokenizers.table import TOKENIZERS, make_tokenizer
from sci_tokenizers.tokenizer import Tokenizer, TokenizerError, TokenizerSettings
from sci_tokenizers.tokens import Tokens
from sci_tokenizers.variables import forward_transform
from toy_samples import altered_from, toy_sample, toy_statistics

SETTINGS = TokenizerSettings(grid_patch=4, trace_samples=5)
FRAMES, CONTEXT = 24, 8
# what of a token's own frame the model reads (offset and weight serve decoding and loss only)
PER_FRAME_INPUTS = (
    "payload",
    "valid",
    "ids",
    "last",
    "anchor",
    "anchor_spread",
    "memory",
    "volatility",
    "frame_features",
)
PER_SLOT_INPUTS = ("variable", "row", "column", "slot_features", "log_scale", "scale", "pile")


def made(modality: str, *, seed: int = 0, missing: float = 0.15) -> tuple[Tokenizer, Sample]:
    """A tokenizer and a window of FRAMES frames for it."""
    tokenizer = make_tokenizer(modality, SETTINGS)
    return tokenizer, toy_sample(modality, FRAMES * tokenizer.frame_times, seed=seed, missing=missing)


def encode(tokenizer: Tokenizer, sample: Sample, statistics: dict[str, ChannelStatistics] | None) -> Tokens:
    """Tokens of the window with CONTEXT frames of context."""
    return tokenizer.encode(sample, num_context=CONTEXT, leads=(1, 3), statistics=statistics)


@pytest.mark.parametrize("known", [True, False], ids=["known source", "unseen source"])
@pytest.mark.parametrize("modality", TOKENIZERS)
def test_round_trip(modality: str, known: bool) -> None:
    """Grids and traces come back within float32 rounding, series within half a bin, where nothing is clipped."""
    tokenizer, sample = made(modality)
    statistics = toy_statistics(sample) if known else None
    tokens = encode(tokenizer, sample, statistics)
    back = tokenizer.decode(tokens, tokens.payload)
    assert back.shape == sample.values.shape
    for v, name in enumerate(sample.variables):
        truth, found = (forward_transform(x[:, v].astype(np.float64), name) for x in (sample.values, back))
        error = np.abs(found - truth)[sample.valid[:, v]].max()
        if modality == "series":
            assert error <= 0.5 * SETTINGS.series_bin_width * tokens.scale[v, 0] + 1e-4
        else:
            assert error <= 1e-5 * np.abs(truth).max()
    for row in tokenizer.report(sample, num_context=CONTEXT, statistics=statistics):
        assert row.num_values == sample.valid[:, sample.channels.index(row.channel)].sum()
        assert row.clipped_share == 0.0
        assert row.mean_error <= row.max_error


@pytest.mark.parametrize("modality", TOKENIZERS)
def test_shape_is_the_documents(modality: str) -> None:
    tokenizer, sample = made(modality)
    tokens = encode(tokenizer, sample, None)
    assert (tokens.num_frames, tokens.modality, tokens.leads) == (FRAMES, modality, (1, 3))
    assert tokens.num_slots == tokenizer.num_slots(sample.values.shape[1:])
    # a frame is known at the end of its last time
    assert (tokens.time == sample.time[tokenizer.frame_times - 1 :: tokenizer.frame_times]).all()


@pytest.mark.parametrize("known", [True, False], ids=["known source", "unseen source"])
@pytest.mark.parametrize("modality", TOKENIZERS)
def test_no_input_knows_the_future(modality: str, known: bool) -> None:
    """Altering all values, and what is missing, from frame k >= C on changes no bit of the inputs before k."""
    tokenizer, sample = made(modality)
    statistics = toy_statistics(sample) if known else None
    tokens = encode(tokenizer, sample, statistics)
    for k in (CONTEXT, CONTEXT + 1, FRAMES - 1):
        other = encode(tokenizer, altered_from(sample, k * tokenizer.frame_times), statistics)
        for name in PER_FRAME_INPUTS:
            if getattr(tokens, name) is not None:
                np.testing.assert_array_equal(getattr(other, name)[:k], getattr(tokens, name)[:k], err_msg=name)
        for name in PER_SLOT_INPUTS:
            np.testing.assert_array_equal(getattr(other, name), getattr(tokens, name), err_msg=name)
        assert (other.payload[k:] != tokens.payload[k:]).any()


@pytest.mark.parametrize("modality", TOKENIZERS)
def test_scales_come_from_the_context(modality: str) -> None:
    tokenizer, sample = made(modality)
    louder = altered_from(sample, 0)
    assert (encode(tokenizer, louder, None).scale != encode(tokenizer, sample, None).scale).all()


@pytest.mark.parametrize("modality", TOKENIZERS)
def test_same_sample_same_tokens(modality: str) -> None:
    tokenizer, sample = made(modality)
    one, two = (encode(tokenizer, sample, toy_statistics(sample)) for _ in range(2))
    for name in (*PER_FRAME_INPUTS, *PER_SLOT_INPUTS, "weight", "offset"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name), err_msg=name)


@pytest.mark.parametrize("modality", TOKENIZERS)
def test_what_is_missing_leaves_no_trace(modality: str) -> None:
    """Whatever number stands where a value is missing, the tokens are the same; and the payload there is 0."""
    tokenizer, sample = made(modality)
    filled = replace(sample, values=np.where(sample.valid, sample.values, np.float32(1e6)))
    one, two = encode(tokenizer, sample, None), encode(tokenizer, filled, None)
    for name in (*PER_FRAME_INPUTS, *PER_SLOT_INPUTS):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name), err_msg=name)
    assert (one.payload[~one.valid] == 0.0).all()
    assert one.valid.sum() == sample.valid.sum()


@pytest.mark.parametrize("modality", TOKENIZERS)
def test_a_window_without_a_valid_value(modality: str) -> None:
    tokenizer, sample = made(modality, missing=1.1)
    tokens = encode(tokenizer, sample, toy_statistics(sample))
    assert not tokens.valid.any()
    for name in ("payload", "last", "anchor", "anchor_spread", "memory", "volatility", "scale", "offset", "weight"):
        assert np.isfinite(getattr(tokens, name)).all(), name
    assert (tokens.scale > 0).all()


@pytest.mark.parametrize("modality", ["grid", "series"])
def test_last_is_the_last_valid_value(modality: str) -> None:
    """Plain loops: the newest valid payload at or before the frame, 0 before the first."""
    tokenizer, sample = made(modality)
    tokens = encode(tokenizer, sample, None)
    for place in np.ndindex(tokens.payload.shape[1:]):
        last = 0.0
        for f in range(FRAMES):
            if tokens.valid[(f, *place)]:
                last = tokens.payload[(f, *place)]
            assert tokens.last[(f, *place)] == last
            if modality == "grid":
                assert tokens.anchor[(f, *place, 0)] == last


def test_memory_is_what_its_names_say() -> None:
    """Plain loops over one slot: values some frames ago, running means of the past, as differences from the last."""
    tokenizer, sample = made("series")
    tokens = encode(tokenizer, sample, None)
    value, valid, last = (x[:, 0, 0, 0] for x in (tokens.payload, tokens.valid, tokens.last))
    memory = {name: tokens.memory[:, 0, 0, 0, j] for j, name in enumerate(MEMORIES)}
    for f in range(3, FRAMES):
        assert memory["lag_2"][f] == pytest.approx(last[f - 2] - last[f], abs=1e-6)
        weights = 0.5 ** ((f - np.arange(f + 1)) / 8.0) * valid[: f + 1]
        mean = (weights * value[: f + 1]).sum() / weights.sum()
        assert memory["mean_8"][f] == pytest.approx(mean - last[f], abs=1e-5)
        assert memory["mean_inf"][f] == pytest.approx(value[: f + 1][valid[: f + 1]].mean() - last[f], abs=1e-5)


def test_home_is_the_climatology_or_the_contexts_median() -> None:
    """Known source: home is the climatology, -level / scale in payload units; unseen source: the context's median,
    0.
    """
    tokenizer, sample = made("series", missing=0.0)
    j = MEMORIES.index("home")
    unseen = encode(tokenizer, sample, None)
    np.testing.assert_allclose(unseen.memory[:, :, 0, 0, j] + unseen.last[:, :, 0, 0], 0.0, atol=1e-5)
    statistics = toy_statistics(sample)
    known = encode(tokenizer, sample, statistics)
    home = (known.memory[..., j] + known.last)[:, 0, 0, 0]
    row = statistics[sample.channels[0]]
    climatology = row.climatology_at(sample.year_phase, sample.day_phase)
    level = known.offset[:, 0, 0, 0] - climatology
    np.testing.assert_allclose(home, -level / known.scale[0, 0], rtol=1e-3, atol=1e-3)


def test_a_level_beyond_training_is_the_farthest_that_training_saw() -> None:
    """A station 500 K warmer than all of training: home lies no farther than the warmest value of training."""
    tokenizer, sample = made("series", missing=0.0)
    statistics = toy_statistics(sample)
    row = statistics[sample.channels[0]]
    warm = replace(sample, values=sample.values + np.float32(500.0))
    tokens = encode(tokenizer, warm, statistics)
    home = (tokens.memory[..., MEMORIES.index("home")] + tokens.last)[:, 0, 0, 0] * tokens.scale[0, 0]
    np.testing.assert_allclose(home, -(row.maximum - row.mean), rtol=1e-3)


def test_kin_stands_in_for_a_missing_level() -> None:
    """Two levels of one variable: where one is missing, its last value is moved as the other has moved since."""
    tokenizer, sample = made("series", missing=0.0)
    twin = replace(sample, variables=("air_temperature", *sample.variables[1:]), levels=(100000.0, *sample.levels[1:]))
    variables = ("air_temperature", "air_temperature", *sample.variables[2:])
    twin = replace(twin, variables=variables, levels=(100000.0, 85000.0, *sample.levels[2:]))
    valid = twin.valid.copy()
    valid[12:15, 0] = False
    tokens = encode(tokenizer, replace(twin, valid=valid), None)
    since, kin = MEMORIES.index("kin_since"), MEMORIES.index("kin_lag_0")
    moved = tokens.last[14, 1] - tokens.last[11, 1]
    assert tokens.memory[14, 0, 0, 0, since] == pytest.approx(moved.item(), abs=1e-6)
    assert tokens.memory[14, 0, 0, 0, kin] == pytest.approx((tokens.last[14, 1] - tokens.last[14, 0]).item(), abs=1e-6)
    assert tokens.memory[20, 0, 0, 0, since] == 0


@pytest.mark.parametrize("modality", ["grid", "series"])
def test_a_phase_that_training_did_not_cover_is_unknown(modality: str) -> None:
    """No harmonics of the year: its phase is NaN in every frame, the day's is there; of an unseen source, both."""
    tokenizer, sample = made(modality)
    part = {
        name: replace(row, num_year=0, climatology=(row.mean, 0.0, 0.0)) for name, row in toy_statistics(sample).items()
    }
    year, day, _ = encode(tokenizer, sample, part).frame_features.T
    assert np.isnan(year).all()
    np.testing.assert_array_equal(day, sample.day_phase)
    assert np.isfinite(encode(tokenizer, sample, None).frame_features).all()


def test_values_at_a_bound_stay_one_value() -> None:
    """Dry hours have one id all day long, whatever the hour's climatology; temperature follows its cycle."""
    tokenizer, sample = made("series", missing=0.0)
    values = sample.values.copy()
    values[:, 1] = 0.0
    values[:, 0] = 280.0
    ids = encode(tokenizer, replace(sample, values=values), toy_statistics(sample)).ids
    assert ids is not None
    assert len(np.unique(ids[:, 1])) == 1
    assert len(np.unique(ids[:, 0])) > 5


def test_no_token_names_its_record() -> None:
    """A lone receiver's place is its array's, so 0; a station's place is a region: neither is known by heart."""
    trace = encode(*made("trace"), None)
    assert np.nan_to_num(trace.slot_features[:, :2]).sum() == pytest.approx(0.0, abs=1e-4)
    assert np.isnan(trace.frame_features[:, :2]).all()
    tokenizer, sample = made("series")
    near = replace(sample, latitude=sample.latitude + 0.01, longitude=sample.longitude - 0.01)
    one, two = encode(tokenizer, sample, None), encode(tokenizer, near, None)
    np.testing.assert_array_equal(one.slot_features, two.slot_features)


def test_the_size_of_counts_is_not_told() -> None:
    """Digitizer counts are not calibrated: the logarithm of their scale says nothing physical."""
    assert np.isnan(encode(*made("trace"), None).log_scale).all()
    assert np.isfinite(encode(*made("series"), None).log_scale).all()


def test_a_traces_anchor_continues_what_is_predictable() -> None:
    """Two sines are an autoregression of order 4: after the context each lead's anchor is the future payload itself."""
    tokenizer, sample = made("trace", missing=0.0)
    t = np.arange(sample.num_times, dtype=np.float64)
    wave = 300.0 * np.sin(0.9 * t) + 200.0 * np.sin(0.35 * t + 1.0)
    pure = replace(sample, values=np.broadcast_to(wave[:, None, None, None], sample.values.shape).astype(np.float32))
    tokens = encode(tokenizer, pure, None)
    assert tokens.anchor.shape[-1] == len(tokens.leads) == 2
    for which, lead in enumerate(tokens.leads):
        ahead, truth = tokens.anchor[CONTEXT - 1 : -lead, ..., which], tokens.payload[CONTEXT - 1 + lead :]
        error = np.sqrt(((ahead - truth) ** 2).mean())
        assert error < 0.1 * truth.std()
        spread = np.exp(tokens.anchor_spread[CONTEXT - 1 : -lead, ..., which])
        assert spread.mean() < 0.2 * truth.std()


def test_an_autoregressions_weights_repeat_its_own_step() -> None:
    """k steps ahead by the weights equals feeding one-step forecasts back k times, in a plain loop."""
    random = np.random.default_rng(3)
    series = np.cumsum(random.standard_normal((2, 80)), axis=1)
    coefficients = burg(series, (2, 4))[4]
    weights = step_coefficients(coefficients, 6)
    state = newest(series, np.array([79]), order=4)[:, 0]
    np.testing.assert_array_equal(state, series[:, :-5:-1])
    for b in range(2):
        past = list(series[b])
        for k in range(6):
            past.append(float(np.dot(coefficients[b], past[:-5:-1])))
            assert weights[b, k] @ state[b] == pytest.approx(past[-1])


def test_grid_weight_is_area() -> None:
    """Weights go with the cosine of latitude, mean 1 over the cells; padding weighs nothing."""
    tokenizer, sample = made("grid", missing=0.0)
    tokens = encode(tokenizer, sample, None)
    inside = encode(tokenizer, replace(sample, values=np.ones_like(sample.values)), None).valid.any(axis=0)
    assert tokens.weight[inside].mean() == pytest.approx(1.0, abs=1e-6)
    assert (tokens.weight[~inside] == 0).all()
    # first patch: rows at 60, 50, 40, 30 degrees; cos 30 / cos 60 = sqrt(3)
    patch = tokens.weight[0, 0].reshape(4, 4)
    assert patch[3, 0] / patch[0, 0] == pytest.approx(np.sqrt(3.0), rel=1e-5)


def test_grid_slots_are_patches_in_row_major_order() -> None:
    """6 x 9 cells in patches of 4: two rows of three patches, ragged at the high edges."""
    tokenizer, sample = made("grid", missing=0.0)
    tokens = encode(tokenizer, sample, None)
    assert tokens.row.tolist() == [0, 0, 0, 1, 1, 1]
    assert tokens.column.tolist() == [0, 1, 2, 0, 1, 2]
    assert tokens.valid[0, :, 0].sum(axis=-1).tolist() == [16, 16, 4, 8, 8, 2]
    # mean latitude of rows 0..3 of 60, 50, .., 10
    assert tokens.slot_features[0, 0] == pytest.approx(45.0)
    physical = tokenizer.decode(tokens, tokens.payload)
    np.testing.assert_allclose(physical[3, 0, 5, 8], sample.values[3, 0, 5, 8], rtol=1e-5)


@pytest.mark.parametrize("modality", TOKENIZERS)
def test_refusals_name_the_sample(modality: str) -> None:
    tokenizer, sample = made(modality)
    stranger = made(next(other for other in TOKENIZERS if other != modality))[1]
    with pytest.raises(TokenizerError, match=f"{modality} tokenizer got sample {stranger.key!r}"):
        encode(tokenizer, stranger, None)
    with pytest.raises(TokenizerError, match=f"{sample.key!r}: context of {FRAMES + 1} frames in a window of {FRAMES}"):
        tokenizer.encode(sample, num_context=FRAMES + 1, leads=(1,))


@pytest.mark.parametrize("modality", TOKENIZERS)
@pytest.mark.parametrize("leads", [(), (0,), (-1,), (2, 1), (1, 1)])
def test_leads_that_are_none_are_refused(modality: str, leads: tuple[int, ...]) -> None:
    tokenizer = make_tokenizer(modality, SETTINGS)
    sample = toy_sample(modality, 8 * tokenizer.frame_times)
    with pytest.raises(TokenizerError, match=r"sample 'toy/.*leads are frames ahead, ascending and from 1 on"):
        tokenizer.encode(sample, num_context=4, leads=leads)


def test_a_trace_window_is_whole_frames() -> None:
    tokenizer, sample = made("trace")
    with pytest.raises(TokenizerError, match="whole frames of 5 times, got 119 times"):
        encode(tokenizer, sample.window(0, sample.num_times - 1), None)


def test_no_such_modality() -> None:
    with pytest.raises(KeyError, match="no tokenizer for modality 'film'; known: .*grid"):
        make_tokenizer("film", SETTINGS)


def test_quantizer_takes_the_nearest_centre() -> None:
    """Every id decodes to its own centre; a value goes to the nearest one; beyond the ends, to the end."""
    quantizer = Quantizer(64, 3.0)
    ids = np.arange(3, 64)
    centres = quantizer.centres(ids).astype(np.float64)
    assert (centres[0], centres[-1]) == (-3.0, 3.0)
    assert (quantizer.ids(centres, np.ones(61, bool)) == ids).all()
    values = np.random.default_rng(0).uniform(-4.0, 4.0, 1000)
    nearest = np.abs(values[:, None] - centres[None]).argmin(axis=1)
    assert (quantizer.ids(values, np.ones(1000, bool)) == ids[nearest]).all()
    assert (quantizer.ids(values, np.zeros(1000, bool)) == PAD).all()
    assert quantizer.clipped(np.array([3.2, -3.2, 3.0])).tolist() == [True, True, False]
    assert quantizer.width == TokenizerSettings(series_ids=64, series_limit=3.0).series_bin_width
