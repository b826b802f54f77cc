"""Slurm launcher: fills in launch/slurm/pretrain.sbatch for a run, submits it, and says how to follow and cancel it."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sci_gpt.config import PretrainConfig
from sci_gpt.config_file import show_config
from sci_gpt.data.store import Store
from sci_gpt.errors import ConfigError
from sci_gpt.recipes import parts
from sci_gpt.train.resume import where_to_go_on
from sci_gpt.train.run_folder import write_whole
from sci_launch.slurm_job import is_complete, processes_per_node

SCRIPT = Path(__file__).resolve().parents[1] / "slurm" / "pretrain.sbatch"
FOLDER = "slurm"  # in the run folder: script, configuration, logs, the last job's number
_ANSWER_SECONDS = 60.0
_HERE = "or train here with --on local (--dry-run shows the script without Slurm)"


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What is asked of Slurm; None leaves what stands in the script.

    Attributes:
        nodes: over which `parallel.processes` are divided evenly.
        time: limit, in Slurm's words (minutes, H:M:S, D-H:M:S).
        partition, account: as the cluster names them.
        options: more options of sbatch, as "gpus-per-node=4" or "exclusive".
        script: the batch script to fill in.
    """

    nodes: int = 1
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    options: Sequence[str] = ()
    script: Path = SCRIPT


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job before its submission: two files of the run folder and the command that submits them."""

    script: str
    script_path: Path
    config: str
    config_path: Path
    log: str

    @property
    def command(self) -> list[str]:
        """What submits it."""
        return ["sbatch", "--parsable", str(self.script_path), str(self.config_path)]


def render(config: PretrainConfig, wishes: Wishes) -> Job:
    """The job for a run; nothing is written.

    Raises:
        ConfigError: processes that do not divide over the nodes, no script, a script without the line `python=`.
    """
    each = processes_per_node(config, wishes.nodes)
    folder = (config.output / FOLDER).absolute()
    log = str(folder / "%j.log")
    options: dict[str, str | None] = {
        "job-name": f"sci-gpt-{config.name}",
        "nodes": str(wishes.nodes),
        "ntasks-per-node": "1",
        "cpus-per-task": str(each * config.parallel.threads_per_process),
        "chdir": str(Path.cwd()),
        "output": log,
    }
    named = {"time": wishes.time, "partition": wishes.partition, "account": wishes.account}
    options |= {name: value for name, value in named.items() if value is not None}
    for option in wishes.options:
        name, equals, value = option.removeprefix("--").partition("=")
        options[name] = value if equals else None
    try:
        text = wishes.script.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"no batch script {str(wishes.script)!r} ({error.strerror}); give yours with --script FILE, made from "
            "launch/slurm/pretrain.sbatch of the repository"
        ) from error
    return Job(
        script=_fill(text, options, where=wishes.script),
        script_path=folder / SCRIPT.name,
        config=show_config(config),
        config_path=folder / "config.yaml",
        log=log,
    )


def _fill(text: str, options: Mapping[str, str | None], *, where: Path) -> str:
    """Put options in the place of the script's `#SBATCH --name=..` lines, new ones below them; and this Python."""
    text, found = re.subn(r"^python=.*$", lambda _: f"python={shlex.quote(sys.executable)}", text, flags=re.MULTILINE)
    if found != 1:
        raise ConfigError(
            f"{where}: expected one line `python=..`, which names the Python of the job, found {found}; compare with "
            "launch/slurm/pretrain.sbatch"
        )
    lines = text.splitlines()
    for name, value in options.items():
        line = f"#SBATCH --{name}" + ("" if value is None else f"={shlex.quote(value)}")
        there = [number for number, old in enumerate(lines) if re.match(rf"#SBATCH\s+--{re.escape(name)}(=|\s|$)", old)]
        if there:
            lines[there[0]] = line
        else:
            last = max((number for number, old in enumerate(lines) if old.startswith("#SBATCH")), default=0)
            lines.insert(last + 1, line)
    return "\n".join(lines) + "\n"


def describe(job: Job) -> str:
    """What `--dry-run` prints: the script, and the files and the command of the submission."""
    return (
        f"{job.script}\n"
        f"# would write the script above to {job.script_path}\n"
        f"# and the configuration, with overrides applied, to {job.config_path}\n"
        f"# and submit: {shlex.join(job.command)}"
    )


