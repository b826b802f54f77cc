"""Noise of samples: its keys, the fair CRPS and the pooled one, and a trunk that is conditioned on it."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch

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
        here = made.noise.values[:, start : start + frames * slots].reshape(3, frames, slots, 6)
        assert torch.equal(here, here[:, :, :1].expand_as(here))
        assert (here[0, :, 0] != here[1, :, 0]).all()
        assert len({float(one) for one in here[0, :, 0, 0]}) == frames


def test_fair_crps_against_all_pairs_and_in_the_mean() -> None:
    """mean|x - y| - sum over pairs / (M (M - 1)); for normal members its mean is the closed form 1 / sqrt(pi)."""
    random = np.random.default_rng(0)
    members, truth = random.standard_normal((4, 5)), random.standard_normal(5)
    pairs = sum(np.abs(members[i] - members[j]) for i, j in combinations(range(4), 2))
    expected = np.abs(members - truth).mean(axis=0) - pairs / (4 * 3)
    found = crps_members(torch.from_numpy(members), torch.from_numpy(truth))
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    many = torch.from_numpy(random.standard_normal((2, 200_000)))
    # E|x - y| - E|x - x'| / 2 = (2 - 1) / sqrt(pi), whatever M: that is what fair means.
    score = crps_members(many, torch.from_numpy(random.standard_normal(200_000))).mean()
    assert float(score) == pytest.approx(1 / np.sqrt(np.pi), abs=0.01)


def test_pooled_crps_prefers_members_that_move_together_as_the_truth_does() -> None:
    """Cells, slots and variables of one sign everywhere: members that are independent in one of them score worse."""
    random = np.random.default_rng(1)
    frames, slots, shape = 3000, 4, (2, 4)
    together = Together(
        group=torch.arange(frames).repeat_interleave(slots),
        slot=torch.arange(slots).repeat(frames),
        frame=torch.arange(frames).repeat_interleave(slots),
    )
    weight = torch.ones(frames * slots, *shape)

    def moved(*free: int) -> torch.Tensor:
        """Members (2, frames * slots, V, K) that are the same over all axes but `free` (1 slot, 2 variable, 3 cell)."""
        size = [slots if 1 in free else 1, shape[0] if 2 in free else 1, shape[1] if 3 in free else 1]
        drawn = random.standard_normal((2, frames, *size))
        return torch.from_numpy(np.broadcast_to(drawn, (2, frames, slots, *shape)).reshape(2, -1, *shape)).float()

    truth = moved()[0]
    best = float(pooled_crps(moved() - truth, weight=weight, together=together).mean())
    for free in ((1,), (2,), (3,), (1, 2, 3)):
        worse = float(pooled_crps(moved(*free) - truth, weight=weight, together=together).mean())
        assert worse > 1.03 * best, free


def test_missing_values_count_in_no_score_of_members() -> None:
    """What stands where the truth is missing moves neither loss nor gradient."""
    made = inputs()
    payload = made.payloads["grid"]
    assert made.noise is not None
    count = len(payload.unit_token)
    values = torch.randn(2, count, *payload.values.shape[1:], generator=torch.Generator().manual_seed(0))
    prediction = SamplePrediction(values=values, together=made.noise.together["grid"], pooled_weight=1.0)
    found = unit_losses(prediction, payload, settings=SETTINGS)
    missing = ~payload.valid[payload.unit_target]
    assert missing.any()
    other = replace(prediction, values=torch.where(missing, torch.full_like(values, 1e6), values))
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
