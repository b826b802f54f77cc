"""Quality: spans of a stretch that are missing, constant, clipped or out of range, and the windows that they cost.

Windows belong to a run, stretches to the store. So a build notes the spans in which a rule holds, and a run leaves out
a window by arithmetic, without reading it: where the spans of a rule cover a stated share of its times.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sci_tokenizers.sample import Sample
from sci_tokenizers.variables import VARIABLES

SPAN = np.dtype([("stretch", "<i4"), ("rule", "u1"), ("start", "<i8"), ("stop", "<i8")])
LEAST_TIMES = 8  # of a span that is missing or constant; shorter ones are not noted
CLIPPED_TIMES = 5  # equal values in a row at a record's own extreme: a recorder that has reached its limit
LEAST_LEVELS = 64  # distinct values of a record whose extremes mean something; a quiet one has a handful of counts
CLIPPED_STEP = (
    2  # finest steps of the record; beside the round top of a slow wave it moves by fewer, beside a cut one by more
)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """When a window is left out.

    Attributes:
        name: of the rule.
        share: of the window's times that its spans must cover; 0: any time.
        what: the rule in words, for people.
    """

    name: str
    share: float
    what: str


# In this order: a window counts under the first rule that leaves it out. A span's `rule` is the number in this table.
RULES = (
    Rule(name="missing", share=1.0, what="no value of any channel is valid"),
    Rule(name="constant", share=1.0, what="no channel changes from its last known value"),
    Rule(
        name="clipped",
        share=0.01,
        what=f"waveforms: 1 % of the times or more touched by runs of {CLIPPED_TIMES} equal raw values at the record's "
        "extreme",
    ),
    Rule(name="out_of_range", share=0.0, what="a value outside the variable table's valid range"),
)


def find_spans(sample: Sample) -> list[tuple[int, int, int]]:
    """(rule, start, stop) of every span of a stretch, times [start, stop)."""
    unknown = np.logical_not(sample.valid.reshape(sample.num_times, -1).any(axis=1))
    found = [(0, start, stop) for start, stop in runs(unknown) if stop - start >= LEAST_TIMES]
    found += [(1, start, stop) for start, stop in _constant(sample)]
    if sample.modality == "trace":
        # The reader's verdict on the raw record where there is one: filtered values show no flat top.
        flags = _clipped(sample) if sample.clipped is None else sample.clipped
        found += [(2, start, stop) for start, stop in runs(flags)]
    found += [(3, start, stop) for start, stop in runs(_out_of_range(sample))]
    return found


def count_spans(spans: np.ndarray) -> dict[str, dict[str, int]]:
    """{rule: {"spans", "times"}} of spans (dtype SPAN)."""
    found = {}
    for number, rule in enumerate(RULES):
        mine = spans[spans["rule"] == number]
        found[rule.name] = {"spans": len(mine), "times": int((mine["stop"] - mine["start"]).sum())}
    return found


def left_out(spans: np.ndarray, *, num_times: int, need: int, step: int) -> np.ndarray:
    """Which windows of one stretch are left out, and why.

    Args:
        spans: dtype SPAN, of this stretch.
        num_times: of the stretch.
        need: times of a window; window k begins at k * step.
        step: times between the starts of windows.

    Returns:
        int8 (window,): number of the first rule in RULES that leaves it out, -1 where none does.
    """
    return judged(spans, np.arange(max((num_times - need) // step + 1, 0)) * step, need=need)


def judged(spans: np.ndarray, starts: np.ndarray, *, need: int) -> np.ndarray:
    """As `left_out`, for the windows of `need` times that begin at `starts`, int (window,)."""
    verdict = np.full(len(starts), -1, np.int8)
    for number, rule in reversed(list(enumerate(RULES))):
        mine = spans[spans["rule"] == number]
        if not len(mine):
            continue
        # A constant span counts by its steps: two constant spans that touch differ in the step between them.
        lead = 1 if rule.name == "constant" else 0
        edges = np.stack([mine["start"] + lead, mine["stop"]], axis=1).astype(np.float64).ravel()
        covered = np.repeat(np.append(0, np.cumsum(mine["stop"] - mine["start"] - lead)), 2)[1:-1]
        begin, end = starts + lead, starts + need
        overlap = np.interp(end, edges, covered) - np.interp(begin, edges, covered)
        most = rule.share * (end - begin)
        verdict[(overlap > 0) & (overlap >= most)] = number
    return verdict


def at_limit(record: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Where one component's record stays at its own largest or smallest value as a recorder at its limit does.

    A run of CLIPPED_TIMES equal values, beside which the record moves by more than CLIPPED_STEP of its finest steps: a
    slow wave that is rounded to counts stays at its top too, but comes and goes by one count at a time.

    Args:
        record: (samples,), as raw as there is: filtering takes flat tops away.
        known: bool (samples,); a run ends where a value is missing.

    Returns:
        bool (samples,).
    """
    flags = np.zeros(len(record), bool)
    levels = np.unique(record[known])
    if len(levels) < LEAST_LEVELS:
        return flags
    least = CLIPPED_STEP * float(np.diff(levels).min())
    for limit in (levels[0], levels[-1]):
        for start, stop in runs(known & (record == limit)):
            if stop - start < CLIPPED_TIMES:
                continue
            beside = (slice(max(start - 2, 0), start + 1), slice(stop - 1, stop + 2))  # with two values outside each
            steps = [np.abs(np.diff(record[part][known[part]].astype(np.float64))) for part in beside]
            if np.concatenate(steps).max(initial=0.0) > least:
                flags[start:stop] = True
    return flags


