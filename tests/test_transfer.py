"""`sci-gpt transfer`: equal arms, no test data in a choice, what was seen is refused, examples saved by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from mlflow.tracking import MlflowClient

from sci_evals import transfer
from sci_evals.transfer_curves import FINETUNED, SCRATCH, Curves, needed, resample, saved, verdict
from sci_evals.transfer_data import draw, refuse_seen
from sci_gpt.config import PretrainConfig
from sci_gpt.config_file import load_config, show_config
from sci_gpt.data.store import Store
from sci_gpt.errors import ConfigError
from sci_gpt.recipes.adapt import AdaptSettings, Examples, adapt
from sci_gpt.recipes.load import LoadedModel
from sci_gpt.recipes.studies import TransferConfig, TransferTask
from sci_launch import cli
from toy_model import make_run

QUAKES = {"source": "quake", "weight": 1, "frames": 30, "stride": 4, "context_frames": [4, 15]}
STATIONS = {"source": "station", "weight": 1, "frames": 24, "stride": 3, "context_frames": [3, 12], "leads": [1, 2]}


def furnish(folder: Path) -> PretrainConfig:
    """A finished pretraining on two of the toy sources and a transfer to the third, a grid."""
    config = make_run(folder, mixture=[QUAKES, STATIONS])
    (folder / "run.yaml").write_text(show_config(config), encoding="utf-8")
    tree = {
        "name": "toy-transfer",
        "output": str(folder / "transfer"),
        "pretrain": str(folder / "run.yaml"),
        "data": str(folder / "store"),
        "tasks": [
            {
                "source": "field",
                "frames": 12,
                "context_frames": [4, 8],
                "leads": [1, 2],
                "max_steps": 6,
                "rows_per_step": 2,
            }
        ],
        "examples": [8, 16],
        "seeds": [0, 1],
        "learning_rates": [1e-4, 1e-2],
        "validate_every": 2,
        "patience": 2,
        "test_windows": 12,
        "bootstrap": 100,
    }
    (folder / "transfer.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    return config


class Watch:
    """What `adapt` was given and gave back, in order."""

    def __init__(self) -> None:
        self.settings: list[tuple[bool, AdaptSettings]] = []  # whether the start is pretrained
        self.examples: list[Examples] = []
        self.valid: list[float] = []

    def __call__(self, start: LoadedModel, examples: Examples, settings: AdaptSettings, **words: Any) -> Any:
        """`adapt`, watched."""
        self.settings.append((start.step > 0, settings))
        self.examples.append(examples)
        adapted = adapt(start, examples, settings=settings, **words)
        self.valid.append(min(row[2] for row in adapted.history))
        return adapted


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Watch]:
    """A transfer run by the command, watched."""
    folder, watch = tmp_path_factory.mktemp("transfer"), Watch()
    furnish(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer, "adapt", watch)
        assert cli.main(["transfer", str(folder / "transfer.yaml")]) == 0
    return folder, watch


def result(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "transfer" / "transfer.json").read_text())["tasks"]["field"]
    return found


def test_both_arms_get_the_same_steps_documents_patience_and_rates(done: tuple[Path, Watch]) -> None:
    _, watch = done
    fine = [settings for pretrained, settings in watch.settings if pretrained]
    scratch = [settings for pretrained, settings in watch.settings if not pretrained]
    assert len(fine) == len(scratch) == 2 * 2 * 2  # numbers of examples, seeds, learning rates
    assert fine == scratch
    assert {settings.max_steps for settings in fine} == {6}


def test_neither_arm_sees_the_test_split_and_validation_is_apart_from_training(done: tuple[Path, Watch]) -> None:
    folder, watch = done
    store = Store.open(folder / "store")
    train = [store.read("field", "train", index=i, start=0, stop=120).time for i in range(3)]
    allowed = set(np.concatenate(train).tolist())
    for examples in watch.examples:
        learned = {time for sample in examples.train for time in sample.time.tolist()}
        checked = {time for sample in examples.valid for time in sample.time.tolist()}
        assert learned <= allowed and checked <= allowed, "the test split begins elsewhere"
        assert not learned & checked
    assert {(len(e.train), len(e.valid)) for e in watch.examples} == {(6, 2), (12, 4)}


def test_the_rate_is_the_one_that_validation_likes_best(done: tuple[Path, Watch]) -> None:
    folder, watch = done
    trials = [trial for trial in result(folder)["trials"] if trial["valid"]]
    assert len(trials) == 8
    for number, trial in enumerate(trials):
        seen = dict(zip((1e-4, 1e-2), watch.valid[2 * number : 2 * number + 2], strict=True))
        assert {float(rate): loss for rate, loss in trial["valid"].items()} == seen
        assert trial["learning_rate"] == min(seen, key=seen.__getitem__)


def test_the_trials_are_children_of_one_run_in_mlflow(done: tuple[Path, Watch]) -> None:
    folder, _ = done
    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("toy-transfer").experiment_id])
    (parent,) = (run for run in runs if "mlflow.parentRunId" not in run.data.tags)
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(children) == 8
    assert {(run.data.params["arm"], run.data.params["examples"]) for run in children} == {
        (arm, count) for arm in (FINETUNED, SCRATCH) for count in ("8", "16")
    }
    assert {file.path for file in client.list_artifacts(parent.info.run_id)} == {"transfer.json", "transfer.png"}


def test_the_curves_intervals_and_verdict_are_written(done: tuple[Path, Watch]) -> None:
    folder, _ = done
    found = result(folder)
    for arm, errors in found["errors"].items():
        assert len(errors) == 2 and all(error > 0 for error in errors)
        for error, (low, high) in zip(errors, found["intervals"][arm], strict=True):
            assert low <= error * 1.2 and high >= error * 0.8
    assert found["unit"] == "K" and found["verdict"][-1].startswith("field: the test windows are ")
    assert (folder / "transfer" / "transfer.png").stat().st_size > 10_000


def curves(fine: list[float], scratch: list[float], *, spread: float = 0.0) -> Curves:
    """Curves at 8, 32 and 128 examples; resamples scatter by `spread`."""
    random = np.random.default_rng(0)
    errors = {FINETUNED: np.array([fine]), SCRATCH: np.array([scratch])}
    drawn = {arm: rows * np.exp(spread * random.standard_normal((500, 1))) for arm, rows in errors.items()}
    return Curves(examples=(8, 32, 128), errors=errors, resampled=drawn, level=0.9)


def test_examples_needed_are_interpolated_in_logarithms() -> None:
    # error 1/n: the error 1/16 is reached at 16, half way between 8 and 32 in logarithms
    assert needed((8, 32, 128), np.array([1 / 8, 1 / 32, 1 / 128]), target=1 / 16) == pytest.approx(16)
    assert needed((8, 32), np.array([1.0, 0.5]), target=2.0) == -math.inf
    assert needed((8, 32), np.array([1.0, 0.5]), target=0.4) == math.inf


def test_examples_saved_and_what_is_not_identifiable() -> None:
    # finetuned has the error 1/64 at 64 examples, which scratch has at 128
    found = saved(curves([1 / 8, 1 / 32, 1 / 128], [1 / 4, 1 / 16, 1 / 64]))
    assert found["status"] == "found" and found["saved"] == pytest.approx(64) and found["low"] == pytest.approx(64)
    found = saved(curves([3.0, 2.9, 2.8], [3.0, 2.0, 1.0]))
    assert found["status"] == "not identifiable" and found["saved"] is None
    assert "not identifiable" in " ".join(verdict("t", curves([3.0, 2.9, 2.8], [3.0, 2.0, 1.0])))
    found = saved(curves([1.0, 0.9, 0.8], [3.0, 2.5, 2.0]))
    assert (found["status"], found["saved"]) == ("at least", pytest.approx(120))
    # more examples do not help from scratch: nothing that could be saved
    found = saved(curves([1.0, 1.1, 0.9], [1.1, 1.2, 1.15]))
    assert found["status"] == "not identifiable" and "does not fall" in found["why"]
    # from scratch 32 examples are as good as 128: the finetuned model, which needs 128, saves nothing
    found = saved(curves([3.0, 2.0, 1.0], [2.0, 1.0, 1.0]))
    assert found["status"] == "found" and found["saved"] == pytest.approx(-96) and found["low"] == pytest.approx(-96)
    assert "32 examples are as good as 128" in found["why"]
    # as good as scratch up to noise: half of the resamples never reach it, so the lower end is open
    found = saved(curves([3.0, 2.0, 0.999], [3.0, 2.0, 1.0], spread=0.2))
    assert found["status"] == "found" and found["low"] is None


@pytest.mark.parametrize(
    ("fine", "scratch", "said"),
    [
        ([1.0, 1.0, 1.0], [2.0, 2.0, 2.0], "t: pretraining is worth it here"),
        ([2.0, 2.0, 2.0], [1.0, 1.0, 1.0], "t: pretraining is not worth it here"),
        ([1.0, 1.0, 2.0], [2.0, 2.0, 1.0], "t: it depends on the number of examples"),
    ],
)
def test_the_verdict_follows_the_intervals(fine: list[float], scratch: list[float], said: str) -> None:
    assert verdict("t", curves(fine, scratch))[-1] == said
    assert verdict("t", curves(fine, scratch, spread=2.0))[-1] == "t: nothing is established either way"


def test_resampling_keeps_blocks_and_arms_together() -> None:
    """Two blocks, one of error 0 and one of error 2: a resample's mean is 0, 1 or 2, half of them 1."""
    errors = np.array([[[0.0, 0.0, 2.0, 2.0]]])
    found = resample({"a": errors, "b": 3 * errors}, np.ones(4), blocks=np.array([0, 0, 1, 1]), resamples=4000, seed=1)
    assert set(np.unique(found["a"])) == {0.0, 1.0, 2.0}
    assert np.mean(found["a"] == 1.0) == pytest.approx(0.5, abs=0.03)
    np.testing.assert_allclose(found["b"], 3 * found["a"])


