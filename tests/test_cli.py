"""The command line: what --help loads and says, --show, --json, exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sci_gpt.config_file import show_config
from sci_launch import cli
from sci_tokenizers.packing import PackingError
from sci_tokenizers.quantizer import QuantizerError
from sci_tokenizers.sample import SampleError
from sci_tokenizers.tokenizer import TokenizerError
from sci_tokenizers.tokens import TokensError
from sci_tokenizers.variables import UnitError
from toy_store import toy_config, write_store

HEAVY = ("torch", "deepspeed", "mlflow", "pandas", "xarray", "obspy", "scipy")
NOT_YET = ("promote",)


def loaded_by(code: str) -> set[str]:
    """Names in sys.modules after `code` in a fresh process."""
    script = (
        f"import sys\ntry:\n    {code}\nexcept SystemExit:\n    pass\nprint('\\n'.join(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


@pytest.mark.parametrize("arguments", [["--help"], ["pretrain", "--help"], ["forecast", "--help"]])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    names = loaded_by(f"from sci_launch import cli; cli.main({arguments!r})")
    assert "sci_launch.cli" in names
    assert not names.intersection(HEAVY)


def test_importing_the_face_loads_nothing_heavy_and_its_names_are_there() -> None:
    assert not loaded_by("import sci_gpt").intersection(HEAVY)
    names = loaded_by("import sci_gpt; assert callable(sci_gpt.load_model)")
    assert "torch" in names
    assert "deepspeed" not in names and "mlflow" not in names


def test_the_face_refuses_other_names() -> None:
    import sci_gpt

    with pytest.raises(AttributeError, match=r"no attribute 'load_modell'; public: \['LoadedModel', 'load_model'\]"):
        sci_gpt.load_modell  # noqa: B018


def test_help_explains_every_command_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    for name, command in cli.COMMANDS.items():
        assert f"sci-gpt {name} " in text, f"{name} has no example"
        assert command.summary in text
    assert list(cli.COMMANDS) == [
        "build",
        "inspect",
        "pretrain",
        "evaluate",
        "forecast",
        "finetune",
        "plan",
        "launch",
        "drill",
        "sweep",
        "fit",
        "transfer",
        "export",
        "doctor",
    ]
    for name in NOT_YET:
        assert f"sci-gpt {name}" not in text and name not in cli.COMMANDS


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_the_help_of_a_command_has_its_example_and_explains_every_option(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main([name, "--help"])
    text = capsys.readouterr().out
    assert cli.COMMANDS[name].example in text
    assert ("--set" in text) == (
        name in ("build", "pretrain", "evaluate", "plan", "launch", "drill", "sweep", "transfer")
    )
    assert ("--json" in text) == (name not in ("pretrain", "launch"))


def test_the_examples_of_help_are_themselves_command_lines() -> None:
    for name, command in cli.COMMANDS.items():
        words = command.example.split()
        assert words[:2] == ["sci-gpt", name]
        assert cli.parser().parse_args(words[1:]).command == name
        for word in words:
            if word.startswith("configs/"):
                assert Path(__file__).resolve().parents[1].joinpath(word).exists()


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store and a pretraining configuration, `run.yaml`."""
    folder = tmp_path_factory.mktemp("toy")
    write_store(folder / "store")
    config = toy_config(folder / "store", folder / "run")
    (folder / "run.yaml").write_text(show_config(config), encoding="utf-8")
    return folder


