"""`sci-gpt doctor`: each thing broken on purpose is named with its remedy, and the exit code says so."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import mlflow
import pytest
import yaml

from sci_gpt.config import TrackingConfig
from sci_launch import cli, doctor
from sci_launch.probe import PROBES
from test_cli import one_source

NOTHING = Path("nowhere.yaml")


def check(report: dict[str, Any], name: str) -> dict[str, Any]:
    """The finding of that name."""
    (found,) = (row for row in report["checks"] if row["name"] == name)
    return dict(found)


def in_a_process(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`sci-gpt doctor --json` started in `folder`."""
    command = [sys.executable, "-m", "sci_launch.cli", "doctor", "--json", *words]
    clean = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    return subprocess.run(
        command, cwd=folder, env=clean | environment, capture_output=True, text=True, check=False, timeout=200
    )


@pytest.fixture
def healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Probes that take seconds answer as on a healthy machine; what a test breaks, it breaks for real."""
    answers: dict[str, dict[str, Any]] = {
        "devices": {"version": "2", "cpu_threads": 1, "cuda_build": None, "accelerators": []},
        "imports": {"version": "1", "place": ""},
        "tracking": {"uri": "u", "experiments": 0},
        "package_data": {"files": 1, "missing": []},
    }
    monkeypatch.setattr(doctor, "probe", lambda name, argument: {"found": answers[name]})


def test_a_healthy_installation_is_found_healthy_in_a_real_process(root: Path) -> None:
    """The whole command with every probe; the embedded database is not there and is not made by asking."""
    before = sorted((root / "runs").rglob("*.db")) if (root / "runs").exists() else []
    done = in_a_process(root)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    names = [row["name"] for row in report["checks"]]
    for name in ("python", "packages", "cores", "memory", "disk", "loopback", "torch", "deepspeed", "mlflow", "slurm"):
        assert name in names
    assert check(report, "torch")["found"].startswith(metadata.version("torch"))
    assert metadata.version("deepspeed") in check(report, "deepspeed")["found"]
    for name in ("numpy", "mlflow", "torch", "deepspeed"):
        assert f"{name} {metadata.version(name)}" in check(report, "packages")["found"]
    assert check(report, "data")["status"] == "ok" and "all 76 files" in check(report, "data")["found"]
    assert (sorted((root / "runs").rglob("*.db")) if (root / "runs").exists() else []) == before


def test_a_library_that_crashes_on_import_is_named_and_the_exit_code_is_1(tmp_path: Path) -> None:
    """A deepspeed that raises and a torch that kills its process stand first on the path, in real processes."""
    for name, body in {"deepspeed": "raise OSError('libfoo.so is missing')", "torch": "import os; os.abort()"}.items():
        (tmp_path / "broken" / name).mkdir(parents=True)
        (tmp_path / "broken" / name / "__init__.py").write_text(f'"""Broken."""\n{body}\n')
    done = in_a_process(tmp_path, PYTHONPATH=f"{tmp_path}/broken{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    assert done.returncode == 1, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert not report["ok"]
    found = check(report, "deepspeed")
    assert found["status"] == "wrong" and "libfoo.so is missing" in found["found"] and "pip install" in found["remedy"]
    found = check(report, "torch")
    assert found["status"] == "wrong" and "exit code -6" in found["found"] and "pip install" in found["remedy"]


@pytest.fixture
def silent_server() -> Iterator[int]:
    """A port that takes connections and never answers."""
    held, over = [], threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)

        def accept() -> None:
            while not over.is_set():
                try:
                    held.append(server.accept()[0])
                except TimeoutError:
                    continue

        thread = threading.Thread(target=accept)
        thread.start()
        yield server.getsockname()[1]
        over.set()
        thread.join()
        for connection in held:
            connection.close()


def test_a_tracking_server_that_does_not_answer_is_named(
    silent_server: int, healthy: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"http://127.0.0.1:{silent_server}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    asked = {name: doctor.probe(name, "") for name in PROBES}
    monkeypatch.undo()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    real = doctor.probe
    monkeypatch.setattr(
        doctor, "probe", lambda name, argument: real(name, argument) if name == "tracking" else asked[name]
    )
    report = doctor.doctor(data=NOTHING)
    found = check(report, "mlflow")
    assert not report["ok"] and found["status"] == "wrong"
    assert uri in found["found"] and "timed out" in found["found"].lower()
    assert found["remedy"] == "start that server, or unset MLFLOW_TRACKING_URI to use the embedded database"


def test_an_embedded_database_that_is_none_is_named(tmp_path: Path) -> None:
    database = tmp_path / "mlflow.db"
    database.write_bytes(b"not a database" * 100)
    uri = f"sqlite:///{database}"
    found = doctor.check_tracking(doctor.probe("tracking", uri), uri)
    assert found.status == "wrong" and "not a database" in found.found
    assert found.remedy.startswith(f"move {database} away")


def test_a_database_that_answers_is_counted(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    mlflow.MlflowClient(tracking_uri=uri).create_experiment("one", artifact_location=str(tmp_path))
    found = doctor.check_tracking(doctor.probe("tracking", uri), uri)
    assert found.status == "ok" and f"{uri} answers" in found.found


def test_a_full_disk_is_named(healthy: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = type(shutil.disk_usage(tmp_path))
    asked = []

    def full(path: Path) -> Any:
        asked.append(Path(path))
        return usage(total=10**12, used=10**12 - 10**6, free=10**6)

    monkeypatch.setattr(doctor.shutil, "disk_usage", full)
    report = doctor.doctor(runs=tmp_path / "not" / "there", data=NOTHING)
    assert asked == [tmp_path]
    found = check(report, "disk")
    assert not report["ok"] and found["status"] == "wrong"
    assert "0.0 GB free" in found["found"] and "make room, 1 GB at least" in found["remedy"]


def test_a_runs_folder_that_is_a_file_is_named(healthy: None, tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    found = check(doctor.doctor(runs=tmp_path / "runs", data=NOTHING), "disk")
    assert found["status"] == "wrong" and "cannot be written to" in found["found"]
    assert "make it a folder that you may write to" in found["remedy"]


def test_a_package_that_is_missing_or_too_old_is_named(healthy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name == "einops":
            raise metadata.PackageNotFoundError(name)
        return "1.9.12" if name == "numpy" else real(name)

    monkeypatch.setattr(doctor.metadata, "version", version)
    report = doctor.doctor(data=NOTHING)
    assert not report["ok"]
    assert check(report, "einops")["found"] == "not installed"
    assert check(report, "numpy")["found"] == "1.9.12, but sci-gpt needs 2.0 or newer"
    assert "pip install" in check(report, "einops")["remedy"]


def test_package_data_that_is_missing_is_named_by_source(tmp_path: Path) -> None:
    path = one_source(tmp_path)
    tree = yaml.safe_load(path.read_text())
    absent = tree["sources"][0] | {"name": "absent", "package": "no_such_package", "files": ["a.csv"]}
    short = tree["sources"][0] | {"name": "short", "package": "statsmodels", "files": ["datasets/co2/gone.csv"]}
    here = tree["sources"][0] | {"name": "here", "package": "statsmodels", "files": ["datasets/co2/co2.csv"]}
    tree["sources"] += [absent, short, here]
    path.write_text(yaml.safe_dump(tree))
    found = doctor.check_data(doctor.probe("package_data", str(path)), path)
    assert found.status == "wrong" and "pip install -e '.[quickstart]'" in found.remedy
    assert "source 'absent': package 'no_such_package' is not installed" in found.found
    assert "source 'short': no file matches 'datasets/co2/gone.csv'" in found.found
    assert "'here'" not in found.found and "'co2'" not in found.found


def test_too_little_memory_is_named(healthy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_meminfo", lambda key: 2 * 10**9)
    found = check(doctor.doctor(data=NOTHING), "memory")
    assert found["status"] == "wrong" and "2.0 GB available" in found["found"] and "--processes 1" in found["remedy"]


def test_a_machine_without_loopback_is_named_and_a_taken_port_is_not_wrong(
    healthy: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(doctor, "USUAL_PORTS", {"a test": server.getsockname()[1]})
        report = doctor.doctor(data=NOTHING)
        found = check(report, "port")
        assert found["status"] == "info" and "(a test) is taken" in found["found"] and report["ok"]

    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError("Cannot assign requested address")

    monkeypatch.setattr(doctor.socket, "create_server", refuse)
    report = doctor.doctor(data=NOTHING)
    found = check(report, "loopback")
    assert (
        not report["ok"]
        and "Cannot assign requested address" in found["found"]
        and "ip link set lo up" in found["remedy"]
    )


def test_slurm_is_information_only(healthy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda tool: "/usr/bin/sbatch" if tool == "sbatch" else None)
    assert check(doctor.doctor(data=NOTHING), "slurm")["found"] == "sbatch on PATH"
    monkeypatch.setattr(doctor.shutil, "which", lambda tool: None)
    report = doctor.doctor(data=NOTHING)
    assert check(report, "slurm")["status"] == "info" and report["ok"]


def test_the_allocator_is_information_only(healthy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "left_alone", lambda: "")
    monkeypatch.setattr(doctor, "find", lambda: "libjemalloc.so.2")
    assert check(doctor.doctor(data=NOTHING), "allocator")["found"].endswith("of a run: libjemalloc.so.2")
    monkeypatch.setattr(doctor, "find", lambda: None)
    report = doctor.doctor(data=NOTHING)
    assert "grows" in check(report, "allocator")["found"] and "libjemalloc2" in check(report, "allocator")["remedy"]
    assert check(report, "allocator")["status"] == "info" and report["ok"]
    monkeypatch.setattr(doctor, "left_alone", lambda: "the environment chooses: LD_PRELOAD=libm.so")
    chosen = check(doctor.doctor(data=NOTHING), "allocator")
    assert "LD_PRELOAD=libm.so" in chosen["found"] and not chosen["remedy"]


def test_the_lines_for_people_name_what_is_wrong_and_the_exit_code_follows(
    healthy: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["doctor"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "nothing that is needed is wrong"
    monkeypatch.setattr(doctor, "_meminfo", lambda key: 10**6)
    assert cli.main(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("WRONG memory"))
    assert lines[at + 1].strip().startswith("-> end other programs") and lines[-1] == "wrong: memory"


def test_help_says_the_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["doctor", "--help"])
    assert "exit code 1 where something that is needed is wrong" in " ".join(capsys.readouterr().out.split())


def test_the_embedded_database_is_where_runs_are_tracked() -> None:
    assert TrackingConfig.model_fields["uri"].default == doctor.EMBEDDED
