"""The linear prior and the averaged autoregression: they equal plain regressions, and read the training split alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sci_gpt.data.prior import with_priors
from sci_gpt.data.statistics import TrainingStatistics
from sci_gpt.data.store import FORMAT_VERSION, Store
from sci_gpt.data.store_writer import SplitWriter, seal
from sci_gpt.data.windows import Windows, WindowSpec
from sci_tokenizers.autoregression import burg, own_forecast, step_coefficients
from sci_tokenizers.memory import MEMORIES
from sci_tokenizers.prior import PRIOR_FEATURES, LinearPrior, Past
from sci_tokenizers.sample import Sample
from sci_tokenizers.statistics import (
    ChannelStatistics,
    known_priors,
    place_number,
    statistics_from_json,
    statistics_to_json,
)
from sci_tokenizers.table import make_tokenizer
from sci_tokenizers.tokenizer import TokenizerSettings
from toy_samples import toy_sample, toy_statistics

SETTINGS = TokenizerSettings(grid_patch=4)


def coupled(num_times: int, *, seed: int) -> Sample:
    """Temperature that rings (AR(2), innovations of 1 K) and wind that repeats it a step later, exactly; a tenth is
    missing.
    """
    random = np.random.default_rng(seed)
    noise, ring = random.standard_normal(num_times), np.zeros(num_times)
    for t in range(2, num_times):
        ring[t] = 1.6 * ring[t - 1] - 0.8 * ring[t - 2] + noise[t]
    sample = toy_sample("series", num_times, seed=seed, missing=0.0)
    values = np.stack([280.0 + ring, 50.0 + np.concatenate([[0.0], ring[:-1]])], axis=1)[:, :, None, None]
    valid = random.random(values.shape) > 0.1
    return replace(
        sample,
        variables=("air_temperature", "wind_speed"),
        levels=(np.nan, np.nan),
        values=np.where(valid, values, 0.0).astype(np.float32),
        valid=valid,
        year_phase=np.zeros(num_times, np.float32),
        day_phase=np.zeros(num_times, np.float32),
    )


def trained(tmp_path: Path) -> tuple[Store, dict[str, ChannelStatistics]]:
    """A store of four coupled records to train on and a livelier one to test on; its statistics with priors."""
    source = "toy_series"
    sums = None
    for split, seeds in (("train", (1, 2, 3, 4)), ("test", (5,))):
        with SplitWriter(folder=tmp_path / source / split, shard_bytes=1 << 20) as writer:
            for seed in seeds:
                sample = replace(coupled(600, seed=seed), key=f"{source}/{split}-{seed}")
                level = np.array([280.0, 50.0], np.float32)[None, :, None, None]
                if split == "test":  # three times as lively about the same level
                    sample = replace(sample, values=(3.0 * sample.values - 2.0 * level).astype(np.float32))
                elif sums is None:
                    sums = TrainingStatistics(
                        source=source, variables=sample.variables, levels=sample.levels, num_year=0, num_day=0
                    )
                if split == "train" and sums is not None:
                    sums.add(sample)
                writer.add(sample)
    assert sums is not None
    row = {"modality": "series", "step_seconds": 3600.0, "shape": [2, 1, 1], "levels": [None, None], "gap_days": None}
    row["variables"] = ["air_temperature", "wind_speed"]
    (tmp_path / "statistics.json").write_text("{}")
    seal(tmp_path, {"format_version": FORMAT_VERSION, "fingerprint": "f", "sources": {source: row}})
    store = replace(Store.open(tmp_path), statistics={source: sums.finish()})
    return store, with_priors(
        windows(store, "train"), make_tokenizer("series", SETTINGS), statistics=store.statistics[source]
    )


def windows(store: Store, split: str) -> Windows:
    """Windows of 60 hours."""
    spec = WindowSpec(source="toy_series", frames=60, stride=2, context_frames=(16, 24), leads=(1, 3))
    return Windows(store, spec, split=split, frame_times=1)


def test_the_prior_finds_the_process(tmp_path: Path) -> None:
    """One step ahead the ringing channel is known nearly to its innovations, its echo better; leads are 1 .. 3."""
    _, statistics = trained(tmp_path)
    ring, echo = (statistics[name].prior for name in ("air_temperature", "wind_speed"))
    assert ring is not None
    assert echo is not None
    assert ring.leads == (1, 2, 3)
    assert ring.spread[0] < ring.spread[1] < ring.spread[2]
    # a tenth of the values is missing and carried forward, which costs more than the innovations' 1 K
    assert 1.0 < ring.spread[0] < 1.6
    assert echo.spread[0] < 0.8 * ring.spread[0]
    assert statistics["air_temperature"].std > 2 * ring.spread[0]


def test_anchor_is_weights_times_features(tmp_path: Path) -> None:
    """A plain loop over features by their names; the offset and scale of the document are undone."""
    store, statistics = trained(tmp_path)
    tokens = make_tokenizer("series", SETTINGS).encode(
        windows(store, "train").read(3), num_context=20, leads=(1, 3), statistics=statistics
    )
    f = 31
    features = []
    for slot in range(2):
        last = tokens.last[f, slot, 0, 0]
        own = [last] + [
            tokens.memory[f, slot, 0, 0, j] for j, name in enumerate(MEMORIES) if not name.startswith("kin")
        ]
        assert len(own) == PRIOR_FEATURES
        features += [value * tokens.scale[slot, 0] for value in own]
    for slot, name in enumerate(("air_temperature", "wind_speed")):
        prior = statistics[name].prior
        assert prior is not None
        expected = np.dot(prior.weights[2], [*features, 1.0]) / tokens.scale[slot, 0]
        assert tokens.anchor[f, slot, 0, 0, 1] == pytest.approx(expected, rel=1e-4)


def test_spread_follows_the_documents_own_errors(tmp_path: Path) -> None:
    """Where the record is three times as lively as those of training, the spread grows towards its own errors."""
    store, statistics = trained(tmp_path)
    tokenizer = make_tokenizer("series", SETTINGS)
    prior = statistics["air_temperature"].prior
    assert prior is not None
    for split, low, high in (("train", 0.7, 1.4), ("test", 1.6, 4.5)):
        tokens = tokenizer.encode(windows(store, split).read(5), num_context=20, leads=(1, 3), statistics=statistics)
        found = np.exp(tokens.anchor_spread[-1, 0, 0, 0, 0]) * tokens.scale[0, 0] / prior.spread[0]
        assert low < found < high


def test_priors_read_the_training_split_alone(tmp_path: Path) -> None:
    store, _ = trained(tmp_path)
    with pytest.raises(ValueError, match="training split alone, got 'test'"):
        with_priors(
            windows(store, "test"), make_tokenizer("series", SETTINGS), statistics=store.statistics["toy_series"]
        )


@pytest.mark.parametrize("modality", ["grid", "series"])
def test_no_anchor_knows_the_future(modality: str) -> None:
    """Altering values from frame k on moves no anchor, spread or volatility before k, priors included."""
    tokenizer, sample = make_tokenizer(modality, SETTINGS), toy_sample(modality, 24)
    channels = sample.channels
    random = np.random.default_rng(0)
    statistics = {
        name: replace(
            row,
            prior=LinearPrior(
                leads=(1, 2, 3),
                weights=tuple(map(tuple, random.normal(0, 0.1, (3, PRIOR_FEATURES * len(channels) + 1)).tolist())),
                spread=(1.0, 2.0, 3.0),
                limits=(1e6,) * (PRIOR_FEATURES * len(channels) + 1),
            ),
        )
        for name, row in toy_statistics(sample).items()
    }
    assert known_priors(statistics, channels, leads=(1, 3)) is not None
    one = tokenizer.encode(sample, num_context=8, leads=(1, 3), statistics=statistics)
    assert one.anchor.shape[-1] == 2
    for k in (8, 9, 23):
        values = sample.values.copy()
        values[k:] = 0.5 * values[k:] + 17.0
        other = tokenizer.encode(replace(sample, values=values), num_context=8, leads=(1, 3), statistics=statistics)
        for name in ("anchor", "anchor_spread", "volatility", "memory"):
            np.testing.assert_array_equal(getattr(one, name)[:k], getattr(other, name)[:k], err_msg=name)


def test_a_prior_is_used_whole_or_not_at_all() -> None:
    """A lead or a channel that no prior knows: the document's own past speaks instead."""
    sample, size = toy_sample("series", 24), 3 * PRIOR_FEATURES + 1
    prior = LinearPrior(leads=(1,), weights=((0.0,) * size,), spread=(1.0,), limits=(1.0,) * size)
    statistics = {name: replace(row, prior=prior) for name, row in toy_statistics(sample).items()}
    assert known_priors(statistics, sample.channels, leads=(1,)) == [prior] * 3
    assert known_priors(statistics, sample.channels, leads=(1, 2)) is None
    assert known_priors(None, sample.channels, leads=(1,)) is None
    statistics[sample.channels[0]] = replace(statistics[sample.channels[0]], prior=None)
    assert known_priors(statistics, sample.channels, leads=(1,)) is None


