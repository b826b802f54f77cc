"""Loader: from a sample number to a document, from n(t) to the rows of step t, from rows to a rank's share."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import lru_cache

from sci_gpt.data.order import PERIOD, Order, keyed, mixture_table
from sci_gpt.data.store import Store
from sci_gpt.data.windows import Windows, WindowSpec
from sci_gpt.errors import ConfigError, DataError
from sci_tokenizers.left_out import without
from sci_tokenizers.masked import masked_tokens
from sci_tokenizers.packing import pack_rows
from sci_tokenizers.table import make_tokenizer
from sci_tokenizers.tokenizer import TokenizerError, TokenizerSettings
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
        for spec, tok in zip(specs, self.tokenizers, strict=True):
            try:
                tok.check_size(store.shape(spec.source), where=f"source {spec.source!r} of store {store.path}")
            except TokenizerError as error:
                raise ConfigError(str(error)) from error
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
        return self.lengths[self.order.source(n)]

    def modality(self, n: int) -> str:
        """Modality of sample number n, without reading it."""
        return str(self.tokenizers[self.order.source(n)].modality)

    def document(self, n: int) -> Tokens:
        """Sample number n, read and tokenized; its C is drawn from (seed, n)."""
        source, window, _ = self.order.sample(n)
        spec = self.specs[source]
        low, high = spec.context_frames
        context = low + keyed(self.seed, "context", n) % (high - low + 1)
        tokenizer, windows = self.tokenizers[source], self.windows[source]
        sample = windows.stored(window)
        statistics = without(self.store.statistics[spec.source], sample)
        sample = windows.shuffled(sample, window)
        if self.masked(n):
            key = keyed(self.seed, "tubes", n)
            return masked_tokens(
                tokenizer, sample, key=key, num_context=context, leads=spec.leads, statistics=statistics
            )
        return tokenizer.encode(sample, num_context=context, leads=spec.leads, statistics=statistics)

    def masked(self, n: int) -> bool:
        """Whether sample number n is a masked document: drawn from (seed, n), without reading it."""
        share = self.specs[self.order.source(n)].masked
        return share > 0 and keyed(self.seed, "masked", n) < share * 2.0**64

    def cost(self, n: int) -> int:
        """Attention cost of sample number n, without reading it: a token sees its own document, so the square of its
        tokens, and twice that where it is masked and sees later frames too.
        """
        return (2 if self.masked(n) else 1) * self.length(n) ** 2


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
    tokens = 0
    while tokens <= rows * row_length:
        lengths.append(corpus.length(n + len(lengths)))
        tokens += lengths[-1]
    for count in range(len(lengths) - 1, 0, -1):
        placed = pack_rows(lengths[:count], rows, row_length=row_length)
        if placed is not None:
            numbers = tuple(tuple(n + document for document in row) for row in placed)
            return StepPlan(first=n, count=count, rows=numbers, row_length=row_length)
    raise DataError(f"sample {n} has {lengths[0]} tokens, a row holds {row_length}: raise row_length or cut its frames")


def attention_cost(corpus: Corpus, plan: StepPlan) -> list[int]:
    """Attention cost of each row: of its documents."""
    return [sum(corpus.cost(i) for i in row) for row in plan.rows]


def deal(plan: StepPlan, *, world: int, cost: Sequence[int]) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """The rows of each rank: equally many, at about equal attention cost; empty rows, which weigh nothing, fill up.

    Rows go, the dearest first, to the rank with the least cost so far that still has room (Graham 1969); then the
    dearest rank exchanges rows with others while that brings two ranks closer. Integers alone decide, so that every
    rank comes to the same shares.

    Args:
        plan: of the step.
        world: ranks.
        cost: attention cost of each of the plan's rows.

    Returns:
        Per rank its rows, sample numbers each.
    """
    room = -(-len(plan.rows) // world)
    rows = plan.rows + ((),) * (room * world - len(plan.rows))
    cost = [*cost, *[0] * (len(rows) - len(cost))]
    shares: list[list[int]] = [[] for _ in range(world)]
    total = [0] * world
    for row in sorted(range(len(rows)), key=lambda row: (-cost[row], row)):
        free = [rank for rank in range(world) if len(shares[rank]) < room]
        # Among equals, the rank with fewer rows; then to and fro over the ranks.
        best = min(free, key=lambda r: (total[r], len(shares[r]), -r if len(shares[r]) % 2 else r))
        shares[best].append(row)
        total[best] += cost[row]
    while (exchange := _exchange(shares, total, cost=cost)) is not None:
        dearest, i, other, j = exchange
        less = cost[shares[dearest][i]] - cost[shares[other][j]]
        shares[dearest][i], shares[other][j] = shares[other][j], shares[dearest][i]
        total[dearest] -= less
        total[other] += less
    return tuple(tuple(rows[row] for row in share) for share in shares)


def _exchange(
    shares: Sequence[Sequence[int]], total: Sequence[int], *, cost: Sequence[int]
) -> tuple[int, int, int, int] | None:
    """The exchange of two rows by which the dearest rank gains most, as (rank, place, rank, place); None: none helps.

    Each lowers the sum of squared totals, so that exchanging comes to an end.
    """
    dearest = max(range(len(total)), key=lambda rank: (total[rank], -rank))
    gain, exchange = 0, None
    for other, rows in enumerate(shares):
        gap = total[dearest] - total[other]
        for i, mine in enumerate(shares[dearest]):
            for j, theirs in enumerate(rows):
                less = cost[mine] - cost[theirs]
                if less * (gap - less) > gain:  # half of what the sum of squares falls
                    gain, exchange = less * (gap - less), (dearest, i, other, j)
    return exchange


def packing_report(
    corpus: Corpus, *, rows: int, row_length: int, ranks: int = 1, accumulation: int = 1, steps: int = 50
) -> dict[str, float]:
    """How well the first steps of a phase are packed and dealt; nothing is read.

    Args:
        corpus: with its phase begun.
        rows, row_length: of a step.
        ranks, accumulation: data-parallel ranks, and micro-batches of each.
        steps: how many are looked at.

    Returns:
        fill: share of the rows' tokens that documents take.
        mixed_rows: share of rows that hold two or more modalities.
        cost_spread: mean over steps of (largest - smallest) / mean of the ranks' attention costs.
    """
    modality = lru_cache(maxsize=None)(corpus.modality)
    n, fill, mixed, spread = corpus.order.first, 0, 0, 0.0
    for _ in range(steps):
        plan = plan_step(corpus, n, rows=rows, row_length=row_length)
        fill += sum(corpus.length(i) for row in plan.rows for i in row)
        mixed += sum(len({modality(i) for i in row}) >= 2 for row in plan.rows)
        shares = deal(plan, world=ranks * accumulation, cost=attention_cost(corpus, plan))
        places = [sum(corpus.cost(i) for row in share for i in row) for share in shares]
        totals = [sum(places[rank * accumulation : (rank + 1) * accumulation]) for rank in range(ranks)]
        spread += (max(totals) - min(totals)) * ranks / sum(totals)
        n = plan.next_sample
    return {
        "fill": fill / (steps * rows * row_length),
        "mixed_rows": mixed / (steps * rows),
        "cost_spread": spread / steps,
    }
