"""Windows: arithmetic on stored stretches, from a window's number to its stretch, its times and its sample."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from sci_gpt.data.order import keyed
from sci_gpt.data.quality import RULES, left_out, runs
from sci_gpt.errors import DataError
from sci_tokenizers.sample import Sample


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
    """

    source: str
    frames: int
    stride: int
    context_frames: tuple[int, int]
    leads: tuple[int, ...]
    weight: float = 1.0

    def __post_init__(self) -> None:
        low, high = self.context_frames
        if not 1 <= low <= high < self.frames:
            raise DataError(
                f"source {self.source!r}: context_frames must be within 1..frames - 1 = {self.frames - 1}, "
                f"got {low}..{high}"
            )


class Stretches(Protocol):
    """Where windows are cut from: a built `Store`, or stretches in memory (`held.Held`)."""

    def stretches(self, source: str, split: str) -> np.ndarray:
        """A record per stretch of a split, with the field `num_times`."""
        ...

    def spans(self, source: str, split: str) -> np.ndarray:
        """Where a rule of quality holds in them (dtype quality.SPAN)."""
        ...

    def read(self, source: str, split: str, *, index: int, start: int, stop: int) -> Sample:
        """The times [start, stop) of a stretch."""
        ...


class Windows:
    """The windows of one split of one source, less those that a rule of quality leaves out (`quality.RULES`).

    Attributes:
        num_windows: that are left.
        left_out: {rule: number of windows} that it cost; empty where all are good.

    Args:
        store: the built store, or stretches in memory.
        spec: shape of the windows.
        split: "train", "valid" or "test".
        frame_times: entries of the time axis per frame (the tokenizer's).
        shuffle_time: permute values in time within each window, keyed by `seed` and the window; the calendar stays.
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
        times = np.asarray(store.stretches(spec.source, split)["num_times"], np.int64)
        need, self._step = spec.frames * frame_times, spec.stride * frame_times
        counts = np.maximum((times - need) // self._step + 1, 0)
        self._ends = np.cumsum(counts)
        whole = int(self._ends[-1]) if len(counts) else 0
        self._leave_out(times, need=need)
        self.num_windows = whole - sum(self.left_out.values())
        if not len(times):
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
                f"source {spec.source!r}, {split}: a window of {spec.frames} frames ({need} times) is longer than the "
                f"data ({int(times.max())} times); lower mixture frames"
            )

    def locate(self, window: int) -> tuple[int, int, int]:
        """(stretch, first time, one past the last time) of a window."""
        window += int(self._skipped[np.searchsorted(self._kept_before, window, side="right")])
        stretch = int(np.searchsorted(self._ends, window, side="right"))
        before = int(self._ends[stretch - 1]) if stretch else 0
        start = (window - before) * self._step
        return stretch, start, start + self.spec.frames * self.frame_times

    def read(self, window: int) -> Sample:
        """The window's sample (time-shuffled where the run asks for it)."""
        stretch, start, stop = self.locate(window)
        sample = self.store.read(self.spec.source, self.split, index=stretch, start=start, stop=stop)
        return self._shuffled(sample, window) if self.shuffle_time else sample

    def _leave_out(self, times: np.ndarray, *, need: int) -> None:
        """Runs of windows that are left out: how many good ones come before each, how many are skipped up to it."""
        spans = self.store.spans(self.spec.source, self.split)
        starts, lengths, counts = [0], [0], np.zeros(len(RULES), np.int64)
        for stretch in np.unique(spans["stretch"]).tolist():
            mine = spans[spans["stretch"] == stretch]
            verdict = left_out(mine, num_times=int(times[stretch]), need=need, step=self._step)
            counts += np.bincount(verdict[verdict >= 0], minlength=len(RULES))
            first = int(self._ends[stretch - 1]) if stretch else 0
            for start, stop in runs(verdict >= 0):
                starts.append(first + start)
                lengths.append(stop - start)
        self._skipped = np.cumsum(lengths)
        self._kept_before = np.asarray(starts[1:], np.int64) - self._skipped[:-1]
        self.left_out = {rule.name: int(n) for rule, n in zip(RULES, counts, strict=True) if n}

    def _shuffled(self, sample: Sample, window: int) -> Sample:
        key = keyed(self.seed, "shuffle", self.spec.source, self.split, window)
        order = np.random.Generator(np.random.Philox(key=key)).permutation(sample.num_times)
        return replace(sample, values=sample.values[order], valid=sample.valid[order])
