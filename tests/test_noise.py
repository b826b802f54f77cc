"""Noise of samples: its keys, the fair CRPS and the pooled one, and a trunk that is conditioned on it."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.special import ndtri

from sci_gpt.model.heads import SamplePrediction
from sci_gpt.model.init import initialize
from sci_gpt.model.inputs import ModelInputs, NoiseSettings, Together
from sci_gpt.model.loss import crps_members, pooled_crps, unit_losses
from sci_gpt.model.noise import frame_noise, noisy_inputs
from sci_gpt.model.shapes import SHAPES
from sci_gpt.model.transformer import ModelSettings, SciGPT, build_model
from sci_tokenizers.packing import Batch, collate
from sci_tokenizers.table import make_tokenizer
from sci_tokenizers.tokenizer import TokenizerSettings
from toy_samples import toy_sample, toy_statistics

SETTINGS = TokenizerSettings(grid_patch=4)
NOISE = NoiseSettings(width=6, members=3)


def batch() -> Batch:
    """A document of each modality in one row, with gaps, several variables and slots."""
    made = []
    for modality in ("grid", "series", "trace"):
        tokenizer = make_tokenizer(modality, SETTINGS)
        sample = toy_sample(modality, 10 * tokenizer.frame_times)
        made.append(tokenizer.encode(sample, num_context=4, leads=(1, 2), statistics=toy_statistics(sample)))
    return collate([made], sum(one.num_tokens for one in made), numbers=[[11, 12, 13]])


def model(noise: NoiseSettings = NOISE) -> SciGPT:
    """Initial weights."""
    made = build_model(SHAPES["tiny"], ModelSettings(tokenizer=SETTINGS, noise=noise))
    initialize(made, 0)
    return made.eval()


def inputs(seed: int = 5, members: int | None = None) -> ModelInputs:
    """Of `batch`, with noise."""
    return noisy_inputs(batch(), noise=NOISE, seed=seed, members=members)


def test_noise_is_the_same_however_it_is_drawn() -> None:
    """A frame alone, or within its document; another seed, document, member or frame gives other numbers."""
    whole = frame_noise("a", seed=1, member=0, frames=(0, 9), width=6)
    assert torch.equal(whole[5:7], frame_noise("a", seed=1, member=0, frames=(5, 7), width=6))
    others = [frame_noise("a", seed=2, member=0, frames=(0, 9), width=6)]
    others += [frame_noise("b", seed=1, member=0, frames=(0, 9), width=6)]
    others += [frame_noise("a", seed=1, member=1, frames=(0, 9), width=6)]
    assert all((whole - other).abs().min() > 0 for other in others)
    many = frame_noise("a", seed=1, member=0, frames=(0, 4000), width=6)
    assert abs(float(many.mean())) < 0.02 and abs(float(many.std()) - 1) < 0.02


def test_all_slots_of_a_frame_share_their_noise() -> None:
    """One vector per document, frame and member, whatever the slots."""
    made, spans = inputs(), batch().spans
    assert made.noise is not None
    for start, frames, slots in spans:
        here = made.noise.values[:, start : start + frames * slots].reshape(3, frames, slots, NOISE.drawn)
        assert torch.equal(here, here[:, :, :1].expand_as(here))
        assert (here[0, :, 0] != here[1, :, 0]).all()
        assert len({float(one) for one in here[0, :, 0, 0]}) == frames


def test_fair_crps_against_quantiles_pair_by_pair() -> None:
    """mean E|x - y| - sum over pairs of E|x - x'| / (M (M - 1)), each mean over 2,000 quantiles of a normal."""
    random = np.random.default_rng(0)
    location, spread, truth = random.standard_normal((3, 5)), random.random((3, 5)) + 0.2, random.standard_normal(5)
    z = ndtri((np.arange(2000) + 0.5) / 2000)[:, None]

    def mean_absolute(mean: np.ndarray, size: np.ndarray) -> np.ndarray:
        return np.asarray(np.abs(mean + size * z).mean(axis=0))

    error = np.mean([mean_absolute(m - truth, s) for m, s in zip(location, spread, strict=True)], axis=0)
    pairs = sum(
        mean_absolute(location[i] - location[j], np.hypot(spread[i], spread[j])) for i, j in combinations(range(3), 2)
    )
    found = crps_members(*(torch.from_numpy(part) for part in (location, spread)), truth=torch.from_numpy(truth))
    np.testing.assert_allclose(found, error - pairs / (3 * 2), atol=1e-3)


@pytest.mark.parametrize("inside", [0.1, 0.5, 0.9])
def test_fair_crps_is_least_in_the_mean_for_members_as_wide_as_the_truth(inside: float) -> None:
    """Two members whose variance is partly drawn and partly `inside`, truth of variance 1: the mean is the closed form
    1 / sqrt(pi) however it is parted, and more for members that are too narrow or too wide."""
    random = np.random.default_rng(1)
    drawn, truth = (torch.from_numpy(random.standard_normal((n, 200_000))) for n in (2, 1))

    def score(width: float) -> float:
        location, spread = width * np.sqrt(1 - inside) * drawn, torch.full_like(drawn, width * np.sqrt(inside))
        return float(crps_members(location, spread, truth=truth[0]).mean())

    assert score(1.0) == pytest.approx(1 / np.sqrt(np.pi), abs=0.004)
    assert min(score(0.8), score(1.25)) > score(1.0) + 0.005


FRAMES, SLOTS, CELLS = 500, 4, (2, 4)  # cells: variables and values of a token