def test_what_the_pretraining_saw_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = furnish(tmp_path)
    store = Store.open(tmp_path / "store")
    refuse_seen(config, store, store=store, source="field")  # a simulation, of other files
    words = ["transfer", str(tmp_path / "transfer.yaml"), "--set", "tasks.0.source=station"]
    assert cli.main(words) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "task 'station': the pretraining 'toy' saw this source" in line
    facts = store.manifest["sources"]
    facts["field"]["files"] = facts["station"]["files"] = {"a.nc": "0f0f"}
    with pytest.raises(ConfigError, match=r"1 of its files are those of 'station'"):
        refuse_seen(config, store, store=store, source="field")


def test_the_same_place_in_the_same_period_is_refused_and_another_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The toy field spans 30 to 40 N on 10 E, the station lies at 30 N, 10 E: both have air temperature from 1970."""
    config = furnish(tmp_path)
    store = Store.open(tmp_path / "store")
    for facts in store.manifest["sources"].values():
        facts["nature"] = "observation"
    with pytest.raises(ConfigError, match=r"saw 'station' at the same place from 1970-01-01 to 1970-01-17"):
        refuse_seen(config, store, store=store, source="field")
    read = Store.read

    def elsewhere(self: Store, source: str, split: str, **where: int) -> Any:
        sample = read(self, source, split, **where)
        return replace(sample, longitude=sample.longitude + 180) if source == "station" else sample

    monkeypatch.setattr(Store, "read", elsewhere)
    refuse_seen(config, store, store=store, source="field")

    def another_time(self: Store, source: str, split: str, **where: int) -> Any:
        sample = read(self, source, split, **where)
        return replace(sample, time=sample.time - 1e9) if source == "station" else sample

    monkeypatch.setattr(Store, "read", another_time)
    refuse_seen(config, store, store=store, source="field")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "tasks.0.source=nowhere"], "task 'nowhere' is not in"),
        (["--set", "tasks.0.frames=100"], "no window of 100 frames fits"),
        (["--set", "tasks.0.leads=[8]"], "do not fit in 12 frames"),
        (["--set", "examples=[2, 8]"], "4 or more"),
        (["--set", "examples=[16, 8]"], "ascending"),
        (["--set", "learning_rates=[-1]"], "learning_rates are positive"),
        (["--set", "pretrain=nowhere.yaml"], "no configuration file 'nowhere.yaml'"),
    ],
)
def test_bad_input_is_one_line(
    done: tuple[Path, Watch], words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["transfer", str(done[0] / "transfer.yaml"), *words]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1


def test_examples_come_from_the_training_split_evenly(tmp_path: Path) -> None:
    furnish(tmp_path)
    store = Store.open(tmp_path / "store")
    task = TransferTask(source="field", frames=12, context_frames=(4, 8), leads=(1, 2), max_steps=1)
    drawn = draw(store, task, count=8, valid_share=0.25, frame_times=1, most=12)
    assert [sample.num_times for sample in (*drawn.train, *drawn.valid)] == [12] * 8
    assert {sample.key.split("#")[0] for sample in drawn.train} == {f"field/train-{part}" for part in range(3)}
    assert drawn.test.num_windows == 12


def test_the_quickstarts_transfer_names_a_pretraining_without_its_tasks(root: Path) -> None:
    config = load_config(root / "configs" / "transfer" / "quickstart.yaml", TransferConfig)
    pretraining = load_config(root / config.pretrain, PretrainConfig)
    seen = {entry.source for entry in pretraining.mixture}
    assert "nino_sst" in {task.source for task in config.tasks}
    assert not seen & {task.source for task in config.tasks}
    assert config.examples == (8, 32, 128) and len(config.seeds) == 2
