"""Phases: sources go on in their epochs over a boundary, and a resume anywhere eats what the whole run would have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sci_gpt.config import PretrainConfig
from sci_gpt.data.curriculum import Curriculum
from sci_gpt.data.loader import packing_report, plan_step
from sci_gpt.data.order import Order
from sci_gpt.data.store import Store
from sci_gpt.errors import DataError
from sci_gpt.recipes import parts
from sci_gpt.train.feed import StepReader
from toy_store import toy_config, write_store

FIRST, SECOND, LAST = 60, 90, 170  # steps at which the phases end
BLOCK = 32


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("curriculum") / "store")


def configuration(store: Path, **changes: Any) -> PretrainConfig:
    """Three phases: the toy's own; longer rows, the field rarer and the quakes away; the first again, in another order.

    The station's windows are longer in the second phase: another set of windows.
    """
    phase = toy_config(store, store.parent / "run").model_dump(mode="json")["phases"][0]
    field, station, quake = phase["mixture"]
    second = phase | {
        "until_step": SECOND,
        "row_length": 250,
        "rows_per_step": 2,
        "mixture": [station | {"frames": 30, "weight": 3.0}, field | {"weight": 0.5}],
    }
    third = phase | {"until_step": LAST, "mixture": [quake, field, station]}
    schedule = {"steps": LAST, "warmup_steps": 4, "cooldown_steps": 6}
    phases = [phase | {"until_step": FIRST}, second, third]
    return toy_config(store, store.parent / "run", phases=phases, schedule=schedule, shuffle_block=BLOCK, **changes)


def opened(config: PretrainConfig, starts: Sequence[int] = (0,)) -> Curriculum:
    """The curriculum of a configuration."""
    return parts.curriculum(config, Store.open(config.data), starts=starts)


def steps_of(curriculum: Curriculum, *, step: int = 0, n: int = 0) -> Iterator[tuple[int, int, list[Any]]]:
    """(step, its first sample, [(phase, spec, window, epoch)]) from a step on to the end; nothing is read."""
    while step < LAST:
        phase, corpus = curriculum.at(step, n)
        plan = plan_step(corpus, n, rows=phase.rows, row_length=phase.row_length)
        eaten = []
        for number in range(n, plan.next_sample):
            source, window, epoch = corpus.order.sample(number)
            eaten.append((curriculum.phases.index(phase), corpus.specs[source], window, epoch))
        yield step, n, eaten
        step, n = step + 1, plan.next_sample


def test_each_sources_windows_are_whole_permutations_over_the_phases(store: Path) -> None:
    """Cut anywhere: the windows of a source, in the order eaten, are one permutation after another."""
    curriculum = opened(configuration(store))
    sizes = {
        (spec.source, spec.frames): windows.num_windows
        for corpus in curriculum.corpora
        for spec, windows in zip(corpus.specs, corpus.windows, strict=True)
    }
    eaten: dict[tuple[str, int], list[tuple[int, int, int]]] = {}
    for _, _, samples in steps_of(curriculum):
        for phase, spec, window, epoch in samples:
            eaten.setdefault((spec.source, spec.frames), []).append((phase, window, epoch))
    assert sizes.keys() == eaten.keys() and len(sizes) == 4
    whole = Counter[tuple[str, int]]()
    for key, rows in eaten.items():
        size = sizes[key]
        for first in range(0, len(rows), size):
            part = rows[first : first + size]
            assert {epoch for _, _, epoch in part} == {first // size}
            windows = [window for _, window, _ in part]
            assert len(set(windows)) == len(windows), key
            if len(part) == size:
                assert sorted(windows) == list(range(size))
                whole[key] += len({phase for phase, _, _ in part}) > 1
    assert whole["field", 16] and whole["quake", 30], f"no epoch lies over a boundary: {whole}"
    assert {phase for phase, _, _ in eaten["quake", 30]} == {0, 2}
    assert {phase for phase, _, _ in eaten["station", 30]} == {1}


def test_sample_numbers_go_on_over_the_phases_and_rows_are_the_phases_own(store: Path) -> None:
    curriculum = opened(configuration(store))
    steps = list(steps_of(curriculum))
    for (_, n, samples), (_, after, _) in zip(steps[:-1], steps[1:], strict=True):
        assert after == n + len(samples)
    starts = [n for step, n, _ in steps if step in (0, FIRST, SECOND)]
    assert curriculum.starts(LAST) == tuple(starts)
    assert curriculum.starts(FIRST) == (0,), "nothing of the second phase is eaten yet"
    assert curriculum.starts(FIRST + 1) == tuple(starts[:2])
    assert "(station window" in curriculum.name(starts[1]) or "(field window" in curriculum.name(starts[1])
    assert {curriculum.name(n).split("(")[1].split()[0] for n in range(starts[1], starts[2])} == {"station", "field"}


@pytest.mark.parametrize("step", [1, FIRST - 1, FIRST, FIRST + 1, SECOND - 1, SECOND, SECOND + 1, LAST - 2])
def test_a_resume_eats_what_the_whole_run_would_have(store: Path, step: int) -> None:
    """From any step, with nothing but n(t) and the phases' first samples; another process knows no more."""
    config = configuration(store)
    whole = opened(config)
    steps = list(steps_of(whole))
    again = opened(config, whole.starts(step))
    assert list(steps_of(again, step=step, n=steps[step][1])) == steps[step:]
    assert again.starts(LAST) == whole.starts(LAST)


