"""Traces by phase: frames before P, between P and S, and after S of a made-up record; too few frames say so."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sci_evals.phases import LEAST_FRAMES, PHASES, frame_phases, phase_scores, record_arrivals
from sci_evals.scores import ALL, Bootstrap, WindowScores
from sci_evals.toy import trace_record
from sci_evals.windowset import WindowSet, WindowShape, cut

SHAPE = WindowShape(num_context=8, leads=(1, 2), frame_times=5)


def windows_at(starts: list[int]) -> WindowSet:
    record = trace_record()
    return cut([record], SHAPE, starts=[np.asarray(starts)])


def record_start(windows: WindowSet) -> float:
    return float(windows.time.min())


def test_frames_are_told_apart_by_their_first_and_last_sample() -> None:
    # Frames of lead 1 hold samples 40..44 of a window, of lead 2 samples 45..49; windows begin every 5 samples.
    windows = windows_at([0, 5, 10, 15, 20])
    zero, step = record_start(windows), float(windows.step_seconds[0])

    def phases(p: float, s: float) -> list[list[int]]:
        return frame_phases(windows, [{"P": zero + p * step, "S": zero + s * step}]).tolist()

    noise, between, coda = range(3)
    # P at the first sample of a frame, S in the middle of one.
    assert phases(50, 57) == [[noise, noise], [noise, between], [between, -1], [-1, coda], [coda, coda]]
    # P at the last sample of a frame: the frame is no noise any more, and not after P either.
    assert phases(49, 60) == [[noise, -1], [-1, between], [between, between], [between, coda], [coda, coda]]


def test_unknown_arrivals_have_no_phase() -> None:
    windows = windows_at([0, 5])
    assert (frame_phases(windows, [{}]) == -1).all()
    only_p = frame_phases(windows, [{"P": record_start(windows)}])
    assert (only_p == -1).all(), "without S, nothing says where the coda begins"


def test_arrivals_are_of_the_record_s_own_event() -> None:
    windows = windows_at([0])
    event = windows.records[0].split("/")[0]
    place = np.zeros((1, 1), np.float32)
    windows = replace(windows, places=((place, place + 30.0, place),))
    origin = {"origin": "2020-01-01T00:00:00", "latitude": 0.0, "longitude": 0.0, "depth_km": 0.0}
    (found,) = record_arrivals(windows, {event: origin})
    assert found["P"] - 1577836800.0 == pytest.approx(370.0, abs=3.0)  # Jeffreys and Bullen, 30 degrees
    assert record_arrivals(windows, {"another": origin}) == ({},)


def test_each_phase_is_scored_on_its_own_frames() -> None:
    windows = windows_at(list(range(0, 5 * 90, 5)))
    zero, step = record_start(windows), float(windows.step_seconds[0])
    phase = frame_phases(windows, [{"P": zero + 200 * step, "S": zero + 400 * step}])
    channels = windows.values.shape[2]
    weight = np.ones((90, 2, channels))
    share = np.choose(phase + 1, [9.0, 0.5, 0.8, 1.25])[:, :, None] * weight
    models = {"trained": WindowScores(total={"crps": share}, weight=weight)}
    baselines = {"b": WindowScores(total={"crps": weight}, weight=weight)}
    bootstrap = Bootstrap(
        blocks=np.arange(90) // 5, regions=np.full(90, ALL, dtype=object), resamples=100, interval=0.9
    )
    found = phase_scores(windows, phase, models=models, baselines=baselines, bootstrap=bootstrap)
    assert [part.phase for part in found] == list(PHASES)
    assert [part.num_frames for part in found] == [int((phase == number).sum()) for number in range(3)]
    for part, skill in zip(found, (0.5, 0.2, -0.25), strict=True):
        assert part.num_records == 1 and part.missing == ""
        assert part.rows and [row.skill for row in part.rows] == pytest.approx([skill] * len(part.rows))


def test_a_phase_with_too_few_frames_says_so() -> None:
    windows = windows_at(list(range(0, 5 * 40, 5)))
    zero, step = record_start(windows), float(windows.step_seconds[0])
    phase = frame_phases(windows, [{"P": zero + 190 * step, "S": zero + 215 * step}])
    weight = np.ones((40, 2, windows.values.shape[2]))
    scores = {"m": WindowScores(total={"crps": weight}, weight=weight)}
    bootstrap = Bootstrap(
        blocks=np.arange(40) // 5, regions=np.full(40, ALL, dtype=object), resamples=100, interval=0.9
    )
    noise, between, _ = phase_scores(windows, phase, models=scores, baselines=scores, bootstrap=bootstrap)
    assert noise.missing == "" and noise.rows
    assert between.rows == () and between.num_frames < LEAST_FRAMES
    assert f"{between.num_frames} target frames" in between.missing and f"at least {LEAST_FRAMES}" in between.missing
