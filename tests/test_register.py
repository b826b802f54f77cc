"""The registered model: no pickle among its artifacts, the alias, and a fresh process that loads it and forecasts."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import mlflow
import netCDF4
import obspy
import pandas as pd
import pytest
import yaml

from sci_gpt.config import PretrainConfig
from sci_gpt.config_file import show_config
from sci_gpt.data.store import Store
from sci_gpt.errors import CheckpointError, ConfigError
from sci_gpt.recipes.load import load_model
from sci_gpt.recipes.register import register_model
from sci_gpt.train.run_folder import TRACKING
from sci_launch import cli
from test_forecast import table
from test_forecast_fields import field
from test_forecast_waveforms import record
from toy_model import make_run, moved_model, toy_data, write_checkpoint
from toy_store import change_manifest, toy_config

NAME = "toy-model"


def tracking(folder: Path) -> dict[str, str]:
    return {
        "uri": f"sqlite:///{folder}/mlflow/mlflow.db",
        "artifacts": f"{folder}/mlflow/artifacts",
        "experiment": "toy",
        "registered_model": NAME,
    }


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> PretrainConfig:
    """A run whose training MLflow knows, registered once."""
    folder = tmp_path_factory.mktemp("registered")
    config = make_run(folder, tracking=tracking(folder))
    (folder / "mlflow").mkdir()
    client = mlflow.MlflowClient(tracking_uri=config.tracking.uri)
    experiment = client.create_experiment("toy", Path(config.tracking.artifacts).as_uri())
    run = client.create_run(experiment, run_name="training")
    (config.output / TRACKING).write_text(json.dumps({"run_id": run.info.run_id}), encoding="utf-8")
    assert register_model(config, config.output) == "1"
    return config


def client_of(config: PretrainConfig) -> mlflow.MlflowClient:
    return mlflow.MlflowClient(tracking_uri=config.tracking.uri, registry_uri=config.tracking.uri)


def test_the_alias_points_at_the_version_made_from_the_training_run(registered: PretrainConfig) -> None:
    client = client_of(registered)
    version = client.get_model_version_by_alias(NAME, "candidate")
    run_id = json.loads((registered.output / TRACKING).read_text())["run_id"]
    assert (version.version, version.run_id) in {("1", run_id), (1, run_id)}
    assert version.tags["fingerprint"] == "0123456789abcdef"
    assert "## Intended use" in version.description


def test_a_checkpoint_is_registered_once_and_a_newer_one_moves_the_alias(
    registered: PretrainConfig, tmp_path: Path
) -> None:
    assert register_model(registered, registered.output) == "1"
    config = make_run(tmp_path, tracking=tracking(registered.output.parent) | {"registered_model": "again"})
    assert register_model(config, config.output) == "1"
    write_checkpoint(config, Store.open(config.data), moved_model(config), step=30)
    assert register_model(config, config.output) == "2"
    client = client_of(registered)
    assert str(client.get_model_version_by_alias("again", "candidate").version) == "2"
    assert load_model("models:/again@candidate", tracking_uri=config.tracking.uri).step == 30


def test_no_artifact_is_a_pickle(registered: PretrainConfig) -> None:
    files = [path for path in Path(registered.tracking.artifacts).rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"MLmodel", "served.py", "model.safetensors", "model.json", "card.md"} <= names
    for path in files:
        head = path.read_bytes()[:2]
        assert path.suffix not in {".pkl", ".pickle", ".pt", ".pth", ".bin", ".joblib", ".pyc"}, path
        assert not (head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05"), f"{path} begins like a pickle"
        assert not zipfile.is_zipfile(path), f"{path} may hold a pickle, as torch.save's files do"


def test_the_model_says_its_columns_and_needs(registered: PretrainConfig) -> None:
    root = next(Path(registered.tracking.artifacts).rglob("MLmodel")).parent
    described = yaml.safe_load((root / "MLmodel").read_text())
    inputs = {column["name"]: column["type"] for column in json.loads(described["signature"]["inputs"])}
    outputs = {column["name"]: column["type"] for column in json.loads(described["signature"]["outputs"])}
    assert inputs == {"kind": "string", "payload": "binary", "horizon": "long"}
    assert outputs == {"kind": "string", "payload": "binary"}
    needs = (root / "requirements.txt").read_text().split()
    assert f"mlflow=={mlflow.__version__}" in needs
    assert any(line.startswith("torch==") and "+" not in line for line in needs)
    code = {path.relative_to(root / "code").as_posix() for path in (root / "code").rglob("*.py")}
    assert {"sci_gpt/recipes/load.py", "sci_tokenizers/sample.py"} <= code


FRESH = """
import sys, mlflow, pandas
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model("models:/toy-model@candidate")
folder = sys.argv[2]
endings = {"netcdf": "nc", "csv": "csv", "miniseed": "mseed"}
rows = [{"kind": k, "payload": open(f"{folder}/in.{e}", "rb").read(), "horizon": 1} for k, e in endings.items()]
out = model.predict(pandas.DataFrame(rows), params={"quantiles": "0.25,0.75"})
assert list(out.columns) == ["kind", "payload"], out.columns
for kind, payload in zip(out["kind"], out["payload"]):
    open(f"{folder}/out.{endings[kind]}", "wb").write(payload)
