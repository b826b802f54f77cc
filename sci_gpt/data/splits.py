"""Splits: which times of which stretch train, validate and test, on one calendar with gaps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, timedelta
from typing import Literal

import numpy as np

from sci_gpt.data.store import SPLITS, Store
from sci_gpt.errors import DataError
from sci_tokenizers.sample import Sample

DAY = 86400.0
EARTH_KM = 6371.0088  # mean radius (IUGG)


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
        buffer_km: for station: a station that is not held out but nearer than this to one that is has no split at all.
        valid, test: stations, runs or events held out whole.
        empty: splits that may hold nothing.
        near: {station that the buffer leaves out: (the nearest held-out one, distance in km)}; None before
            `with_places`, which a rule with a buffer needs.
    """

    source: str
    by: Literal["time", "station", "run", "event"]
    era: Era | None = None
    gap_days: float | None = None
    buffer_km: float | None = None
    valid: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    empty: tuple[str, ...] = ()
    near: Mapping[str, tuple[str, float]] | None = None

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
        if self.buffer_km is not None and (self.by != "station" or not (self.valid or self.test)):
            raise DataError(
                f"{where}: buffer_km {self.buffer_km:g} goes with by: station and stations held out in valid or test, "
                f"got by: {self.by} and {len(self.valid) + len(self.test)} held out; leave it out"
            )

    def with_places(self, samples: Iterable[Sample]) -> SplitRule:
        """The rule that knows which stations its buffer leaves out; itself where it has no buffer.

        Args:
            samples: all stretches of the source; their keys and places are looked at.

        Raises:
            DataError: a station whose place is not known.
        """
        if self.buffer_km is None:
            return self
        found: dict[str, set[tuple[float, float]]] = {}
        for sample in samples:
            station = sample.key.split("/")[1]
            known = np.isfinite(sample.latitude) & np.isfinite(sample.longitude)
            if not known.any():
                raise DataError(
                    f"source {self.source!r}: split: buffer_km needs the latitude and longitude of every station, "
                    f"{station!r} has none; give its place (option stations), or leave buffer_km out"
                )
            pairs = zip(sample.latitude[known].tolist(), sample.longitude[known].tolist(), strict=True)
            found.setdefault(station, set()).update(pairs)
        places = {station: np.asarray(sorted(own)) for station, own in found.items()}
        held = [station for station in (*self.valid, *self.test) if station in places]
        near: dict[str, tuple[str, float]] = {}
        for station in sorted(set(places) - set(held)):
            distances = {other: least_distance_km(places[station], places[other]) for other in held}
            closest = min(distances, key=distances.__getitem__, default=None)
            if closest is not None and distances[closest] < self.buffer_km:
                near[station] = (closest, distances[closest])
        return replace(self, near=near)

    def parts(self, sample: Sample) -> list[tuple[str, Sample]]:
        """The sample's pieces with their splits, in time order; pieces of one time are dropped.

        A value stamped at the end of its interval belongs to the interval: an era's days are (start, end], not
        [start, end).
        """
        group = sample.key.split("/")[1]
        if self.by in ("run", "event"):
            return [("test" if group in self.test else "valid" if group in self.valid else "train", sample)]
        if self.buffer_km is not None and self.near is None:
            raise DataError(
                f"source {self.source!r}: split: a rule with a buffer must know all places before it splits: call "
                "with_places first"
            )
        if self.near and group in self.near:
            return []
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
        buffer = f" (buffer_km leaves out {', '.join(self.near)})" if self.near else ""
        for split in SPLITS:
            if not times.get(split) and split not in self.empty:
                raise DataError(
                    f"{where}: {split} is empty{buffer}; choose other dates or names"
                    + (f", or list it under split.empty: [{split}]" if split != "train" else "")
                )


def least_distance_km(one: np.ndarray, other: np.ndarray) -> float:
    """Shortest great-circle distance between two sets of places, on a sphere of the Earth's mean radius (haversine).

    Args:
        one, other: (n, 2) and (m, 2), latitude and longitude in degrees; any longitude convention.
    """
    (north, east), (to_north, to_east) = np.radians(one).T[:, :, None], np.radians(other).T[:, None, :]
    half = np.sin((to_north - north) / 2) ** 2
    half = half + np.cos(north) * np.cos(to_north) * np.sin((to_east - east) / 2) ** 2
    return float(2 * EARTH_KM * np.arcsin(np.sqrt(np.minimum(half, 1.0))).min())


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


def _end_of(day: date) -> float:
    """Seconds since 1970 at which a date is over (UTC)."""
    return ((day - date(1970, 1, 1)).days + 1) * DAY
