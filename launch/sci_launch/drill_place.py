"""Where a drill starts its runs: on this machine, or over the nodes of the Slurm allocation that it stands in."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import psutil

from sci_gpt.config import PretrainConfig
from sci_gpt.errors import ConfigError
from sci_launch.local import WORKER
from sci_launch.slurm_job import free_port

POISONED = "sci_launch.drill_worker"
_ANSWER_SECONDS = 60.0
_GONE_SECONDS = 120.0  # that the last process of a killed run may take: Slurm's KillWait is 30 s by default
_KILLED = re.compile(r"^srun: error: \S+: tasks? ([0-9,-]+): Killed", re.MULTILINE)


class DrillError(RuntimeError):
    """A part of a drill could not be done, or a run did not behave: the fault's row says so."""


class Worker(Protocol):
    """One rank's process."""

    def kill(self) -> None:
        """SIGKILL."""

    def suspend(self) -> None:
        """SIGSTOP."""

    def is_running(self) -> bool:
        """Whether it is still there."""


Launcher = subprocess.Popen[bytes]


class Place(Protocol):
    """How runs are started, found and ended there. A start's name is a path without a file of that name.

    Attributes:
        failure: exit code of a start of which a worker failed; None: any but 0.
    """

    failure: ClassVar[int | None]

    def command(self, config: PretrainConfig, path: Path, *, name: Path, poisoned: int | None) -> list[str]:
        """What starts a run of `config`, which stands in the file `path`; `poisoned`: the sample of infinities."""

    def environment(self) -> dict[str, str]:
        """What it needs in its environment."""

    def workers(self, launcher: Launcher, name: Path) -> dict[int, Worker]:
        """The ranks that are there."""

    def terminate(self, launcher: Launcher, name: Path) -> None:
        """SIGTERM as the scheduler sends it."""

    def kill(self, launcher: Launcher, name: Path) -> None:
        """SIGKILL for the launcher and for every worker, and wait until they are gone."""

    def told_of_kill(self, said: str, *, rank: int, size: int) -> bool:
        """Whether a start has said that this rank was killed."""


