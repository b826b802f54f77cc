"""The order of a run: a pure function of n, a permutation per epoch, exact shares, rows dealt once at any layout."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.order import ROW_LENGTH, SOURCES, open_corpus, write_index
from sci_gpt.data.loader import Corpus, StepPlan, attention_cost, deal, packing_report, plan_step
from sci_gpt.data.order import PERIOD, Order, keyed, mixture_table, permute
from sci_gpt.errors import DataError
from sci_tokenizers.packing import pack_rows

SIZES, NAMES, SHARES = (700, 130, 41), ("a", "b", "c"), (6.0, 3.0, 1.0)


@pytest.fixture(scope="module")
def table() -> tuple[np.ndarray, np.ndarray]:
    """The mixture table of SHARES."""
    return mixture_table(SHARES)


def order_of(table: tuple[np.ndarray, np.ndarray], *, seed: int = 5, block: int = 64) -> Order:
    """An order over three small sources."""
    return Order(seed=seed, sizes=SIZES, names=NAMES, table=table, block=block)


class Lengths(Corpus):
    """A corpus that knows nothing but the length of each sample."""

    def __init__(self, seed: int, longest: int) -> None:
        self.seed, self.longest = seed, longest

    def length(self, n: int) -> int:
        """Between 1 and `longest` tokens."""
        return 1 + keyed(self.seed, n) % self.longest


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 300), st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation_and_its_inverse_undoes_it(size: int, key: int) -> None:
    image = [permute(position, size, key=key) for position in range(size)]
    assert sorted(image) == list(range(size))
    assert [permute(value, size, key=key, inverse=True) for value in image] == list(range(size))


def test_permute_moves_things_about() -> None:
    """Neighbours part, keys differ, all places are as likely: 2,000 keys put 0 of 10 in each 200 +- 60 times."""
    image = np.array([permute(position, 1000, key=7) for position in range(1000)])
    assert (np.abs(np.diff(image)) == 1).sum() < 20
    assert image.tolist() != [permute(position, 1000, key=8) for position in range(1000)]
    counts = np.bincount([permute(0, 10, key=keyed(0, key)) for key in range(2000)], minlength=10)
    assert np.abs(counts - 200).max() < 60  # 4.5 standard deviations of a binomial
    with pytest.raises(ValueError, match="position 10 is not in a permutation of 10"):
        permute(10, 10, key=0)


def test_every_source_has_given_its_share_within_one_sample(table: tuple[np.ndarray, np.ndarray]) -> None:
    source, before = table
    for s, share in enumerate(np.array(SHARES) / sum(SHARES)):
        given_so_far = np.cumsum(source == s)
        assert np.abs(given_so_far - share * np.arange(1, PERIOD + 1)).max() < 1.0 + 1e-6 * PERIOD
        assert (before[source == s] == np.arange(given_so_far[-1])).all()


@settings(max_examples=4, deadline=None)
@given(st.lists(st.floats(0.02, 1.0), min_size=1, max_size=6))
def test_any_mixture_is_kept_within_one_sample(shares: list[float]) -> None:
    source, _ = mixture_table(shares)
    exact = np.bincount(source, minlength=len(shares))
    assert np.abs(exact / PERIOD - np.array(shares) / sum(shares)).max() <= 1.0 / PERIOD
    for s, count in enumerate(exact):
        drift = np.cumsum(source == s) - count / PERIOD * np.arange(1, PERIOD + 1)
        assert np.abs(drift).max() < 1.0 + 1e-9


def test_a_mixture_needs_shares() -> None:
    for shares, complaint in (
        ([], "positive shares"),
        ([1.0, 0.0], "positive shares"),
        ([1.0, 1e-9], "one rounds to 0"),
    ):
        with pytest.raises(ValueError, match=complaint):
            mixture_table(shares)


def test_a_sample_is_a_pure_function_of_its_number(table: tuple[np.ndarray, np.ndarray]) -> None:
    """A fresh object, asked backwards, gives the same; another seed gives another order from the same mixture."""
    numbers = [*range(300), PERIOD - 1, PERIOD, 7 * PERIOD + 3]
    one = {n: order_of(table).sample(n) for n in numbers}
    fresh = order_of(table)
    assert {n: fresh.sample(n) for n in reversed(numbers)} == one
    other = order_of(table, seed=6)
    assert [other.sample(n)[0] for n in range(300)] == [one[n][0] for n in range(300)]
    assert [other.sample(n) for n in range(300)] != [one[n] for n in range(300)]


class OneByOne:
    """A table that gives single entries and nothing else."""

    def __init__(self, entries: np.ndarray) -> None:
        self.entries = entries

    def __getitem__(self, position: int) -> int:
        assert isinstance(position, int)
        return int(self.entries[position])


def test_a_sample_takes_two_looks_into_the_table_wherever_it_lies(table: tuple[np.ndarray, np.ndarray]) -> None:
    """Once it has given a sample of a later period, an order never goes through the table again."""
    order, plain = order_of(table), order_of(table)
    order.sample(PERIOD)
    object.__setattr__(order, "table", tuple(map(OneByOne, table)))
    for n in (0, 5 * PERIOD + 77, 10**12 + 3):
        assert order.sample(n) == plain.sample(n)
        assert order.source(n) == plain.sample(n)[0]


def test_a_far_sample_counts_what_was_given_before_it(table: tuple[np.ndarray, np.ndarray]) -> None:
    """Against the definition: samples of its source in all whole periods and in the part of its own."""
    order = order_of(table)
    for n in (3 * PERIOD + 12345, 10**9 + 7):
        period, position = divmod(n, PERIOD)
        source = int(table[0][position])
        given = period * int((table[0] == source).sum()) + int((table[0][:position] == source).sum())
        assert order.sample(n)[0] == source and order.sample(n)[2] == given // SIZES[source]
        assert order.given_until(n)[source] == given


@pytest.mark.parametrize("block", [16, 64, PERIOD])
def test_every_epoch_visits_every_window_once(table: tuple[np.ndarray, np.ndarray], block: int) -> None:
    """Through the first period's end too; epochs follow each other and differ."""
    order = order_of(table, block=block)
    for first in (0, PERIOD - 2000):
        seen: dict[tuple[int, int], list[int]] = {}
        for n in range(first, first + 4000):
            source, window, epoch = order.sample(n)
            seen.setdefault((source, epoch), []).append(window)
        whole = {key: windows for key, windows in seen.items() if len(windows) >= SIZES[key[0]]}
        assert {source for source, _ in whole} == {0, 1, 2}
        for (source, epoch), windows in whole.items():
            assert sorted(windows) == list(range(SIZES[source]))
            assert whole.get((source, epoch + 1)) != windows
        for source in range(3):
            epochs = sorted(epoch for s, epoch in seen if s == source)
            assert epochs == list(range(epochs[0], epochs[-1] + 1))
            assert all(len(seen[source, epoch]) == SIZES[source] for epoch in epochs[1:-1])


