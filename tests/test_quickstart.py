"""The quickstart's driver: stages in order, a stop at the first failure, and memory summed over a stage's processes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from sci_launch import quickstart
from sci_launch.quickstart import Stage

MIB = 2**20
# A process with a child, each of which writes to 64 MiB of its own.
TWO_PROCESSES = """
import subprocess, sys, time
code = "import time; block = bytearray(b'x') * (64 * 2**20); time.sleep(1.5)"
child = subprocess.Popen([sys.executable, "-c", code])
exec(code)
child.wait()
"""


def stage(name: str, code: str) -> Stage:
    """A stage that runs this Python code."""
    return Stage(name=name, command=(sys.executable, "-c", code), output=f"runs/{name}")


def test_memory_is_summed_over_processes() -> None:
    alone = quickstart.run_stage(stage("small", "import time; time.sleep(0.8)"))
    both = quickstart.run_stage(stage("two", TWO_PROCESSES))
    assert both.code == 0
    assert both.seconds > 1.5
    # two blocks of 64 MiB on top of two interpreters of at least the small stage's size, less what they share
    assert 128 * MIB < both.peak_bytes < (128 + 60) * MIB + 2 * alone.peak_bytes


def test_a_shared_page_counts_once() -> None:
    """Four forked children share the parent's 100 MiB: the sum of resident sizes would be 500 MiB."""
    code = (
        "import os, time\nblock = bytearray(b'x') * (100 * 2**20)\n"
        "for _ in range(4):\n    if os.fork() == 0:\n        time.sleep(1.2)\n        os._exit(0)\n"
        "for _ in range(4):\n    os.wait()\n"
    )
    cost = quickstart.run_stage(stage("forks", code))
    assert 100 * MIB < cost.peak_bytes < 250 * MIB


def test_the_first_failure_stops_the_rest(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    mark = tmp_path / "ran"
    todo = (
        stage("first", "print('hello', flush=True)"),
        stage("second", "import sys; sys.exit(7)"),
        stage("third", f"open({str(mark)!r}, 'w')"),
    )
    assert quickstart.run(todo) == 7
    told = capfd.readouterr().out
    assert not mark.exists()
    assert told.index("=== first") < told.index("hello") < told.index("=== second")
    rows = {line.split()[0]: line for line in told.splitlines() if line.startswith(("first", "second", "third", "all"))}
    assert rows["first"].endswith("runs/first")
    assert rows["second"].endswith("failed with exit code 7")
    assert rows["third"].endswith("not run")


def test_a_stage_ended_by_a_signal_fails() -> None:
    assert quickstart.run((stage("killed", f"import os; os.kill(os.getpid(), {9})"),)) == 128 + 9


def test_the_stages_name_files_that_exist(root: Path) -> None:
    todo = quickstart.stages()
    assert [row.name for row in todo] == ["build", "pretrain", "control", "evaluate", "forecast"]
    for row in todo:
        assert os.access(row.command[0], os.X_OK)
        assert all((root / word).is_file() for word in row.command if word.endswith(".yaml"))
