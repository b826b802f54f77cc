"""One start of a drilled run: `sci-gpt pretrain` in a process of its own, its workers, its log, what it printed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, ClassVar, Self

from sci_gpt.config import PretrainConfig
from sci_gpt.config_file import show_config
from sci_gpt.parallel.worker import read_refusal
from sci_gpt.train.run_folder import LOG, read_lines, write_whole
from sci_launch.drill_place import DrillError, Place, Worker

_LOOK_SECONDS = 0.005
_RESUMED = re.compile(r"^resumes from .*step-(\d+)$", re.MULTILINE)


def logged(run: Path) -> int:
    """Steps in a run's log, where one stands when the next has begun."""
    return max((record["step"] for record in read_lines(run / LOG)), default=0)


def completed(run: Path) -> int:
    """Steps that a run has completed: a rank notes its samples right after the update."""
    noted = [record["step"] for path in (run / "keys").glob("rank-*.jsonl") for record in read_lines(path)]
    return max([logged(run), *noted])


@dataclass(frozen=True, kw_only=True)
class Start:
    """A run's launcher process, which has a session of its own, and the file that takes what it prints.

    Attributes:
        patience_seconds: after that a run that has not ended is killed.
    """

    alive: ClassVar[list[Start]] = []

    config: PretrainConfig
    place: Place
    process: subprocess.Popen[bytes]
    output: Path
    patience_seconds: float

    @classmethod
    def begin(
        cls, config: PretrainConfig, *, place: Place, patience_seconds: float, poisoned: int | None = None
    ) -> Self:
        """Start a run there, or go on with it, as a user or a scheduler would; `poisoned`: the sample of infinities."""
        run = config.output
        run.parent.mkdir(parents=True, exist_ok=True)
        path = run.parent / f"{run.name}.yaml"
        write_whole(path, show_config(config))
        number = len(list(run.parent.glob(f"{run.name}-start-*.txt"))) + 1
        output = run.parent / f"{run.name}-start-{number}.txt"
        with output.open("wb") as file:
            process = subprocess.Popen(
                place.command(config, path, name=output.with_suffix(""), poisoned=poisoned),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | {"PYTHONUNBUFFERED": "1"} | place.environment(),
            )
        start = cls(config=config, place=place, process=process, output=output, patience_seconds=patience_seconds)
        cls.alive.append(start)
        return start

    @classmethod
    def end_all(cls) -> list[str]:
        """Kill every run that is still there: a drill that ends early leaves none behind. What could not be ended."""
        left = []
        for start in cls.alive:
            try:
                if start.process.poll() is None:
                    start.kill()
            except DrillError as error:
                left.append(f"{start.name.name} could not be ended: {error}")
        cls.alive.clear()
        return left

    @property
    def text(self) -> str:
        """What it has printed so far."""
        return self.output.read_text(encoding="utf-8", errors="replace")

    @property
    def resumed_from(self) -> int | None:
        """The step of the checkpoint that it says it goes on from."""
        found = _RESUMED.search(self.text)
        return int(found.group(1)) if found else None

    @property
    def name(self) -> Path:
        """Of this start, as its place knows it."""
        return self.output.with_suffix("")

    def refusal(self) -> str:
        """Why it ended with exit code 2: a worker's own words, or the last line."""
        refusals = [error for line in self.text.splitlines() if (error := read_refusal(line)) is not None]
        return str(refusals[0]) if refusals else self.last_lines(1)

    def workers(self) -> list[Worker]:
        """The worker processes, by rank.

        Raises:
            DrillError: not all of them are there.
        """
        ranks, size = self.place.workers(self.process, self.name), self.config.parallel.processes
        if sorted(ranks) != list(range(size)):
            raise DrillError(f"{size} workers were expected, ranks {sorted(ranks)} are there; see {self.output}")
        return [ranks[rank] for rank in range(size)]

    def terminate(self) -> None:
        """SIGTERM, as a scheduler sends it."""
        self.place.terminate(self.process, self.name)

    def wait_for_step(self, step: int) -> float:
        """Wait until the log holds a step at least this far; the time (monotonic seconds) of that.

        Raises:
            DrillError: the run ends before it, or all steps are done already, or it takes too long.
        """
        deadline = time.monotonic() + self.patience_seconds
        log = self.config.output / LOG
        while time.monotonic() < deadline:
            ended = self.process.poll() is not None
            if log.exists() and log.stat().st_size and logged(self.config.output) >= step:
                return time.monotonic()
            if ended:
                raise DrillError(f"the run ended before step {step}: {self.last_lines()}")
            time.sleep(_LOOK_SECONDS)
        self.kill()
        raise DrillError(f"step {step} was not reached in {self.patience_seconds:.0f} s; see {self.output}")

    def wait_for_new_step(self, done: int) -> float:
        """Wait until a run that was started again has a step beyond `done`; the time of that.

        Before it goes on, its log may still hold what the last start wrote and a checkpoint does not: no step counts
        until it has said where it resumes, and the log is cut back by then.

        Raises:
            DrillError: as `wait_for_step`.
        """
        deadline = time.monotonic() + self.patience_seconds
        while self.resumed_from is None and self.process.poll() is None and time.monotonic() < deadline:
            time.sleep(_LOOK_SECONDS)
        return self.wait_for_step(done + 1)

    def wait_for_file(self, path: Path) -> None:
        """Wait until a file is there.

        Raises:
            DrillError: the run ends without it, or it takes too long.
        """
        deadline = time.monotonic() + self.patience_seconds
        while not path.exists():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise DrillError(f"{path} did not come: {self.last_lines()}")
            time.sleep(_LOOK_SECONDS)

    def wait(self, *, code: int | None = None) -> int:
        """Wait for the end; the exit code, which must be `code` where that is given.

        Raises:
            DrillError: another code, or it takes too long.
        """
        try:
            found = self.process.wait(self.patience_seconds)
        except subprocess.TimeoutExpired as error:
            self.kill()
            raise DrillError(f"the run did not end in {self.patience_seconds:.0f} s; see {self.output}") from error
        if code is not None and found != code:
            raise DrillError(f"exit code {found}, not {code}: {self.last_lines()}")
        return found

    def wait_for_failure(self) -> None:
        """Wait for the end, with the exit code that its place has where a worker failed.

        Raises:
            DrillError: as `wait`.
        """
        if self.wait(code=self.place.failure) == 0:
            raise DrillError(f"exit code 0, though a worker failed: {self.last_lines()}")

    def last_lines(self, count: int = 3) -> str:
        """The end of what it printed, in one line."""
        return f"{' / '.join(self.text.strip().splitlines()[-count:])} (in {self.output})"

    def kill(self) -> None:
        """SIGKILL for the launcher and for every worker: nobody is asked."""
        self.place.kill(self.process, self.name)


class TrackingServer:
    """An MLflow server on this machine only, which can be killed and started again on the same data and port."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port = folder, port
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None

    @property
    def uri(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, and wait until it answers.

        Raises:
            DrillError: it does not in five minutes.
        """
        # Imported here: only this fault needs them.
        import urllib.error
        import urllib.request

        self.folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", f"sqlite:///{self.folder.absolute()}/mlflow.db", "--workers", "1"]
        command += ["--artifacts-destination", str(self.folder.absolute() / "artifacts")]
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        self._log = (self.folder / "server.txt").open("ab")
        self._process = subprocess.Popen(
            command, stdout=self._log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        deadline = time.monotonic() + 300.0
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=5.0):
                    return
            except (OSError, urllib.error.URLError):
                time.sleep(0.1)
        self.kill()
        raise DrillError(f"no MLflow server answers at {self.uri}; see {self.folder / 'server.txt'}")

    def kill(self) -> None:
        """SIGKILL for the server and its own processes."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
        if self._log is not None:
            self._log.close()
            self._log = None
