"""Loader: from a sample number to a document, from n(t) to the rows of step t, from rows to a rank's share."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from sci_gpt.data.order import PERIOD, Order, keyed, mixture_table
from sci_gpt.data.store import Store
from sci_gpt.data.windows import Windows, WindowSpec
from sci_gpt.errors import DataError
from sci_tokenizers.packing import pack_rows
from sci_tokenizers.table import make_tokenizer
from sci_tokenizers.tokenizer import TokenizerSettings
from sci_tokenizers.tokens import Tokens


class Corpus:
    """The endless numbered samples of a mixture over the training split.

    Args:
        store: the built store.
        specs: the mixture; weights are shares of tokens.
        seed: of the run; with n it keys everything random about a sample.
        settings: sizes of tokens.
        shuffle_block: windows in a shuffle block.
        shuffle_time: the time-shuffled control.
    """

    def __init__(
        self,
        store: Store,
        specs: Sequence[WindowSpec],
        *,
        seed: int,
        settings: TokenizerSettings,
        shuffle_block: int = PERIOD,
        shuffle_time: bool = False,
    ) -> None:
        unknown = [spec.source for spec in specs if spec.source not in store.sources]
        if unknown:
            raise DataError(f"mixture names {unknown}, the store {store.path} holds {list(store.sources)}")
        self.store, self.specs, self.seed = store, tuple(specs), seed
        self.tokenizers = tuple(make_tokenizer(store.modality(spec.source), settings) for spec in specs)
        self.windows = tuple(
            Windows(store, spec, split="train", frame_times=tok.frame_times, shuffle_time=shuffle_time, seed=seed)
            for spec, tok in zip(specs, self.tokenizers, strict=True)
        )
        self.lengths = tuple(
            spec.frames * tok.num_slots(store.shape(spec.source))
            for spec, tok in zip(specs, self.tokenizers, strict=True)
        )
        shares = [spec.weight / length for spec, length in zip(specs, self.lengths, strict=True)]
        self.order = Order(
            seed=seed,
            sizes=tuple(windows.num_windows for windows in self.windows),
            names=tuple(spec.source for spec in specs),
            table=mixture_table(shares),
            block=shuffle_block,
        )

    def begun(self, first: int, given: Sequence[int]) -> Corpus:
        """The same mixture with its phase begun at sample `first`, when earlier ones have `given` of its sources."""
        one = copy(self)
        one.order = replace(self.order, first=first, given=tuple(given))
        return one

    def length(self, n: int) -> int:
        """Tokens of sample number n, without reading it."""
        return self.lengths[self.order.sample(n)[0]]

    def modality(self, n: int) -> str:
        """Modality of sample number n, without reading it."""
        return str(self.tokenizers[self.order.sample(n)[0]].modality)

    def document(self, n: int) -> Tokens:
        """Sample number n, read and tokenized; its C is drawn from (seed, n)."""
        source, window, _ = self.order.sample(n)
        spec = self.specs[source]
        low, high = spec.context_frames
        context = low + keyed(self.seed, "context", n) % (high - low + 1)
        return self.tokenizers[source].encode(
            self.windows[source].read(window),
            num_context=context,
            leads=spec.leads,
            statistics=self.store.statistics[spec.source],
        )


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """The rows of one step: samples first .. first + count - 1, as sample numbers per row."""

    first: int
    count: int
    rows: tuple[tuple[int, ...], ...]
    row_length: int

    @property
    def next_sample(self) -> int:
        """n(t + 1): the whole resume state."""
        return self.first + self.count


def plan_step(corpus: Corpus, n: int, *, rows: int, row_length: int) -> StepPlan:
    """The longest run of consecutive samples from n that best-fit-decreasing places in the step's rows.

    Raises:
        DataError: not even the first sample fits.
    """
    lengths: list[int] = []
    while sum(lengths) <= rows * row_length:
        lengths.append(corpus.length(n + len(lengths)))
    for count in range(len(lengths) - 1, 0, -1):
        placed = pack_rows(lengths[:count], rows, row_length=row_length)
        if placed is not None:
            numbers = tuple(tuple(n + document for document in row) for row in placed)
            return StepPlan(first=n, count=count, rows=numbers, row_length=row_length)
    raise DataError(f"sample {n} has {lengths[0]} tokens, a row holds {row_length}: raise row_length or cut its frames")


def deal(plan: StepPlan, *, rank: int, world: int, cost: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """A rank's rows: descending attention cost, snake-wise; short ranks get empty rows, which weigh nothing.

    Args:
        plan: of the step.
        rank, world: in the data-parallel group.
        cost: attention cost of each of the plan's rows.
    """
    ordered = [plan.rows[i] for i in np.argsort(-np.asarray(cost), kind="stable")]
    per_rank = -(-len(ordered) // world)
    mine = []
    for turn in range(per_rank):
        place = rank if turn % 2 == 0 else world - 1 - rank
        position = turn * world + place
        mine.append(ordered[position] if position < len(ordered) else ())
    return tuple(mine)


def packing_report(corpus: Corpus, *, rows: int, row_length: int, steps: int = 50) -> dict[str, float]:
    """Over the first steps of a phase: mean fill and the share of rows that hold two or more modalities."""
    modality = lru_cache(maxsize=None)(corpus.modality)
    n, fill, mixed = corpus.order.first, 0, 0
    for _ in range(steps):
        plan = plan_step(corpus, n, rows=rows, row_length=row_length)
        fill += sum(corpus.length(i) for row in plan.rows for i in row)
        mixed += sum(len({modality(i) for i in row}) >= 2 for row in plan.rows)
        n = plan.next_sample
    return {"fill": fill / (steps * rows * row_length), "mixed_rows": mixed / (steps * rows)}
