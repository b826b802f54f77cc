"""The local launcher: environment of workers, signals passed on, refusals said once, crashes with their last lines."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import pytest

from sci_gpt.errors import CheckpointError, DataError
from sci_launch import local
from sci_launch.local import WorkerFailure, run_workers


@pytest.fixture(autouse=True)
def workers_find_their_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


def run(folder: Path, how: str, *, processes: int = 2) -> None:
    run_workers(["local_worker", str(folder), how], processes=processes, threads=3, meeting_place=folder / "meet")


def test_workers_know_their_place_and_warnings_pass_through(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, "end")
    assert [(tmp_path / f"started-{rank}").read_text() for rank in (0, 1)] == ["2 3", "2 3"]
    assert sorted(capfd.readouterr().err.splitlines()) == ["warning: rank 0 ends", "warning: rank 1 ends"]


def test_workers_have_the_allocator_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "preload", lambda: {"LD_PRELOAD": "libm.so.6"})
    run(tmp_path, "end")
    assert [(tmp_path / f"preload-{rank}").read_text() for rank in (0, 1)] == ["libm.so.6"] * 2


def test_a_refusal_comes_back_once_as_what_it_was(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match="^no store at 'data/x'; build it$"):
        run(tmp_path, "refuse")
    assert capfd.readouterr().err == ""


def test_a_full_disk_is_a_refusal(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no space left on the disk while writing 'runs/x/log.jsonl'"):
        run(tmp_path, "full", processes=1)


def test_a_crash_ends_the_others_and_shows_its_last_lines(tmp_path: Path) -> None:
    with pytest.raises(WorkerFailure, match=r"(?s)rank 1 of 2 ended with exit code 1.*one divided by nothing"):
        run(tmp_path, "crash")
    assert (tmp_path / "ended-0").read_text() == "True", "rank 0 must be asked to stop, not left waiting"


def test_a_crash_below_python_is_shown_with_all_its_lines(tmp_path: Path) -> None:
    with pytest.raises(WorkerFailure, match=r"(?s)^rank 1 of 2 was killed by SIGABRT; .*line 0 of a.*line 149 of a"):
        run(tmp_path, "abort")


def ended(rank: int, code: int, *lines: str, sent: Sequence[int] = ()) -> local._Worker:
    """A worker that has ended so, and said that."""
    process: Any = SimpleNamespace(returncode=code, poll=lambda: code)
    return local._Worker(
        rank=rank, process=process, reader=threading.Thread(), lines=deque(lines), refusals=[], sent=set(sent)
    )


def test_ranks_that_fail_together_are_all_shown() -> None:
    """The one that was killed comes first, and does not hide what the other said: it may have died of its loss."""
    workers = [ended(0, 1, "one divided by nothing"), ended(1, -6, "aborted")]
    assert str(local._failure(local._failed(workers), workers)) == (
        "rank 1 of 2 was killed by SIGABRT; its last lines:\naborted\n"
        "rank 0 of 2 ended with exit code 1; its last lines:\none divided by nothing"
    )


def test_ranks_that_fail_later_are_shown_in_a_line_but_for_those_that_were_ended_from_here() -> None:
    crash = ["terminate called after throwing", "  what():  no such device", "Fatal Python error: Aborted", "Extension"]
    workers = [
        ended(0, 1, "connection closed by peer"),
        ended(1, -6, *crash),
        ended(2, -9),
        ended(3, -15, "stopped", sent=[signal.SIGTERM]),
        ended(4, 0, "a warning"),
    ]
    assert str(local._failure(workers[:1], workers)).splitlines()[2:] == [
        "then rank 1 of 5 was killed by SIGABRT: terminate called after throwing; what():  no such device; "
        "Fatal Python error: Aborted",
        "then rank 2 of 5 was killed by SIGKILL: (it wrote nothing on stderr)",
    ]


def test_a_rank_that_fails_after_the_others_lost_it_is_shown_too(tmp_path: Path) -> None:
    found = (
        r"(?s)^rank 0 of 2 ended .*closed by peer\nthen rank 1 of 2 ended with exit code 1: .*one divided by nothing$"
    )
    with pytest.raises(WorkerFailure, match=found):
        run(tmp_path, "lost")


def worker(*lines: str, stdout: IO[str] | int = subprocess.DEVNULL) -> subprocess.Popen[str]:
    """A worker process of these lines of Python, which Python's own end would abort; its output has a buffer."""
    head = [
        "import atexit, os, threading, time",
        "from sci_gpt.parallel.worker import leaving",
        "atexit.register(os.abort)",
    ]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-c", "\n".join([*head, *lines])]
    return subprocess.Popen(command, env=buffered, stdout=stdout, stderr=subprocess.PIPE, text=True)


def test_nothing_comes_after_the_work_of_a_worker() -> None:
    """An error there would end with the work's exit code, 0."""
    done = worker("with leaving(): pass", "raise ValueError('after the work')")
    assert done.communicate()[1] == "" and done.returncode == 0


def test_a_request_to_stop_that_comes_too_late_ends_nothing(tmp_path: Path) -> None:
    """While threads are waited for."""
    begun, ends = tmp_path / "begun", tmp_path / "ends"
    late = f"lambda: (open({str(begun)!r}, 'w').close(), time.sleep(0.5), open({str(ends)!r}, 'w').close())"
    process = worker("with leaving():", f"    threading.Timer(0.2, {late}).start()")
    deadline = time.monotonic() + 60
    while not begun.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.terminate()
    process.communicate()
    assert process.returncode == 0 and ends.exists()


def test_a_worker_whose_output_cannot_be_written_says_so() -> None:
    with Path("/dev/full").open("w") as full:
        done = worker("with leaving(): print('x')", stdout=full)
    done.communicate()
    assert done.returncode == 120


def test_a_worker_ends_with_its_code_and_without_pythons_end(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Python's own end aborts it, as a thread of gloo may; what it still has to do is done before."""
    with pytest.raises(WorkerFailure, match="^rank 1 of 2 ended with exit code 7; "):
        run(tmp_path, "past")
    for rank in (0, 1):
        assert (tmp_path / f"registered-{rank}").exists() and (tmp_path / f"thread-{rank}").exists()
        assert (tmp_path / f"log-{rank}").read_text() == "kept until the end\n"
    assert capfd.readouterr().out == "not yet written" * 2


def test_a_signal_reaches_every_worker_also_while_they_start(tmp_path: Path) -> None:
    def interrupt() -> None:
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    run(tmp_path, "late")
    thread.join()
    assert [(tmp_path / f"ended-{rank}").read_text() for rank in (0, 1)] == ["True", "True"]