def test_errors_count_when_they_come_due() -> None:
    """The spread at frame f knows the errors of targets up to f: 16 times the training variance against their sum."""
    payload = np.zeros((6, 1, 1, 1), np.float32)
    payload[3] = 4.0
    size = PRIOR_FEATURES + 1
    past = Past(
        payload=payload,
        valid=np.ones(payload.shape, bool),
        last=payload,
        memory=np.zeros((6, 1, 1, 1, len(MEMORIES))),
        scale=np.ones((1, 1)),
        slots_are_channels=True,
    )
    prior = LinearPrior(leads=(2,), weights=((0.0,) * size,), spread=(1.0,), limits=(9.0,) * size)
    variance = np.exp(2 * past.forecast([prior], (2,))["anchor_spread"][:, 0, 0, 0, 0])
    np.testing.assert_allclose(variance, [1, 1, 16 / 17, 32 / 18, 32 / 19, 32 / 20], rtol=1e-5)


def test_a_line_is_not_followed_beyond_the_training_range() -> None:
    """A last value of 100 where training saw at most 9 is forecast like 9, by a prior that repeats the last value."""
    payload = np.full((3, 1, 1, 1), 100.0, np.float32)
    size = PRIOR_FEATURES + 1
    past = Past(
        payload=payload,
        valid=np.ones(payload.shape, bool),
        last=payload,
        memory=np.zeros((3, 1, 1, 1, len(MEMORIES))),
        scale=np.ones((1, 1)),
        slots_are_channels=True,
    )
    prior = LinearPrior(leads=(1,), weights=((1.0, *(0.0,) * (size - 1)),), spread=(1.0,), limits=(9.0,) * size)
    np.testing.assert_allclose(past.forecast([prior], (1,))["anchor"], 9.0)


