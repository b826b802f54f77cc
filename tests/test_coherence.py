"""Samples are coherent: on fields whose correlations are known, against members that are shuffled cell by cell."""

from __future__ import annotations

import numpy as np
import pytest

from sci_gpt.model.inputs import NoiseSettings
from toy_correlated import (
    LEVEL,
    PERSISTENCE,
    SHARED,
    SIDE,
    SPREAD,
    contexts,
    covariance,
    frames,
    predictor,
    trained,
)

MEMBERS, CONTEXTS, AHEAD, STEPS = 40, 12, 4, 160
INNOVATION = np.sqrt(1 - PERSISTENCE**2)  # spread of a cell one frame ahead


@pytest.fixture(scope="module")
def trajectories() -> np.ndarray:
    """(context, member, lead, variable, row, column) in units of the process, after some seconds of training."""
    model = trained(STEPS, noise=NoiseSettings(width=32))
    found = predictor(model).trajectories(
        contexts(CONTEXTS, num_times=8 + AHEAD), num_context=8, num_frames=AHEAD, num_samples=MEMBERS, seed=1
    )
    return (np.stack(found)[:, :, :, 0] - LEVEL) / SPREAD


def shuffled(ensemble: np.ndarray) -> np.ndarray:
    """Members dealt anew in every cell and variable: the same marginals to the bit, nothing in common."""
    order = np.random.default_rng(3).random(ensemble.shape).argsort(axis=1)
    return np.take_along_axis(ensemble, order, axis=1)


def away(ensemble: np.ndarray) -> np.ndarray:
    """Members less the ensemble's mean."""
    return np.asarray(ensemble - ensemble.mean(axis=1, keepdims=True))


def test_the_spread_of_the_area_mean_is_that_of_the_process(trajectories: np.ndarray) -> None:
    """True: INNOVATION times the root of the mean covariance, 0.43 of a cell's; shuffled members have 1/8 of a cell's.
    Cells themselves are as wide as they are."""
    first = trajectories[:, :, 0]
    assert away(first).std() / INNOVATION == pytest.approx(1.0, abs=0.2)
    true = INNOVATION * np.sqrt(covariance().mean())
    mean, dealt = (away(one).mean(axis=(-1, -2)).std() for one in (first, shuffled(first)))
    assert 0.6 < mean / true < 1.8  # 1.55: so few steps know the mean only roughly, and say so
    assert dealt / true < 0.45


def test_large_waves_hold_the_power_that_they_have_in_the_process(trajectories: np.ndarray) -> None:
    """Share of the zonal power in waves 0 and 1: most of the true fields', a third of shuffled members'."""

    def share(fields: np.ndarray) -> float:
        power = (np.abs(np.fft.rfft(fields, axis=-1)) ** 2).reshape(-1, SIDE // 2 + 1).mean(axis=0)
        power[1:-1] *= 2.0  # both signs of the wave number
        return float(power[:2].sum() / power.sum())

    first = trajectories[:, :, 0]
    true = share(frames(1, seed=99, start=np.zeros((2, SIDE, SIDE)), runs=500))
    assert share(away(first)) > 0.75 * true
    assert share(away(shuffled(first))) < 0.55 * true


def test_variables_and_neighbours_move_together_as_in_the_process(trajectories: np.ndarray) -> None:
    """Correlations of what members have beside their mean: of the two variables in a cell, and of neighbours."""
    found = away(trajectories[:, :, 0])
    across = np.corrcoef(found[:, :, 0].ravel(), found[:, :, 1].ravel())[0, 1]
    assert across == pytest.approx(SHARED, abs=0.2)
    near = (found[..., :-1] * found[..., 1:]).mean() / (found**2).mean()
    assert near == pytest.approx(covariance()[0, 1], abs=0.25)
    half = SIDE // 2
    far = (found[..., :-half] * found[..., half:]).mean() / (found**2).mean()
    assert far < 0.75  # the same cell of the next patch: 1 where all patches follow the noise alike, 0.14 in truth


def test_trajectories_persist_as_the_process_does(trajectories: np.ndarray) -> None:
    """Correlation of a member's departure with its own a frame later: that of AR(1) started at a known frame."""
    found = away(trajectories)
    spread = [1 - PERSISTENCE ** (2 * lead) for lead in range(1, AHEAD + 1)]  # variance at each lead
    for lead in range(AHEAD - 1):
        lagged = (found[:, :, lead] * found[:, :, lead + 1]).mean()
        lagged /= np.sqrt((found[:, :, lead] ** 2).mean() * (found[:, :, lead + 1] ** 2).mean())
        true = PERSISTENCE * np.sqrt(spread[lead] / spread[lead + 1])
        assert lagged == pytest.approx(true, abs=0.25), lead
