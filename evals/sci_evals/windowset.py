"""WindowSet: many windows of one source as stacked arrays, cut from stretches, with context and future apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256

import numpy as np

from sci_gpt.data.quality import RULES, judged
from sci_gpt.data.store import Store
from sci_gpt.errors import DataError
from sci_tokenizers.sample import Modality, Sample
from sci_tokenizers.sphere import cell_weights
from sci_tokenizers.variables import VARIABLES, forward_transform

# A whole stretch is read at once up to this size; beyond it, window by window.
_READ_ONCE_BYTES = 256e6


@dataclass(frozen=True, kw_only=True)
class WindowShape:
    """Shape of a source's windows: context frames, leads in frames (ascending), times per frame."""

    num_context: int
    leads: tuple[int, ...]
    frame_times: int = 1

    @property
    def num_times(self) -> int:
        """Times that a window spans: context and every frame up to the longest lead."""
        return (self.num_context + max(self.leads)) * self.frame_times

    @property
    def context_times(self) -> int:
        """Times of the context."""
        return self.num_context * self.frame_times

    @property
    def future_index(self) -> np.ndarray:
        """(lead, frame_times): positions in the window of the times that are forecast."""
        first = (self.num_context - 1 + np.asarray(self.leads)) * self.frame_times
        return np.asarray(first[:, None] + np.arange(self.frame_times))


@dataclass(frozen=True, kw_only=True, eq=False)
class WindowSet:
    """N windows of W times of one source, V channels on Y x X places; values in units of the variable table.

    Attributes:
        source, modality, variables, levels, channels: of the source.
        shape: where context ends and which frames are forecast.
        values: float32 (N, W, V, Y, X), 0 where missing; valid: bool, same shape.
        time: float64 (N, W), seconds since 1970; year_phase, day_phase: float32 (N, W), of the samples' own calendar.
        step_seconds: float64 (N,).
        groups: run, station or event of each window; stretch: int (N,), row of `places`.
        places: (latitude, longitude, elevation) of each stretch, float32 (Y, X) each.
        records: key of each stretch without the source (GROUP[/PART]).
        left_out: {rule of quality: windows} that were chosen and then left out, of a set that was read from a store.
    """

    source: str
    modality: Modality
    variables: tuple[str, ...]
    levels: tuple[float, ...]
    channels: tuple[str, ...]
    shape: WindowShape
    values: np.ndarray
    valid: np.ndarray
    time: np.ndarray
    year_phase: np.ndarray
    day_phase: np.ndarray
    step_seconds: np.ndarray
    groups: tuple[str, ...]
    stretch: np.ndarray
    places: tuple[tuple[np.ndarray, np.ndarray, np.ndarray], ...]
    records: tuple[str, ...]
    left_out: Mapping[str, int] = field(default_factory=dict)

    @property
    def num_windows(self) -> int:
        """N."""
        return int(self.values.shape[0])

    @property
    def transformed(self) -> tuple[bool, ...]:
        """Per channel: is the unit that baselines work in another than the physical one?"""
        return tuple(VARIABLES[name].transform != "none" for name in self.variables)

    @cached_property
    def work(self) -> np.ndarray:
        """Values in the variables' transformed units (those in which baselines are fitted), float32 (N, W, V, Y, X)."""
        if not any(self.transformed):
            return self.values
        parts = [forward_transform(self.values[:, :, i], name) for i, name in enumerate(self.variables)]
        return np.stack(parts, axis=2).astype(np.float32)

    @property
    def context(self) -> np.ndarray:
        """Transformed context, NaN where missing: float64 (N, C, V, Y, X), C times."""
        cut = slice(0, self.shape.context_times)
        return np.where(self.valid[:, cut], self.work[:, cut].astype(np.float64), np.nan)

    @property
    def future(self) -> np.ndarray:
        """Transformed truth, NaN where missing: float64 (N, lead, frame_times, V, Y, X)."""
        index = self.shape.future_index
        return np.where(self.valid[:, index], self.work[:, index].astype(np.float64), np.nan)

    @property
    def truth(self) -> np.ndarray:
        """Raw physical truth, NaN where missing: float64 (N, lead, frame_times, V, Y, X)."""
        index = self.shape.future_index
        return np.where(self.valid[:, index], self.values[:, index].astype(np.float64), np.nan)

    @property
    def future_month(self) -> np.ndarray:
        """Calendar month (0..11, twelfths of the year) of each lead's first time, int (N, lead)."""
        phase = self.year_phase[:, self.shape.future_index[:, 0]].astype(np.float64)
        return np.minimum((phase * 12).astype(int), 11)

    @cached_property
    def place_names(self) -> tuple[str, ...]:
        """One name per row of `places`: equal where latitudes and longitudes are."""
        return tuple(sha256(lat.tobytes() + lon.tobytes()).hexdigest()[:16] for lat, lon, _ in self.places)

    @property
    def origin(self) -> np.ndarray:
        """Time of the last context value, float64 (N,)."""
        return self.time[:, self.shape.context_times - 1]

    @cached_property
    def cell_weights(self) -> np.ndarray:
        """Area weight of each cell, mean 1, float64 (Y, X): the loss's own, `sci_tokenizers.sphere.cell_weights`."""
        latitude, longitude, _ = self.places[0]
        return cell_weights(latitude, longitude) if self.modality == "grid" else np.ones(latitude.shape)

    def take(self, index: np.ndarray) -> WindowSet:
        """The windows of these numbers, in this order."""
        return replace(
            self,
            **{name: getattr(self, name)[index] for name in ("values", "valid", "time", "year_phase", "day_phase")},
            step_seconds=self.step_seconds[index],
            groups=tuple(self.groups[i] for i in index),
            stretch=self.stretch[index],
        )

    def shuffled(self, seed: int) -> WindowSet:
        """Each time has the values of one drawn at random from its window (with replacement, as in `Windows.shuffled`),
        all channels together; the calendar stays.
        """
        drawn = np.random.default_rng(seed).integers(0, self.time.shape[1], self.time.shape)
        index = drawn[:, :, None, None, None]
        return replace(
            self,
            values=np.take_along_axis(self.values, index, axis=1),
            valid=np.take_along_axis(self.valid, index, axis=1),
        )

    def samples(self) -> Iterator[Sample]:
        """The windows as samples, for a model."""
        for i in range(self.num_windows):
            latitude, longitude, elevation = self.places[self.stretch[i]]
            yield Sample(
                key=f"{self.source}/{self.records[self.stretch[i]]}/{i}",
                source=self.source,
                modality=self.modality,
                variables=self.variables,
                levels=self.levels,
                values=self.values[i],
                valid=self.valid[i],
                time=self.time[i],
                year_phase=self.year_phase[i],
                day_phase=self.day_phase[i],
                step_seconds=float(self.step_seconds[i]),
                latitude=latitude,
                longitude=longitude,
                elevation=elevation,
            )


