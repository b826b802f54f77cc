"""The watchdog: two ranks of which one stands still, what they write, who is named, and runs that only pause."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from sci_gpt.train.watchdog import HANGS, PHASES, Standing, Watchdog, behind, report, set_reports_aside, standings

LIMIT = 0.4


def standing(rank: int, step: int, phase: str) -> Standing:
    return Standing(rank=rank, step=step, phase=phase, seconds=300.0, keys=("a/1@0", "b/2@8"), who="process 7 on here")


def test_a_rank_that_stands_still_makes_every_rank_write_and_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rank 0 waits in the collective past the limit; rank 1 still reads, and moved later: its own limit is far."""
    ends: list[int] = []
    waits = Watchdog(tmp_path, rank=0, size=2, limit_seconds=LIMIT, end=ends.append)
    reads = Watchdog(tmp_path, rank=1, size=2, limit_seconds=100.0, end=ends.append)
    reads._look = 0.05
    with waits, reads:
        reads.at("reading the rows", step=5, keys=("quake/train-1@8",))
        waits.at("agreeing on the step", step=5, keys=("field/train-0@4",))
        for thread in (waits._thread, reads._thread):
            thread.join(20.0)
    assert ends == [HANGS, HANGS]
    found = standings(tmp_path)
    assert [(one.rank, one.step, one.phase) for one in found] == [
        (0, 5, "agreeing on the step"),
        (1, 5, "reading the rows"),
    ]
    assert found[0].seconds >= LIMIT and found[1].keys == ("quake/train-1@8",)
    written = (tmp_path / "hang" / "rank-1.txt").read_text()
    assert "most recent call first" in written and "test_train_watchdog.py" in written
    page = (tmp_path / "hang" / "report.txt").read_text()
    assert page.startswith("behind: rank 1: it is still in step 5, reading the rows")
    assert "error: nothing moves. behind: rank 1" in capsys.readouterr().err


def test_a_run_that_moves_writes_nothing(tmp_path: Path) -> None:
    ends: list[int] = []
    with Watchdog(tmp_path, rank=0, size=1, limit_seconds=LIMIT, end=ends.append) as watch:
        for step in range(1, 13):
            watch.at("forward pass", step=step)
            time.sleep(LIMIT / 8)
        watch.close()
        time.sleep(2 * LIMIT)
    assert ends == [] and not (tmp_path / "hang").exists()
    assert "watchdog" not in {thread.name for thread in threading.enumerate()}


def test_a_rank_without_a_word_is_behind_whatever_the_others_say() -> None:
    found = [standing(0, 5, "agreeing on the step"), standing(2, 4, "reading the rows")]
    assert behind(found, size=4)[0] == [1, 3]
    page = report(found, size=4)
    assert page.splitlines()[0] == (
        "behind: rank 1, rank 3: it wrote nothing: stopped, dead, or its machine or disk is gone"
    )
    assert "  rank 0: step 5, agreeing on the step, 300 s without a move; process 7 on here" in page
    assert "  rank 3: no word" in page


def test_the_rank_in_the_earliest_step_and_phase_is_behind() -> None:
    order = list(PHASES)
    assert order.index("reading the rows") < order.index("agreeing on the step") < order.index("forward pass")
    late = [standing(0, 5, "agreeing on the step"), standing(1, 4, "backward pass and update")]
    assert behind(late, size=2)[0] == [1]
    early = [standing(0, 5, "forward pass"), standing(1, 5, "agreeing on the step")]
    assert behind(early, size=2)[0] == [1]


def test_of_two_micro_batches_the_rank_in_the_first_is_behind() -> None:
    later = replace(standing(0, 5, "forward pass"), micro=2)
    stuck = replace(standing(1, 5, "backward pass and update"), micro=1)
    assert behind([later, stuck], size=2)[0] == [1]
    saves = standing(0, 5, "saving")
    assert behind([saves, replace(later, rank=1)], size=2)[0] == [1]


def test_where_all_stand_at_one_place_nobody_is_blamed() -> None:
    meet = [standing(rank, 5, "backward pass and update") for rank in range(3)]
    ranks, why = behind(meet, size=3)
    assert ranks == [] and "the network between them" in why
    ranks, why = behind([standing(rank, 5, "reading the rows") for rank in range(3)], size=3)
    assert ranks == [] and "watch.hang_seconds is too short" in why


def test_a_rank_s_file_is_read_back(tmp_path: Path) -> None:
    one = replace(standing(3, 17, "forward pass"), micro=2)
    path = tmp_path / "rank-3.txt"
    path.write_text(one.text() + "\nstacks of all its threads:\nrank: 9\n")
    assert Standing.read(path) == one
    path.write_text("rank: 3\nwho")
    assert Standing.read(path) is None


def test_an_earlier_hang_is_kept_under_another_name(tmp_path: Path) -> None:
    for text in ("first", "second"):
        (tmp_path / "hang").mkdir()
        (tmp_path / "hang" / "report.txt").write_text(text)
        set_reports_aside(tmp_path)
    assert not (tmp_path / "hang").exists()
    assert [(tmp_path / f"hang-{n}" / "report.txt").read_text() for n in (1, 2)] == ["first", "second"]
