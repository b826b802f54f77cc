"""The data card opens without a network and says what the store says; `inspect` gives the same facts."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sci_gpt.data.store import SPLITS, Store
from sci_gpt.recipes.data_card import CARD, draw_histograms, draw_map, draw_periods, write_card
from sci_gpt.recipes.inspect import inspect_store
from sci_launch.results import print_result
from test_data_build import config_of, quiet, station, tree


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Three years of one station; a fortnight of the training split is one value, and markup stands in the licence."""
    folder = tmp_path_factory.mktemp("card")
    station(folder / "station.csv")
    rows = (folder / "station.csv").read_text().splitlines()
    rows[101:115] = [f"{row.split(',')[0]},12.5" for row in rows[101:115]]
    (folder / "station.csv").write_text("\n".join(rows) + "\n")
    mapping = tree(folder / "store", licence="<i>CC BY</i> & more", citation="A. Person (2001)")
    mapping["sources"][0]["options"]["stations"] = {"station": {"latitude": 45.0, "longitude": 7.0, "elevation": 9.0}}
    return Store.open(quiet(config_of(mapping)).path)


class Page(HTMLParser):
    """Tags that could load something, and the text."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe", "object", "i"), "escaped, and nothing is loaded"
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]

    def handle_data(self, data: str) -> None:
        self.text += data + " "


def test_the_card_says_what_the_store_says_and_loads_nothing(store: Store) -> None:
    content = (Path(store.path) / CARD).read_text(encoding="utf-8")
    page = Page()
    page.feed(content)
    assert len(page.loads) == 3 and all(source.startswith("data:image/png;base64,") for source in page.loads)
    for source in page.loads:
        assert base64.b64decode(source.split(",")[1]).startswith(b"\x89PNG")
    assert not re.search(r"https?://|url\(|@import", content)
    facts = inspect_store(store.path)
    (row,) = facts["sources"]
    train = row["splits"]["train"]
    shown = [facts["fingerprint"], "<i>CC BY</i> & more", "A. Person (2001)", f"{train['tokens']:,}", train["end"]]
    for text in (*shown, "constant", "no channel changes", "air_temperature", "stations", "observation", "missing"):
        assert text in page.text, text
    assert train["quality"]["constant"] == {"spans": 1, "times": 14}
    assert re.search(r"stations\s+train\s+constant\s+1\s+14\s", page.text)


def test_inspect_counts_as_the_store_holds(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    facts = inspect_store(store.path)
    (row,) = facts["sources"]
    times = {split: int(store.stretches("stations", split)["num_times"].sum()) for split in SPLITS}
    # A series token is one value of one variable, and the source has one.
    assert {split: part["tokens"] for split, part in row["splits"].items()} == times
    assert facts["tokens"] == sum(times.values())
    assert row["places"] == {
        "known": 1,
        "stretches_without_place": 0,
        "bounds": [{"south": 45.0, "north": 45.0, "west": 7.0, "east": 7.0}],
    }
    train = store.read("stations", "train", index=0, start=0, stop=times["train"])
    histogram = row["histograms"]["air_temperature"]
    assert histogram["unit"] == "K" and sum(histogram["counts"]) == histogram["values"]
    assert train.values.min() <= histogram["low"] < histogram["high"] <= train.values.max()
    assert 0.5 * times["train"] < histogram["values"] <= times["train"]
    assert row["start"] == row["splits"]["train"]["start"] and row["end"] == row["splits"]["test"]["end"]
    assert print_result(facts, as_json=False) == 0
    said = capsys.readouterr().out
    assert "constant: spans=1  times=14" in said and f"tokens: {facts['tokens']}" in said
    assert print_result(facts, as_json=True) == 0


def _source(name: str, modality: str, bounds: list[dict[str, float]], *, start: str | None) -> dict[str, Any]:
    split = {"start": start, "end": start and "2001-06-01T00:00:00"}
    histogram = {"unit": "K", "low": 1.0, "high": 1.0, "counts": [5] + [0] * 39, "values": 5}
    return {
        "source": name,
        "modality": modality,
        "splits": dict.fromkeys(SPLITS, split),
        "places": {"known": len(bounds), "stretches_without_place": 1, "bounds": bounds},
        "histograms": {f"channel {n}": histogram for n in range(60)},
    }


def test_figures_of_odd_stores() -> None:
    """A tile over the date line is drawn on both edges; nothing known, an empty split and 60 channels are drawn too."""
    over = {"south": -5.0, "north": 5.0, "west": 170.0, "east": 190.0}
    sources = [_source("a", "grid", [over], start="2001-01-01T00:00:00"), _source("b", "trace", [], start=None)]
    (axis,) = draw_map(sources).axes
    corners = sorted(
        tuple(patch.get_extents().transformed(axis.transData.inverted()).intervalx) for patch in axis.patches
    )
    assert np.allclose(corners, [(-190.0, -170.0), (170.0, 190.0)])
    for line in axis.lines:
        assert np.abs(np.diff(np.asarray(line.get_xdata(), float))).max(initial=0.0) <= 180.0, "no line runs round"
    assert len(draw_histograms(sources).axes) == 48
    (periods,) = draw_periods(sources).axes
    drawn = [line for line in (np.asarray(line.get_xdata(), float) for line in periods.lines) if len(line) == 2]
    assert len(drawn) == len(SPLITS)
    assert np.allclose(drawn[0], [2001.0, 2001.41], atol=0.02)


def test_a_path_is_returned_and_many_channels_are_said(tmp_path: Path, store: Store) -> None:
    facts = inspect_store(store.path)
    facts["sources"][0]["histograms"] = {
        f"c{n}": facts["sources"][0]["histograms"]["air_temperature"] for n in range(50)
    }
    path = write_card(facts, tmp_path / "x.html")
    assert path == tmp_path / "x.html" and "The first 48 of 50 channels are drawn." in path.read_text()