def frames_together() -> Together:
    """FRAMES frames of SLOTS units each."""
    frame = torch.arange(FRAMES).repeat_interleave(SLOTS)
    return Together(group=frame, slot=torch.arange(SLOTS).repeat(FRAMES), frame=frame)


def pooled(hangs: np.ndarray, *, truth: np.ndarray) -> float:
    """Mean pooled score of members that hang so, each frame alike, (SLOTS, V, K, N), where the truth hangs as `truth`
    says."""
    drawn = np.random.default_rng(1).standard_normal((FRAMES, truth.shape[-1]))
    came = torch.from_numpy(np.einsum("svkn,fn->fsvk", truth, drawn).reshape(-1, *CELLS)).float()
    twice = torch.from_numpy(hangs).float().repeat(FRAMES, 1, 1, 1).expand(2, -1, -1, -1, -1)
    errors, weight = -came.expand(2, -1, -1, -1), torch.ones_like(came)
    together = frames_together()
    return float(pooled_crps(errors, twice, weight=weight, together=together, key=977 * together.frame).mean())


def test_pooled_crps_prefers_members_that_move_together_as_the_truth_does() -> None:
    """Cells, slots and variables of one sign everywhere: members that are independent in one of them, too narrow or
    too wide score worse."""
    same = np.ones((SLOTS, *CELLS, 1))
    best = pooled(same, truth=same)
    for free in ((0,), (1,), (2,), (0, 1, 2)):
        sizes = [size if axis in free else 1 for axis, size in enumerate((SLOTS, *CELLS))]
        number = np.broadcast_to(np.arange(np.prod(sizes)).reshape(sizes), (SLOTS, *CELLS))
        assert pooled(np.eye(int(np.prod(sizes)))[number], truth=same) > 1.03 * best, free
    assert min(pooled(0.5 * same, truth=same), pooled(2.0 * same, truth=same)) > 1.02 * best


@pytest.mark.parametrize("second", ["in the token", "over the slots"])
def test_pooled_crps_sees_that_two_patterns_go_together(second: str) -> None:
    """A slope inside tokens goes with another pattern inside them, or with a step between slots (a smooth field has no
    edge between patches): members with both, each by itself, have the same variance in every Walsh function."""
    slope = np.broadcast_to(np.array([1.0, 1.0, -1.0, -1.0]), (SLOTS, *CELLS))
    other = {
        "in the token": np.broadcast_to(np.array([1.0, -1.0, 1.0, -1.0]), (SLOTS, *CELLS)),
        "over the slots": np.broadcast_to(np.array([1.0, -1.0, 1.0, -1.0])[:, None, None], (SLOTS, *CELLS)),
    }[second]
    truth, parted = (slope + other)[..., None], np.stack([slope, other], axis=-1)
    assert pooled(parted, truth=truth) > 1.01 * pooled(truth, truth=truth)


def test_missing_values_count_in_no_score_of_members() -> None:
    """What stands where the truth is missing moves neither loss nor gradient."""
    made = inputs()
    payload = made.payloads["grid"]
    assert made.noise is not None
    count = len(payload.unit_token)
    values = torch.randn(2, count, *payload.values.shape[1:], generator=torch.Generator().manual_seed(0))
    hangs = torch.randn(*values.shape, 3, generator=torch.Generator().manual_seed(1))
    prediction = SamplePrediction(
        location=values,
        hangs=hangs,
        noise=torch.zeros(2, count, 3),
        together=made.noise.together["grid"],
        pooled_weight=1.0,
    )
    found = unit_losses(prediction, payload, settings=SETTINGS)
    missing = ~payload.valid[payload.unit_target]
    assert missing.any()
    other = replace(
        prediction,
        location=torch.where(missing, torch.full_like(values, 1e6), values),
        hangs=torch.where(missing[..., None], torch.full_like(hangs, 1e6), hangs),
    )
    assert torch.equal(unit_losses(other, payload, settings=SETTINGS), found)


def test_members_differ_from_the_first_step_and_learn() -> None:
    """Untrained members are as wide as the spread says; every parameter of the noise gets a gradient."""
    made, net = inputs(), model()
    predictions = net(made)
    losses = [unit_losses(one, made.payloads[name], settings=SETTINGS).sum() for name, one in predictions.items()]
    assert all((one.values[0] - one.values[1]).abs().max() > 0.1 for one in predictions.values())
    torch.stack(losses).sum().backward()
    quiet = [
        name
        for name, p in net.named_parameters()
        if "noise" in name or "readout" in name
        if p.grad is None or not p.grad.any()
    ]
    assert not quiet


def test_a_member_is_what_it_would_be_alone_and_the_seed_counts() -> None:
    """Members do not see each other; the same seed gives the same, another one other members."""
    net = model()
    with torch.no_grad():
        all_three, one, other = (net(made) for made in (inputs(), inputs(members=1), inputs(seed=6)))
    for name, prediction in all_three.items():
        torch.testing.assert_close(prediction.values[:1], one[name].values, rtol=1e-5, atol=1e-5)
        assert (prediction.values - other[name].values).abs().max() > 0.1


def test_inputs_must_fit_the_model() -> None:
    """Noise for a model without, or none for one with: one clear error."""
    with pytest.raises(ValueError, match="width 6 got inputs without noise"):
        model()(noisy_inputs(batch(), noise=NoiseSettings(), seed=0))
    with pytest.raises(ValueError, match="width 0 got inputs with noise"):
        model(NoiseSettings())(inputs())
