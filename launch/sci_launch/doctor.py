"""`sci-gpt doctor`: what this machine and installation have, what is wrong with them, and the remedy; stdlib only."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from sci_launch.allocator import INSTALL, find, left_alone

OK, INFO, WRONG = "ok", "info", "wrong"
EMBEDDED = "sqlite:///runs/mlflow/mlflow.db"  # as TrackingConfig has it (a test holds them together)
DATA_CONFIG = Path("configs/data/quickstart.yaml")
LEAST_PYTHON = (3, 11)
# The quickstart's two processes held 2.7 GB at their peak, its store and runs 0.1 GB; reruns and sweeps come on top.
LEAST_MEMORY_BYTES = 3 * 10**9
LEAST_DISK_BYTES = 10**9
USUAL_PORTS = {"torchrun's rendezvous": 29500, "MLflow's pages": 5000}
SLURM_TOOLS = ("sbatch", "srun", "scancel", "scontrol", "squeue", "sinfo")
_PROBE_SECONDS = 60.0
_REQUIREMENT = re.compile(r"^([A-Za-z0-9._-]+)\s*(?:>=\s*([0-9.]+))?\s*(?:;.*)?$")
_INSTALL = "run `make install` in the repository, or `pip install -e '.[quickstart]'`"


@dataclass(frozen=True, kw_only=True)
class Check:
    """One finding: its name, "ok", "info" or "wrong", what was found, and what to do where it is wrong."""

    name: str
    status: str
    found: str
    remedy: str = ""


def doctor(*, runs: Path = Path("runs"), data: Path = DATA_CONFIG) -> dict[str, Any]:
    """Look at everything that a run here would need.

    Args:
        runs: where runs would lie.
        data: the data configuration whose packages are looked for.

    Returns:
        {"ok": whether nothing needed is wrong, "checks": [{"name", "status", "found", "remedy"}]}.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or EMBEDDED
    asked = {"torch": ("devices", ""), "deepspeed": ("imports", "deepspeed"), "mlflow": ("tracking", uri)}
    if data.exists():
        asked["data"] = ("package_data", str(data))
    if not (embedded := _embedded_folder(uri)) or embedded.exists():
        asked_now = asked
    else:  # asking would make the database; whether it could be made is what `embedded` says
        asked_now = {**asked, "mlflow": ("imports", "mlflow")}
    with ThreadPoolExecutor(max_workers=len(asked_now)) as pool:
        waiting = {name: pool.submit(probe, *question) for name, question in asked_now.items()}
        checks = [check_python(), *check_packages()]
        checks += [check_processors(), check_memory(), check_disk(runs), *check_ports()]
        answers = {name: future.result() for name, future in waiting.items()}
    checks += [check_torch(answers["torch"]), check_deepspeed(answers["deepspeed"])]
    checks.append(check_tracking(answers["mlflow"], uri))
    checks.append(check_data(answers.get("data"), data))
    checks += [check_allocator(), check_slurm()]
    return {"ok": all(check.status != WRONG for check in checks), "checks": [asdict(check) for check in checks]}


def describe(report: dict[str, Any]) -> str:
    """The report as lines: one per check, the remedy below what is wrong, a verdict at the end."""
    lines = []
    for check in report["checks"]:
        lines.append(f"{check['status'].upper() if check['status'] == WRONG else check['status']:<6}"
                     f"{check['name']:<12}{check['found']}")  # fmt: skip
        if check["remedy"]:
            lines.append(f"{'':<18}-> {check['remedy']}")
    wrong = [check["name"] for check in report["checks"] if check["status"] == WRONG]
    lines.append(f"wrong: {', '.join(wrong)}" if wrong else "nothing that is needed is wrong")
    return "\n".join(lines)


