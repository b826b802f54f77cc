"""The loaders' benchmark in small: every loader returns equal windows, and its tables hold what was measured."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks import loader
from benchmarks.results import write_section


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """2 MB of windows of 64 KiB through ours, the plain loop and webdataset, two rounds each."""
    scratch = tmp_path_factory.mktemp("loader")
    return loader.compare(
        [64],
        megabytes=2,
        rounds=2,
        names=["ours", loader.PLAIN, "webdataset"],
        scratch=scratch,
        environments=scratch / "environments",
    )


def test_each_loader_has_its_rates_and_ours_its_split(lines: list[str]) -> None:
    rows = {line.split(" | ")[0].strip("| "): line for line in lines if line.startswith("|")}
    assert "32 windows, 2 rounds." in lines
    assert rows["ours"].count("MB/s") == rows["webdataset"].count("MB/s") == 4
    assert rows[loader.PLAIN].count("MB/s") == 2 and rows[loader.PLAIN].count("ours x") == 2
    (bound,) = (line for line in lines if line.startswith("Ours, warm"))
    assert "checksums" in bound and "reading bytes" in bound


def test_loaders_that_return_other_windows_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = {(32, "one digest"), (32, "another")}
    monkeypatch.setattr(loader, "write_all", lambda *_, **__: None)
    monkeypatch.setattr(loader, "measure", lambda *_, **__: ({}, held))
    with pytest.raises(RuntimeError, match="did not return equal windows"):
        loader.compare([64], megabytes=2, rounds=1, names=["ours"], scratch=tmp_path, environments=tmp_path)


def test_a_ratio_is_of_medians_and_says_how_often_ours_is_faster() -> None:
    rates = {("ours", 1, "warm"): [20.0, 30.0, 100.0], ("webdataset", 1, "warm"): [10.0, 20.0, 12.0]}
    rates |= {(name, workers, state): [1.0] for name in ("ours", "webdataset") for workers, state in ((1, "cold"),)}
    rates |= {(name, 2, state): [1.0] for name in ("ours", "webdataset") for state in ("warm", "cold")}
    row = loader.table(rates, ["ours", "webdataset"], kilobytes=1024)[-1]
    assert row.startswith("| webdataset | 12 (10-20), 13 MB/s, ours x 2.50 |")


def test_pages_that_were_dropped_are_not_resident(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(1 << 20))
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    path.read_bytes()
    assert loader.resident(tmp_path) == 1.0
    assert loader.drop_cache(tmp_path) < loader.MOST_RESIDENT


def test_a_section_is_replaced_between_its_marks_and_appended_where_it_lacks(tmp_path: Path) -> None:
    page = tmp_path / "RESULTS.md"
    page.write_text("# Results\n")
    for words in ("first", "second"):
        write_section("one", [words], title="One", path=page)
    write_section("two", ["third"], title="Two", path=page)
    write_section("one", ["fourth"], title="One", path=page)
    text = page.read_text()
    assert text.count("## One") == text.count("## Two") == 1
    assert "fourth" in text and "third" in text and "second" not in text and text.startswith("# Results\n")