def test_a_block_is_finished_before_the_next(table: tuple[np.ndarray, np.ndarray]) -> None:
    order = order_of(table, block=16)
    windows = [w for s, w, epoch in (order.sample(n) for n in range(300)) if s == 1 and epoch == 0][:130]
    blocks = [window // 16 for window in windows]
    changes = sum(one != two for one, two in pairwise(blocks))
    assert changes == len(set(blocks)) - 1
    assert blocks != sorted(blocks)
    assert windows != sorted(windows)


def test_a_new_source_moves_no_other(table: tuple[np.ndarray, np.ndarray]) -> None:
    """Each source's own sequence of windows stays when another joins the mixture."""
    wider = Order(seed=5, sizes=(9, *SIZES), names=("z", *NAMES), table=mixture_table((2.0, *SHARES)), block=64)
    narrow = order_of(table)
    old = [w for s, w, _ in map(narrow.sample, range(2000)) if s == 1]
    new = [w for s, w, _ in map(wider.sample, range(2000)) if s == 2]
    assert new[:200] == old[:200]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(0, 10**6))
def test_steps_take_consecutive_samples_and_leave_none_out(seed: int, rows: int, first: int) -> None:
    """Each step begins where the last ended, fills rows without overflow, and could not have taken one sample more."""
    corpus, n = Lengths(seed, 40), first
    for _ in range(3):
        plan = plan_step(corpus, n, rows=rows, row_length=64)
        assert plan.first == n
        taken = sorted(number for row in plan.rows for number in row)
        assert taken == list(range(n, plan.next_sample))
        assert len(plan.rows) == rows
        assert all(sum(corpus.length(number) for number in row) <= 64 for row in plan.rows)
        more = [corpus.length(number) for number in range(n, plan.next_sample + 1)]
        while sum(more) <= rows * 64:
            assert pack_rows(more, rows, row_length=64) is None
            more.append(corpus.length(n + len(more)))
        n = plan.next_sample
    assert plan_step(corpus, first, rows=rows, row_length=64) == plan_step(
        Lengths(seed, 40), first, rows=rows, row_length=64
    )


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 6))
def test_rows_are_packed_best_fit_decreasing(lengths: list[int], rows: int) -> None:
    """Against the definition: the longest first, each into the row with the least room that still holds it."""
    room, placed, fits = [64] * rows, [list[int]() for _ in range(rows)], True
    for document in sorted(range(len(lengths)), key=lambda document: -lengths[document]):
        free = [(room[row], row) for row in range(rows) if room[row] >= lengths[document]]
        fits = fits and bool(free)
        if fits:
            placed[min(free)[1]].append(document)
            room[min(free)[1]] -= lengths[document]
    assert pack_rows(lengths, rows, row_length=64) == ([sorted(row) for row in placed] if fits else None)