def probe(name: str, argument: str) -> dict[str, Any]:
    """Ask `sci_launch.probe` in a process of its own: {"found": {...}} or {"error": why not}."""
    command = [sys.executable, "-W", "ignore", "-m", "sci_launch.probe", name, argument]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {_PROBE_SECONDS:g} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or ["it wrote nothing on stderr"])[-1]
        return {"error": f"the process ended with exit code {done.returncode}: {last}"}
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer


def check_python() -> Check:
    """The interpreter."""
    found = f"{platform.python_version()}, {sys.executable}, {platform.system()} {platform.machine()}"
    if sys.version_info[:2] < LEAST_PYTHON:
        need = ".".join(map(str, LEAST_PYTHON))
        return Check(name="python", status=WRONG, found=found, remedy=f"install Python {need} or newer")
    return Check(name="python", status=OK, found=found)


def check_packages() -> list[Check]:
    """Every package that sci-gpt needs, at the version that it asks for; in one line where all are right."""
    try:
        needs = metadata.requires("sci-gpt") or []
    except metadata.PackageNotFoundError:
        return [Check(name="packages", status=WRONG, found="sci-gpt is not installed", remedy=_INSTALL)]
    versions, wrong = {}, []
    for need in (need for need in needs if "extra ==" not in need):
        match = _REQUIREMENT.match(need)
        assert match is not None, f"pyproject.toml asks for {need!r}: only NAME>=VERSION is understood here"
        name, least = match.group(1), match.group(2)
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            wrong.append(Check(name=name, status=WRONG, found="not installed", remedy=_INSTALL))
            continue
        if least and _numbers(versions[name]) < _numbers(least):
            found = f"{versions[name]}, but sci-gpt needs {least} or newer"
            wrong.append(Check(name=name, status=WRONG, found=found, remedy=_INSTALL))
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    return [*wrong, Check(name="packages", status=OK if not wrong else INFO, found=listed)]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def check_processors() -> Check:
    """Cores that this process may use."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return Check(name="cores", status=INFO, found=f"{usable} usable of {os.cpu_count()}{load}")


def check_memory() -> Check:
    """Memory that is free for new processes: of the machine, and of this process' control group."""
    free = [_meminfo("MemAvailable"), _cgroup_free()]
    known = [value for value in free if value is not None]
    if not known:
        return Check(name="memory", status=INFO, found="this system does not say")
    found = f"{min(known) / 1e9:.1f} GB available, the quickstart needs {LEAST_MEMORY_BYTES / 1e9:g} GB"
    if min(known) < LEAST_MEMORY_BYTES:
        remedy = "end other programs, or run with --processes 1"
        return Check(name="memory", status=WRONG, found=found, remedy=remedy)
    return Check(name="memory", status=OK, found=found)


