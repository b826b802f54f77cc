"""Scores of traces by phase: noise before P, P to S, and coda after S, by theoretical first arrivals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sci_evals.arrivals import first_arrivals
from sci_evals.scores import Bootstrap, LeadGroup, Score, WindowScores, compare
from sci_evals.windowset import WindowSet

PHASES = ("noise", "P to S", "coda")
# Fewer target frames than this, or a single block of them, say nothing of a phase.
LEAST_FRAMES = 20


@dataclass(frozen=True, kw_only=True)
class PhaseScore:
    """One phase of a source: how many target frames lie in it, and its rows, or why there are none.

    Attributes:
        num_frames: (window, lead) pairs whose frame lies in the phase whole and holds a truth.
        num_records: records that they come from.
        rows: of the trained model against the best baseline on these frames, by metric, record and component.
        missing: why there are no rows; empty where there are.
    """

    source: str
    phase: str
    num_frames: int
    num_records: int
    rows: tuple[Score, ...]
    missing: str


def record_arrivals(windows: WindowSet, events: Mapping[str, Mapping[str, object]]) -> tuple[dict[str, float], ...]:
    """{"P": seconds since 1970, "S": ..} of each stretch of `windows` (see `first_arrivals`); empty where unknown.

    Args:
        events: {event: its origin, latitude, longitude, depth_km}, of the source's options.
    """
    found = []
    for record, (latitude, longitude, _) in zip(windows.records, windows.places, strict=True):
        event = events.get(record.split("/")[0], {})
        found.append(first_arrivals(event, float(latitude.flat[0]), longitude=float(longitude.flat[0])))
    return tuple(found)


def frame_phases(windows: WindowSet, arrivals: Sequence[Mapping[str, float]]) -> np.ndarray:
    """Phase of every forecast frame: its number in `PHASES`, -1 where an arrival lies in the frame or is unknown.

    A frame is noise where its last sample is before P, P to S where its first is at or after P and its last before S,
    coda where its first is at or after S. The causal filter shows an arrival up to a few samples later.

    Args:
        arrivals: of each stretch, as `record_arrivals`.

    Returns:
        int (N, lead).
    """
    nan = float("nan")
    p, s = (np.asarray([at.get(name, nan) for at in arrivals])[windows.stretch][:, None] for name in ("P", "S"))
    times = windows.time[:, windows.shape.future_index]  # (N, lead, frame_times)
    first, last = times[..., 0], times[..., -1]
    phase = np.full(first.shape, -1)
    phase[last < p] = PHASES.index("noise")
    phase[(first >= p) & (last < s)] = PHASES.index("P to S")
    phase[(first >= s) & (s > p)] = PHASES.index("coda")
    return phase


def phase_scores(
    windows: WindowSet,
    phase: np.ndarray,
    *,
    models: Mapping[str, WindowScores],
    baselines: Mapping[str, WindowScores],
    bootstrap: Bootstrap,
) -> list[PhaseScore]:
    """Scores of each phase alone, on the frames in it; the best baseline is chosen on these frames.

    Args:
        phase: int (N, lead), as `frame_phases`.
        models, baselines: scores of all windows.
        bootstrap: blocks and records of the windows.
    """
    seen = next(iter(models.values())).weight.any(axis=2)  # (N, lead)
    group = LeadGroup(name="all leads", leads=windows.shape.leads)
    found = []
    for number, name in enumerate(PHASES):
        inside = (phase == number) & seen
        frames, own = int(inside.sum()), np.flatnonzero(inside.any(axis=1))
        blocks = len(np.unique(bootstrap.blocks[own]))
        rows: list[Score] = []
        missing = f"{frames} target frames in {blocks} blocks: at least {LEAST_FRAMES} in 2 are needed"
        if frames >= LEAST_FRAMES and blocks > 1:
            mine, others = (_only(part, inside) for part in (models, baselines))
            rows = compare(windows, mine, baselines=others, lead_groups=[group], bootstrap=bootstrap)
            missing = "" if rows else "no baseline errs on its frames, so there is nothing to compare with"
        records = len({windows.records[windows.stretch[i]] for i in own})
        found.append(
            PhaseScore(
                source=windows.source,
                phase=name,
                num_frames=frames,
                num_records=records,
                rows=tuple(rows),
                missing=missing,
            )
        )
    return found


def _only(scores: Mapping[str, WindowScores], inside: np.ndarray) -> dict[str, WindowScores]:
    """The same scores with nothing but the frames `inside` (N, lead) in sums and weights."""
    kept = inside[:, :, None]
    return {
        name: WindowScores(total={metric: part * kept for metric, part in own.total.items()}, weight=own.weight * kept)
        for name, own in scores.items()
    }
