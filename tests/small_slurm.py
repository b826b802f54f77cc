"""A Slurm of the test's own on this machine: munged, slurmctld and two slurmd as children that end with the test."""

from __future__ import annotations

import ctypes
import getpass
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

NODES = ("n1", "n2")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol", "squeue")
DAEMONS_PATH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"))
START_SECONDS, END_SECONDS = 30.0, 20.0
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")  # states of a job
_PR_SET_PDEATHSIG = 1

CONF = """\
ClusterName=small
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={base}/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation={base}/state
SlurmdSpoolDir={base}/spool-%n
SlurmctldPidFile={base}/slurmctld.pid
SlurmdPidFile={base}/slurmd-%n.pid
SlurmctldLogFile={base}/slurmctld.log
SlurmdLogFile={base}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0,requeue_delay=0
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
JobRequeue=1
KillWait=5
MinJobAge=300
InactiveLimit=0
SlurmctldTimeout=30
SlurmdTimeout=30
ReturnToService=2
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=INFINITE DefaultTime=10 State=UP
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 RealMemory=4000 State=UNKNOWN\n"


def missing_programs() -> list[str]:
    """What of Slurm is not installed here."""
    return [name for name in PROGRAMS if shutil.which(name, path=DAEMONS_PATH) is None]


@dataclass(frozen=True, kw_only=True)
class Slurm:
    """A running Slurm: its folder, and the environment in which its commands find it."""

    base: Path
    environment: dict[str, str]

    def ask(self, *command: str, seconds: float = 20.0) -> str:
        """Run a command of Slurm's; its output.

        Raises:
            CalledProcessError, TimeoutExpired: it failed, or did not answer.
        """
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, check=True, timeout=seconds
        )
        return done.stdout

    def state(self, job: str) -> dict[str, str]:
        """A job's facts, as `scontrol show job` names them (JobState, Restarts, ..)."""
        words = self.ask("scontrol", "-o", "show", "job", job).split()
        return dict(word.partition("=")[::2] for word in words)

    def logs(self) -> str:
        """The ends of the daemons' logs, for a failure's message."""
        return "\n".join(f"--- {path.name}\n{path.read_text()[-2000:]}" for path in sorted(self.base.glob("*.log")))


@contextmanager
def small_slurm() -> Iterator[Slurm]:
    """Start it, give it, end it: jobs first, then the daemons, by their process ids."""
    # Not below pytest's own folder, which only its owner may enter: munged refuses a socket there.
    base = Path(tempfile.mkdtemp(prefix="sci-gpt-slurm-", dir="/tmp"))
    base.chmod(0o755)
    slurm = Slurm(base=base, environment=os.environ | {"SLURM_CONF": str(base / "slurm.conf"), "PATH": DAEMONS_PATH})
    try:
        _configure(base)
        with ExitStack() as daemons:
            key, socket_, log = base / "munge.key", base / "munge.sock", base / "munged.log"
            options = [f"--key-file={key}", f"--socket={socket_}", f"--log-file={log}"]
            options += [f"--pid-file={base}/munged.pid", f"--seed-file={base}/munged.seed"]
            daemons.enter_context(_daemon(slurm, ["munged", "--foreground", *options]))
            daemons.enter_context(_daemon(slurm, ["slurmctld", "-D", "-c"]))
            for name in NODES:
                daemons.enter_context(_daemon(slurm, ["slurmd", "-D", "-N", name]))
            _wait_for_nodes(slurm)
            try:
                yield slurm
            finally:
                _end_jobs(slurm)
        _nothing_is_left(base)
    finally:
        shutil.rmtree(base, ignore_errors=True)


def _configure(base: Path) -> None:
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(1 + len(NODES))]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        ports = [one.getsockname()[1] for one in sockets]
    host = socket.gethostname().partition(".")[0]
    text = CONF.format(base=base, host=host, user=getpass.getuser(), ports=ports)
    for name, port in zip(NODES, ports[1:], strict=True):
        (base / f"spool-{name}").mkdir()
        text += NODE.format(name=name, host=host, port=port)
    (base / "state").mkdir()
    (base / "slurm.conf").write_text(text)
    (base / "munge.key").write_bytes(os.urandom(1024))
    (base / "munge.key").chmod(0o600)


@contextmanager
def _daemon(slurm: Slurm, command: Sequence[str]) -> Iterator[None]:
    """A daemon in the foreground, which the system ends if pytest is killed."""
    with (slurm.base / f"{command[0]}-{len(command)}.out").open("ab") as output:
        process = subprocess.Popen(
            command, env=slurm.environment, stdout=output, stderr=output, preexec_fn=_end_with_parent
        )
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(timeout=END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _wait_for_nodes(slurm: Slurm) -> None:
    deadline = time.monotonic() + START_SECONDS
    command = ["sinfo", "-h", "-N", "-t", "idle", "-o", "%N"]
    while time.monotonic() < deadline:
        done = subprocess.run(
            command, env=slurm.environment, capture_output=True, text=True, check=False, timeout=START_SECONDS
        )
        if set(done.stdout.split()) == set(NODES):
            return
        time.sleep(0.1)
    raise TimeoutError(f"the nodes did not become idle in {START_SECONDS:g} s\n{slurm.logs()}")


def processes_of(base: Path) -> list[psutil.Process]:
    """Living processes, other than this one, that were started for the Slurm in `base`: its daemons, their jobs."""
    conf = str(base / "slurm.conf")
    found = [process for process in psutil.process_iter(["environ"]) if process.pid != os.getpid()]
    return [process for process in found if (process.info["environ"] or {}).get("SLURM_CONF") == conf]


def _nothing_is_left(base: Path) -> None:
    deadline = time.monotonic() + END_SECONDS
    while left := processes_of(base):
        if time.monotonic() > deadline:
            told = [" ".join(process.cmdline()) for process in left]
            for process in left:
                process.kill()
            raise AssertionError(f"outlived the test and were killed: {told}")
        time.sleep(0.1)


def _end_jobs(slurm: Slurm) -> None:
    """Cancel what runs and wait until no process of a job is left."""
    deadline = time.monotonic() + END_SECONDS
    jobs = slurm.ask("squeue", "-h", "-o", "%A").split()
    if jobs:
        slurm.ask("scancel", *jobs)
    while slurm.ask("squeue", "-h", "-o", "%A").split() and time.monotonic() < deadline:
        time.sleep(0.1)
