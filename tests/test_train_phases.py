"""Runs of phases, partly masked: what a resume may change; one killed in its second phase goes on at 2 ranks."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from sci_gpt.config import PretrainConfig
from sci_gpt.config_file import parse_config, show_config
from sci_gpt.data.store import Store
from sci_gpt.errors import CheckpointError
from sci_gpt.recipes import parts
from sci_gpt.recipes.card import card
from sci_gpt.train.checkpoint import latest, read_state
from sci_gpt.train.resume import check_same_run, eaten
from sci_gpt.train.run_folder import read_lines
from toy_store import toy_config, write_store

BOUNDARY, STEPS = 12, 44
PATIENCE_SECONDS = 120.0


def phases(*ends_and_weights: tuple[int, float]) -> dict[str, Any]:
    """An identity with phases that differ in their mixture's weight."""
    rows = [{"until_step": end, "mixture": [{"source": "x", "weight": weight}]} for end, weight in ends_and_weights]
    return {"seed": 1, "phases": rows}


@pytest.mark.parametrize(
    ("step", "mine", "message"),
    [
        (15, phases((10, 0.5), (20, 0.25)), None),
        (15, phases((10, 0.5), (90, 0.25)), None),  # prolonged
        (15, phases((10, 0.5), (15, 0.25), (20, 0.75)), None),  # another phase from here on
        (10, phases((10, 0.5), (20, 0.75)), None),  # the second phase has not begun
        (10, phases((20, 0.5)), None),  # and need not
        (15, phases((10, 0.5), (20, 0.75)), "phases.1.mixture.0.weight is 0.25 there and 0.75 here"),
        (15, phases((10, 0.75), (20, 0.25)), "phases.0.mixture.0.weight is 0.5 there and 0.75 here"),
        (15, phases((11, 0.5), (20, 0.25)), "phases.0.until_step is 10 there and 11 here"),
        (15, phases((10, 0.5), (14, 0.25), (20, 0.25)), "phases.1.until_step is 15 there and 14 here"),
        (15, phases((20, 0.5)), "phases.0.until_step is 10 there and 15 here"),
        (11, phases((20, 0.5)), "phases.1.until_step is 11 there and absent here"),
    ],
)
def test_a_resume_may_change_only_what_lies_ahead(step: int, mine: dict[str, Any], message: str | None) -> None:
    saved = phases((10, 0.5), (20, 0.25))
    if message is None:
        check_same_run(eaten(saved, step), eaten(mine, step), checkpoint=Path("c"))
        return
    with pytest.raises(CheckpointError) as error:
        check_same_run(eaten(saved, step), eaten(mine, step), checkpoint=Path("c"))
    assert message in str(error.value)


def test_the_identity_holds_all_that_decides_the_order(tmp_path: Path) -> None:
    """Anything that moves a sample is in it, at any depth; the layout and the schedule are not."""
    config = toy_config(tmp_path / "store", tmp_path / "run")
    store = Store(path=Path("store"), manifest={"fingerprint": "f"}, statistics={})
    same = parts.identity(config, store)
    tree = config.model_dump(mode="json")
    for key, value in {"seed": 4, "shuffle_block": 32, "shuffle_time": True}.items():
        assert parts.identity(parse_config(tree | {key: value}, PretrainConfig, where="here"), store) != same, key
    for key, value in {"row_length": 200, "rows_per_step": 4, "mixture": tree["phases"][0]["mixture"][:2]}.items():
        changed = tree | {"phases": [tree["phases"][0] | {key: value}]}
        assert parts.identity(parse_config(changed, PretrainConfig, where="here"), store) != same, key
    free = tree | {"parallel": {"processes": 1}, "checkpoint": {"every": 3}, "optimizer": {"learning_rate": 1.0}}
    assert parts.identity(parse_config(free, PretrainConfig, where="here"), store) == same


@dataclass(frozen=True, kw_only=True)
class Runs:
    """A run of two phases that went straight through, and one killed in the second and called again on 2 processes."""

    straight: Path
    killed: Path
    output: dict[str, str]


