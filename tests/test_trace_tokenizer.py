"""Traces of any rate, gaps and onsets come back; receivers keep their places; thousands of them fit the model."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sci_tokenizers.trace as trace
from sci_gpt.model.init import initialize
from sci_gpt.model.inputs import to_inputs
from sci_gpt.model.shapes import SHAPES
from sci_gpt.model.transformer import ModelSettings, build_model
from sci_tokenizers.packing import collate
from sci_tokenizers.sample import Sample
from sci_tokenizers.tokenizer import TokenizerSettings
from sci_tokenizers.trace import TraceTokenizer
from toy_samples import toy_sample

COMPONENTS = {
    "digitizer_counts_vertical": 1.0,
    "ground_velocity_vertical": 1e-9,
    "ground_velocity_north": 1e-3,
}


def record(values: np.ndarray, valid: np.ndarray, *, names: tuple[str, ...], rate_hz: float = 10.0) -> Sample:
    """A window of (time, component, receiver); what is not valid is 0."""
    toy = toy_sample("trace", len(values))
    receivers = values.shape[2]
    line = np.linspace(0.0, 1.0, receivers, dtype=np.float32)[:, None]
    return replace(
        toy,
        variables=names,
        levels=(float("nan"),) * len(names),
        values=np.where(valid, values, 0.0).astype(np.float32)[..., None],
        valid=valid[..., None],
        time=1e9 + np.arange(len(values)) / rate_hz,
        step_seconds=1.0 / rate_hz,
        latitude=40.0 + 0.1 * line,
        longitude=10.0 + 0.2 * line,
        elevation=100.0 * line,
    )


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 7),
    st.lists(st.sampled_from(sorted(COMPONENTS)), min_size=1, max_size=3, unique=True),
    st.integers(1, 4),
    st.sampled_from([1.0, 1e3, 1e6]),
    st.sampled_from([0.0, 1e2, 1e4]),
    st.sampled_from([0.0, 0.2, 0.9]),
    st.integers(0, 10_000),
)
def test_round_trip(
    samples: int, names: list[str], receivers: int, onset: float, drift: float, missing: float, seed: int
) -> None:
    """Within 1e-3 (|x| + s) through onsets of a million spreads, and within float32's rounding, as the class says."""
    random = np.random.default_rng(seed)
    shape = (12 * samples, len(names), receivers)
    spread = np.array([COMPONENTS[name] for name in names])[:, None]
    values = spread * (random.standard_normal(shape) + drift)
    values[8 * samples :] *= onset
    valid = random.random(shape) >= missing
    sample = record(values, valid, names=tuple(names), rate_hz=float(random.choice([0.5, 10.0, 100.0, 1000.0])))
    tokenizer = TraceTokenizer(TokenizerSettings(trace_samples=samples))
    tokens = tokenizer.encode(sample, num_context=6, leads=(1,))
    back = tokenizer.decode(tokens, tokens.payload)
    assert 0 < tokens.importance <= 1
    assert back.shape == sample.values.shape and tokens.valid.sum() == valid.sum()
    x, error = sample.values.astype(np.float64), np.abs(back - sample.values)
    scale, offset = (array.swapaxes(-1, -2) for array in (tokens.scale, tokens.offset[0, :, :, 0]))  # c r
    assert (scale[[names.index(n) for n in names if n.startswith("digitizer")]] >= 1.0).all()
    at = np.broadcast_to(offset.astype(np.float64)[..., None], x.shape)
    assert (error <= 1e-3 * (np.abs(x) + scale[..., None]))[sample.valid].all()
    assert (error <= 2.0**-24 * (1 + 1e-6) * (np.abs(x) + np.abs(x - at)))[sample.valid].all()


def test_a_calm_digitizer_is_scaled_by_one_count() -> None:
    """The context's median absolute deviation of a constant record is 0: the scale is 1 count; of any other, 1.4826 x
    that deviation.
    """
    tokenizer = TraceTokenizer(TokenizerSettings(trace_samples=5))
    values = np.full((60, 1, 2), 7.0)
    values[:, 0, 1] = np.tile([-30.0, 10.0, 50.0], 20)
    tokens = tokenizer.encode(
        record(values, np.ones(values.shape, bool), names=("digitizer_counts_vertical",)), num_context=6, leads=(1,)
    )
    np.testing.assert_allclose(tokens.scale[:, 0], [1.0, 1.4826 * 40.0], rtol=1e-6)
    np.testing.assert_array_equal(tokens.offset[0, :, 0, 0], [7.0, 10.0])