def _meminfo(key: str) -> int | None:
    path = Path("/proc/meminfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":")), None)


def _cgroup_free() -> int | None:
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if not limit.exists() or not used.exists():
        return None
    most = limit.read_text(encoding="utf-8").strip()
    return None if most == "max" else max(0, int(most) - int(used.read_text(encoding="utf-8")))


def check_disk(runs: Path) -> Check:
    """Room and the right to write where runs lie."""
    folder = runs.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    found = f"{free / 1e9:.1f} GB free where {runs} lies ({folder})"
    if free < LEAST_DISK_BYTES:
        remedy = f"make room, {LEAST_DISK_BYTES / 1e9:g} GB at least, or start in a folder on another disk"
        return Check(name="disk", status=WRONG, found=found, remedy=remedy)
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(b"x")
            file.flush()
    except OSError as error:
        remedy = "make it a folder that you may write to, or start in another folder"
        return Check(name="disk", status=WRONG, found=f"{folder} cannot be written to: {error.strerror}", remedy=remedy)
    return Check(name="disk", status=OK, found=found)


def check_ports() -> list[Check]:
    """Whether two processes could meet on loopback, and which of the usual ports are taken."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname(), 5.0):
            checks = [Check(name="loopback", status=OK, found="a port of 127.0.0.1 opens and answers")]
    except OSError as error:
        remedy = "bring up the loopback interface (`ip link set lo up`), or lift the limit on open files or sockets"
        checks = [Check(name="loopback", status=WRONG, found=f"no port of 127.0.0.1 opens: {error}", remedy=remedy)]
    for what, port in USUAL_PORTS.items():
        taken = "free" if port_is_free(port) else "taken: name another one where you need it"
        checks.append(Check(name="port", status=INFO, found=f"{port} ({what}) is {taken}"))
    return checks


def port_is_free(port: int) -> bool:
    """Whether a server could listen on this port of loopback."""
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


def check_torch(answer: dict[str, Any]) -> Check:
    """torch and its devices."""
    if "error" in answer:
        return Check(name="torch", status=WRONG, found=f"does not import: {answer['error']}", remedy=_INSTALL)
    found = answer["found"]
    devices = [f"{row['name']} ({row['memory_bytes'] / 2**30:.0f} GiB)" for row in found["accelerators"]]
    listed = ", ".join(devices) or "CPU only"
    build = f"CUDA {found['cuda_build']}" if found["cuda_build"] else "CPU build"
    text = f"{found['version']} ({build}), devices: {listed}, {found['cpu_threads']} CPU threads"
    return Check(name="torch", status=OK, found=text)


def check_deepspeed(answer: dict[str, Any]) -> Check:
    """DeepSpeed, which training needs."""
    if "error" in answer:
        return Check(name="deepspeed", status=WRONG, found=f"does not import: {answer['error']}", remedy=_INSTALL)
    return Check(name="deepspeed", status=OK, found=f"{answer['found']['version']} imports")


def _embedded_folder(uri: str) -> Path | None:
    """The database file of an embedded tracking store, None for a server."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def check_tracking(answer: dict[str, Any], uri: str) -> Check:
    """MLflow: the server that MLFLOW_TRACKING_URI names, or the embedded database."""
    database = _embedded_folder(uri)
    if "error" in answer:
        remedy = (
            f"move {database} away (a new one is made), or restore it" if database and database.exists() else
            _INSTALL if database else "start that server, or unset MLFLOW_TRACKING_URI to use the embedded database"
        )  # fmt: skip
        return Check(name="mlflow", status=WRONG, found=f"{uri} does not answer: {answer['error']}", remedy=remedy)
    if "uri" not in answer["found"]:
        return Check(name="mlflow", status=OK, found=f"{uri} is not there yet; the first run makes it")
    return Check(name="mlflow", status=OK, found=f"{uri} answers, {answer['found']['experiments']} experiments")


def check_data(answer: dict[str, Any] | None, data: Path) -> Check:
    """The packages that carry the quickstart's data."""
    if answer is None:
        found = f"no {data} here, so no package was looked for; start in the repository to check the quickstart's"
        return Check(name="data", status=INFO, found=found)
    problems: Sequence[str] = [answer["error"]] if "error" in answer else answer["found"]["missing"]
    if problems:
        return Check(name="data", status=WRONG, found="; ".join(problems), remedy=_INSTALL)
    return Check(name="data", status=OK, found=f"all {answer['found']['files']} files of {data} are installed")


def check_allocator() -> Check:
    """What memory allocator a run's processes would have: information only."""
    if found := left_alone():
        return Check(name="allocator", status=INFO, found=found)
    if (library := find()) is not None:
        return Check(name="allocator", status=INFO, found=f"jemalloc for the processes of a run: {library}")
    found = "the system's: on CPUs the memory of a run of thousands of steps grows (docs/faults.md)"
    return Check(name="allocator", status=INFO, found=found, remedy=INSTALL)


def check_slurm() -> Check:
    """Slurm's tools: information only."""
    have = [tool for tool in SLURM_TOOLS if shutil.which(tool)]
    found = f"{', '.join(have)} on PATH" if have else "not here (only `--on slurm` needs it)"
    return Check(name="slurm", status=INFO, found=found)
