"""A two-node pretraining on a real Slurm: preempted, requeued and finished with the losses of the uninterrupted run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sci_gpt.config import PretrainConfig
from sci_gpt.config_file import show_config
from sci_gpt.errors import ConfigError
from sci_gpt.train.run_folder import LOG, REQUEUE, keys_log, read_lines
from sci_launch.slurm import Wishes, submit
from small_slurm import ENDED, NODES, Slurm, processes_of, small_slurm
from toy_store import toy_config, write_store

STEPS, PREEMPTED_AT = 40, 6
PATIENCE_SECONDS = 100.0


@dataclass(frozen=True, kw_only=True)
class Story:
    """What happened: two runs of one configuration, and what was seen in between.

    Attributes:
        preempted, straight: run folders.
        launched: what `sci-gpt launch` printed.
        job: its number.
        marker: content of the requeue marker.
        before: lines of the log when the job was requeued, as they stood.
        second: what a second launch of the waiting job was answered.
        facts: of the job at its end, as scontrol names them.
        output: the job's log.
    """

    preempted: Path
    straight: Path
    launched: str
    job: str
    marker: dict[str, Any]
    before: list[str]
    second: str
    facts: dict[str, str]
    output: str


def configuration(folder: Path, run: str) -> PretrainConfig:
    """Two processes, no checkpoint but that of the preemption and the last."""
    return toy_config(
        folder / "store",
        folder / run,
        schedule={"steps": STEPS, "warmup_steps": 4, "cooldown_steps": 10},
        checkpoint={"every": 100_000},
        validation={"every": 100_000, "windows": 2},
    )


def start(config: PretrainConfig, *words: str, environment: dict[str, str]) -> subprocess.Popen[str]:
    """A command of `sci-gpt` on this configuration, in a process of its own."""
    path = config.output.parent / f"{config.output.name}.yaml"
    path.write_text(show_config(config), encoding="utf-8")
    command = [sys.executable, "-m", "sci_launch.cli", words[0], str(path), *words[1:]]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def end(process: subprocess.Popen[str]) -> str:
    """Wait for its end, which must be good; its output."""
    try:
        output = process.communicate(timeout=PATIENCE_SECONDS)[0]
    finally:
        process.kill()
    assert process.returncode == 0, output
    return output


def wait_until(slurm: Slurm, job: str, *, log: Path, what: Callable[[], bool]) -> None:
    """Wait for something that a job does; it must not end before."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not what():
        state = slurm.state(job)["JobState"]
        told = log.read_text() if log.exists() else "(no log)"
        assert state not in ENDED or what(), f"the job is {state}\n{told}"
        assert time.monotonic() < deadline, f"the job is {state} after {PATIENCE_SECONDS:g} s\n{told}\n{slurm.logs()}"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def story(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory) -> Story:
    folder = tmp_path_factory.mktemp("two-nodes")
    write_store(folder / "store")
    config, straight = configuration(folder, "preempted"), configuration(folder, "straight")
    run = config.output
    launched = end(start(config, "launch", "--on", "slurm", "--nodes", "2", environment=slurm.environment))
    job = re.findall(r"^job (\d+) submitted", launched, flags=re.MULTILINE)[0]
    log = run / "slurm" / f"{job}.log"

    wait_until(slurm, job, log=log, what=lambda: len(read_lines(run / LOG)) >= PREEMPTED_AT)
    slurm.ask("scancel", "--batch", "--signal=USR1", job)
    wait_until(slurm, job, log=log, what=lambda: (run / REQUEUE).exists())
    marker = json.loads((run / REQUEUE).read_text())
    reference = start(straight, "pretrain", environment=dict(os.environ))
    before = (run / LOG).read_text().splitlines()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ConfigError) as second:
        for name in ("PATH", "SLURM_CONF"):
            patch.setenv(name, slurm.environment[name])
        submit(config, Wishes(nodes=2))
    end(reference)

    def again() -> bool:
        """The job has logged steps in its second start; they must not be those of the first."""
        lines = (run / LOG).read_text().splitlines()
        return len(lines) > len(before) or lines[: len(before)] != before

    wait_until(slurm, job, log=log, what=again)
    assert (run / LOG).read_text().splitlines()[: len(before)] == before, "the requeued job has begun from zero"
    wait_until(slurm, job, log=log, what=lambda: slurm.state(job)["JobState"] in ENDED)
    return Story(
        preempted=run,
        straight=straight.output,
        launched=launched,
        job=job,
        marker=marker,
        before=before,
        second=str(second.value),
        facts=slurm.state(job),
        output=log.read_text(),
    )