def cut(samples: Sequence[Sample], shape: WindowShape, *, starts: Sequence[np.ndarray]) -> WindowSet:
    """Cut windows out of stretches.

    Args:
        samples: stretches of one source.
        shape: of every window.
        starts: per stretch, the first time of each window, int (n,).

    Raises:
        DataError: no window at all.
    """
    parts: dict[str, list[np.ndarray]] = {name: [] for name in ("values", "valid", "time", "year_phase", "day_phase")}
    kept = [(sample, np.asarray(first, int)) for sample, first in zip(samples, starts, strict=True) if len(first)]
    if not kept:
        raise DataError(
            f"no window of {shape.num_times} times fits the {len(samples)} stretches given; shorten the windows"
        )
    for sample, first in kept:
        index = first[:, None] + np.arange(shape.num_times)
        for name, rows in parts.items():
            rows.append(getattr(sample, name)[index])
    counts = [len(first) for _, first in kept]
    head = kept[0][0]
    return WindowSet(
        source=head.source,
        modality=head.modality,
        variables=head.variables,
        levels=head.levels,
        channels=head.channels,
        shape=shape,
        **{name: np.concatenate(rows) for name, rows in parts.items()},
        step_seconds=np.repeat([sample.step_seconds for sample, _ in kept], counts),
        groups=tuple(group_of(sample.key) for (sample, _), n in zip(kept, counts, strict=True) for _ in range(n)),
        stretch=np.repeat(np.arange(len(kept)), counts),
        places=tuple((sample.latitude, sample.longitude, sample.elevation) for sample, _ in kept),
        records=tuple(sample.key.split("/", 1)[1] for sample, _ in kept),
        left_out={},
    )


