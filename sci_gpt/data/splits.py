"""Splits: which times of which stretch train, validate and test, on one calendar with gaps; duplicates are refused."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date, timedelta
from typing import Literal

import numpy as np

from sci_gpt.data.near_duplicates import NearDuplicates
from sci_gpt.data.store import SPLITS, Store
from sci_gpt.errors import DataError
from sci_tokenizers.sample import Sample

DAY = 86400.0
BLOCK_TIMES = 32  # times in a block of the duplicate search
BLOCK_CELLS = 16  # cells of a time that stand for it in a block


@dataclass(frozen=True, kw_only=True)
class Era:
    """A part of the calendar: dates to `train_until` train, to `valid_until` validate, to `end` test; inclusive."""

    name: str
    start: date
    train_until: date
    valid_until: date
    end: date


@dataclass(frozen=True, kw_only=True)
class SplitRule:
    """How one source is split.

    Attributes:
        source: its name.
        by: time | station | run | event.
        era: for time and station.
        gap_days: dropped between two splits of an era.
        valid, test: stations, runs or events held out whole.
        empty: splits that may hold nothing.
    """

    source: str
    by: Literal["time", "station", "run", "event"]
    era: Era | None = None
    gap_days: float | None = None
    valid: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    empty: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        where = f"source {self.source!r}: split"
        if self.by in ("time", "station"):
            if self.era is None:
                raise DataError(f"{where} by {self.by} needs an era of the calendar")
            if self.gap_days is None or not self.gap_days > 0:
                raise DataError(
                    f"{where}: gap_days must be positive, got {self.gap_days}; windows on both sides of a date touch"
                )
        both = sorted(set(self.valid) & set(self.test))
        if both:
            raise DataError(f"{where}: {both[0]!r} is held out for both validation and test")
        if self.by == "time" and (self.valid or self.test):
            raise DataError(f"{where} by time holds nothing out whole, got {[*self.valid, *self.test]}")
        if self.by in ("run", "event") and self.era is not None:
            raise DataError(f"{where} by {self.by} has no era, got {self.era.name!r}")

    def parts(self, sample: Sample) -> list[tuple[str, Sample]]:
        """The sample's pieces with their splits, in time order; pieces of one time are dropped.

        A value stamped at the end of its interval belongs to the interval: an era's days are (start, end], not
        [start, end).
        """
        group = sample.key.split("/")[1]
        if self.by in ("run", "event"):
            return [("test" if group in self.test else "valid" if group in self.valid else "train", sample)]
        parts = []
        for split, (start, end) in self.ranges().items():
            if self.by == "station" and split not in self._splits_of(group):
                continue
            first, last = np.searchsorted(sample.time, [start, end], side="right")
            if last - first >= 2:
                parts.append((split, sample.window(int(first), int(last))))
        return parts

    def ranges(self) -> dict[str, tuple[float, float]]:
        """{split: (after, until)} in seconds since 1970, with the gap taken from the start of the later split."""
        if self.era is None or self.gap_days is None:
            return {}
        gap = self.gap_days * DAY
        train, valid = _end_of(self.era.train_until), _end_of(self.era.valid_until)
        ranges = {"train": (_end_of(self.era.start - timedelta(days=1)), train)}
        if valid > train:
            ranges["valid"] = (train + gap, valid)
        ranges["test"] = (valid + gap, _end_of(self.era.end))
        return {split: (after, until) for split, (after, until) in ranges.items() if until > after}

    def _splits_of(self, station: str) -> tuple[str, ...]:
        if station in self.test:
            return ("test",)
        if station in self.valid:
            return ("valid",)
        return ("train",) if self.valid else ("train", "valid")

    def check_complete(self, *, groups: Sequence[str], times: dict[str, int]) -> None:
        """After reading: every group that was to be held out exists, and no split is empty that may not be.

        Args:
            groups: all groups read.
            times: {split: number of times}.

        Raises:
            DataError: the group or split.
        """
        where = f"source {self.source!r}: split"
        for name in (*self.valid, *self.test):
            if name not in groups:
                raise DataError(
                    f"{where} holds out {name!r}, which the files do not have; they have {', '.join(groups)}"
                )
        for split in SPLITS:
            if not times.get(split) and split not in self.empty:
                raise DataError(
                    f"{where}: {split} is empty; choose other dates or names"
                    + (f", or list it under split.empty: [{split}]" if split != "train" else "")
                )


def check_eras(rules: Sequence[SplitRule], *, simulations: Sequence[str], gap_days: float) -> None:
    """Eras of real-world sources are apart by the calendar's gap, so that no date trains in one and tests in another.

    Args:
        rules: of all sources.
        simulations: names of the sources whose weather never happened; their eras are free.
        gap_days: the calendar's gap.

    Raises:
        DataError: the two eras.
    """
    if not gap_days > 0:
        raise DataError(f"calendar: gap_days must be positive, got {gap_days}")
    eras = {rule.era.name: rule.era for rule in rules if rule.era is not None and rule.source not in simulations}
    ordered = sorted(eras.values(), key=lambda era: era.start)
    for before, after in zip(ordered[:-1], ordered[1:], strict=True):
        if (after.start - before.end).days <= gap_days:
            raise DataError(
                f"calendar: era {before.name!r} ends {before.end}, era {after.name!r} starts {after.start}: real-world "
                f"eras must be more than {gap_days:g} days apart"
            )


def check_window(store: Store, source: str, *, num_times: int) -> None:
    """Refuse windows longer than the gap between the splits of a source.

    Args:
        store: the built store.
        source: a source of it.
        num_times: times in the longest window.

    Raises:
        DataError: both lengths in days.
    """
    length, gap = num_times * store.step_seconds(source), store.gap_seconds(source)
    if length > gap:
        raise DataError(
            f"source {source!r}: a window of {num_times} times is {length / DAY:g} days long, the gap between its "
            f"splits is {gap / DAY:g} days; use fewer frames, or build with a longer split.gap_days"
        )


@dataclass(frozen=True, kw_only=True)
class DuplicateGuard:
    """Refuses content that stands in two splits of the corpus, under whatever name and from whatever offset on; nearly
    identical content too (see `NearDuplicates`).

    For copies to the last bit held-out stretches are remembered at every offset, training stretches at every
    BLOCK_TIMES-th: a common piece of 2 * BLOCK_TIMES - 1 times is found. Blocks that are constant or mostly missing are
    not compared.
    """

    _seen: dict[bytes, tuple[str, str]] = field(default_factory=dict, repr=False)
    _train: list[tuple[str, list[bytes]]] = field(default_factory=list, repr=False)
    _near: NearDuplicates = field(default_factory=NearDuplicates, repr=False)

    def add(self, sample: Sample, split: str) -> None:
        """Take one stretch in.

        Raises:
            DataError: another split holds the same content; both keys are named.
        """
        self._near.add(sample, split)
        if split == "train":
            self._train.append((sample.key, list(_blocks(sample, BLOCK_TIMES))))
            return
        for block in _blocks(sample, 1):
            other, other_split = self._seen.setdefault(block, (sample.key, split))
            if other_split != split:
                _refuse(other, other_split, other=sample.key, other_split=split)

    def check(self) -> None:
        """Compare training with what is held out, when all stretches are in.

        Raises:
            DataError: the same content in both, or nearly the same in two splits; both keys are named.
        """
        for key, blocks in self._train:
            for block in blocks:
                if block in self._seen:
                    other, other_split = self._seen[block]
                    _refuse(key, "train", other=other, other_split=other_split)
        self._near.check()


def _refuse(key: str, split: str, *, other: str, other_split: str) -> None:
    raise DataError(f"{key!r} ({split}) and {other!r} ({other_split}) hold the same values; leave one of the two out")


def _blocks(sample: Sample, step: int) -> list[bytes]:
    times = sample.num_times
    size = min(BLOCK_TIMES, times)
    cells = np.ascontiguousarray(sample.values.reshape(times, -1))
    known = sample.valid.reshape(times, -1)
    chosen = np.unique(np.linspace(0, cells.shape[1] - 1, BLOCK_CELLS).astype(int))
    cells, known = np.ascontiguousarray(cells[:, chosen]), known[:, chosen]
    mostly = np.convolve(known.mean(axis=1), np.ones(size), "valid") / size >= 0.5 * known.any(axis=0).mean()
    changes = np.concatenate([[0], np.cumsum((np.diff(cells, axis=0) != 0).any(axis=1))])
    moving = changes[size - 1 :] - changes[: times - size + 1] >= size // 4
    starts = [start for start in range(0, times - size + 1, step) if mostly[start] and moving[start]]
    return [hashlib.blake2b(cells[start : start + size].tobytes(), digest_size=16).digest() for start in starts]


def _end_of(day: date) -> float:
    """Seconds since 1970 at which a date is over (UTC)."""
    return ((day - date(1970, 1, 1)).days + 1) * DAY
