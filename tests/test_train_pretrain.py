"""`sci-gpt pretrain` on the quickstart's own batches: 1 and 2 processes, SIGTERM, kill -9, resume, tracking."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from mlflow.tracking import MlflowClient

from sci_gpt.config import PretrainConfig
from sci_gpt.config_file import load_config, show_config
from sci_gpt.data.store import Store
from sci_gpt.errors import CheckpointError, ConfigError
from sci_gpt.model.transformer import SciGPT
from sci_gpt.recipes import parts
from sci_gpt.recipes.pretrain import pretrain
from sci_gpt.train.checkpoint import committed, latest, read_state, read_weights
from sci_gpt.train.feed import StepReader
from sci_gpt.train.run_folder import read_lines
from sci_gpt.train.signals import Requests
from toy_store import change_manifest

STEPS, COMPARED = 28, 20
MASKED = {"cmip6_daily_ta": 0.25, "earthquakes": 0.25, "ostia_sst": 0.5, "a1b_air_temperature": 0.5}
PATIENCE_SECONDS = 120.0


@dataclass(frozen=True, kw_only=True)
class Runs:
    """Finished runs of one configuration: straight through; moved from 1 process to 2; killed, its newest checkpoint
    damaged, and called again."""

    folder: Path
    store: Path
    straight: Path
    moved: Path
    killed: Path
    output: dict[str, str]

    def config(self, run: str, **overrides: Any) -> PretrainConfig:
        """The configuration of one of the runs."""
        return configuration(self.folder, self.store, run, **overrides)


def configuration(folder: Path, store: Path, run: str, **overrides: Any) -> PretrainConfig:
    """The quickstart's own, with its rows and mixture, but a tiny trunk, few steps, a part of each modality masked."""
    changes = {
        "output": folder / run,
        "data": store,
        "model.size": "tiny",
        "schedule.steps": STEPS,
        "phases.0.until_step": STEPS,
        **{f"phases.0.mixture.{name}.masked": share for name, share in MASKED.items()},
        "schedule.warmup_steps": 4,
        "schedule.cooldown_steps": 8,
        "optimizer.clip": 0.5,
        "checkpoint.every": 8,
        "validation.every": 14,
        "validation.windows": 2,
        "tracking.uri": f"sqlite:///{folder}/mlflow/mlflow.db",
        "tracking.artifacts": folder / "mlflow/artifacts",
        "tracking.experiment": "tests",
        "tracking.registered_model": "null",
    } | overrides
    path = Path(__file__).resolve().parents[1] / "configs" / "pretrain" / "quickstart.yaml"
    return load_config(path, PretrainConfig, overrides=tuple(f"{key}={value}" for key, value in changes.items()))


