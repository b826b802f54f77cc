"""`sci-gpt sweep`: derived points, nested runs, POINTS.csv and its arithmetic, no finished point trained again."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow.tracking import MlflowClient

from sci_evals.scaling_points import read_points
from sci_gpt.config import PretrainConfig
from sci_gpt.config_file import load_config, show_config
from sci_gpt.errors import ConfigError
from sci_gpt.recipes.points import COLUMNS, points_of
from sci_gpt.recipes.studies import SweepConfig
from sci_gpt.train.run_folder import read_complete, read_lines
from sci_launch import cli, local, sweep
from sci_launch.sweep import remaining
from toy_model import toy_data
from toy_store import toy_config


def write_sweep(folder: Path, **changes: Any) -> Path:
    """A sweep on the toy store; its steps have 3 x 160 positions."""
    if not (folder / "store").exists():
        toy_data(folder / "store")
    base = toy_config(folder / "store", folder / "run", parallel={"processes": 1})
    (folder / "run.yaml").write_text(show_config(base), encoding="utf-8")
    tree = {
        "name": "toy-sweep",
        "output": str(folder / "sweep"),
        "pretrain": str(folder / "run.yaml"),
        "sizes": [{"size": "tiny", "learning_rate": None}, {"size": "100k", "learning_rate": 2e-3}],
        "tokens": [1440, 2880],
        "validation_windows": 2,
        "title": "plumbing check, not a law",
    } | changes
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of two sizes and two budgets, run by the command; the folder that holds everything."""
    folder = tmp_path_factory.mktemp("sweep")
    assert cli.main(["sweep", str(write_sweep(folder))]) == 0
    return folder


