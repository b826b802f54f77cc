"""`sci-gpt drill` over the two nodes of a Slurm allocation: a rank on each, signals by Slurm's own steps."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sci_gpt.config_file import show_config
from sci_gpt.errors import ConfigError
from sci_launch.drill_place import Allocation, DrillError, Here, Remote, find_place
from sci_launch.drill_run import Start
from small_slurm import ENDED, NODES, Slurm
from toy_store import toy_config, write_store

STEPS = 12
FAULTS = ("sigterm", "kill-rank", "kill-all", "hang")  # those in which a signal has to find its way
PATIENCE_SECONDS = 400.0


@dataclass(frozen=True, kw_only=True)
class Drilled:
    """A drill's folder, its result, its job's state and output."""

    folder: Path
    rows: dict[str, dict[str, Any]]
    state: str
    said: str


@pytest.fixture(scope="module")
def drilled(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory) -> Drilled:
    folder = tmp_path_factory.mktemp("two-nodes")
    write_store(folder / "store")
    config = toy_config(folder / "store", folder / "runs" / "toy", parallel={"processes": 2})
    (folder / "toy.yaml").write_text(show_config(config))
    words = [
        sys.executable,
        "-m",
        "sci_launch.cli",
        "drill",
        str(folder / "toy.yaml"),
        "--output",
        str(folder / "drill"),
    ]
    words += ["--steps", str(STEPS), "--faults", ",".join(FAULTS), "--hang-seconds", "5", "--json"]
    script = folder / "drill.sh"
    script.write_text(f"#!/bin/sh\nexec {' '.join(words)} >{folder}/result.json\n")
    options = ["--nodes=2", "--ntasks-per-node=1", "--parsable", f"--output={folder}/job.log", f"--chdir={Path.cwd()}"]
    job = slurm.ask("sbatch", *options, str(script)).strip()
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (state := slurm.state(job)["JobState"]) not in ENDED and time.monotonic() < deadline:
        time.sleep(0.5)
    said = (folder / "job.log").read_text() if (folder / "job.log").exists() else slurm.logs()
    assert state in ENDED, f"the job is {state}\n{said}"
    found = (folder / "result.json").read_text()
    assert found, said
    return Drilled(
        folder=folder, rows={row["fault"]: row for row in json.loads(found)["faults"]}, state=state, said=said
    )


def test_each_fault_passes_over_two_nodes(drilled: Drilled) -> None:
    assert tuple(drilled.rows) == FAULTS and drilled.state == "COMPLETED", drilled.said
    for row in drilled.rows.values():
        assert row["passed"], drilled.said
        assert row["max_loss_difference"] == row["max_weight_difference"] == row["keys_differ"] == 0, row


def test_a_rank_ran_on_each_node(drilled: Drilled) -> None:
    for name in ("straight-start-1", "hang-start-1", "hang-start-2"):
        notes = [json.loads((drilled.folder / "drill" / f"{name}-rank-{rank}.json").read_text()) for rank in (0, 1)]
        assert [note["node"] for note in notes] == list(NODES)
    assert "task 1: Killed" in (drilled.folder / "drill" / "kill-rank-start-1.txt").read_text()


def test_the_launcher_that_names_a_killed_rank_is_known_by_its_words() -> None:
    ours, theirs = "rank 3 of 4 was killed by SIGKILL; its last lines:", "srun: error: n2: task 3: Killed"
    for place, words in ((Here(), ours), (Allocation(job="7", nodes=2, host="n1"), theirs)):
        assert place.told_of_kill(f"step 7/12\n{words}\n", rank=3, size=4)
        assert not place.told_of_kill(f"step 7/12\n{words}\n", rank=2, size=4)
        assert not place.told_of_kill("step 7/12 | task 3: Killed time", rank=3, size=4)
    grouped = "srun: error: n2: tasks 4,6-7: Killed"
    killed = [Allocation(job="7", nodes=2, host="n1").told_of_kill(grouped, rank=rank, size=8) for rank in range(8)]
    assert [rank for rank in range(8) if killed[rank]] == [4, 6, 7]


def test_a_signal_runs_on_the_worker_s_node_or_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A `srun` that runs its last words here and says that it did so on the node of --nodelist, or on another."""
    (tmp_path / "srun").write_text(
        '#!/bin/sh\nfor word; do case "$word" in --nodelist=*) node=${word#*=};; esac; line=$word; done\n'
        'SLURMD_NODENAME=${ELSEWHERE:-$node} exec sh -c "$line"\n'
    )
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    sleeper = subprocess.Popen(["sleep", "60"])
    worker = Remote(node="n2", pid=sleeper.pid)
    assert worker.is_running()
    monkeypatch.setenv("ELSEWHERE", "n1")
    with pytest.raises(DrillError, match="was meant for n2 and ran on n1"):
        worker.is_running()
    monkeypatch.delenv("ELSEWHERE")
    worker.kill()
    assert sleeper.wait(10) == -signal.SIGKILL and not worker.is_running()
    with pytest.raises(DrillError, match="No such process"):
        worker.suspend()
    (tmp_path / "srun").write_text("#!/bin/sh\necho 'srun: error: no answer' >&2\nexit 1\n")
    with pytest.raises(DrillError, match="no answer"):
        worker.is_running()


def test_a_run_that_cannot_be_ended_does_not_take_the_drill_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said, and the others are ended."""
    ended: list[str] = []

    @dataclass
    class Stub:
        name: Path
        fails: bool
        process: Any = field(default_factory=lambda: SimpleNamespace(poll=lambda: None))

        def kill(self) -> None:
            if self.fails:
                raise DrillError("squeue gave no answer")
            ended.append(self.name.name)

    runs = [Stub(Path("drill/hang-start-1"), True), Stub(Path("drill/hang-start-2"), False)]
    monkeypatch.setattr(Start, "alive", runs)
    assert Start.end_all() == ["hang-start-1 could not be ended: squeue gave no answer"]
    assert ended == ["hang-start-2"] and Start.end_all() == []


def test_where_a_drill_stands(slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(find_place({}), Here) and isinstance(find_place({"SLURM_JOB_NUM_NODES": "1"}), Here)
    for name in ("PATH", "SLURM_CONF"):
        monkeypatch.setenv(name, slurm.environment[name])
    inside = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_ID": "7", "SLURMD_NODENAME": "n1"}
    place = find_place(inside)
    assert isinstance(place, Allocation) and (place.job, place.nodes) == ("7", 2)
    with pytest.raises(ConfigError, match="runs on the first of them, n1, where rank 0 is, and this is n2: start it"):
        find_place(inside | {"SLURMD_NODENAME": "n2"})
    with pytest.raises(
        ConfigError, match="a drill is one process, and srun has started 2: start it once, from a batch"
    ):
        find_place(inside | {"SLURM_STEP_NUM_TASKS": "2"})