def group_of(key: str) -> str:
    """Run, station or event of a stretch: the second part of its key SOURCE/GROUP[/PART]."""
    return key.split("/")[1]


def choose_starts(lengths: np.ndarray, shape: WindowShape, *, count: int, seed: int = 0) -> list[np.ndarray]:
    """Starts of about `count` windows, spread evenly over all possible ones (one drawn from each of `count` equal
    pieces).

    The draw within a piece keeps starts from falling on one hour or weekday.

    Args:
        lengths: times of each stretch, int (n,).

    Returns:
        Per stretch, ascending starts; every start if there are no more than `count`.
    """
    possible = np.maximum(np.asarray(lengths, np.int64) - shape.num_times + 1, 0)
    ends = np.cumsum(possible)
    total = int(ends[-1]) if len(ends) else 0
    if total <= count:
        chosen = np.arange(total)
    else:
        pieces = (np.arange(count) + np.random.default_rng(seed).random(count)) * (total / count)
        chosen = np.unique(np.minimum(pieces.astype(np.int64), total - 1))
    stretch = np.searchsorted(ends, chosen, side="right")
    return [chosen[stretch == i] - (ends[i] - possible[i]) for i in range(len(possible))]


def keep_good(
    store: Store, source: str, *, split: str, starts: Sequence[np.ndarray], need: int
) -> tuple[list[np.ndarray], dict[str, int]]:
    """Windows less those that a rule of quality leaves out, as in training (`sci_gpt.data.quality.RULES`).

    Args:
        store, source, split: where they are.
        starts: per stretch, the first time of each window, int (n,).
        need: times of a window.

    Returns:
        Per stretch the starts that are left, and {rule: how many it cost}.
    """
    counts, kept, before = np.zeros(len(RULES), np.int64), list(starts), 0
    for records, spans in store.shards(source, split):
        for row in np.unique(spans["stretch"]).tolist():
            stretch = before + row
            verdict = judged(spans[spans["stretch"] == row], kept[stretch], need=need)
            counts += np.bincount(verdict[verdict >= 0], minlength=len(RULES))
            kept[stretch] = kept[stretch][verdict < 0]
        before += len(records)
    return kept, {rule.name: int(n) for rule, n in zip(RULES, counts, strict=True) if n}


def read_windows(store: Store, source: str, *, split: str, shape: WindowShape, count: int) -> WindowSet | None:
    """About `count` windows of a split, evenly spread, less those that a rule of quality leaves out; None where none
    is left, or none fits the split's stretches.

    Raises:
        DataError: a shard cannot be read.
    """
    lengths = store.lengths(source, split)
    per_time = float(np.prod(store.shape(source))) * 5.0  # float32 and a bool
    count = max(1, min(count, int(1e9 / (per_time * shape.num_times))))
    samples: list[Sample] = []
    starts: list[np.ndarray] = []
    chosen = choose_starts(lengths, shape, count=count)
    good, left_out = keep_good(store, source, split=split, starts=chosen, need=shape.num_times)
    for i, first in enumerate(good):
        if not len(first):
            continue
        low, high = int(first[0]), int(first[-1]) + shape.num_times
        if (high - low) * per_time <= _READ_ONCE_BYTES:
            samples.append(store.read(source, split, index=i, start=low, stop=high))
            starts.append(first - low)
        else:
            samples += [store.read(source, split, index=i, start=int(s), stop=int(s) + shape.num_times) for s in first]
            starts += [np.zeros(1, int)] * len(first)
    if not samples:
        return None
    windows = replace(cut(samples, shape, starts=starts), left_out=left_out)
    context_seen = windows.valid[:, : shape.context_times].any(axis=(1, 2, 3, 4))
    future_seen = windows.valid[:, shape.future_index].any(axis=(1, 2, 3, 4, 5))
    useful = np.flatnonzero(context_seen & future_seen)
    return windows.take(useful) if len(useful) else None