def lines(folder: Path) -> list[dict[str, str]]:
    """POINTS.csv."""
    with (folder / "sweep" / "POINTS.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_point_has_its_line_per_modality(swept: Path) -> None:
    rows = lines(swept)
    assert tuple(rows[0]) == COLUMNS
    assert len(rows) == 2 * 2 * 3
    assert {(row["modality"], row["size"]) for row in rows} == {
        (modality, size) for modality in ("grid", "series", "trace") for size in ("tiny", "100k")
    }
    assert len({row["params"] for row in rows}) == 2
    assert len(read_points(swept / "sweep" / "POINTS.csv", modality="grid")) == 4
    assert (swept / "sweep" / "sweep.png").stat().st_size > 10_000
    fits = json.loads((swept / "sweep" / "fits.json").read_text())
    assert set(fits) == {"grid", "series", "trace"}


def test_tokens_and_losses_are_those_of_the_runs_own_logs(swept: Path) -> None:
    for row in lines(swept):
        (run,) = (
            path
            for path in (swept / "sweep" / "points").glob(f"{row['size']}-*")
            if sum(one["tokens"] for one in read_lines(path / "log.jsonl") if "tokens" in one) == int(row["tokens"])
        )
        (last,) = (one for one in read_lines(run / "log.jsonl") if "validation" in one)
        assert float(row["loss"]) == last["validation"][row["modality"]]["loss"]


def test_epochs_are_passes_over_distinct_tokens(swept: Path) -> None:
    """The toy grid: 3 stretches of 120 frames in 2 x 3 patches; what was eaten is in the run's own keys."""
    (row,) = (
        row for row in lines(swept) if (row["modality"], row["size"]) == ("grid", "tiny") and int(row["tokens"]) > 1440
    )
    run = swept / "sweep" / "points" / "tiny-2880-seed0"
    keys = [key for line in read_lines(run / "keys" / "rank-0.jsonl") for key in line["keys"]]
    grids = sum("field/" in str(key) for key in keys)
    assert grids > 0
    assert float(row["epochs"]) == pytest.approx(grids * 16 * 6 / (3 * 120 * 6))


def test_the_derived_run_differs_only_where_the_point_does(swept: Path) -> None:
    study = load_config(swept / "sweep.yaml", SweepConfig)
    base = load_config(swept / "run.yaml", PretrainConfig)
    point = points_of(study, parent_run="p")[-1]
    assert (point.size, point.tokens, point.config.schedule.steps) == ("100k", 2880, 6)
    assert point.config.phases[0].until_step == 6
    assert (point.config.schedule.warmup_steps, point.config.schedule.cooldown_steps) == (1, 2)
    assert point.config.optimizer.learning_rate == 2e-3
    assert point.config.tracking.parent_run == "p"
    same = ("data", "shuffle_block", "loss_factor", "tokenizer", "parallel", "evaluate")
    assert all(getattr(point.config, name) == getattr(base, name) for name in same)
    assert point.config.phases[0].mixture == base.phases[0].mixture


def test_the_points_are_children_of_one_run_in_mlflow(swept: Path) -> None:
    client = MlflowClient(tracking_uri=f"sqlite:///{swept}/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name("toy-sweep")
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = (run for run in runs if "mlflow.parentRunId" not in run.data.tags)
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(children) == 4 and len(runs) == 5
    assert parent.info.status == "FINISHED"
    assert {child.data.params["model.size"] for child in children} == {"tiny", "100k"}
    assert {file.path for file in client.list_artifacts(parent.info.run_id)} >= {"POINTS.csv", "sweep.png"}
    assert len([name for name in parent.data.metrics if name.startswith("loss/grid/")]) == 4


def counting(monkeypatch: pytest.MonkeyPatch, act: Callable[[PretrainConfig], object]) -> list[str]:
    """Names of the runs that the sweep hands to the local launcher, which `act` stands for."""
    asked: list[str] = []

    def pretrain(config: PretrainConfig) -> int:
        asked.append(config.output.name)
        act(config)
        return 0

    monkeypatch.setattr(local, "pretrain", pretrain)
    return asked


def test_a_finished_point_is_not_trained_again_and_a_stopped_sweep_goes_on(
    swept: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = counting(monkeypatch, lambda config: None)
    before = (swept / "sweep" / "POINTS.csv").read_bytes()
    assert cli.main(["sweep", str(swept / "sweep.yaml")]) == 0
    assert asked == []
    assert "4 points, 4 of them finished before" in capsys.readouterr().out
    assert (swept / "sweep" / "POINTS.csv").read_bytes() == before
    run = swept / "sweep" / "points" / "100k-1440-seed0"
    marker = (run / "complete.json").read_text()
    (run / "complete.json").unlink()  # as a run that was stopped leaves it
    try:
        assert cli.main(["sweep", str(swept / "sweep.yaml"), "--json"]) == 0
        assert asked == [run.name]
        assert json.loads(capsys.readouterr().out)["complete"] is False, "what was stopped is not fitted"
        asked.clear()
        counted = counting(monkeypatch, lambda config: (config.output / "complete.json").write_text(marker))
        assert cli.main(["sweep", str(swept / "sweep.yaml"), "--json"]) == 0
        result = json.loads(capsys.readouterr().out)
        assert counted == [run.name] and result["complete"] and result["trained"] == ["100k, 1,440 tokens, seed 0"]
        assert (swept / "sweep" / "POINTS.csv").read_bytes() == before
    finally:
        (run / "complete.json").write_text(marker)
    assert read_complete(run) is not None


def test_only_unfinished_points_are_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = points_of(load_config(write_sweep(tmp_path), SweepConfig), parent_run=None)
    asked = counting(monkeypatch, lambda config: None)
    monkeypatch.setattr(sweep, "is_finished", lambda point: True)
    assert sweep.train(points, [True, False, True, False]) == [points[1].name, points[3].name]
    assert asked == [points[1].config.output.name, points[3].config.output.name]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "sizes.0.size=2M"], "sizes: one of tiny, 100k, 200k, 300k, 1M"),
        (["--set", "tokens=[100, 2880]"], "give budgets of two steps or more"),
        (["--set", "tokens=[2880, 2900]"], "differ by a step at least"),
        (["--set", "sizes.0.learning_rate=0.1"], "was trained with optimizer"),
        (["--set", "pretrain=nowhere.yaml"], "no configuration file 'nowhere.yaml'"),
        (["--set", "seeds=[0, 0]"], "seed 0 stands 2 times"),
        (["--set", "titel=x"], "titel"),
    ],
)
def test_bad_input_is_one_line(swept: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sweep", str(swept / "sweep.yaml"), *words]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1


def test_a_pretraining_of_two_phases_is_refused(swept: Path, tmp_path: Path) -> None:
    tree = yaml.safe_load((swept / "run.yaml").read_text())
    tree["phases"] = [tree["phases"][0] | {"until_step": 12}, tree["phases"][0]]
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(tree))
    study = load_config(swept / "sweep.yaml", SweepConfig, overrides=(f"pretrain={tmp_path}/two.yaml",))
    with pytest.raises(ConfigError, match=r"two\.yaml has 2 phases"):
        points_of(study, parent_run=None)


def test_the_time_left_is_a_start_and_a_rate() -> None:
    assert remaining([], [1.0]) == "not known yet"
    assert remaining([(10.0, 30.0)], [10.0, 10.0]) == "1:00"
    # 10 s to start and 2 s per unit of work: two of 20 units take 2 x (10 + 40) s
    assert remaining([(10.0, 30.0), (20.0, 50.0)], [20.0, 20.0]) == "1:40"


def test_the_quickstarts_sweep_is_three_by_three(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    study = load_config(root / "configs" / "sweeps" / "quickstart.yaml", SweepConfig)
    points = points_of(study, parent_run=None)
    assert len(points) == 9 and len({point.tokens for point in points}) == 3
    assert [point.tokens for point in points][::3] == list(study.tokens), "budgets are whole steps"
    assert study.title == "plumbing check, not a law"
