"""The order of a run: sample number n is a pure function of (seed, mixture, n), in constant time and memory."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

PERIOD = 65536
_STEPS = tuple(0x9E3779B97F4A7C15 * number for number in range(1, 5))  # of splitmix64, one per round
_BITS = 0xFFFFFFFFFFFFFFFF
_KEYS = 4096  # kept: a block's windows share a key


def keyed(seed: int, *words: object) -> int:
    """A 64-bit key for (seed, words): the only source of randomness of a run."""
    digest = hashlib.blake2b(repr((seed, *words)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


@lru_cache(maxsize=_KEYS)
def _permutation_key(seed: int, name: str, *numbers: int) -> int:
    return keyed(seed, name, *numbers)


def permute(position: int, size: int, *, key: int, inverse: bool = False) -> int:
    """Element `position` of a keyed permutation of range(size): a Feistel network on the next power of four,
    cycle-walked.

    Args:
        position: within range(size).
        size: length of the permutation.
        key: of the permutation.
        inverse: give the position that holds the element `position` instead.

    Raises:
        ValueError: position outside range(size).
    """
    if not 0 <= position < size:
        raise ValueError(f"position {position} is not in a permutation of {size}")
    if size == 1:
        return 0
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    value = position
    while True:
        left, right = value >> half, value & mask
        if inverse:
            for step in reversed(_STEPS):
                left, right = right ^ (_mix(left ^ key, step) & mask), left
        else:
            for step in _STEPS:
                left, right = right, left ^ (_mix(right ^ key, step) & mask)
        value = left << half | right
        if value < size:
            return value


def _mix(value: int, step: int) -> int:
    """splitmix64's finalizer (Steele et al. 2014), as the round function."""
    z = (value + step) & _BITS
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _BITS
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _BITS
    return z ^ (z >> 31)


def mixture_table(shares: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Which source gives sample n of a period, and how many samples it gave before, each (PERIOD,).

    Shares are rounded to 1/65536. At every n a source has given its share of n within one sample: the chairman
    assignment of
    Tijdeman (1980): among sources that may give one without overshooting, the one whose deadline comes first.

    Raises:
        ValueError: no source, or a share that rounds to nothing.
    """
    weights = np.asarray(shares, np.float64)
    if not weights.size or not (weights > 0).all():
        raise ValueError(f"a mixture needs positive shares, got {list(shares)}")
    counts = np.floor(weights / weights.sum() * PERIOD).astype(np.int64)
    rest = weights / weights.sum() * PERIOD - counts
    counts[np.argsort(-rest, kind="stable")[: PERIOD - counts.sum()]] += 1
    if not counts.all():
        raise ValueError(f"shares {list(shares)}: one rounds to 0 of {PERIOD}")
    slack = 0.0 if len(counts) == 1 else 1.0 - 1.0 / (2 * len(counts) - 2)
    given = [0] * len(counts)
    source = np.zeros(PERIOD, np.int64)
    before = np.zeros(PERIOD, np.int64)
    rates = [int(count) / PERIOD for count in counts]
    for n in range(PERIOD):
        best, deadline = -1, float("inf")
        for s, rate in enumerate(rates):
            if rate * (n + 1) - given[s] >= 1.0 - slack - 1e-12:
                due = (given[s] + 1.0 - (1.0 - slack)) / rate
                if due < deadline:
                    best, deadline = s, due
        if best < 0:  # rounding of the test above: the source furthest behind
            best = int(np.argmax([rate * (n + 1) - count for rate, count in zip(rates, given, strict=True)]))
        source[n], before[n] = best, given[best]
        given[best] += 1
    return source, before


@dataclass(frozen=True, kw_only=True)
class Order:
    """The order of a phase of a run over several sources.

    Attributes:
        seed: of the run.
        sizes: windows in each source.
        names: of the sources (they key the permutations, so that adding a source moves no other's order).
        table: of `mixture_table`.
        block: windows in a shuffle block; blocks are visited in a permuted order, windows within one too. A source of
            no more windows is one block.
        first: number of the phase's first sample.
        given: samples that earlier phases have given of each source, so that its epochs go on; none: as if 0.
    """

    seed: int
    sizes: tuple[int, ...]
    names: tuple[str, ...]
    table: tuple[np.ndarray, np.ndarray]
    block: int = PERIOD
    first: int = 0
    given: tuple[int, ...] = ()

    def sample(self, n: int) -> tuple[int, int, int]:
        """Sample number n as (source, window, epoch of the source).

        Raises:
            ValueError: n lies before the phase.
        """
        source = self.source(n)
        period, position = divmod(n - self.first, PERIOD)
        count = self._before(source) + period * self._per_period[source] + int(self.table[1][position])
        epoch, place = divmod(count, self.sizes[source])
        return source, self._window(source, epoch, place=place), epoch

    def source(self, n: int) -> int:
        """The source of sample number n: one look into the table.

        Raises:
            ValueError: n lies before the phase.
        """
        if n < self.first:
            raise ValueError(f"sample {n} is of an earlier phase, this one begins at {self.first}")
        return int(self.table[0][(n - self.first) % PERIOD])

    def given_until(self, n: int) -> tuple[int, ...]:
        """How many samples of each source the run has given when sample n is the next, earlier phases included."""
        period, position = divmod(n - self.first, PERIOD)
        part = np.bincount(self.table[0][:position], minlength=len(self.sizes))
        return tuple(
            self._before(source) + period * whole + int(part[source]) for source, whole in enumerate(self._per_period)
        )

    @cached_property
    def _per_period(self) -> tuple[int, ...]:
        """Samples of each source in a whole period, counted once: `sample` must not look at the whole table."""
        return tuple(np.bincount(self.table[0], minlength=len(self.sizes)).tolist())

    def _before(self, source: int) -> int:
        return self.given[source] if self.given else 0

    def _window(self, source: int, epoch: int, *, place: int) -> int:
        size, name = self.sizes[source], self.names[source]
        blocks = -(-size // self.block)
        tail = size - (blocks - 1) * self.block
        key = _permutation_key(self.seed, name, epoch)
        # The last block is shorter: where the permuted order puts it decides which block `place` falls in.
        visit = permute(blocks - 1, blocks, key=key, inverse=True)
        if place < visit * self.block:
            slot, inside = divmod(place, self.block)
        elif place < visit * self.block + tail:
            slot, inside = visit, place - visit * self.block
        else:
            slot, inside = divmod(place - tail, self.block)
            slot += 1
        chosen = permute(slot, blocks, key=key)
        length = tail if chosen == blocks - 1 else self.block
        return chosen * self.block + permute(inside, length, key=_permutation_key(self.seed, name, epoch, chosen))
