"""ChronosQuantizer: mean scaling and uniform bins, value to id by arithmetic (Ansari et al. 2024, arXiv:2403.07815)."""

from __future__ import annotations

import numpy as np

PAD, EOS = 0, 1
_NUM_SPECIAL = 2


class Quantizer:
    """Uniform bins on [-limit, limit]: ids PAD = 0, EOS = 1, then 2 kept free below the first bin as Chronos does.

    `num_ids - 3` centres are spaced evenly from -limit to limit; a value's id is that of the nearest centre (a tie goes
    up), the outer bins are open.
    """

    def __init__(self, num_ids: int = 4096, limit: float = 15.0) -> None:
        if num_ids < 8 or limit <= 0:
            raise ValueError(f"at least 8 ids and a positive limit, got {num_ids} and {limit}")
        self.num_ids, self.limit = num_ids, limit
        self.num_bins = num_ids - _NUM_SPECIAL - 1
        self.width = 2.0 * limit / (self.num_bins - 1)

    def ids(self, scaled: np.ndarray, valid: np.ndarray) -> np.ndarray:
        """Ids int32 of scaled values; PAD where not valid."""
        bins = np.floor((np.asarray(scaled, np.float64) + self.limit) / self.width + 0.5)
        bins = np.clip(bins, 0, self.num_bins - 1).astype(np.int32)
        return np.where(valid, bins + _NUM_SPECIAL + 1, PAD).astype(np.int32)

    def centres(self, ids: np.ndarray) -> np.ndarray:
        """The centre of each id's bin, float32; special ids give the first centre (mask them)."""
        bins = np.clip(np.asarray(ids, np.int64) - _NUM_SPECIAL - 1, 0, self.num_bins - 1)
        return (bins * self.width - self.limit).astype(np.float32)

    def clipped(self, scaled: np.ndarray) -> np.ndarray:
        """True where a scaled value lies beyond the outer centres by more than half a bin."""
        return np.abs(scaled) > self.limit + self.width / 2


def mean_scale(values: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Chronos' scale: mean |x| over the valid values of the first axis; 1 where there is none or it is 0."""
    count = valid.sum(axis=0)
    total = np.where(valid, np.abs(values), 0.0).sum(axis=0)
    scale = total / np.maximum(count, 1)
    return np.where((count > 0) & (scale > 0), scale, 1.0)
