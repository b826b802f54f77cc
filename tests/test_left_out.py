"""A training document's climatology has not seen its window: it equals that of the split without it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from sci_gpt.data.held import Held
from sci_gpt.data.loader import Corpus
from sci_gpt.data.prior import with_priors
from sci_gpt.data.statistics import TrainingStatistics
from sci_gpt.data.windows import Windows, WindowSpec
from sci_tokenizers.left_out import without
from sci_tokenizers.sample import Sample
from sci_tokenizers.statistics import ChannelStatistics, harmonics
from sci_tokenizers.table import make_tokenizer
from sci_tokenizers.tokenizer import TokenizerSettings
from sci_tokenizers.variables import forward_transform

MONTH = 365.25 * 86400.0 / 12
SETTINGS = TokenizerSettings(grid_patch=2)


def monthly(modality: str, *, months: int, seed: int = 0) -> Sample:
    """Temperature with a season, a spread of its own in each cell, and gaps; rain beside it (log1p)."""
    random = np.random.default_rng(seed)
    rows, columns = (3, 4) if modality == "grid" else (1, 1)
    seconds = MONTH * np.arange(months)
    phase = np.mod(seconds / (12 * MONTH), 1.0)
    season = 280.0 + 8.0 * np.cos(2 * np.pi * phase)[:, None, None, None]
    values = season + random.normal(0.0, 1.5, (months, 1, rows, columns))
    rain = random.gamma(0.8, 3.0, values.shape)
    values = np.concatenate([values, rain], axis=1).astype(np.float32)
    valid = random.random(values.shape) > 0.1
    return Sample(
        key=f"s/{seed}",
        source="s",
        modality=modality,  # type: ignore[arg-type]
        variables=("air_temperature", "precipitation_amount"),
        levels=(np.nan, np.nan),
        values=np.where(valid, values, 0.0).astype(np.float32),
        valid=valid,
        time=seconds,
        year_phase=phase.astype(np.float32),
        day_phase=np.zeros(months, np.float32),
        step_seconds=MONTH,
        latitude=np.linspace(10.0, 30.0, rows, dtype=np.float32)[:, None].repeat(columns, axis=1),
        longitude=np.linspace(0.0, 30.0, columns, dtype=np.float32)[None].repeat(rows, axis=0),
        elevation=np.zeros((rows, columns), np.float32),
    )


def fitted(sample: Sample) -> dict[str, ChannelStatistics]:
    """Statistics of one stretch, its season in two harmonics."""
    sums = TrainingStatistics(
        source="s",
        variables=sample.variables,
        levels=sample.levels,
        num_year=2,
        num_day=0,
        by_cell=sample.modality == "grid",
    )
    sums.add(sample)
    return sums.finish()


def blanked(sample: Sample, start: int, stop: int) -> Sample:
    """The whole stretch with the times [start, stop) missing."""
    valid = sample.valid.copy()
    valid[start:stop] = False
    return replace(sample, valid=valid)


def cycle(statistics: dict[str, ChannelStatistics], channel: str, sample: Sample) -> np.ndarray:
    """The climatology at the sample's times and cells, (time, Y, X)."""
    row = statistics[channel]
    if row.cells is None:
        return row.climatology_at(sample.year_phase, sample.day_phase)[:, None, None]
    return row.cycle_at(sample.year_phase, sample.day_phase, latitude=sample.latitude, longitude=sample.longitude)[0]


@pytest.mark.parametrize("modality", ["grid", "series"])
def test_it_is_the_fit_of_the_rest(modality: str) -> None:
    """A fit with the window's values missing, of raw and of transformed variables, but for what a window's mean does to
    the season there: that goes into the constant alone. The plain climatology is off by far more."""
    whole, (start, stop) = monthly(modality, months=48), (17, 25)
    window, statistics = whole.window(start, stop), fitted(whole)
    found, expected = without(statistics, window), fitted(blanked(whole, start, stop))
    design = harmonics(whole.year_phase, whole.day_phase, num_year=2, num_day=0)
    for v, channel in enumerate(statistics):
        plain, rest = cycle(statistics, channel, window), cycle(expected, channel, window)
        values = forward_transform(window.values[:, v].astype(np.float64), whole.variables[v])
        for y, x in np.ndindex(values.shape[1:]):
            seen, inside = whole.valid[:, v, y, x], window.valid[:, v, y, x]
            level = (values[:, y, x] - plain[:, y, x])[inside].mean()
            left = np.delete(design[:], np.arange(start, stop), axis=0)[np.delete(seen, np.arange(start, stop))]
            season = np.linalg.solve(left.T @ left, design[start:stop][inside].sum(axis=0))
            constant = inside.sum() / len(left)
            rest[:, y, x] += level * (design[start:stop] @ season - constant)
        np.testing.assert_allclose(cycle(found, channel, window), rest, atol=2e-4)
        assert np.abs(plain - rest).max() > 0.02
        assert found[channel].mean == statistics[channel].mean