def test_receivers_are_slots_with_their_places_in_the_array() -> None:
    """Latitude, longitude and elevation less the array's mean; row and column are 0, the order says nothing."""
    random = np.random.default_rng(0)
    values = random.standard_normal((60, 1, 3)) * 50
    sample = record(values, np.ones(values.shape, bool), names=("digitizer_counts_vertical",))
    tokens = TraceTokenizer(TokenizerSettings(trace_samples=5)).encode(sample, num_context=6, leads=(1,))
    expected = np.array([[-0.05, -0.1, -50.0], [0.0, 0.0, 0.0], [0.05, 0.1, 50.0]])
    np.testing.assert_allclose(tokens.slot_features[:, :3], expected, atol=1e-5)
    assert not tokens.row.any() and not tokens.column.any()


def test_a_gap_is_missing_and_nothing_else() -> None:
    """One component of one receiver is gone for three frames: its values are missing there, all others as before."""
    random = np.random.default_rng(1)
    values, valid = random.standard_normal((60, 2, 3)) * 50, np.ones((60, 2, 3), bool)
    names = ("digitizer_counts_vertical", "digitizer_counts_north")
    tokenizer = TraceTokenizer(TokenizerSettings(trace_samples=5))
    whole = tokenizer.encode(record(values, valid, names=names), num_context=4, leads=(1,))
    valid[30:45, 1, 2] = False
    gap = tokenizer.encode(record(values, valid, names=names), num_context=4, leads=(1,))
    assert not gap.valid[6:9, 2, 1].any() and (gap.payload[6:9, 2, 1] == 0).all()
    others = np.ones(gap.valid.shape, bool)
    others[6:9, 2, 1] = False
    assert gap.valid[others].all()
    np.testing.assert_array_equal(gap.payload[others], whole.payload[others])
    np.testing.assert_array_equal(gap.anchor[:, :2], whole.anchor[:, :2])


def fibre(receivers: int, times: int) -> Sample:
    """A wave that travels along a fibre, and noise."""
    random = np.random.default_rng(2)
    phase = 0.4 * np.arange(times)[:, None, None] - 0.02 * np.arange(receivers)
    values = 300.0 * np.sin(phase) + 30.0 * random.standard_normal(phase.shape)
    return record(values, np.ones(values.shape, bool), names=("digitizer_counts_vertical",), rate_hz=100.0)


def test_thousands_of_channels_go_through_the_model() -> None:
    """2,048 receivers x 1 component: encoded within 64 bytes a value of working memory beside the tokens themselves,
    collated and asked; the anchor of each still knows the wave.
    """
    tokenizer = TraceTokenizer(TokenizerSettings(trace_samples=30))
    sample = fibre(2048, 90)
    tracemalloc.start()
    tokens = tokenizer.encode(sample, num_context=2, leads=(1,))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    held = sum(array.nbytes for array in vars(tokens).values() if isinstance(array, np.ndarray))
    assert peak < held + 64 * sample.values.size
    error = tokens.anchor[1, ..., 0] - tokens.payload[2]
    assert np.sqrt((error[..., :5] ** 2).mean()) < 0.5 * tokens.payload[2].std()
    inputs = to_inputs(collate([[tokens]], tokens.num_tokens))
    model = build_model(SHAPES["tiny"], ModelSettings(tokenizer=tokenizer.settings))
    initialize(model, 0)
    with torch.no_grad():
        found = model(inputs)["trace"]
    assert found.mean.shape == (2048, 1, 30) and torch.isfinite(found.mean).all()


@pytest.mark.parametrize(("receivers", "most"), [(256, 96), (257, 32)])
def test_many_receivers_take_lower_orders(receivers: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to 256 waveforms nothing changes; and what is forecast of one does not depend on which are beside it."""
    asked: list[tuple[int, ...]] = []
    plain = trace.own_forecast

    def spy(*arguments: np.ndarray, **options: object) -> object:
        asked.append(options["orders"])  # type: ignore[arg-type]
        return plain(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(trace, "own_forecast", spy)
    tokenizer = TraceTokenizer(TokenizerSettings(trace_samples=5))
    tokens = tokenizer.encode(fibre(receivers, 60), num_context=8, leads=(1,))
    assert len(asked) == -(-receivers // 128) and {max(orders) for orders in asked} == {most}
    order = np.roll(np.arange(receivers), 50)
    sample = fibre(receivers, 60)
    other = tokenizer.encode(
        replace(sample, values=sample.values[:, :, order], valid=sample.valid[:, :, order]), num_context=8, leads=(1,)
    )
    np.testing.assert_allclose(other.anchor, tokens.anchor[:, order], rtol=1e-4, atol=1e-5)