def start(config: PretrainConfig) -> subprocess.Popen[str]:
    """`sci-gpt pretrain` in a process of its own."""
    path = config.output.parent / f"{config.output.name}.yaml"
    path.write_text(show_config(config))
    command = [sys.executable, "-m", "sci_launch.cli", "pretrain", str(path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def end(process: subprocess.Popen[str], *, code: int = 0) -> str:
    """Wait for the end; its output."""
    output = process.communicate(timeout=PATIENCE_SECONDS)[0]
    assert process.returncode == code, output
    return output


def at_step(run: Path, step: int, process: subprocess.Popen[str], *, do: Callable[[], None]) -> None:
    """Do something as soon as the log holds a step."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if any(record["step"] >= step for record in read_lines(run / "log.jsonl")):
            do()
            return
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not reached while the run went on: {process.poll()}")


def kill_workers(process: subprocess.Popen[str]) -> None:
    """kill -9 for every worker, none for the launcher."""
    for worker in psutil.Process(process.pid).children():
        worker.kill()


def flip_a_bit(path: Path) -> None:
    """In the middle of a file, as a disk may."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.fixture(scope="module")
def runs(quickstart_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder, store = tmp_path_factory.mktemp("pretrain"), quickstart_store
    output: dict[str, str] = {}

    straight = configuration(folder, store, "straight")
    output["straight"] = end(start(straight))
    output["again"] = end(start(straight))

    alone = configuration(folder, store, "moved", **{"parallel.processes": 1})
    process = start(alone)
    at_step(alone.output, COMPARED, process, do=lambda: process.send_signal(signal.SIGTERM))
    output["stopped"] = end(process)
    output["requeue"] = (alone.output / "requeue").read_text()
    output["moved"] = end(start(configuration(folder, store, "moved")))

    killed = configuration(folder, store, "killed")
    process = start(killed)
    at_step(killed.output, 20, process, do=lambda: kill_workers(process))
    output["killed"] = end(process, code=1)
    flip_a_bit(killed.output / "checkpoints" / "step-00000016" / "rank-00001.safetensors")
    (killed.output / "checkpoints" / "step-00000011").mkdir()  # as a save that never finished leaves it
    with (killed.output / "log.jsonl").open("a") as log:
        log.write('{"step": 99, "lo')  # as a write that was cut leaves it
    output["resumed"] = end(start(killed))
    return Runs(
        folder=folder,
        store=store,
        straight=straight.output,
        moved=alone.output,
        killed=killed.output,
        output=output,
    )


def losses(run: Path) -> list[float]:
    """The logged loss of every step, checking that each stands once."""
    records = [record for record in read_lines(run / "log.jsonl") if "loss" in record]
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    return [record["loss"] for record in records]


def losses_by_name(run: Path) -> list[dict[str, float]]:
    """The logged losses of every step: of each modality, and of the masked objective by itself."""
    return [record["losses"] for record in read_lines(run / "log.jsonl") if "loss" in record]


def consumed(run: Path) -> list[tuple[int, list[int], list[str]]]:
    """(step, sample numbers, keys) over all ranks: what the run has eaten, in order of step and sample."""
    steps: dict[int, dict[int, str]] = {}
    for path in sorted((run / "keys").glob("rank-*.jsonl")):
        for record in read_lines(path):
            step = steps.setdefault(record["step"], {})
            for number, key in zip(record["samples"], record["keys"], strict=True):
                assert number not in step, f"sample {number} stands twice in step {record['step']}"
                step[number] = key
    return [(step, sorted(eaten), [eaten[n] for n in sorted(eaten)]) for step, eaten in sorted(steps.items())]


def test_one_and_two_processes_have_the_same_losses(runs: Runs) -> None:
    assert losses(runs.moved)[:COMPARED] == pytest.approx(losses(runs.straight)[:COMPARED], rel=1e-5)
    for one, two in zip(losses_by_name(runs.moved), losses_by_name(runs.straight), strict=True):
        assert one == pytest.approx(two, rel=1e-4)
    names = {name for step in losses_by_name(runs.straight)[:COMPARED] for name in step}
    assert names == {"grid", "series", "trace", "grid/masked", "series/masked", "trace/masked"}


def test_the_batches_compared_are_mixed_uneven_and_have_gaps(runs: Runs) -> None:
    config = runs.config("straight")
    store = Store.open(runs.store)
    settings = parts.tokenizer_settings(config)
    curriculum = parts.curriculum(config, store)
    readers = [StepReader(curriculum, parts.place(config, rank=rank), settings=settings) for rank in (0, 1)]
    n, gaps, uneven, mixed = 0, False, 0, set()
    for step in range(3):
        batches = [reader(step, n).batches[0] for reader in readers]
        n = readers[0](step, n).next_sample
        valid = [payload.valid for batch in batches for payload in batch.payloads.values()]
        gaps = gaps or any(not array.all() for array in valid)
        uneven += len({int((batch.document >= 0).sum()) for batch in batches}) == 2
        mixed |= {m for batch in batches for m, payload in batch.payloads.items() if len(payload.index)}
    assert gaps and uneven and mixed == {"grid", "series", "trace"}
    norms = [record["gradient_norm"] for record in read_lines(runs.straight / "log.jsonl") if "loss" in record]
    assert np.mean(np.array(norms[:COMPARED]) > config.optimizer.clip) > 0.5


def test_sigterm_finishes_the_step_saves_and_leaves_a_marker(runs: Runs) -> None:
    marker = json.loads(runs.output["requeue"])
    assert COMPARED <= marker["step"] < STEPS
    assert f"stopped after {marker['step']} steps" in runs.output["stopped"]
    assert marker["checkpoint"] == f"checkpoints/step-{marker['step']:08d}"
    assert not (runs.moved / "requeue").exists(), "the marker must go when the run goes on"


def test_a_run_goes_on_over_another_number_of_processes(runs: Runs) -> None:
    assert losses(runs.moved) == pytest.approx(losses(runs.straight), rel=1e-5)
    assert consumed(runs.moved) == consumed(runs.straight)


def test_kill_9_costs_only_the_steps_since_the_checkpoint(runs: Runs) -> None:
    assert losses(runs.killed) == pytest.approx(losses(runs.straight), rel=1e-6)
    assert consumed(runs.killed) == consumed(runs.straight)
    for rank in (0, 1):
        name = f"keys/rank-{rank}.jsonl"
        assert read_lines(runs.killed / name) == read_lines(runs.straight / name)
    assert "killed by SIGKILL" in runs.output["killed"]
    assert f"resumes from {runs.killed}/checkpoints/step-00000008" in runs.output["resumed"]


def test_a_damaged_checkpoint_is_passed_over_kept_and_said(runs: Runs) -> None:
    folder = runs.killed / "checkpoints" / "step-00000016"
    (line,) = [line for line in runs.output["resumed"].splitlines() if "damaged" in line]
    assert line.startswith(f"warning: {folder / 'rank-00001.safetensors'} is damaged: sha256 ")
    assert line.endswith(f": {folder} is ignored, and kept as step-00000016.damaged for you to look at or delete")
    aside = folder.with_name("step-00000016.damaged")
    assert sorted(path.name for path in aside.iterdir()) == [
        "manifest.json",
        *[f"rank-0000{rank}.{end}" for rank in (0, 1) for end in ("parts.json", "safetensors")],
        "state.json",
    ]
    assert [path.name for path in committed(runs.killed)] == ["step-00000024", f"step-{STEPS:08d}"]


def test_a_torn_checkpoint_is_ignored_with_a_message(runs: Runs) -> None:
    assert "step-00000011 is torn" in runs.output["resumed"]
    assert not (runs.killed / "checkpoints" / "step-00000011").exists()


def test_no_sample_is_skipped_or_repeated(runs: Runs) -> None:
    numbers = [number for _, samples, _ in consumed(runs.straight) for number in samples]
    assert numbers == list(range(len(numbers)))
    assert read_state(latest(runs.straight) or Path())["next_sample"] == len(numbers)


def test_the_final_weights_agree_however_the_run_went(runs: Runs) -> None:
    straight, killed, moved = (read_weights(latest(run) or Path()) for run in (runs.straight, runs.killed, runs.moved))
    model = SciGPT(parts.model_shape(runs.config("straight")), parts.model_settings(runs.config("straight")))
    model.load_state_dict(straight, strict=True)
    for name, tensor in straight.items():
        assert np.allclose(tensor, killed[name], rtol=0, atol=1e-6), name
        assert np.allclose(tensor, moved[name], rtol=0, atol=1e-3), name


def test_the_last_checkpoints_are_kept_and_say_where_they_are_from(runs: Runs) -> None:
    assert [path.name for path in committed(runs.straight)] == ["step-00000024", f"step-{STEPS:08d}"]
    state = read_state(latest(runs.straight) or Path())
    store = Store.open(runs.store)
    assert state["step"] == STEPS and state["fingerprint"] == store.fingerprint
    assert state["statistics"].keys() == store.statistics.keys()
    assert state["sources"]["earthquakes"]["modality"] == "trace"
    assert PretrainConfig.model_validate(state["config"]) == runs.config("straight")
    assert state["code_version"] and state["variables"]


def test_a_complete_run_is_left_as_it_is(runs: Runs) -> None:
    assert "is complete: 28 steps" in runs.output["again"]
    assert json.loads((runs.straight / "complete.json").read_text())["step"] == STEPS


def test_the_start_says_what_is_trained_and_lines_how_it_goes(runs: Runs) -> None:
    output = runs.output["straight"]
    config = runs.config("straight")
    rows = f"{config.phases[0].rows_per_step} rows x {config.phases[0].row_length} tokens per step"
    assert rows in output and "% of rows hold two or more modalities" in output
    last = next(line for line in output.splitlines() if line.startswith(f"step {STEPS}/{STEPS} |"))
    for word in ("tokens/s", "ETA", "loss", "skill grid", "waits for data"):
        assert word in last
    assert sum(line.startswith("waits for data ") and line.endswith(" s of steps") for line in output.splitlines()) == 1


def test_other_data_another_seed_or_mixture_is_refused(runs: Runs, tmp_path: Path) -> None:
    for path in runs.store.iterdir():
        if path.name != "manifest.json":
            (tmp_path / path.name).symlink_to(path)
    shutil.copy(runs.store / "manifest.json", tmp_path)
    change_manifest(tmp_path, {"fingerprint": "another"})
    before = sorted(path.stat().st_mtime_ns for path in runs.straight.rglob("*"))
    changes = {
        "data": (tmp_path, "fingerprint is .* there and another here"),
        "seed": (8, "seed is 0 there and 8 here"),
        "phases.0.mixture.cmip6_daily_ta.weight": (
            0.25,
            r"phases\.0\.mixture\.0\.weight is 0\.\d+ there and 0\.25 here",
        ),
        "shuffle_block": (4096, "shuffle_block is 65536 there and 4096 here"),
        "model.size": ("1M", "model.size is tiny there and 1M here"),
    }
    for key, (value, message) in changes.items():
        with pytest.raises(CheckpointError, match=f"of another run: .*{message}.*another output"):
            pretrain(runs.config("straight", **{key: value}), Requests())
    assert sorted(path.stat().st_mtime_ns for path in runs.straight.rglob("*")) == before


def test_a_disk_without_room_is_refused_before_anything_is_written(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
    with pytest.raises(CheckpointError, match="no space for the checkpoints of .*nowhere': 2 kept and one being wr"):
        pretrain(runs.config("nowhere"), Requests())
    # the last 2, steps 8, 16 and 24 of 28, the best 3
    more = {"checkpoint.keep_every": 8, "checkpoint.keep_best": 3}
    with pytest.raises(CheckpointError, match="no space for the checkpoints of .*nowhere': 8 kept and one being wr"):
        pretrain(runs.config("nowhere", **more), Requests())
    assert not (runs.folder / "nowhere").exists()


def test_a_size_that_does_not_exist_is_refused(runs: Runs) -> None:
    with pytest.raises(ConfigError, match="model.size is one of tiny, .*got '2M'"):
        pretrain(runs.config("nowhere", **{"model.size": "2M"}), Requests())


def test_the_run_is_in_mlflow_once_and_whole(runs: Runs) -> None:
    client = MlflowClient(f"sqlite:///{runs.folder}/mlflow/mlflow.db")
    for run in (runs.straight, runs.killed):
        tracked = client.get_run(json.loads((run / "tracking.json").read_text())["run_id"])
        assert tracked.info.status == "FINISHED"
        assert tracked.data.params["optimizer.clip"] == "0.5"
        assert tracked.data.params["phases.0.mixture.0.source"] == "cmip6_daily_ta"
        assert tracked.data.tags["fingerprint"] == Store.open(runs.store).fingerprint
        assert tracked.data.tags["code_version"]
        history = {metric.step: metric.value for metric in client.get_metric_history(tracked.info.run_id, "loss")}
        assert sorted(history) == list(range(1, STEPS + 1))
        assert [history[step] for step in sorted(history)] == pytest.approx(losses(run), rel=1e-6)
        assert "validation/series/skill" in tracked.data.metrics
        assert tracked.data.metrics["system/rank0_resident_megabytes"] > 50
        assert "config.yaml" in [item.path for item in client.list_artifacts(tracked.info.run_id)]
    experiment = client.get_experiment_by_name("tests")
    assert experiment is not None
    assert len(client.search_runs([experiment.experiment_id])) == 3  # a resumed run goes on as the same one


def test_workers_are_gone_with_their_launcher(runs: Runs) -> None:
    left = [
        process.info["cmdline"]
        for process in psutil.process_iter(["cmdline", "environ"])
        if str(os.getpid()) == (process.info["environ"] or {}).get("SCI_GPT_PARENT")
    ]
    assert left == []