def runs(flags: np.ndarray) -> Iterator[tuple[int, int]]:
    """(start, stop) of the longest runs of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(np.int8), [0]])))
    return zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)


def _constant(sample: Sample) -> Iterator[tuple[int, int]]:
    """Spans over which no cell's known values change; what is missing within them changes nothing."""
    values, valid = sample.values, sample.valid
    changed = ((values[1:] != values[:-1]) & valid[1:] & valid[:-1]).any(axis=(1, 2, 3))
    for start, stop in runs(~changed):
        if stop - start + 1 >= LEAST_TIMES:
            # Values on both sides of a gap are neighbours too: each is compared with the cell's last known one.
            inside = slice(start, stop + 1)
            yield from _unchanged(values[inside], valid[inside], first=start)


def _unchanged(values: np.ndarray, valid: np.ndarray, *, first: int) -> Iterator[tuple[int, int]]:
    values, valid = values.reshape(len(values), -1), valid.reshape(len(valid), -1)
    last = np.maximum.accumulate(np.where(valid, np.arange(len(values))[:, None], -1), axis=0)
    before = np.take_along_axis(values, np.maximum(last[:-1], 0), axis=0)
    changed = (valid[1:] & (last[:-1] >= 0) & (values[1:] != before)).any(axis=1)
    for start, stop in runs(~changed):
        if stop - start + 1 >= LEAST_TIMES and valid[start : stop + 1].any():
            yield first + start, first + stop + 1


def _clipped(sample: Sample) -> np.ndarray:
    """Times at which some component stays at the limit of its record, as far as the sample's own values show it."""
    flags = np.zeros(sample.num_times, bool)
    values, valid = sample.values.reshape(len(flags), -1), sample.valid.reshape(len(flags), -1)
    for column, known in zip(values.T, valid.T, strict=True):
        flags |= at_limit(column, known)
    return flags


def _out_of_range(sample: Sample) -> np.ndarray:
    """Times at which a valid value is outside its variable's range (in float32, as values are kept)."""
    flags = np.zeros(sample.num_times, bool)
    for number, name in enumerate(sample.variables):
        low, high = np.float32(VARIABLES[name].minimum), np.float32(VARIABLES[name].maximum)
        values = sample.values[:, number]
        outside = ((values < low) | (values > high)) & sample.valid[:, number]
        flags |= outside.any(axis=(1, 2))
    return flags
