"""A run over a damaged store: it ends with the samples of the others unmoved, or stops at its limit with a summary."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from sci_gpt.config import PretrainConfig
from sci_gpt.config_file import show_config
from sci_gpt.data.store import Store
from sci_gpt.recipes import parts
from sci_gpt.train.feed import Place, StepReader
from sci_gpt.train.run_folder import keys_log, read_lines
from toy_store import toy_config, write_store

STEPS = 8


@dataclass(frozen=True, kw_only=True)
class Runs:
    """Two runs over the same damage: one that may pass over as many samples as it likes, and one that may not."""

    patient: PretrainConfig
    strict: PretrainConfig
    output: dict[str, str]
    code: dict[str, int]
    keys: list[list[str]]


def configuration(folder: Path, name: str, *, most: int) -> PretrainConfig:
    return toy_config(
        folder / "store",
        folder / name,
        schedule={"steps": STEPS, "warmup_steps": 1, "cooldown_steps": 1},
        parallel={"processes": 1},
        reading={"attempts": 2, "wait_seconds": 0.01, "most_passed_over": most},
        tracking={
            "uri": f"sqlite:///{folder}/{name}-mlflow/mlflow.db",
            "artifacts": f"{folder}/{name}-mlflow/artifacts",
            "experiment": "toy",
            "registered_model": None,
        },
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("faulty")
    write_store(folder / "store")
    configs = {name: configuration(folder, name, most=most) for name, most in (("patient", 1000), ("strict", 3))}
    curriculum = parts.curriculum(configs["patient"], Store.open(folder / "store"))
    read = StepReader(
        curriculum, Place(rank=0, world=1, accumulation=1), settings=parts.tokenizer_settings(configs["patient"])
    )
    keys, n = [], 0
    for step in range(STEPS):
        rows = read(step, n)
        keys.append(list(rows.keys))
        n = rows.next_sample
    shard = folder / "store" / "station" / "train" / "shard-00000.tar"
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    processes = {}
    for name, config in configs.items():
        (folder / f"{name}.yaml").write_text(show_config(config))
        command = [sys.executable, "-m", "sci_launch.cli", "pretrain", str(folder / f"{name}.yaml")]
        processes[name] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    output = {name: process.communicate(timeout=120)[0] for name, process in processes.items()}
    code = {name: process.returncode for name, process in processes.items()}
    return Runs(**configs, output=output, code=code, keys=keys)


def test_a_run_ends_with_the_order_of_the_others_unchanged_and_counts_what_it_lost(runs: Runs) -> None:
    assert runs.code["patient"] == 0, runs.output["patient"]
    eaten = [row["keys"] for row in read_lines(keys_log(runs.patient.output, 0))]
    lost = 0
    for whole, kept in zip(runs.keys, eaten, strict=True):
        assert [key for key in kept if "station/" not in key] == [key for key in whole if "station/" not in key]
        lost += len(whole) - len(kept)
    records = [row for row in read_lines(runs.patient.output / "log.jsonl") if "loss" in row]
    assert sum(row["passed_over"] for row in records) == lost > 3
    assert runs.output["patient"].count(" is passed over: ") == lost
    assert "station/train/shard-00000.tar: station/train-" in runs.output["patient"]
    client = MlflowClient(tracking_uri=runs.patient.tracking.uri)
    experiment = client.get_experiment_by_name("toy")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert sum(metric.value for metric in client.get_metric_history(run.info.run_id, "passed_over")) == lost
    assert run.data.metrics["passed_over_so_far"] == lost


def test_a_run_stops_at_its_limit_with_a_summary(runs: Runs) -> None:
    assert runs.code["strict"] == 2
    last = runs.output["strict"].splitlines()[-1]
    assert "samples could not be read, more than the 3 of reading.most_passed_over" in last
    assert "on rank 0: " in last and "station/train/shard-00000.tar: " in last and "build the store again" in last