def launch(config: PretrainConfig, wishes: Wishes, *, dry_run: bool) -> None:
    """Submit a run, or print what would be submitted.

    Raises:
        ConfigError, DataError, CheckpointError: see `render` and `submit`.
    """
    if dry_run:
        print(describe(render(config, wishes)))
    else:
        submit(config, wishes)


def submit(config: PretrainConfig, wishes: Wishes) -> str | None:
    """Write script and configuration into the run folder and submit them; says where the log is and what to do next.

    Returns:
        The job's number; None where the run is complete, for which nothing is submitted.

    Raises:
        ConfigError: no Slurm here, a job of this run in its queue, Slurm's refusal, or what the workers would refuse.
        DataError, CheckpointError: no store that fits, a checkpoint of another run.
    """
    job = render(config, wishes)
    if is_complete(config):
        print(f"{config.output} is complete: {config.schedule.steps} steps; nothing to submit", flush=True)
        return None
    _require_slurm()
    remembered = config.output / FOLDER / "job.json"
    _refuse_second_job(config, remembered)
    _check(config)
    job.script_path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(job.script_path, job.script)
    write_whole(job.config_path, job.config)
    number = (
        _ask(job.command, what="Slurm refused the job", remedy="see what `sinfo` offers and change the options")
        .partition(";")[0]
        .strip()
    )
    write_whole(remembered, json.dumps({"job": number}))
    log = job.log.replace("%j", number)
    print(
        f"job {number} submitted: {config.name}, {config.schedule.steps} steps, {config.parallel.processes} processes "
        f"over {wishes.nodes} nodes\n"
        f"script   {job.script_path}\n"
        f"log      {log}\n"
        f"follow   squeue --jobs={number}    tail -F {shlex.quote(log)}\n"
        f"stop     scancel --batch --signal=USR1 {number}    (saves, and goes on in a later allocation)\n"
        f"cancel   scancel {number}    (saves where the time that Slurm leaves allows it)",
        flush=True,
    )
    return number


def _check(config: PretrainConfig) -> None:
    """Refuse before hours in a queue what the workers would: model, layout, store, windows, another's checkpoint."""
    parts.model_shape(config)
    parts.parallel_plan(config)
    store = Store.open(config.data)
    start = where_to_go_on(config.output, parts.identity(config, store), contents=False)
    parts.curriculum(config, store, starts=start.phase_starts)


def _require_slurm() -> None:
    missing = [name for name in ("sbatch", "squeue", "scontrol") if shutil.which(name) is None]
    if missing:
        raise ConfigError(
            f"no Slurm here: {', '.join(missing)} not on PATH; go to a login node of the cluster or load its module, "
            f"{_HERE}"
        )
    _ask(["scontrol", "ping"], what="no Slurm here: its controller does not answer")


def _refuse_second_job(config: PretrainConfig, remembered: Path) -> None:
    """Two jobs of one run would wait for the same folder, and the second would fail."""
    if not remembered.exists():
        return
    number = str(json.loads(remembered.read_text(encoding="utf-8"))["job"])
    # Asked for by number, squeue fails for a job that it has forgotten; so it is looked for among all.
    queue = dict(line.split() for line in _ask(["squeue", "--noheader", "--format=%A %T"], what="squeue").splitlines())
    if number in queue:
        raise ConfigError(
            f"job {number} of this run is {queue[number]}: two would train in {str(config.output)!r}; wait for it, end "
            f"it with `scancel {number}`, or give this run another output"
        )


def _ask(command: list[str], *, what: str, remedy: str = "go to a node of the cluster where `sinfo` answers") -> str:
    """Run a command of Slurm's.

    Raises:
        ConfigError: it fails, or does not answer in a minute; the message holds `what`, its own words and `remedy`.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_ANSWER_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise ConfigError(
            f"{what}: `{shlex.join(command)}` gave no answer in {_ANSWER_SECONDS:g} s; try again later, {_HERE}"
        ) from error
    if done.returncode:
        words = " ".join((done.stderr or done.stdout).replace("*", " ").split())
        raise ConfigError(f"{what} (`{shlex.join(command)}`: {words}); {remedy}, {_HERE}")
    return done.stdout
