"""Windows: arithmetic on stored stretches, from a window's number to its stretch, its times and its sample."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

import numpy as np

from sci_gpt.data.order import keyed
from sci_gpt.data.quality import RULES, left_out, runs
from sci_gpt.errors import DataError
from sci_tokenizers.sample import Sample

_MOST_TABLES = 64  # shards whose windows are kept worked out


@dataclass(frozen=True, kw_only=True)
class WindowSpec:
    """The shape of a source's documents and its share of a mixture.

    Attributes:
        source: name in the store.
        frames: length of a document.
        stride: frames between the starts of neighbouring windows.
        context_frames: smallest and largest C; a sample's own C is drawn from its number.
        leads: frames ahead that each token is asked for.
        weight: share of the tokens of the mixture.
        masked: share of the samples that are masked documents; which ones, their numbers say.
    """

    source: str
    frames: int
    stride: int
    context_frames: tuple[int, int]
    leads: tuple[int, ...]
    weight: float = 1.0
    masked: float = 0.0

    def __post_init__(self) -> None:
        low, high = self.context_frames
        if not 1 <= low <= high < self.frames:
            raise DataError(
                f"source {self.source!r}: context_frames must be within 1..frames - 1 = {self.frames - 1}, "
                f"got {low}..{high}"
            )


class Stretches(Protocol):
    """Where windows are cut from: a built `Store`, or stretches in memory (`held.Held`)."""

    def shards(self, source: str, split: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """`shard` of every shard, in order."""
        ...

    def shard(self, source: str, split: str, *, number: int) -> tuple[np.ndarray, np.ndarray]:
        """A record per stretch of a shard, with the field `num_times`, and where a rule of quality holds in them (dtype
        quality.SPAN, stretches counted within the shard)."""
        ...

    def read(self, source: str, split: str, *, index: int, start: int, stop: int) -> Sample:
        """The times [start, stop) of a stretch, counted over all shards of the split."""
        ...


@dataclass(frozen=True, kw_only=True)
class _Table:
    """The windows of one shard.

    Attributes:
        ends: windows, good or not, up to the end of each stretch, int64 (stretch,).
        kept_before: good windows before each run of windows that are left out, int64 (run,).
        skipped: windows left out before each run, and by all, int64 (run + 1,).
        left_out: windows left out by each of RULES, int64 (rule,).
    """

    ends: np.ndarray
    kept_before: np.ndarray
    skipped: np.ndarray
    left_out: np.ndarray

    @property
    def num_good(self) -> int:
        """Windows that are left."""
        return (int(self.ends[-1]) if len(self.ends) else 0) - int(self.skipped[-1])


class Windows:
    """The windows of one split of one source, less those that a rule of quality leaves out (`quality.RULES`).

    Shards are gone through once, here; of each is kept how many stretches and good windows come before its end. Where
    in its shard a window is, is worked out when it is asked for, and kept for a few shards.

    Attributes:
        num_windows: that are left.
        left_out: {rule: number of windows} that it cost; empty where all are good.

    Args:
        store: the built store, or stretches in memory.
        spec: shape of the windows.
        split: "train", "valid" or "test".
        frame_times: entries of the time axis per frame (the tokenizer's).
        shuffle_time: see `shuffled`.
        seed: of the shuffle.

    Raises:
        DataError: a window is longer than every stretch of the split, the split is empty, or no window of it is good.
    """

    def __init__(
        self,
        store: Stretches,
        spec: WindowSpec,
        *,
        split: str,
        frame_times: int,
        shuffle_time: bool = False,
        seed: int = 0,
    ) -> None:
        self.store, self.spec, self.split, self.frame_times = store, spec, split, frame_times
        self.shuffle_time, self.seed = shuffle_time, seed
        self._need, self._step = spec.frames * frame_times, spec.stride * frame_times
        self._table = lru_cache(maxsize=_MOST_TABLES)(self._make)
        stretches, good = [0], [0]
        whole, longest, lost = 0, 0, np.zeros(len(RULES), np.int64)
        for records, spans in store.shards(spec.source, split):
            table = self._worked_out(records, spans)
            stretches.append(stretches[-1] + len(records))
            good.append(good[-1] + table.num_good)
            lost += table.left_out
            whole += table.num_good + int(table.skipped[-1])
            longest = max(longest, int(records["num_times"].max(initial=0)))
        self._stretches, self._good = np.asarray(stretches, np.int64), np.asarray(good, np.int64)
        self.num_windows = good[-1]
        self.left_out = {rule.name: int(n) for rule, n in zip(RULES, lost, strict=True) if n}
        if not stretches[-1]:
            raise DataError(
                f"source {spec.source!r} has no stretch in its {split} split; choose another split rule or dates"
            )
        if whole and not self.num_windows:
            raise DataError(
                f"source {spec.source!r}, {split}: rules of quality leave out all {whole} windows "
                f"({', '.join(f'{name} {count}' for name, count in self.left_out.items())}); look at the data"
            )
        if not whole:
            raise DataError(
                f"source {spec.source!r}, {split}: a window of {spec.frames} frames ({self._need} times) is longer "
                f"than the data ({longest} times); lower mixture frames"
            )

    def locate(self, window: int) -> tuple[int, int, int]:
        """(stretch, first time, one past the last time) of a window."""
        shard = int(self._good.searchsorted(window, side="right")) - 1
        table, inside = self._table(shard), window - int(self._good[shard])
        inside += int(table.skipped[table.kept_before.searchsorted(inside, side="right")])
        stretch = int(table.ends.searchsorted(inside, side="right"))
        before = int(table.ends[stretch - 1]) if stretch else 0
        start = (inside - before) * self._step
        return int(self._stretches[shard]) + stretch, start, start + self._need

    def read(self, window: int) -> Sample:
        """The window's sample (time-shuffled where the run asks for it)."""
        return self.shuffled(self.stored(window), window)

    def stored(self, window: int) -> Sample:
        """The window's sample, its values in the order of their times."""
        stretch, start, stop = self.locate(window)
        return self.store.read(self.spec.source, self.split, index=stretch, start=start, stop=stop)

    def _make(self, shard: int) -> _Table:
        return self._worked_out(*self.store.shard(self.spec.source, self.split, number=shard))

    def _worked_out(self, records: np.ndarray, spans: np.ndarray) -> _Table:
        times = np.asarray(records["num_times"], np.int64)
        ends = np.cumsum(np.maximum((times - self._need) // self._step + 1, 0))
        starts, lengths, lost = [0], [0], np.zeros(len(RULES), np.int64)
        spoiled, first = np.unique(spans["stretch"], return_index=True)  # spans lie stretch by stretch
        for stretch, mine in zip(spoiled.tolist(), np.split(spans, first[1:]), strict=False):
            verdict = left_out(mine, num_times=int(times[stretch]), need=self._need, step=self._step)
            lost += np.bincount(verdict[verdict >= 0], minlength=len(RULES))
            before = int(ends[stretch - 1]) if stretch else 0
            for start, stop in runs(verdict >= 0):
                starts.append(before + start)
                lengths.append(stop - start)
        skipped = np.cumsum(lengths)
        kept_before = np.asarray(starts[1:], np.int64) - skipped[:-1]
        return _Table(ends=ends, kept_before=kept_before, skipped=skipped, left_out=lost)

    def shuffled(self, sample: Sample, window: int) -> Sample:
        """What `stored` gave; where the run asks for it each time has the values of a time drawn at random from the
        window, keyed by the seed and the window, and the calendar stays. Drawn with replacement: of a mere permutation
        the values that have not come yet are those that are left, which can be forecast.
        """
        if not self.shuffle_time:
            return sample
        key = keyed(self.seed, "shuffle", self.spec.source, self.split, window)
        drawn = np.random.Generator(np.random.Philox(key=key)).integers(0, sample.num_times, sample.num_times)
        return replace(sample, values=sample.values[drawn], valid=sample.valid[drawn])
