"""Held: the stretches of one source in memory, read window by window like those of a built store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sci_gpt.data.quality import SPAN
from sci_tokenizers.sample import Sample

_RECORD = np.dtype([("num_times", np.int64)])


@dataclass(frozen=True, kw_only=True)
class Held:
    """Stretches by split ("train", "valid", "test"), in the units of the variable table; see `windows.Stretches`."""

    splits: Mapping[str, Sequence[Sample]]

    def stretches(self, source: str, split: str) -> np.ndarray:
        """A record per stretch with its `num_times`; empty where the split has none."""
        lengths = [(sample.num_times,) for sample in self.splits.get(split, ()) if sample.source == source]
        return np.array(lengths, _RECORD)

    def spans(self, source: str, split: str) -> np.ndarray:
        """None: what a user hands over is used as it is."""
        return np.zeros(0, SPAN)

    def read(self, source: str, split: str, *, index: int, start: int, stop: int) -> Sample:
        """The times [start, stop) of a stretch (views, no copy)."""
        own = [sample for sample in self.splits[split] if sample.source == source]
        return own[index].window(start, stop)