def test_a_resume_in_the_second_phase_reads_the_same_keys(store: Path) -> None:
    config = configuration(store)
    settings = parts.tokenizer_settings(config)
    whole = opened(config)
    numbers = {step: n for step, n, _ in steps_of(whole) if step >= FIRST + 5}
    again = opened(config, whole.starts(FIRST + 5))
    readers = [StepReader(one, parts.place(config, rank=1), settings=settings) for one in (whole, again)]
    for step in range(FIRST + 5, FIRST + 9):
        first, second = (reader(step, numbers[step]) for reader in readers)
        assert first.keys == second.keys and first.samples == second.samples and len(first.keys)
        assert first.batches[0].row_length == 250


def test_steps_out_of_order_are_refused(store: Path) -> None:
    curriculum = opened(configuration(store))
    with pytest.raises(ValueError, match=rf"the phases have steps 0\.\.{LAST - 1}, got {LAST}"):
        curriculum.at(LAST, 5000)
    with pytest.raises(ValueError, match=rf"step {FIRST + 1}, sample 500: the phases began at samples \[0\]"):
        curriculum.at(FIRST + 1, 500)
    curriculum.at(FIRST, 420)
    with pytest.raises(ValueError, match=rf"step {FIRST}, sample 421: the phases began at samples \[0, 420\]"):
        curriculum.at(FIRST, 421)
    with pytest.raises(ValueError, match="sample 419 is of an earlier phase, this one begins at 420"):
        curriculum.corpora[1].order.sample(419)


def test_a_document_longer_than_a_row_of_a_later_phase_is_refused_at_the_start(store: Path) -> None:
    config = configuration(store)
    phases = (*config.phases[:2], config.phases[2].model_copy(update={"row_length": 80}))
    with pytest.raises(
        DataError, match=r"phases\.2: documents of source 'field' \(16 frames\) have 96 tokens, a row hol"
    ):
        opened(config.model_copy(update={"phases": phases}))


def test_what_was_given_is_counted_through_periods(store: Path) -> None:
    """Against a plain count of the samples, over more than a period of the mixture's table."""
    order = replace(opened(configuration(store)).corpora[0].order, first=70, given=(5, 0, 11))
    counts = [5, 0, 11]
    for n in range(70, 70 + 1000):
        assert order.given_until(n) == tuple(counts)
        counts[order.sample(n)[0]] += 1
    one, two = order.given_until(70 + 65536), order.given_until(70 + 65536 + 1000)
    assert sum(one) == 16 + 65536
    assert [b - a for a, b in zip(one, two, strict=True)] == [c - g for c, g in zip(counts, (5, 0, 11), strict=True)]


def test_the_shuffle_block_is_the_runs_own(store: Path) -> None:
    """Blocks of 32 windows are finished one by one; with a block wider than the source it is one block."""
    orders: list[Order] = []
    for block in (BLOCK, 65536):
        config = configuration(store).model_copy(update={"shuffle_block": block})
        orders.append(opened(config).corpora[0].order)
    changes = []
    for order in orders:
        windows = [window for s, window, _ in map(order.sample, range(250)) if s == 0]
        blocks = [window // BLOCK for window in windows]
        changes.append(sum(one != two for one, two in zip(blocks[:-1], blocks[1:], strict=True)))
    assert changes[0] <= order.sizes[0] // BLOCK < changes[1]


def test_packing_is_told_for_each_phase(store: Path) -> None:
    curriculum = opened(configuration(store))
    for phase, corpus in zip(curriculum.phases, curriculum.corpora, strict=True):
        report = packing_report(corpus, rows=phase.rows, row_length=phase.row_length, steps=10)
        assert 0.8 < report["fill"] <= 1.0 and report["mixed_rows"] > 0.3
