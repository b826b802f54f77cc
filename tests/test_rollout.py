"""Rollouts: cached trajectories equal those computed again frame by frame; keyed noise, feedback, bounds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.rollout import Recomputed
from sci_gpt.model.init import initialize, standard_normal
from sci_gpt.model.inputs import NoiseSettings
from sci_gpt.model.predict import Predictor
from sci_gpt.model.shapes import SHAPES
from sci_gpt.model.transformer import ModelSettings, build_model
from sci_tokenizers.sample import Sample
from sci_tokenizers.tokenizer import TokenizerSettings
from toy_samples import toy_sample, toy_statistics

SETTINGS = TokenizerSettings(grid_patch=4)
CONTEXT, AHEAD, MEMBERS = 12, 5, 3


def predictor(sample: Sample, *, known: bool = True) -> Predictor:
    """Initial weights, moved so that the trunk matters."""
    model = build_model(SHAPES["tiny"], ModelSettings(tokenizer=SETTINGS, noise=NoiseSettings(width=6)))
    initialize(model, 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            moved = standard_normal(1, name, start=0, stop=parameter.numel())
            parameter.add_(0.05 * moved.view_as(parameter))
    statistics = {sample.source: toy_statistics(sample)} if known else {}
    return Predictor(model, SETTINGS, statistics=statistics)


def samples(modality: str) -> list[Sample]:
    """Two documents of several slots and variables, with gaps."""
    n = {"grid": 1, "series": 1, "trace": SETTINGS.trace_samples}[modality]
    return [toy_sample(modality, (CONTEXT + AHEAD) * n, seed=seed) for seed in (0, 1)]


@pytest.mark.parametrize("modality", ["grid", "series", "trace"])
def test_cached_trajectories_equal_those_computed_again(modality: str) -> None:
    """To 1e-5 of a value's size: batch of documents, members and slots; each frame is fed back as if observed."""
    films = samples(modality)
    made = predictor(films[0])
    found = made.trajectories(films, num_context=CONTEXT, num_frames=AHEAD, num_samples=MEMBERS, seed=4)
    again = Recomputed(made, films, num_context=CONTEXT, members=MEMBERS)
    spread = np.stack([film.values.std(axis=(0, 2, 3)) for film in films]).mean(axis=0)[:, None, None]
    for number in range(AHEAD):
        expected = np.stack(again.step(seed=4))
        frames = np.concatenate([one[:, number] for one in found])
        size = spread + np.abs(expected - np.median(expected, axis=(0, 1, 3, 4))[:, None, None])
        assert (np.abs(frames - expected) / size).max() < 1e-5, number
        again.accept(list(frames))  # rounding must not add up over the frames: a large rain doubles it each time


def test_the_seed_decides_and_a_member_does_not_depend_on_how_many_there_are() -> None:
    """The same seed gives the same to the bit; another one other samples; two members are the first two of three."""
    films = samples("series")
    made = predictor(films[0])
    words = {"num_context": CONTEXT, "num_frames": 3}
    first, same = (made.trajectories(films, **words, num_samples=3, seed=4) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, same, strict=True))
    other = made.trajectories(films, **words, num_samples=3, seed=5)
    assert np.abs(first[0] - other[0]).max() > 0.01
    two = made.trajectories(films[1:], **words, num_samples=2, seed=4)
    np.testing.assert_allclose(two[0], first[1][:2], rtol=1e-4)


def test_what_follows_hangs_on_the_sampled_frame() -> None:
    """A frame that is not fed back would give each frame the same forecast but for its noise: here the first frames'
    noise moves what comes later.
    """
    films = samples("grid")
    made = predictor(films[0])
    long = made.trajectories(films, num_context=CONTEXT, num_frames=AHEAD, num_samples=40, seed=4)[0][:, :, 0, 0]
    flat = long.reshape(40, AHEAD, -1)
    away = flat - flat.mean(axis=0)
    lagged = (away[:, 0] * away[:, 1]).mean(axis=0) / (away[:, 0].std(axis=0) * away[:, 1].std(axis=0))
    assert np.median(lagged) > 0.3


def test_bounded_variables_stay_within_their_bounds() -> None:
    """No negative precipitation, in any frame: the cut value is what is fed back."""
    films = samples("series")
    dry = [replace(film, values=film.values * np.array([1, 0.01, 1], np.float32)[:, None, None]) for film in films]
    made = predictor(dry[0], known=False)
    found = made.trajectories(dry, num_context=CONTEXT, num_frames=AHEAD, num_samples=8, seed=4)
    assert all((one[:, :, :, 1] >= 0).all() for one in found)
    assert any((one[:, :, :, 1] == 0).any() for one in found)