"""


def test_a_fresh_process_loads_the_candidate_and_forecasts_all_three_kinds(
    registered: PretrainConfig, tmp_path: Path
) -> None:
    field().to_netcdf(tmp_path / "in.nc")
    table().to_csv(tmp_path / "in.csv", index_label="time")
    obspy.Stream([record()]).write(str(tmp_path / "in.mseed"), format="MSEED")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()  # not the repository: the model must not need it as its working folder
    command = [sys.executable, "-W", "ignore", "-c", FRESH, registered.tracking.uri, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    with netCDF4.Dataset(tmp_path / "out.nc") as out:
        assert out.variables["quantile"][:].tolist() == [0.25, 0.75]
        assert out.variables["sst"].units == "degC"
    rows = pd.read_csv(tmp_path / "out.csv")
    expected = load_model(registered.output).forecast(table(), 1, quantiles=(0.25, 0.75))
    pd.testing.assert_frame_equal(rows.drop(columns="time"), expected.drop(columns="time"), rtol=1e-5)
    assert {trace.stats.location for trace in obspy.read(io.BytesIO((tmp_path / "out.mseed").read_bytes()))} == {
        "25",
        "75",
    }


def test_the_command_line_trains_registers_once_and_forecasts_with_the_candidate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = toy_data(tmp_path / "store")
    short = {"steps": 3, "warmup_steps": 1, "cooldown_steps": 1}
    config = toy_config(store, tmp_path / "run", schedule=short, parallel={"processes": 1}, tracking=tracking(tmp_path))
    (tmp_path / "run.yaml").write_text(show_config(config), encoding="utf-8")
    for _ in range(2):  # the second call finds a complete and registered run
        assert cli.main(["pretrain", str(tmp_path / "run.yaml")]) == 0
    client = client_of(config)
    versions = client.search_model_versions(f"name='{NAME}'")
    assert [str(version.version) for version in versions] == ["1"]
    assert versions[0].run_id == json.loads((config.output / TRACKING).read_text())["run_id"]
    table().to_csv(tmp_path / "in.csv", index_label="time")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", config.tracking.uri)
    command = ["forecast", f"models:/{NAME}@candidate", str(tmp_path / "in.csv"), "--horizon", "2"]
    assert cli.main([*command, "--out", str(tmp_path / "out.csv")]) == 0
    expected = load_model(config.output).forecast(table(), 2)
    pd.testing.assert_frame_equal(
        pd.read_csv(tmp_path / "out.csv").drop(columns="time"), expected.drop(columns="time"), rtol=1e-5
    )


def test_a_row_of_an_unknown_kind_is_refused(registered: PretrainConfig) -> None:
    mlflow.set_tracking_uri(registered.tracking.uri)
    model = mlflow.pyfunc.load_model(f"models:/{NAME}@candidate")
    rows = pd.DataFrame([{"kind": "grib", "payload": b"", "horizon": 1}])
    with pytest.raises(ConfigError, match=r"row 0: kind is one of \['csv', 'miniseed', 'netcdf'\], got 'grib'"):
        model.predict(rows)


def test_a_run_that_cannot_be_registered_is_refused(registered: PretrainConfig, tmp_path: Path) -> None:
    nameless = registered.model_copy(
        update={"tracking": registered.tracking.model_copy(update={"registered_model": None})}
    )
    with pytest.raises(ConfigError, match=r"tracking\.registered_model null"):
        register_model(nameless, registered.output)
    with pytest.raises(CheckpointError, match=r"holds no finished checkpoint"):
        register_model(registered, tmp_path)
    config = make_run(tmp_path, tracking=tracking(tmp_path))
    change_manifest(Path(config.data), {"fingerprint": "fedcba9876543210"})
    with pytest.raises(
        CheckpointError, match=r"trained on data '0123456789abcdef', and .* is 'fedcba9876543210' by now"
    ):
        register_model(config, config.output)


def test_a_registry_that_does_not_answer_leaves_the_run_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "mlflow").write_text("a file where the database's folder should be")
    config = make_run(tmp_path / "toy", tracking=tracking(tmp_path) | {"uri": "nonsense://nowhere"})
    with pytest.raises(CheckpointError, match=r"registry 'nonsense://nowhere' refused 'toy-model'.*the run is saved"):
        register_model(config, config.output)
    assert load_model(config.output).step == 24