def seasonal_field(num_times: int) -> Sample:
    """Monthly temperature of cells whose seasons are opposite in the two halves, on top of a north-south gradient."""
    sample = toy_sample("grid", num_times, missing=0.0)
    phase = ((np.arange(num_times) % 12) / 12).astype(np.float32)
    amplitude = np.where(np.arange(9) < 4, 5.0, -5.0)[None, None, :] * np.ones((1, 6, 1))
    values = 280.0 + sample.latitude[None] / 10 + amplitude * np.cos(2 * np.pi * phase)[:, None, None]
    return replace(
        sample,
        variables=("air_temperature",),
        levels=(np.nan,),
        values=values[:, None].astype(np.float32),
        valid=np.ones((num_times, 1, 6, 9), bool),
        year_phase=phase,
        day_phase=np.zeros(num_times, np.float32),
    )


def test_each_cell_of_a_grid_has_its_own_season() -> None:
    """The cycle is undone per cell, and only where training saw the place; west of Greenwich is east of it."""
    sample = seasonal_field(48)
    sums = TrainingStatistics(
        source="s", variables=sample.variables, levels=sample.levels, num_year=2, num_day=0, by_cell=True
    )
    sums.add(sample)
    statistics = statistics_from_json(statistics_to_json({"s": sums.finish()}))["s"]
    tokenizer = make_tokenizer("grid", SETTINGS)
    known = tokenizer.encode(sample.window(0, 12), num_context=4, leads=(1,), statistics=statistics)
    assert np.abs(known.payload * known.scale[:, :, None]).max() < 1e-3
    west = replace(sample, longitude=sample.longitude - np.float32(360.0))
    assert (place_number(west.latitude, west.longitude) == place_number(sample.latitude, sample.longitude)).all()
    moved = replace(sample, latitude=sample.latitude + np.float32(3.0))
    unseen = tokenizer.encode(moved.window(0, 12), num_context=4, leads=(1,), statistics=statistics)
    assert np.abs(unseen.payload * unseen.scale[:, :, None]).max() > 4.0
    plain = tokenizer.encode(moved.window(0, 12), num_context=4, leads=(1,))
    np.testing.assert_allclose(unseen.offset, plain.offset)
    np.testing.assert_allclose(
        tokenizer.decode(known, known.payload), sample.window(0, 12).values, rtol=1e-6, err_msg="round trip"
    )


def test_statistics_come_back_from_json(tmp_path: Path) -> None:
    _, statistics = trained(tmp_path)
    back = statistics_from_json(statistics_to_json({"s": statistics}))["s"]
    assert back == statistics


def test_orders_are_averaged_by_their_errors() -> None:
    """The mean lies between its members', at a single order equals it, and follows the better one."""
    random = np.random.default_rng(2)
    series = np.sin(np.arange(300) / 2.0)[None] + 0.01 * random.standard_normal((1, 300))
    known, origins, steps = np.ones(series.shape, bool), np.array([298]), np.array([1, 4])
    one = {
        orders: own_forecast(series, known, origins=origins, steps=steps, orders=orders, refit=8)
        for orders in ((1,), (12,), (1, 12))
    }
    weights = step_coefficients(burg(series[:, :299], (12,))[12], 4)
    np.testing.assert_allclose(one[12,].mean[0, 0], weights[0, [0, 3]] @ series[0, 298:286:-1], rtol=1e-9)
    short, long, both = (one[orders].mean[0, 0] for orders in ((1,), (12,), (1, 12)))
    assert ((both - short) * (both - long) <= 0).all()
    assert (np.abs(both - long) < 1e-3 * np.abs(short - long)).all()
