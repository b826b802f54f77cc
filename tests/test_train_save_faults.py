"""Faults while a run saves, in real processes: killed in a write in the background, gone on, stopped by a signal."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from saving_worker import PATIENCE_SECONDS, SLOW_SECONDS
from sci_gpt.config import PretrainConfig
from sci_gpt.config_file import show_config
from sci_gpt.recipes import parts
from sci_gpt.train.checkpoint import committed, read_state, step_folder
from sci_gpt.train.retention import validation_loss
from sci_gpt.train.run_folder import read_lines
from toy_store import toy_config, write_store

SAVED, NEXT = 4, 8
WORKER = Path(__file__).with_name("saving_worker.py")


@dataclass(frozen=True, kw_only=True)
class Runs:
    """One run: killed while it writes its second checkpoint, called again, and sent SIGTERM after that."""

    config: PretrainConfig
    killed: int
    left: list[str]
    output: str
    error: str
    code: int
    seen: dict[str, object]


def start(config: PretrainConfig, how: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(WORKER), how, f"{config.output}.yaml", f"{config.output}-seen.json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("saving")
    write_store(folder / "store")
    config = toy_config(
        folder / "store",
        folder / "run",
        parallel={"processes": 1},
        checkpoint={"every": SAVED, "keep": 1, "keep_best": 1},
        validation={"every": 6, "windows": 2},
        schedule={"steps": 2000, "warmup_steps": 1, "cooldown_steps": 1},
    )
    Path(f"{config.output}.yaml").write_text(show_config(config), encoding="utf-8")
    process = start(config, "kill")
    process.communicate(timeout=PATIENCE_SECONDS)
    killed = process.returncode
    left = [path.name for path in sorted((config.output / "checkpoints").rglob("*")) if path.is_file()]
    process = start(config, "slow")
    deadline = time.monotonic() + PATIENCE_SECONDS
    again = step_folder(config.output, NEXT) / "manifest.json"
    while not again.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output, error = process.communicate(timeout=PATIENCE_SECONDS)
    return Runs(
        config=config,
        killed=killed,
        left=left,
        output=output,
        error=error,
        code=process.returncode,
        seen=json.loads(Path(f"{config.output}-seen.json").read_text()),
    )


def test_a_kill_in_a_write_in_the_background_leaves_the_checkpoint_before(runs: Runs) -> None:
    assert runs.killed == -signal.SIGKILL
    assert "rank-00000.safetensors.partial" in runs.left and runs.left.count("manifest.json") == 1
    assert runs.code == 0, runs.error
    torn = runs.config.output / "checkpoints" / f"step-{NEXT:08d}"
    assert f"warning: {torn} is torn (a save that never finished): ignored and removed" in runs.error
    assert f"resumes from {runs.config.output}/checkpoints/step-{SAVED:08d}" in runs.output


def test_after_it_every_step_stands_once(runs: Runs) -> None:
    steps = [record["step"] for record in read_lines(runs.config.output / "log.jsonl") if "loss" in record]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > NEXT


def test_a_stopped_run_is_marked_when_its_last_checkpoint_is_committed(runs: Runs) -> None:
    assert runs.seen == {"marker": "requeue", "committed": True}
    lines = runs.output.splitlines()
    told = [number for number, line in enumerate(lines) if "checkpoint: training waited" in line]
    ended = next(number for number, line in enumerate(lines) if line.startswith("stopped after"))
    assert told and max(told) < ended
    seconds = float(lines[told[-1]].split("committed after ")[1].split()[0])
    assert seconds >= SLOW_SECONDS


def test_a_checkpoint_knows_the_validation_before_it_also_after_a_resume(runs: Runs) -> None:
    records = [row for row in read_lines(runs.config.output / "log.jsonl") if "validation" in row]
    factor = parts.loss_factor(runs.config)
    known = {row["step"]: validation_loss(row["validation"], factor) for row in records}
    folders = committed(runs.config.output)
    assert len(folders) in (1, 2)  # the last one; the best one, where that is another
    for folder in folders:
        state = read_state(folder)
        last = max((step for step in known if step <= state["step"]), default=None)
        assert state["validation"] == (None if last is None else {"step": last, "loss": known[last]})
