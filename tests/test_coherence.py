"""Samples are coherent: on fields whose correlations are known, against members that are shuffled cell by cell."""

from __future__ import annotations

import numpy as np
import pytest

from sci_evals.metrics import energy_score
from sci_gpt.model.inputs import NoiseSettings
from toy_correlated import (
    DOCUMENTS,
    INNOVATION,
    LEVEL,
    PERSISTENCE,
    SHARED,
    SIDE,
    SPREAD,
    STEPS,
    away,
    contexts,
    covariance,
    frames,
    predictor,
    shuffled,
    trained,
    zonal_power,
)

MEMBERS, CONTEXTS, AHEAD = 24, 96, 3


@pytest.fixture(scope="module")
def trajectories() -> np.ndarray:
    """(context, member, lead, variable, row, column) in units of the process, after some seconds of training."""
    model = trained(STEPS, documents=DOCUMENTS, noise=NoiseSettings(width=32))
    found = predictor(model).trajectories(
        contexts(CONTEXTS, num_times=8 + AHEAD), num_context=8, num_frames=AHEAD, num_samples=MEMBERS, seed=1
    )
    return (np.stack(found)[:, :, :, 0] - LEVEL) / SPREAD


def test_cells_and_the_area_mean_are_as_wide_as_in_the_process(trajectories: np.ndarray) -> None:
    """True: INNOVATION for a cell, and times the root of the mean covariance, 0.50, for the area mean; shuffled members
    have 1/8 of a cell's."""
    first = trajectories[:, :, 0]
    assert away(first).std() / INNOVATION == pytest.approx(1.0, abs=0.1)
    true = INNOVATION * np.sqrt(covariance().mean())
    mean, dealt = (away(one).mean(axis=(-1, -2)).std() for one in (first, shuffled(first)))
    assert mean / true == pytest.approx(1.0, abs=0.25)
    assert dealt / true < 0.35


def test_every_wave_holds_the_power_that_it_has_in_the_process(trajectories: np.ndarray) -> None:
    """Zonal power by wave number: within a factor of 1.6 where nearly all of it is, of 2.5 (wave 3: of 3.5) where the
    process has a tenth to a fiftieth of wave 0; shuffled members have more than that everywhere there."""
    first = trajectories[:, :, 0]
    true = zonal_power(frames(1, seed=99, start=np.zeros((2, SIDE, SIDE)), runs=2000))
    share = zonal_power(away(first)) / true
    assert (np.abs(np.log(share[:2])) < np.log(1.6)).all(), share
    assert (np.abs(np.log(share[2:])) < np.log([2.5, 3.5, 2.5])).all(), share
    assert (zonal_power(away(shuffled(first)))[2:] / true[2:] > 1.5 * share[2:]).all()


def test_the_energy_score_is_better_than_that_of_shuffled_members(trajectories: np.ndarray) -> None:
    """On truths that no training has seen, paired context by context: by more than two standard errors. The score sees
    little of what shuffling breaks."""
    first = trajectories[:, :, 0]
    truth = np.stack([(film.values[8] - LEVEL) / SPREAD for film in contexts(CONTEXTS, num_times=8 + AHEAD)])
    gain = np.array(
        [
            energy_score(dealt, one) - energy_score(members, one)
            for members, dealt, one in zip(first, shuffled(first), truth, strict=True)
        ]
    )
    assert gain.mean() > 2 * gain.std(ddof=1) / np.sqrt(CONTEXTS), gain.mean()


def test_variables_and_neighbours_move_together_as_in_the_process(trajectories: np.ndarray) -> None:
    """Correlations of what members have beside their mean: of the two variables in a cell, and of neighbours."""
    found = away(trajectories[:, :, 0])
    across = np.corrcoef(found[:, :, 0].ravel(), found[:, :, 1].ravel())[0, 1]
    assert across == pytest.approx(SHARED, abs=0.2)
    near = (found[..., :-1] * found[..., 1:]).mean() / (found**2).mean()
    assert near == pytest.approx(covariance()[0, 1], abs=0.2)
    half = SIDE // 2
    far = (found[..., :-half] * found[..., half:]).mean() / (found**2).mean()
    # the same cell of the next patch: 1 where all patches follow the noise alike
    assert far == pytest.approx(covariance()[0, half], abs=0.2)


def test_trajectories_persist_as_the_process_does(trajectories: np.ndarray) -> None:
    """Correlation of a member's departure with its own a frame later: that of AR(1) started at a known frame."""
    found = away(trajectories)
    spread = [1 - PERSISTENCE ** (2 * lead) for lead in range(1, AHEAD + 1)]  # variance at each lead
    for lead in range(AHEAD - 1):
        lagged = (found[:, :, lead] * found[:, :, lead + 1]).mean()
        lagged /= np.sqrt((found[:, :, lead] ** 2).mean() * (found[:, :, lead + 1] ** 2).mean())
        true = PERSISTENCE * np.sqrt(spread[lead] / spread[lead + 1])
        assert lagged == pytest.approx(true, abs=0.15), lead
