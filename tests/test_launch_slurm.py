"""`sci-gpt launch`: the script that it fills in, a dry run, what it refuses, and how the batch script decides."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from desk import snapshot
from sci_gpt.config import PretrainConfig
from sci_gpt.config_file import show_config
from sci_gpt.errors import ConfigError
from sci_launch import cli
from sci_launch.allocator import preload
from sci_launch.slurm import SCRIPT, Wishes, render, submit
from sci_launch.slurm_job import main as slurm_job
from toy_store import toy_config, write_store

SECONDS = 60.0
# Stands for a program of Slurm's: notes its words, then does what the test put into the variable of its name.
FAKE = '#!/bin/bash\necho "${0##*/} $*" >>"$CALLS"\nname=FAKE_${0##*/}\neval "${!name:-}"\n'


@pytest.fixture
def config(tmp_path: Path) -> PretrainConfig:
    """Two processes of two threads on a toy store."""
    write_store(tmp_path / "store")
    return toy_config(tmp_path / "store", tmp_path / "run", parallel={"processes": 2, "threads_per_process": 2})


@pytest.fixture
def path(config: PretrainConfig, tmp_path: Path) -> Path:
    """The configuration's file."""
    path = tmp_path / "run.yaml"
    path.write_text(show_config(config), encoding="utf-8")
    return path


def directives(script: str) -> list[str]:
    """The `#SBATCH` options of a script."""
    return [line.split(maxsplit=1)[1] for line in script.splitlines() if line.startswith("#SBATCH")]


def test_options_stand_in_the_script_once_and_the_rest_stays(config: PretrainConfig, tmp_path: Path) -> None:
    wishes = Wishes(
        nodes=2, time="1:00:00", account="a b", options=("gpus-per-node=4", "--exclusive", "signal=B:USR1@9")
    )
    job = render(config, wishes)
    found = directives(job.script)
    assert len({option.partition("=")[0] for option in found}) == len(found)
    for option in (
        "--nodes=2",
        "--ntasks-per-node=1",
        "--cpus-per-task=2",
        "--time=1:00:00",
        "--account='a b'",
        "--gpus-per-node=4",
        "--exclusive",
        "--signal=B:USR1@9",
        "--requeue",
        "--open-mode=append",
        f"--output={tmp_path}/run/slurm/%j.log",
        f"--chdir={Path.cwd()}",
    ):
        assert option in found, option
    assert f"\npython={sys.executable}\n" in job.script
    assert not any(option.startswith("--partition") for option in found)
    code = [line for line in SCRIPT.read_text().splitlines() if not line.startswith(("#SBATCH", "python="))]
    assert [line for line in job.script.splitlines() if not line.startswith(("#SBATCH", "python="))] == code
    assert subprocess.run(["bash", "-n"], input=job.script, text=True, check=False).returncode == 0


def test_the_script_as_it_lies_there_is_whole() -> None:
    script = SCRIPT.read_text()
    assert {option.partition("=")[0] for option in directives(script)} >= {"--nodes", "--signal", "--requeue"}
    for words in ("--rdzv-backend=c10d", '--rdzv-id="$SLURM_JOB_ID.$restart"', "SIGUSR1", "--kill-on-bad-exit=0"):
        assert words in script


