"""Windows: arithmetic on stored stretches, from a window's number to its stretch, its times and its sample."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from sci_gpt.data.order import keyed
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

    def read(self, source: str, split: str, *, index: int, start: int, stop: int) -> Sample:
        """The times [start, stop) of a stretch."""
        ...


class Windows:
    """The windows of one split of one source.

    Args:
        store: the built store, or stretches in memory.
        spec: shape of the windows.
        split: "train", "valid" or "test".
        frame_times: entries of the time axis per frame (the tokenizer's).
        shuffle_time: permute values in time within each window, keyed by `seed` and the window; the calendar stays.
        seed: of the shuffle.

    Raises:
        DataError: a window is longer than every stretch of the split, or the split is empty.
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
        self.num_windows = int(self._ends[-1]) if len(counts) else 0
        if not len(times):
            raise DataError(
                f"source {spec.source!r} has no stretch in its {split} split; choose another split rule or dates"
            )
        if not self.num_windows:
            raise DataError(
                f"source {spec.source!r}, {split}: a window of {spec.frames} frames ({need} times) is longer than the "
                f"data ({int(times.max())} times); lower mixture frames"
            )

    def locate(self, window: int) -> tuple[int, int, int]:
        """(stretch, first time, one past the last time) of a window."""
        stretch = int(np.searchsorted(self._ends, window, side="right"))
        before = int(self._ends[stretch - 1]) if stretch else 0
        start = (window - before) * self._step
        return stretch, start, start + self.spec.frames * self.frame_times

    def read(self, window: int) -> Sample:
        """The window's sample (time-shuffled where the run asks for it)."""
        stretch, start, stop = self.locate(window)
        sample = self.store.read(self.spec.source, self.split, index=stretch, start=start, stop=stop)
        return self._shuffled(sample, window) if self.shuffle_time else sample

    def _shuffled(self, sample: Sample, window: int) -> Sample:
        key = keyed(self.seed, "shuffle", self.spec.source, self.split, window)
        order = np.random.Generator(np.random.Philox(key=key)).permutation(sample.num_times)
        return replace(sample, values=sample.values[order], valid=sample.valid[order])