def test_a_sample_longer_than_a_row_is_refused() -> None:
    with pytest.raises((DataError, ValueError), match="a row holds 8"):
        plan_step(Lengths(0, 1000), 5, rows=2, row_length=8)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 100), min_size=1, max_size=12), st.integers(1, 5))
def test_ranks_share_the_rows_out(costs: list[int], world: int) -> None:
    """Every row goes to one rank, every rank gets as many rows as the others (empty ones weigh nothing), in balance."""
    rows = tuple((number,) for number in range(len(costs)))
    plan = StepPlan(first=0, count=len(rows), rows=rows, row_length=8)
    shares = deal(plan, world=world, cost=costs)
    assert sorted(row for share in shares for row in share if row) == sorted(rows)
    assert {len(share) for share in shares} == {-(-len(rows) // world)}
    totals = [sum(costs[row[0]] for row in share if row) for share in shares]
    assert max(totals) - min(totals) <= max(costs)


def test_rows_are_dealt_as_evenly_as_pairs_of_ranks_allow() -> None:
    """Costs 9 7 6 5 4 3 2 2 over two ranks: 19 and 19; dealt snake-wise they would be 9 5 4 2 = 20 and 7 6 3 2 = 18."""
    costs = [2, 9, 4, 7, 6, 3, 5, 2]
    plan = StepPlan(first=0, count=8, rows=tuple((number,) for number in range(8)), row_length=8)
    shares = deal(plan, world=2, cost=costs)
    assert [sum(costs[row[0]] for row in share) for share in shares] == [19, 19]
    assert [len(share) for share in shares] == [4, 4]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 100), min_size=2, max_size=12), st.integers(2, 4))
def test_no_exchange_of_two_rows_would_help_the_dearest_rank(costs: list[int], world: int) -> None:
    rows = tuple((number,) for number in range(len(costs)))
    plan = StepPlan(first=0, count=len(rows), rows=rows, row_length=8)
    own = [[costs[row[0]] if row else 0 for row in share] for share in deal(plan, world=world, cost=costs)]
    dearest = max(own, key=sum)
    for other in own:
        gap = sum(dearest) - sum(other)
        assert not any(0 < mine - theirs < gap for mine in dearest for theirs in other), own


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """The corpus of benchmarks/order.py: grids, series and traces, of which only the index exists."""
    folder = tmp_path_factory.mktemp("index")
    write_index(folder, 1_000_000, most=1_000_000)
    return open_corpus(folder)


def test_a_mixed_corpus_fills_its_rows_and_ranks_pay_the_same(mixed: Corpus) -> None:
    """The goals of the design: fill of 95 % or more, attention costs within 10 % over the ranks."""
    assert len({source.modality for source in SOURCES.values()}) == 3 and len(set(mixed.lengths)) == 4
    for rows, ranks in ((16, 2), (32, 4), (64, 8)):
        report = packing_report(mixed, rows=rows, row_length=ROW_LENGTH, ranks=ranks)
        assert 0.95 <= report["fill"] <= 1.0 and 0.0 < report["cost_spread"] <= 0.10, (rows, ranks, report)


def test_the_spread_is_over_ranks_whatever_they_accumulate(mixed: Corpus) -> None:
    """Of one step: 2 ranks of 3 micro-batches, against their sums."""
    plan = plan_step(mixed, 0, rows=12, row_length=ROW_LENGTH)
    shares = deal(plan, world=6, cost=attention_cost(mixed, plan))
    of_place = [sum(mixed.length(n) ** 2 for row in share for n in row) for share in shares]
    totals = sum(of_place[:3]), sum(of_place[3:])
    report = packing_report(mixed, rows=12, row_length=ROW_LENGTH, ranks=2, accumulation=3, steps=1)
    assert report["cost_spread"] == pytest.approx(2 * abs(totals[0] - totals[1]) / sum(totals))
    assert packing_report(mixed, rows=12, row_length=ROW_LENGTH, steps=1)["cost_spread"] == 0.0


def test_consecutive_samples_read_few_shards(mixed: Corpus) -> None:
    """2,000 samples lie within the blocks that are being read: at most two of a source."""
    windows: dict[int, list[int]] = {}
    for n in range(1_300_000, 1_302_000):
        source, window, _ = mixed.order.sample(n)
        windows.setdefault(source, []).append(window // mixed.order.block)
    assert len(windows) == 4
    assert all(len(set(blocks)) <= 2 for blocks in windows.values())
    assert mixed.order.sizes[0] > 4 * mixed.order.block