def test_a_dry_run_prints_the_script_and_changes_nothing(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")  # it needs no Slurm
    before = snapshot(tmp_path)
    words = ["launch", str(path), "--on", "slurm", "--nodes", "2", "--processes-per-node", "3", "--dry-run"]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert "#SBATCH --nodes=2\n" in out and "#SBATCH --cpus-per-task=6\n" in out
    folder = tmp_path / "run" / "slurm"
    assert out.endswith(f"submit: sbatch --parsable {folder}/pretrain.sbatch {folder}/config.yaml\n")
    assert cli.main(["launch", str(path), "--on", "local", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "would start 2 processes of" in out and "sci_gpt.recipes.pretrain" in out
    assert snapshot(tmp_path) == before


def test_local_is_what_pretrain_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[PretrainConfig] = []

    def pretrain(config: PretrainConfig) -> int:
        ran.append(config)
        return 0

    monkeypatch.setattr("sci_launch.local.pretrain", pretrain)
    assert cli.main(["launch", str(path), "--on", "local", "--set", "seed=5"]) == 0
    assert cli.main(["pretrain", str(path), "--set", "seed=5"]) == 0
    assert ran[0] == ran[1] and ran[0].seed == 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--on", "slurm", "--nodes", "3"], "parallel.processes is 2, which does not divide over 3 nodes"),
        (["--on", "slurm", "--nodes", "0"], "does not divide over 0 nodes"),
        (["--on", "slurm", "--script", "mine.sbatch"], "no batch script 'mine.sbatch'"),
        (["--on", "slurm", "--script", "README.md"], "README.md: expected one line `python=..`"),
        (["--on", "local", "--nodes", "2", "--account", "a"], "--nodes, --account: only with --on slurm"),
        (["--on", "cloud"], "invalid choice: 'cloud'"),
    ],
)
def test_what_cannot_be_launched_is_one_line(
    words: list[str],
    message: str,
    path: Path,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(root)
    assert cli.main(["launch", str(path), *words, "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def programs(folder: Path, *names: str) -> Path:
    """A folder of programs that stand for Slurm's."""
    folder.mkdir()
    for name in names:
        (folder / name).write_text(FAKE)
        (folder / name).chmod(0o755)
    return folder


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins for Slurm's programs come first on PATH; the file that they write their command lines to."""
    names = ("sbatch", "squeue", "scontrol", "scancel", "srun")
    monkeypatch.setenv("PATH", f"{programs(tmp_path / 'bin', *names)}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    return tmp_path / "calls"


def test_no_slurm_is_one_line_and_nothing_is_written(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(programs(tmp_path / "bin", "squeue", "scontrol")))
    before = snapshot(tmp_path)
    assert cli.main(["launch", str(path), "--on", "slurm"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("sci-gpt: no Slurm here: sbatch not on PATH; go to a login node") and error.count("\n") == 1
    assert "--on local" in error
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("variable", "does", "message"),
    [
        (
            "FAKE_scontrol",
            "echo 'Slurmctld(primary) at c0 is DOWN'; echo '** RESTORE **'; exit 1",
            "no Slurm here: its controller does not answer (`scontrol ping`: Slurmctld(primary) at c0 is DOWN RESTORE)",
        ),
        ("FAKE_scontrol", "sleep 30", "`scontrol ping` gave no answer in 0.5 s; try again later"),
        ("FAKE_squeue", "echo 7 RUNNING; echo 8 PENDING", "job 8 of this run is PENDING: two would train in"),
        ("FAKE_sbatch", "echo 'error: Invalid account' >&2; exit 1", "Slurm refused the job (`sbatch --parsable"),
    ],
)
def test_what_slurm_says_is_in_the_error(
    variable: str, does: str, message: str, config: PretrainConfig, calls: Path, *, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sci_launch.slurm._ANSWER_SECONDS", 0.5 if "sleep" in does else SECONDS)
    (config.output / "slurm").mkdir(parents=True)
    (config.output / "slurm" / "job.json").write_text('{"job": "8"}')
    monkeypatch.setenv(variable, does)
    with pytest.raises(ConfigError, match=re.escape(message)):
        submit(config, Wishes())
    assert variable == "FAKE_sbatch" or "sbatch" not in calls.read_text(), "nothing may be submitted"


def test_what_the_workers_would_refuse_is_refused_before_it_waits_in_a_queue(
    config: PretrainConfig, calls: Path
) -> None:
    wrong = config.model_copy(update={"model": config.model.model_copy(update={"size": "2M"})})
    with pytest.raises(ConfigError, match=r"model\.size is one of"):
        submit(wrong, Wishes())
    assert "sbatch" not in calls.read_text() and not config.output.exists()


def test_a_submission_writes_what_it_submits_and_remembers_the_job(
    config: PretrainConfig, calls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_sbatch", "echo '12;cluster'")
    assert submit(config, Wishes(nodes=2)) == "12"
    folder = tmp_path / "run" / "slurm"
    assert f"sbatch --parsable {folder}/pretrain.sbatch {folder}/config.yaml\n" in calls.read_text()
    assert (folder / "pretrain.sbatch").read_text() == render(config, Wishes(nodes=2)).script
    assert PretrainConfig.model_validate(yaml.safe_load((folder / "config.yaml").read_text())) == config
    assert json.loads((folder / "job.json").read_text()) == {"job": "12"}


def test_the_job_is_told_its_facts_or_refused(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert slurm_job(["facts", str(path), "--nodes", "2"]) == 0
    run, each, threads, port, *more = capsys.readouterr().out.splitlines()
    assert more == [f"{name}={value}" for name, value in preload().items()]
    assert (run, each, threads) == (str(tmp_path / "run"), "1", "2") and 1024 < int(port) < 65536
    assert slurm_job(["facts", str(path), "--nodes", "3"]) == 2
    assert "does not divide over 3 nodes" in capsys.readouterr().err
    assert slurm_job(["complete", str(path)]) == 1


MARKER = 'echo \'{"step": 3}\' >"$RUN/requeue"; '
COMPLETE = 'mkdir -p "$RUN/checkpoints/c"; echo {} >"$RUN/checkpoints/c/manifest.json"; '
COMPLETE += 'echo \'{"step": 24, "checkpoint": "checkpoints/c"}\' >"$RUN/complete.json"; '
ENDING = "echo JobId=5 JobState=COMPLETING Reason="


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How the batch script ended, and what it asked of Slurm."""

    code: int
    output: str
    calls: list[str]


def run_script(
    path: Path, calls: Path, *, step: str, state: str = "echo JobId=5 JobState=RUNNING Reason=None"
) -> Ended:
    """Run the batch script as it lies in launch/slurm, with a step that does `step`."""
    script = SCRIPT.read_text().replace("python=.venv/bin/python", f"python={sys.executable}")
    environment = os.environ | {
        "SLURM_JOB_ID": "5",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_NODELIST": "n1",
        "RUN": str(path.parent / "run"),
        "FAKE_srun": step,
        "FAKE_scontrol": state,
    }
    done = subprocess.run(
        ["bash", "-s", str(path)],
        input=script,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=SECONDS,
    )
    return Ended(code=done.returncode, output=done.stdout, calls=calls.read_text().splitlines())


@pytest.mark.parametrize("code", [0, 1])
def test_the_marker_decides_whatever_the_exit_code(path: Path, calls: Path, code: int) -> None:
    stopped = run_script(path, calls, step=f"{MARKER} exit {code}")
    assert stopped.code == 0 and "scontrol requeue 5" in stopped.calls, stopped.output
    calls.unlink()
    failed = run_script(path, calls, step=f"exit {code}")  # and the marker of before is used up
    assert failed.code == 1 and "scontrol requeue 5" not in failed.calls, failed.output
    assert "failed: neither complete nor stopped" in failed.output


def test_a_complete_run_ends_the_job_and_is_not_trained_again(path: Path, calls: Path) -> None:
    done = run_script(path, calls, step=f"{COMPLETE} exit 1")
    assert done.code == 0 and "scontrol requeue 5" not in done.calls, done.output
    assert done.output.rstrip().endswith("complete")
    calls.unlink()
    again = run_script(path, calls, step="exit 1")
    assert again.code == 0 and not any(call.startswith("srun") for call in again.calls), again.output


def test_a_cancelled_job_is_not_raised_but_one_at_its_time_limit_goes_on(path: Path, calls: Path) -> None:
    cancelled = run_script(path, calls, step=f"{MARKER} exit 1", state=f"{ENDING}None")
    assert cancelled.code == 0 and "scontrol requeue 5" not in cancelled.calls, cancelled.output
    assert "cancelled, not requeued" in cancelled.output
    late = run_script(path, calls, step=f"{MARKER} exit 1", state=f"{ENDING}TimeLimit")
    assert "scontrol requeue 5" in late.calls, late.output


def test_a_signal_waits_for_the_processes_and_is_passed_on_once(path: Path, calls: Path) -> None:
    early = 'kill -USR1 $PPID; sleep 1; grep -q scancel "$CALLS" && echo "too early"; '
    ready = 'touch "$RUN/config.yaml"; sleep 1.5; kill -USR1 $PPID; sleep 1.5; '
    done = run_script(path, calls, step=f"{early} {ready} {MARKER} exit 1")
    assert "too early" not in done.output
    assert [call for call in done.calls if call.startswith("scancel")] == ["scancel --signal=USR1 5"], done.output
    assert "scontrol requeue 5" in done.calls


def test_processes_that_do_not_divide_end_the_job_before_its_step(path: Path, calls: Path) -> None:
    path.write_text(path.read_text().replace("processes: 2", "processes: 0"), encoding="utf-8")
    refused = subprocess.run(
        ["bash", "-s", str(path)],
        input=SCRIPT.read_text().replace("python=.venv/bin/python", f"python={sys.executable}"),
        env=os.environ | {"SLURM_JOB_ID": "5", "SLURM_JOB_NUM_NODES": "2"},
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
    )
    assert refused.returncode == 2 and "parallel.processes" in refused.stderr
    assert not calls.exists()
