"""`sci-gpt export`: a folder that a process without DeepSpeed loads, the card's scores, verified copies, bad input."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from sci_gpt.config import PretrainConfig
from sci_gpt.data.store import Store
from sci_gpt.errors import CheckpointError
from sci_gpt.recipes.export import read_evaluation
from sci_gpt.recipes.load import load_model
from sci_gpt.train.checkpoint import latest, read_state, read_weights
from sci_launch import cli
from sci_tokenizers.prior import PRIOR_FEATURES, LinearPrior
from test_forecast import table
from toy_model import make_run, moved_model, write_checkpoint
from toy_store import change_manifest

ROW = {
    "model": "trained", "source": "field", "region": "all", "channel": "air_temperature", "lead": "1 d",
    "metric": "crps", "unit": "K", "score": 1.5, "baseline": "ridge", "baseline_score": 2.0, "skill": 0.25,
    "low": 0.125, "high": 0.375, "num_windows": 64, "num_blocks": 8,
}  # fmt: skip


def report(run: Path, *, step: int | None, fingerprint: str = "0123456789abcdef") -> None:
    """A report as `sci-gpt evaluate` leaves it."""
    (run / "report").mkdir(exist_ok=True)
    rows = [ROW, ROW | {"model": "untrained", "baseline": "nobody"}]
    content = {"run": "toy", "step": step, "data_fingerprint": fingerprint, "interval": 0.9, "rows": rows}
    (run / "report" / "evaluation.json").write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> PretrainConfig:
    """A finished run with a report."""
    config = make_run(tmp_path_factory.mktemp("export"))
    report(config.output, step=24)
    return config


@pytest.fixture(scope="module")
def exported(config: PretrainConfig) -> Path:
    """The run, exported by the command."""
    out = config.output.parent / "deep" / "exported"
    assert cli.main(["export", str(config.output), "--out", str(out), "--json"]) == 0
    return out


FRESH = """
import sys
sys.modules["deepspeed"] = None  # an import of it raises, as where it is not installed
sys.modules["mlflow"] = None
import pandas, sci_gpt
model = sci_gpt.load_model(sys.argv[1])
table = pandas.read_csv(sys.argv[2], index_col="time", parse_dates=True)
model.forecast(table, 2).to_csv(sys.argv[3])
"""


def test_a_process_without_deepspeed_loads_it_and_forecasts_the_same(
    config: PretrainConfig, exported: Path, tmp_path: Path
) -> None:
    table().to_csv(tmp_path / "in.csv", index_label="time")
    command = [sys.executable, "-W", "ignore", "-c", FRESH]
    command += [str(path) for path in (exported, tmp_path / "in.csv", tmp_path / "out.csv")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    expected = load_model(config.output).forecast(table(), 2)
    found = pd.read_csv(tmp_path / "out.csv", index_col=0)
    pd.testing.assert_frame_equal(found.drop(columns="time"), expected.drop(columns="time"), rtol=1e-5)


def test_weights_statistics_configuration_and_tokenizers_are_those_of_the_checkpoint(
    config: PretrainConfig, exported: Path
) -> None:
    checkpoint = latest(config.output)
    assert checkpoint is not None
    expected, found = read_weights(checkpoint), load_file(exported / "model.safetensors")
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    described, state = json.loads((exported / "model.json").read_text()), read_state(checkpoint)
    assert described["config"] == state["config"]
    assert described["statistics"] == state["statistics"]
    assert described["tokenizer"] == state["config"]["tokenizer"]
    assert sorted(path.name for path in exported.iterdir()) == ["card.md", "model.json", "model.safetensors"]


def test_the_linear_priors_go_with_the_statistics(tmp_path: Path) -> None:
    config = make_run(tmp_path)
    store = Store.open(config.data)
    size = 2 * PRIOR_FEATURES + 1
    prior = LinearPrior(leads=(1, 2), weights=((0.25,) * size,) * 2, spread=(1.0, 2.0), limits=(3.0,) * size)
    channel, row = next(iter(store.statistics["station"].items()))
    store.statistics["station"] |= {channel: dataclasses.replace(row, prior=prior)}
    write_checkpoint(config, store, moved_model(config), step=30)
    assert cli.main(["export", str(config.output), "--out", str(tmp_path / "out")]) == 0
    found = load_model(tmp_path / "out").statistics["station"][channel].prior
    assert found == prior


def test_the_card_holds_the_scores_of_these_weights_and_the_licences(exported: Path) -> None:
    text = (exported / "card.md").read_text(encoding="utf-8")
    for part in ("CC0", "made up for tests", "## Limits", "## How to load it", "33.3 %", "90 % block-bootstrap"):
        assert part in text
    line = "| field | all | air_temperature | 1 d | crps | +0.2500 | [+0.1250, +0.3750] | 1.5 K | ridge | 64 |"
    assert line in text
    assert "nobody" not in text, "a control's score is not the model's"


@pytest.mark.parametrize(
    ("step", "fingerprint", "said"),
    [
        (16, "0123456789abcdef", "report is of step 16, data `0123456789abcdef`"),
        (24, "fedcba9876543210", "report is of step 24, data `fedcba9876543210`"),
        (None, "0123456789abcdef", "report is of a step that it does not name"),
    ],
)
def test_scores_of_other_weights_or_data_are_not_these(
    config: PretrainConfig, tmp_path: Path, step: int | None, fingerprint: str, said: str
) -> None:
    report(tmp_path, step=step, fingerprint=fingerprint)
    checkpoint = latest(config.output)
    assert checkpoint is not None
    evaluation = read_evaluation(tmp_path, read_state(checkpoint))
    assert evaluation.rows == () and said in evaluation.missing


def test_a_report_that_cannot_be_read_is_refused(config: PretrainConfig, tmp_path: Path) -> None:
    checkpoint = latest(config.output)
    assert checkpoint is not None
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "evaluation.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"evaluation\.json cannot be read .*run `sci-gpt evaluate` again"):
        read_evaluation(tmp_path, read_state(checkpoint))


def test_an_exported_folder_is_copied_and_a_damaged_one_is_not(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["export", str(exported), "--out", str(tmp_path / "copy")]) == 0
    for path in exported.iterdir():
        assert (tmp_path / "copy" / path.name).read_bytes() == path.read_bytes()
    weights = tmp_path / "copy" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert cli.main(["export", str(tmp_path / "copy"), "--out", str(tmp_path / "again")]) == 2
    assert "model.safetensors is damaged" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"], "no part of a refused export is left"


def test_bad_input_is_one_line_and_leaves_nothing(
    config: PretrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(config.output, run)
    other = tmp_path / "other"
    shutil.copytree(config.data, other)
    change_manifest(other, {"fingerprint": "fedcba9876543210"})
    (tmp_path / "there").mkdir()
    before = sorted(tmp_path.rglob("*"))
    cases = [
        ([str(tmp_path / "nowhere"), "--out", str(out)], "no model folder"),
        ([str(run), "--out", str(tmp_path / "there")], "name a new folder"),
        ([str(run), "--out", str(out), "--data", str(tmp_path / "there")], "or name that store, as --data FOLDER"),
        ([str(run), "--out", str(out), "--data", str(other)], "was trained on data '0123456789abcdef'"),
        ([str(run)], "the following arguments are required: --out"),
    ]
    for words, message in cases:
        assert cli.main(["export", *words]) == 2
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1 and message in captured.err, words
    assert sorted(tmp_path.rglob("*")) == before