class Here(Place):
    """This machine: `sci-gpt pretrain`, as a user starts it."""

    failure: ClassVar[int | None] = 1

    def command(self, config: PretrainConfig, path: Path, *, name: Path, poisoned: int | None) -> list[str]:
        """The launcher; see `Place`."""
        if poisoned is not None:
            return [sys.executable, "-m", POISONED, str(path), str(poisoned)]
        return [sys.executable, "-m", "sci_launch.cli", "pretrain", str(path)]

    def environment(self) -> dict[str, str]:
        """Nothing more than there is."""
        return {}

    def workers(self, launcher: Launcher, name: Path) -> dict[int, Worker]:
        """The launcher's children that have a rank."""
        ranks: dict[int, Worker] = {}
        for child in psutil.Process(launcher.pid).children():
            try:
                ranks[int(child.environ()["RANK"])] = child
            except (psutil.Error, KeyError):
                continue
        return ranks

    def terminate(self, launcher: Launcher, name: Path) -> None:
        """To the launcher, which passes it on."""
        launcher.send_signal(signal.SIGTERM)

    def kill(self, launcher: Launcher, name: Path) -> None:
        """The launcher first: nobody is asked."""
        try:
            family = psutil.Process(launcher.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            family = []
        launcher.kill()
        for member in family:
            try:
                member.kill()
            except psutil.NoSuchProcess:
                continue
        launcher.wait()
        psutil.wait_procs(family, timeout=20.0)

    def told_of_kill(self, said: str, *, rank: int, size: int) -> bool:
        """In the launcher's own words."""
        return f"rank {rank} of {size} was killed by SIGKILL" in said


@dataclass(frozen=True, kw_only=True)
class Remote(Worker):
    """A rank's process on a node of the allocation, which signals reach by a step of their own."""

    node: str
    pid: int

    def kill(self) -> None:
        """SIGKILL."""
        self._send("KILL")

    def suspend(self) -> None:
        """SIGSTOP."""
        self._send("STOP")

    def is_running(self) -> bool:
        """Whether its process id is taken."""
        return self._on_the_node(f"kill -0 {self.pid} 2>/dev/null && echo there || echo gone").strip() == "there"

    def _send(self, name: str) -> None:
        self._on_the_node(f"kill -{name} {self.pid}")

    def _on_the_node(self, line: str) -> str:
        """What a line of shell prints there; DrillError where it fails, or says the name of another node."""
        words = ["srun", "--overlap", "--quiet", "--nodes=1", "--ntasks=1", "--ntasks-per-node=1", "--cpus-per-task=1"]
        said = _ask([*words, f"--nodelist={self.node}", "sh", "-c", f"echo $SLURMD_NODENAME; {line}"])
        where, _, rest = said.partition("\n")
        if where != self.node:
            raise DrillError(f"`{line}` was meant for {self.node} and ran on {where or 'no node'}")
        return rest


@dataclass(frozen=True, kw_only=True)
class Allocation(Place):
    """The nodes of this Slurm allocation: a task for each rank, started by one `srun`, block by block over the nodes.

    Attributes:
        job: its number.
        nodes: how many.
        host: this node, where rank 0 is.
    """

    failure: ClassVar[int | None] = None

    job: str
    nodes: int
    host: str

    def command(self, config: PretrainConfig, path: Path, *, name: Path, poisoned: int | None) -> list[str]:
        """The step; see `Place`."""
        size = config.parallel.processes
        nodes = min(self.nodes, size)
        words = ["srun", f"--job-name={name.name}", f"--nodes={nodes}", f"--ntasks={size}", "--distribution=block"]
        words += [f"--ntasks-per-node={-(-size // nodes)}", f"--cpus-per-task={config.parallel.threads_per_process}"]
        words += ["--overlap", "--kill-on-bad-exit=1", "--unbuffered", sys.executable, "-m", "sci_launch.drill_rank"]
        threads = str(config.parallel.threads_per_process)
        module = [WORKER, str(path)] if poisoned is None else [POISONED, str(path), str(poisoned)]
        return [*words, str(name), threads, *module]

    def environment(self) -> dict[str, str]:
        """Where the ranks meet: rank 0 is on this node."""
        return {"MASTER_ADDR": self.host, "MASTER_PORT": str(free_port())}

    def workers(self, launcher: Launcher, name: Path) -> dict[int, Worker]:
        """Those that have left a note (`sci_launch.drill_rank`)."""
        ranks: dict[int, Worker] = {}
        for path in name.parent.glob(f"{name.name}-rank-*.json"):
            note = json.loads(path.read_text(encoding="utf-8"))
            ranks[int(note["rank"])] = Remote(node=note["node"], pid=note["pid"])
        return ranks

    def terminate(self, launcher: Launcher, name: Path) -> None:
        """To every task of the step, by scancel."""
        for step in self._steps(name):
            _ask(["scancel", "--signal=TERM", step])

    def kill(self, launcher: Launcher, name: Path) -> None:
        """srun and all tasks, none of them asked."""
        launcher.kill()
        launcher.wait()
        deadline = time.monotonic() + _GONE_SECONDS
        while steps := self._steps(name):
            if time.monotonic() > deadline:
                raise DrillError(f"Slurm's step {name.name} is still there {_GONE_SECONDS:.0f} s after SIGKILL")
            for step in steps:
                _run(["scancel", "--signal=KILL", step])  # refused where it has ended meanwhile
            time.sleep(0.2)

    def told_of_kill(self, said: str, *, rank: int, size: int) -> bool:
        """In srun's words: "srun: error: NODE: task 3: Killed", or "tasks 2-3,6: Killed"."""
        return any(rank in _numbers(found) for found in _KILLED.findall(said))

    def _steps(self, name: Path) -> list[str]:
        lines = _ask(["squeue", "--noheader", "--steps", f"--jobs={self.job}", "--format=%i|%j"]).splitlines()
        return [step for step, _, said in (line.strip().partition("|") for line in lines) if said == name.name]


def find_place(environ: Mapping[str, str] = os.environ) -> Place:
    """The allocation where it has several nodes, else this machine.

    Raises:
        ConfigError: in an allocation of several nodes, this is not its first, or one of several tasks of a step.
    """
    nodes = int(environ.get("SLURM_JOB_NUM_NODES", "1"))
    if nodes == 1:
        return Here()
    remedy = f"start it once, from a batch script: `sbatch --nodes={nodes} --wrap 'sci-gpt drill CONFIG'`"
    if environ.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        raise ConfigError(f"a drill is one process, and srun has started {environ['SLURM_STEP_NUM_TASKS']}: {remedy}")
    first = _first_node(environ.get("SLURM_JOB_NODELIST", ""))
    if environ.get("SLURMD_NODENAME") != first:
        raise ConfigError(
            f"a drill over {nodes} nodes runs on the first of them, {first}, where rank 0 is, and this is "
            f"{environ.get('SLURMD_NODENAME', 'none of them')}: {remedy}"
        )
    return Allocation(job=environ["SLURM_JOB_ID"], nodes=nodes, host=socket.gethostname())


def _first_node(listed: str) -> str:
    try:
        return _ask(["scontrol", "show", "hostnames", listed]).split()[0]
    except (DrillError, IndexError) as error:
        raise ConfigError(f"SLURM_JOB_NUM_NODES is set, but Slurm does not name its nodes ({error})") from error


def _numbers(listed: str) -> set[int]:
    """Of "2-3,6"."""
    ends = [part.partition("-") for part in listed.split(",")]
    return {number for first, _, last in ends for number in range(int(first), int(last or first) + 1)}


def _ask(command: list[str]) -> str:
    done = _run(command)
    if done.returncode:
        raise DrillError(f"`{' '.join(command)}` failed: {' '.join(done.stderr.split())}")
    return done.stdout


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=_ANSWER_SECONDS)
    except FileNotFoundError as error:
        raise DrillError(f"there is no {command[0]} on PATH") from error
    except subprocess.TimeoutExpired as error:
        raise DrillError(f"`{' '.join(command)}` gave no answer in {_ANSWER_SECONDS:g} s") from error