def start(config: PretrainConfig) -> subprocess.Popen[str]:
    """`sci-gpt pretrain` in a process of its own."""
    path = config.output.parent / f"{config.output.name}.yaml"
    path.write_text(show_config(config), encoding="utf-8")
    command = [sys.executable, "-m", "sci_launch.cli", "pretrain", str(path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def two_phases(store: Path, run: Path, *, processes: int = 1) -> PretrainConfig:
    """The toy's run, of which a part is masked, with longer rows and without the quakes from step 12 on."""
    phase = toy_config(store, run).model_dump(mode="json")["phases"][0]
    phase |= {"mixture": [entry | {"masked": 0.5} for entry in phase["mixture"]]}
    second = phase | {"row_length": 240, "rows_per_step": 2, "mixture": phase["mixture"][:2]}
    return toy_config(
        store,
        run,
        phases=[phase | {"until_step": BOUNDARY}, second | {"until_step": STEPS}],
        schedule={"steps": STEPS, "warmup_steps": 4, "cooldown_steps": 6},
        parallel={"processes": processes},
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("phases")
    store = write_store(folder / "store")
    straight, killed = (two_phases(store, folder / name) for name in ("straight", "killed"))
    output = {"straight": start(straight).communicate(timeout=PATIENCE_SECONDS)[0]}
    process = start(killed)
    deadline = time.monotonic() + PATIENCE_SECONDS
    # The checkpoint of step 16, in the second phase, is committed before step 18 is.
    while not any(record["step"] >= 18 for record in read_lines(killed.output / "log.jsonl")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.005)
    for worker in psutil.Process(process.pid).children():
        worker.send_signal(signal.SIGKILL)
    process.communicate(timeout=PATIENCE_SECONDS)
    resumed = two_phases(store, killed.output, processes=2)
    output["resumed"] = start(resumed).communicate(timeout=PATIENCE_SECONDS)[0]
    return Runs(straight=straight.output, killed=killed.output, output=output)


def eaten_by(run: Path) -> dict[int, list[tuple[int, str]]]:
    """Step -> (sample number, key) over all ranks, in order."""
    steps: dict[int, list[tuple[int, str]]] = {}
    for path in sorted((run / "keys").glob("rank-*.jsonl")):
        for record in read_lines(path):
            steps.setdefault(record["step"], []).extend(zip(record["samples"], record["keys"], strict=True))
    return {step: sorted(pairs) for step, pairs in steps.items()}


def test_a_run_killed_in_its_second_phase_eats_the_same_samples(runs: Runs) -> None:
    straight, killed = eaten_by(runs.straight), eaten_by(runs.killed)
    assert sorted(straight) == list(range(1, STEPS + 1)), runs.output["straight"]
    assert straight == killed, runs.output["resumed"]
    numbers = [number for step in sorted(straight) for number, _ in straight[step]]
    assert numbers == list(range(len(numbers)))
    assert "resumes from" in runs.output["resumed"]
    resumed = int(runs.output["resumed"].split("resumes from")[1].split("step-")[1].split()[0])
    assert BOUNDARY < resumed < STEPS
    assert len(read_lines(runs.killed / "keys/rank-1.jsonl")) == STEPS - resumed


def test_its_losses_are_the_same_on_2_processes_those_of_masked_documents_too(runs: Runs) -> None:
    """Each objective's by its name; what of a document is hidden is a function of its number alone."""
    straight, killed = (
        [row for row in read_lines(run / "log.jsonl") if "loss" in row] for run in (runs.straight, runs.killed)
    )
    assert [row["step"] for row in straight] == [row["step"] for row in killed] == list(range(1, STEPS + 1))
    assert [row["loss"] for row in killed] == pytest.approx([row["loss"] for row in straight], rel=1e-5)
    for one, two in zip(straight, killed, strict=True):
        assert two["losses"] == pytest.approx(one["losses"], rel=1e-4), one["step"]
    names = {name for row in straight if row["step"] > BOUNDARY for name in row["losses"]}
    assert names == {"grid", "series", "grid/masked", "series/masked"}
    assert any("trace/masked" in row["losses"] for row in straight[:BOUNDARY])


def test_the_checkpoint_records_where_the_phases_began(runs: Runs) -> None:
    eaten_before = [r["samples"] for r in read_lines(runs.straight / "keys/rank-0.jsonl") if r["step"] <= BOUNDARY]
    for run in (runs.straight, runs.killed):
        state = read_state(latest(run) or Path())
        assert state["phase_starts"] == [0, sum(map(len, eaten_before))]


def test_the_start_tells_each_phase(runs: Runs) -> None:
    first = runs.output["straight"]
    assert f"to step {BOUNDARY}: 3 rows x 160 tokens per step" in first
    assert f"to step {STEPS}: 2 rows x 240 tokens per step" in first


@pytest.mark.parametrize(
    ("step", "said"),
    [(8, "8 steps of 480 tokens"), (12, "12 steps of 480 tokens"), (44, "12 steps of 480, then 32 of 480 tokens")],
)
def test_the_card_says_what_the_steps_were_made_of(tmp_path: Path, step: int, said: str) -> None:
    config = two_phases(tmp_path / "store", tmp_path / "run")
    facts = {"modality": "grid", "step_seconds": 1.0, "nature": "simulation", "licence": "CC0", "citation": "made up"}
    sources = {entry.source: facts for entry in config.mixture}
    description = {"num_parameters": 1, "step": step, "code_version": "c", "fingerprint": "f", "sources": sources}
    text = card(config, description, manifest={"sources": sources})
    assert said in text
    assert [name for name in sources if f"| {name} | grid |" in text] == ["field", "station", "quake"]


def test_validation_and_evaluation_see_a_source_as_its_last_phase_has_it(tmp_path: Path) -> None:
    config = two_phases(tmp_path / "store", tmp_path / "run")
    second = config.phases[1]
    longer = second.mixture[1].model_copy(update={"frames": 30})
    config = config.model_copy(
        update={"phases": (config.phases[0], second.model_copy(update={"mixture": (second.mixture[0], longer)}))}
    )
    assert [(spec.source, spec.frames) for spec in parts.window_specs(config)] == [
        ("field", 16),
        ("station", 30),
        ("quake", 30),
    ]
