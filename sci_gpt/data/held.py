"""Held: the stretches of one source in memory, read window by window like those of a built store."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sci_gpt.data.quality import SPAN
from sci_tokenizers.sample import Sample

_RECORD = np.dtype([("num_times", np.int64)])


@dataclass(frozen=True, kw_only=True)
class Held:
    """Stretches by split ("train", "valid", "test"), in the units of the variable table; see `windows.Stretches`."""

    splits: Mapping[str, Sequence[Sample]]

    def shards(self, source: str, split: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """One shard of all stretches."""
        yield self.shard(source, split, number=0)

    def shard(self, source: str, split: str, *, number: int) -> tuple[np.ndarray, np.ndarray]:
        """A record per stretch with its `num_times`, empty where the split has none; no spans: what a user hands over
        is used as it is. There is one shard, number 0."""
        lengths = [(sample.num_times,) for sample in self.splits.get(split, ()) if sample.source == source]
        return np.array(lengths, _RECORD), np.zeros(0, SPAN)

    def read(self, source: str, split: str, *, index: int, start: int, stop: int) -> Sample:
        """The times [start, stop) of a stretch (views, no copy)."""
        own = [sample for sample in self.splits[split] if sample.source == source]
        return own[index].window(start, stop)