def test_show_prints_the_resolved_tree_with_overrides_and_starts_nothing(
    toy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["pretrain", str(toy / "run.yaml"), "--processes", "3", "--show"]
    assert cli.main([*command, "--set", "phases.0.mixture.station.weight=2"]) == 0
    tree = yaml.safe_load(capsys.readouterr().out)
    assert tree["parallel"]["processes"] == 3
    assert tree["phases"][0]["mixture"][1]["weight"] == 2.0
    assert not (toy / "run").exists()


def test_plan_prints_one_json_object(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(toy / "run.yaml"), "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["tokens_per_step"] == 3 * 160
    assert captured.err == ""


def test_plan_prints_lines_for_people(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(toy / "run.yaml")]) == 0
    assert "480" in capsys.readouterr().out


def test_build_in_a_fresh_process_prints_one_json_object_and_its_progress_on_stderr(tmp_path: Path) -> None:
    config = one_source(tmp_path)
    command = [sys.executable, "-m", "sci_launch.cli", "build", str(config), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [row["split"] for row in report["rows"]] == ["train", "valid", "test"]
    assert "build co2" in done.stderr


def one_source(folder: Path) -> Path:
    """A data configuration of one small table in `folder`."""
    days = [
        f"2001-{month:02d}-{day:02d},{340 + month + day / 31 + day % 3:.2f}"
        for month in range(1, 13)
        for day in range(1, 29)
    ]
    (folder / "co2.csv").write_text("date,co2\n" + "\n".join(days) + "\n", encoding="utf-8")
    era = {"name": "all", "start": "2001-01-01", "train_until": "2001-06-30", "valid_until": "2001-09-15"}
    source = {
        "name": "co2",
        "reader": "csv_series",
        "modality": "series",
        "nature": "observation",
        "files": [str(folder / "co2.csv")],
        "options": {
            "time": "date",
            "step": "day",
            "columns": {"co2": {"variable": "mole_fraction_of_carbon_dioxide_in_air", "unit": "ppm"}},
        },
        "licence": "CC0",
        "citation": "made up for a test",
        "split": {"by": "time", "era": "all"},
    }
    tree = {
        "name": "co2",
        "output": str(folder / "store"),
        "calendar": {"gap_days": 7, "eras": [era | {"end": "2001-12-31"}]},
        "sources": [source],
    }
    path = folder / "data.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def test_inspect_of_a_store_gives_lines_and_json(toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = one_source(tmp_path)
    assert cli.main(["build", str(config)]) == 0
    capsys.readouterr()
    assert cli.main(["inspect", str(tmp_path / "store")]) == 0
    text = capsys.readouterr().out
    assert "source=co2" in text and "stretches: 1" in text
    assert cli.main(["inspect", str(tmp_path / "store"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sources"][0]["source"] == "co2"


def test_inspect_takes_the_family_from_the_ending(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one_source(tmp_path)
    assert cli.main(["inspect", str(tmp_path / "co2.csv"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["family"], found["num_samples"], found["step_seconds"]) == ("csv", 336, 86400.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["biuld", "x"], "invalid choice: 'biuld'"),
        (["build"], "the following arguments are required: CONFIG"),
        (["forecast", "m", "i", "--horizon", "two", "--out", "o"], "argument --horizon: invalid int value: 'two'"),
        (["inspect", "/nowhere/at.all"], "no file or store '/nowhere/at.all'"),
        (["pretrain", "nowhere.yaml"], "no configuration file 'nowhere.yaml'"),
    ],
)
def test_a_wrong_command_line_is_one_line_on_stderr_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert message in captured.err


@pytest.mark.parametrize("kind", [PackingError, QuantizerError, SampleError, TokenizerError, TokensError, UnitError])
def test_an_error_of_the_tokenizers_is_one_line(
    kind: type[ValueError], monkeypatch: pytest.MonkeyPatch, toy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refusing(*_: object, **__: object) -> None:
        raise kind("what came,\nand what to do")

    monkeypatch.setattr("sci_gpt.recipes.plan.plan", refusing)
    assert cli.main(["plan", str(toy / "run.yaml")]) == 2
    assert capsys.readouterr().err == "sci-gpt: what came, and what to do\n"


def test_a_defect_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, toy: Path) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr("sci_gpt.recipes.plan.plan", broken)
    with pytest.raises(ZeroDivisionError):
        cli.main(["plan", str(toy / "run.yaml")])


def test_numbers_that_json_has_not_become_null(capsys: pytest.CaptureFixture[str]) -> None:
    from sci_launch.results import print_result

    print_result({"a": float("nan"), "b": [{"c": float("inf")}], "d": (1.5,)}, as_json=True)
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [{"c": None}], "d": [1.5]}