def losses(run: Path) -> list[float]:
    """The logged loss of every step, checking that each step stands once."""
    records = [record for record in read_lines(run / LOG) if "loss" in record]
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    return [record["loss"] for record in records]


def test_a_preempted_job_goes_on_from_its_checkpoint_with_the_losses_of_the_uninterrupted_run(story: Story) -> None:
    assert PREEMPTED_AT <= story.marker["step"] < STEPS
    assert story.marker["checkpoint"] == f"checkpoints/step-{story.marker['step']:08d}"
    assert losses(story.preempted) == pytest.approx(losses(story.straight), rel=1e-6)
    steps = [json.loads(line)["step"] for line in story.before]
    assert steps[-1] == story.marker["step"], "the log must not hold a step beyond the checkpoint"
    # Seconds of each step stand in the lines: a run from zero could not have written them again.
    assert (story.preempted / LOG).read_text().splitlines()[: len(story.before)] == story.before
    assert f"resumes from {story.preempted}/{story.marker['checkpoint']}" in story.output


def test_no_sample_is_skipped_or_repeated_over_the_preemption(story: Story) -> None:
    for rank in range(len(NODES)):
        eaten = read_lines(keys_log(story.preempted, rank))
        assert len(eaten) == STEPS
        assert eaten == read_lines(keys_log(story.straight, rank))


def test_the_job_ran_on_two_nodes_and_was_requeued_once(story: Story) -> None:
    assert (story.facts["JobState"], story.facts["Restarts"], story.facts["NumNodes"]) == ("COMPLETED", "1", "2")
    for restart in (0, 1):
        assert f"job {story.job}: start {restart} on n[1-2], 1 processes on each of 2 nodes" in story.output
    assert json.loads((story.preempted / "complete.json").read_text())["step"] == STEPS
    assert not (story.preempted / REQUEUE).exists()


def test_the_launch_says_where_the_log_is_and_how_to_follow_and_cancel(story: Story) -> None:
    for words in (f"{story.preempted}/slurm/{story.job}.log", f"squeue --jobs={story.job}", f"scancel {story.job}"):
        assert words in story.launched


def test_a_second_job_of_a_waiting_run_and_of_a_complete_one_is_not_submitted(
    story: Story, capsys: pytest.CaptureFixture[str]
) -> None:
    assert re.search(rf"job {story.job} of this run is (PENDING|COMPLETING|RUNNING): two would train", story.second)
    assert submit(configuration(story.preempted.parent, "preempted"), Wishes(nodes=2)) is None
    assert f"complete: {STEPS} steps; nothing to submit" in capsys.readouterr().out


def test_slurms_own_refusal_is_one_error(slurm: Slurm, story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PATH", "SLURM_CONF"):
        monkeypatch.setenv(name, slurm.environment[name])
    config = configuration(story.preempted.parent, "straight").model_copy(update={"output": story.straight / "other"})
    with pytest.raises(ConfigError, match="Slurm refused the job.*nowhere.*change the options"):
        submit(config, Wishes(nodes=2, partition="nowhere"))


def test_no_daemon_outlives_its_slurm(slurm: Slurm) -> None:
    with small_slurm() as another:
        assert len(processes_of(another.base)) >= 2 + len(NODES)
    assert processes_of(another.base) == []
    assert processes_of(slurm.base), "the other one still runs"