def test_a_trend_does_not_pass_for_a_season() -> None:
    """Four years that rise by 6 K a year: taking their last ten months out bends the season of a plain fit of the rest
    several times as much as it bends this one."""
    whole = monthly("series", months=48)
    rising = replace(whole, values=whole.values + 0.5 * np.arange(48, dtype=np.float32)[:, None, None, None])
    window, statistics = rising.window(38, 48), fitted(rising)
    season = [
        np.asarray(row["air_temperature"].climatology[1:])
        for row in (statistics, without(statistics, window), fitted(blanked(rising, 38, 48)))
    ]
    assert 3 * np.abs(season[1] - season[0]).max() < np.abs(season[2] - season[0]).max()


@pytest.mark.parametrize("left", [4, 0])
def test_a_window_that_is_most_of_the_split_leaves_the_climatology_as_it_is(left: int) -> None:
    """What remains, four months of one season, does not tell a year, and nothing tells nothing."""
    whole = monthly("grid", months=40)
    window = whole.window(0, 40 - left)
    statistics = fitted(whole)
    found = without(statistics, window)
    np.testing.assert_allclose(
        cycle(found, "air_temperature", window), cycle(statistics, "air_temperature", window), rtol=1e-6
    )


def test_statistics_without_a_cycle_stay_as_they_are() -> None:
    whole = monthly("series", months=48)
    still = replace(whole, year_phase=np.zeros(48, np.float32))
    statistics = fitted(still)
    assert without(statistics, still.window(3, 9)) == statistics


def test_products_go_through_json() -> None:
    """The numbers that a window is taken out with are in the store and in a checkpoint."""
    whole = monthly("grid", months=48)
    window = whole.window(5, 13)
    statistics = fitted(whole)
    read = {name: ChannelStatistics.from_json(row.to_json()) for name, row in statistics.items()}
    for channel in statistics:
        np.testing.assert_array_equal(
            cycle(without(read, window), channel, window), cycle(without(statistics, window), channel, window)
        )


@dataclass(frozen=True, kw_only=True)
class Memory(Held):
    """A store in memory of one source, as a corpus takes it."""

    statistics: Mapping[str, dict[str, ChannelStatistics]]
    path: str = "memory"
    sources: tuple[str, ...] = ("s",)

    def modality(self, source: str) -> str:
        """Of the one source."""
        return str(self.splits["train"][0].modality)

    def shape(self, source: str) -> tuple[int, ...]:
        """(variables, rows, columns)."""
        return self.splits["train"][0].values.shape[1:]


SPEC = WindowSpec(source="s", frames=8, stride=1, context_frames=(3, 4), leads=(1, 2))


@pytest.mark.parametrize("shuffled", [False, True])
def test_documents_of_training_are_encoded_without_their_window(shuffled: bool) -> None:
    """Also those of the time-shuffled control: what is taken out is what was put in, in the order of its times."""
    whole = monthly("grid", months=48)
    store: Any = Memory(splits={"train": [whole]}, statistics={"s": fitted(whole)})
    corpus = Corpus(store, [SPEC], seed=1, settings=SETTINGS, shuffle_time=shuffled)
    for n in range(5):
        window = corpus.order.sample(n)[1]
        tokens = corpus.document(n)
        rest = without(fitted(whole), whole.window(window, window + SPEC.frames))
        offsets = [
            corpus.tokenizers[0]
            .encode(corpus.windows[0].read(window), num_context=tokens.num_context, leads=(1, 2), statistics=statistics)
            .offset
            for statistics in (rest, fitted(whole))
        ]
        np.testing.assert_array_equal(tokens.offset, offsets[0])
        assert np.abs(tokens.offset - offsets[1]).max() > 0.02


def test_the_spread_of_a_prior_is_that_of_years_that_no_climatology_saw() -> None:
    """White noise of 1.5 K about a season, 36 months: nothing foretells it better than its climatology does, which is
    wrong itself by the root of 5 / 36 of 1.5 K. About the climatology that saw them the months of training lie nearer
    than the noise."""
    whole = monthly("grid", months=36, seed=3)
    tokenizer = make_tokenizer("grid", SETTINGS)
    windows = Windows(Held(splits={"train": [whole]}), SPEC, split="train", frame_times=1)
    statistics = fitted(whole)
    prior = with_priors(windows, tokenizer, statistics=statistics)["air_temperature"].prior
    assert prior is not None
    assert prior.spread[0] > 1.5
    seen = whole.values[:, 0] - cycle(statistics, "air_temperature", whole)
    assert seen[whole.valid[:, 0]].std() < 1.4


def test_what_is_left_of_a_shuffled_window_says_nothing_of_the_rest() -> None:
    """Times are drawn with replacement: of noise the later half's mean hangs on the earlier half's no more than chance
    has it; in permutations of 8 values it falls by as much as the other rises."""
    whole = monthly("series", months=400)
    windows = Windows(Held(splits={"train": [whole]}), SPEC, split="train", frame_times=1, shuffle_time=True)
    values = np.stack([windows.read(n).values[:, 0, 0, 0] for n in range(windows.num_windows)])
    values -= np.stack([windows.stored(n).values[:, 0, 0, 0].mean() for n in range(windows.num_windows)])[:, None]
    early, late = values[:, :4].mean(axis=1), values[:, 4:].mean(axis=1)
    assert abs(np.corrcoef(early, late)[0, 1]) < 0.2
