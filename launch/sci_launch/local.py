"""Local launcher: starts the processes of a run here, passes signals on, and ends the others when one dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO

from sci_gpt.config import PretrainConfig
from sci_gpt.config_file import show_config
from sci_gpt.data.store import Store
from sci_gpt.errors import SciGptError
from sci_gpt.parallel.worker import PARENT_VARIABLE, PASSED_ON, RENDEZVOUS_VARIABLE, read_refusal
from sci_gpt.train.run_folder import read_complete
from sci_launch.allocator import preload

WORKER = "sci_gpt.recipes.pretrain"
_POLL_SECONDS = 0.05
_GRACE_SECONDS = 15.0
_LAST_LINES, _OF_OTHERS = 200, 40  # a crash below Python shows the stack of every thread
_NOTHING = "(it wrote nothing on stderr)"
_CRASHED = ("terminate called", "what():", "Fatal Python error")


class WorkerFailure(RuntimeError):
    """A worker crashed or was killed; the message holds its rank, how it ended and its last lines on stderr."""


def pretrain(config: PretrainConfig) -> int:
    """Run `recipes/pretrain.py` on `parallel.processes` local processes; a run that is complete is left as it is.

    Returns:
        0: the run is complete, or was asked to stop and saved (then `requeue` stands in the run folder).

    Raises:
        DataError: no store; then no process is started.
        SciGptError: what a worker refused, in its own class and words.
        WorkerFailure: a worker crashed.
    """
    complete = read_complete(config.output)
    if complete is not None and complete["step"] >= config.schedule.steps:
        print(
            f"{config.output} is complete: {complete['step']} steps, {complete['checkpoint']}; nothing to train",
            flush=True,
        )
        return 0
    Store.open(config.data)  # where there is none, say so at once and once
    with tempfile.TemporaryDirectory(prefix="sci-gpt-") as folder:
        resolved = Path(folder) / "config.yaml"
        resolved.write_text(show_config(config), encoding="utf-8")
        run_workers(
            [WORKER, str(resolved)],
            processes=config.parallel.processes,
            threads=config.parallel.threads_per_process,
            meeting_place=Path(folder) / "rendezvous",
        )
    return 0


def describe(config: PretrainConfig) -> str:
    """What `pretrain` would start here, for `sci-gpt launch --on local --dry-run`."""
    parallel = config.parallel
    return (
        f"would start {parallel.processes} processes of `{sys.executable} -m {WORKER} CONFIG` here, "
        f"{parallel.threads_per_process} threads each; output {config.output}, data {config.data}, with CONFIG:\n"
        f"{show_config(config)}"
    ).rstrip()


def run_workers(module: Sequence[str], *, processes: int, threads: int, meeting_place: Path) -> None:
    """Start `python -m module...` as ranks 0 .. processes - 1 and wait until all have ended.

    SIGTERM, SIGINT and SIGUSR1 to this process go on to every worker once each, SIGUSR2 (save) each time to the first,
    which tells the others (a worker starts with them blocked, and unblocks them when it listens:
    `train.signals.Requests`); a worker that fails ends the others, first politely.
    Workers share the terminal's output; their stderr passes through here.

    Args:
        module: module name and its arguments.
        processes, threads: how many, and CPU threads in each.
        meeting_place: a file name, not yet there, through which the ranks find each other.

    Raises:
        SciGptError, WorkerFailure: see `pretrain`.
    """
    workers: list[_Worker] = []
    with _passing_on(workers):
        signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
        for rank in range(processes):
            workers.append(
                _Worker.start(module, rank=rank, size=processes, threads=threads, meeting_place=meeting_place)
            )
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
        failed = _wait(workers)
        for worker in workers:
            worker.reader.join()
    if failed:
        raise _failure(failed, workers)


@dataclass(frozen=True, kw_only=True)
class _Worker:
    """One process, its last lines on stderr, and what it refused."""

    rank: int
    process: subprocess.Popen[bytes]
    reader: threading.Thread
    lines: deque[str]
    refusals: list[SciGptError]
    sent: set[int] = field(default_factory=set)

    @classmethod
    def start(cls, module: Sequence[str], *, rank: int, size: int, threads: int, meeting_place: Path) -> _Worker:
        environment = {
            **os.environ,
            **preload(),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "OMP_NUM_THREADS": str(threads),
            RENDEZVOUS_VARIABLE: str(meeting_place),
            PARENT_VARIABLE: str(os.getpid()),
            "PYTHONUNBUFFERED": "1",
        }
        # A session of its own: Ctrl-C in the terminal reaches this process only, which passes it on once.
        process = subprocess.Popen(
            [sys.executable, "-m", *module], env=environment, stderr=subprocess.PIPE, start_new_session=True
        )
        assert process.stderr is not None
        lines: deque[str] = deque(maxlen=_LAST_LINES)
        refusals: list[SciGptError] = []
        reader = threading.Thread(
            target=_read, args=(process.stderr, lines), kwargs={"refusals": refusals}, daemon=True
        )
        reader.start()
        return cls(rank=rank, process=process, reader=reader, lines=lines, refusals=refusals)

    def send(self, number: int) -> None:
        """Send a signal where the process still runs."""
        if self.process.poll() is None:
            self.sent.add(number)
            self.process.send_signal(number)

    @property
    def end(self) -> str:
        """How it ended."""
        code = self.process.returncode
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    @property
    def reason(self) -> str:
        """In one line: what a crash below Python says, else the last line."""
        crash = [line.strip() for line in self.lines if line.strip().startswith(_CRASHED)]
        return "; ".join(crash or [*self.lines][-1:]) or _NOTHING


def _failure(failed: Sequence[_Worker], workers: Sequence[_Worker]) -> Exception:
    """What the end of these workers means for the caller; a refusal of any rank says more than the end of another."""
    for worker in (*failed, *workers):
        if worker.refusals:
            return worker.refusals[0]
    size, told = len(workers), list[str]()
    for worker in failed:
        lines = [*worker.lines][-(_OF_OTHERS if told else _LAST_LINES) :]
        told.append("\n".join([f"rank {worker.rank} of {size} {worker.end}; its last lines:", *(lines or [_NOTHING])]))
    for worker in _failed(workers):
        # One that the others lost may take longer to end than they.
        if worker.rank not in {one.rank for one in failed} and -worker.process.returncode not in worker.sent:
            told.append(f"then rank {worker.rank} of {size} {worker.end}: {worker.reason}")
    return WorkerFailure("\n".join(told))


def _read(stream: IO[bytes], lines: deque[str], *, refusals: list[SciGptError]) -> None:
    """Pass warnings on as they come; keep a refusal (the caller says it once) and the last lines."""
    for raw in stream:
        line = raw.decode(errors="replace").rstrip("\n")
        refusal = read_refusal(line)
        if refusal is not None:
            refusals.append(refusal)
        else:
            lines.append(line)
            if line.startswith("warning: "):
                print(line, file=sys.stderr, flush=True)


def _wait(workers: Sequence[_Worker]) -> list[_Worker]:
    """Wait for all; returns those that failed first. The others are asked to end, and killed after a grace."""
    first: list[_Worker] = []
    deadline = float("inf")
    while any(worker.process.poll() is None for worker in workers):
        if not first and (first := _failed(workers)):
            deadline = time.monotonic() + _GRACE_SECONDS
            for worker in workers:
                worker.send(signal.SIGTERM)
        if time.monotonic() > deadline:
            for worker in workers:
                worker.send(signal.SIGKILL)
        time.sleep(_POLL_SECONDS)
    return first or _failed(workers)


def _failed(workers: Sequence[_Worker]) -> list[_Worker]:
    """Those that have ended with an error; what was killed comes first, as it says more than those that lost it."""
    failed = [worker for worker in workers if worker.process.poll() not in (None, 0)]
    return sorted(failed, key=lambda worker: worker.process.returncode >= 0)


@contextmanager
def _passing_on(workers: list[_Worker]) -> Iterator[None]:
    """Send signals on to the workers, once each; end them where this process is ended by an error."""
    sent: set[int] = set()

    def pass_on(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR2:
            for worker in workers[:1]:
                worker.send(number)
        elif number not in sent:
            sent.add(number)
            for worker in workers:
                worker.send(number)

    before = {number: signal.signal(number, pass_on) for number in PASSED_ON}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for worker in workers:
            worker.send(signal.SIGKILL)
