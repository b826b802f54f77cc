"""Six layouts on four real processes, on the quickstart's own batches: losses, norms and samples of one process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import any_to_any, parity, traffic
from benchmarks.layouts import Layout, apart, run
from sci_gpt.data.store import Store
from sci_gpt.recipes import parts
from sci_gpt.train.checkpoint import step_folder
from sci_gpt.train.feed import StepReader

STEPS, SAVED = 4, 2
SIX = {
    "TP2 x DP2, ZeRO 3": Layout(tensor=2, data=2, zero=3),
    "TP2 x SP2, ZeRO 1": Layout(tensor=2, sequence=2, zero=1, count=True),
    "SP2 x DP2, ZeRO 2": Layout(sequence=2, data=2, zero=2),
    "DP4, ZeRO 3": Layout(data=4, zero=3),
    "TP4, ZeRO 2, bf16": Layout(tensor=4, zero=2, dtype="bf16", count=True),
    "SP2 x DP2, ZeRO 3, bf16": Layout(sequence=2, data=2, zero=3, dtype="bf16"),
}

GOES_ON = ["-> DP4, ZeRO 1", "-> SP4", "-> TP4", "-> SP2 x DP2", "-> DP4, ZeRO 2, bf16"]
GOES_ON += ["-> one process", "-> one process, ZeRO 0"]


@pytest.fixture(scope="module")
def seen(quickstart_store: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Every layout by name: one launch of four processes, one of one."""
    folder = tmp_path_factory.mktemp("layouts")
    saved = replace(SIX["TP2 x DP2, ZeRO 3"], save=SAVED, folder=str(folder))
    checkpoint = str(step_folder(folder, SAVED))
    four = SIX | {"TP2 x DP2, ZeRO 3": saved}
    four |= {"-> DP4, ZeRO 1": Layout(data=4, load=checkpoint), "-> SP4": Layout(sequence=4, load=checkpoint)}
    four |= {"-> DP4, ZeRO 2, bf16": Layout(data=4, zero=2, dtype="bf16", load=checkpoint)}
    four |= {"-> TP4": Layout(tensor=4, load=checkpoint), "-> SP2 x DP2": Layout(sequence=2, data=2, load=checkpoint)}
    one = {"fp32": Layout(), "bf16": Layout(dtype="bf16"), "-> one process, ZeRO 0": Layout(zero=0, load=checkpoint)}
    one |= {"-> one process": Layout(load=checkpoint)}
    found: dict[str, dict[str, Any]] = {}
    for launch in (four, one):
        layouts = [replace(layout, steps=STEPS) for layout in launch.values()]
        found |= dict(zip(launch, run(layouts, quickstart_store), strict=True))
    return found


@pytest.mark.parametrize("name", SIX)
def test_losses_and_norms_are_those_of_one_process(seen: dict[str, dict[str, Any]], name: str) -> None:
    dtype = SIX[name].dtype
    worst = apart(seen[name]["steps"], seen[dtype]["steps"])
    for quantity, limit in parity.LIMITS[dtype].items():
        assert worst[quantity] <= limit, worst
    assert seen[name]["all_samples"] == seen[dtype]["all_samples"]
    assert min(row["gradient_norm"] for row in seen[dtype]["steps"]) > 0.05, "clipping must be active"


@pytest.mark.parametrize("name", GOES_ON)
def test_a_checkpoint_of_tensor_slices_goes_on_anywhere(seen: dict[str, dict[str, Any]], name: str) -> None:
    source = seen["TP2 x DP2, ZeRO 3"]
    limit = any_to_any.LIMIT["bf16" if "bf16" in name else "fp32"]
    assert apart(seen[name]["steps"], source["steps"][SAVED:])["loss"] <= limit
    assert seen[name]["all_samples"] == source["all_samples"][SAVED:]


@pytest.mark.parametrize(
    ("name", "axes"), [("TP2 x SP2, ZeRO 1", {"zero", "tensor", "sequence"}), ("TP4, ZeRO 2, bf16", {"tensor"})]
)
def test_layouts_send_what_theory_says(seen: dict[str, dict[str, Any]], name: str, axes: set[str]) -> None:
    """Tensor sums of a sequence rank's own tokens, all-to-alls of a tensor rank's own heads; in bf16 half as much."""
    found = traffic.rows(SIX[name], seen[name])
    assert all(row.within for row in found), found
    assert {row.axis for row in found} == axes


def test_on_some_rank_a_modality_is_absent_and_a_row_is_empty(quickstart_store: Path) -> None:
    """What the six layouts meet: four rows a step over eight micro-batches leave four of them empty."""
    config = Layout(data=4, steps=STEPS).config(quickstart_store)
    curriculum = parts.curriculum(config, Store.open(quickstart_store))
    settings = parts.tokenizer_settings(config)
    readers = [StepReader(curriculum, parts.place(config, rank=rank), settings=settings) for rank in range(4)]
    batches = [batch for reader in readers for batch in reader(0, 0).batches]
    present = [{name for name, payload in batch.payloads.items() if len(payload.index)} for batch in batches]
    assert len(batches) == 8 and present.count(set()) == 4
    assert set().union(*present) == {"grid", "series", "trace"}
    assert any(0 < len(names) < 3 for names in present)


def test_the_scripts_of_the_tables_train_and_compare(
    quickstart_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one process: each stage against the first, and a checkpoint of stage 0 at its own layout and at stage 3."""
    monkeypatch.setattr(parity, "STEPS", STEPS)
    monkeypatch.setattr(any_to_any, "STEPS", STEPS)
    monkeypatch.setattr(any_to_any, "SAVED", SAVED)
    layouts = [Layout(zero=0, steps=STEPS), Layout(zero=3, steps=STEPS, dtype="bf16")]
    monkeypatch.setitem(parity.LIMITS, "bf16", {"loss": 0.0, "gradient_norm": 0.0})
    close, too_far = parity.compare(layouts, quickstart_store)
    assert close["within"] and close["loss"] <= parity.LIMITS["fp32"]["loss"]
    assert not too_far["within"] and too_far["loss"] > 0.0, "ZeRO 3 rounds otherwise in bf16"
    itself, moved = any_to_any.go_on([Layout(zero=0)], [Layout(zero=3)], data=quickstart_store, folder=tmp_path)
    assert itself["exact"] and itself["within"] and itself["loaded"] == itself["saved"]
    assert moved["within"] and moved["same_samples"] and moved["loss"] <= any_to_any.LIMIT["fp32"]


def test_the_tables_say_what_was_seen() -> None:
    layout = Layout(tensor=2, zero=3)
    row = {"layout": layout, "loss": 3.2e-8, "gradient_norm": 2.0e-4, "within": False}
    assert "| 2 | 1 | 1 |  |  |  | 3.2e-08 / 2.0e-04 **beyond** |" in parity.lines([row])
    pair = {"saved": "A", "loaded": "B", "loss": 2e-3, "exact": False, "same_samples": False, "within": False}
    assert "| A | B | 2.0e-03 | no | **beyond** |" in any_to_any.lines([pair])


def test_the_whole_table_has_every_layout_within_four_processes() -> None:
    layouts = parity.table()
    axes = {(one.tensor, one.sequence, one.data) for one in layouts if one.zero == 2 and one.dtype == "bf16"}
    assert axes == {(t, s, d) for t in (1, 2, 4) for s in (1, 2, 4) for d in (1, 2, 4) if t * s * d in (1, 2, 4)}
    assert {(one.data, one.dtype) for one in layouts if one.zero == 0} == {(1, "fp32"), (2, "fp32"), (4, "fp32")}
