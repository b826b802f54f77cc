"""`.ci/run` runs the make targets in order from an empty home, stops at the first failure and at its limit of time."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from planted_tree import write

MAKEFILE = """
install quickstart check test mutants:
	@echo "$@ CI=$$CI HOME=$$HOME entries=$$(ls -A $$HOME | wc -l) data=$$SCI_GPT_SAMPLE_DATA"
	@{command}
"""


SLURM = ("slurmctld", "slurmd", "munged", "sbatch")


def run(
    script: str, tree: Path, *, command: str = "true", data: str | None = None, path: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run this text as `.ci/run` of a tree whose make targets tell their environment and then run `command`."""
    write(tree / ".ci/run", script)
    (tree / ".ci/run").chmod(0o755)
    write(tree / "Makefile", MAKEFILE.format(command=command))
    environment = {name: value for name, value in os.environ.items() if name not in ("CI", "SCI_GPT_SAMPLE_DATA")}
    environment |= {"SCI_GPT_SAMPLE_DATA": data} if data else {}
    # Slurm counts as installed, so that no test installs it.
    environment["PATH"] = path or f"{programs(tree / 'bin', *SLURM)}:{os.environ['PATH']}"
    return subprocess.run([tree / ".ci/run"], env=environment, capture_output=True, text=True, timeout=60)


def programs(folder: Path, *names: str, text: str = "#!/bin/sh\n") -> Path:
    """A folder of programs that do what `text` says."""
    for name in names:
        write(folder / name, text)
        (folder / name).chmod(0o755)
    return folder


@pytest.fixture
def script(root: Path) -> str:
    """The text of `.ci/run`."""
    return (root / ".ci/run").read_text(encoding="utf-8")


def test_stages_in_order_from_an_empty_home(script: str, tmp_path: Path) -> None:
    (tmp_path / "shared/data").mkdir(parents=True)
    done = run(script, tmp_path / "tree")
    assert done.returncode == 0, done.stderr
    told = [line.split() for line in done.stdout.splitlines() if "CI=" in line]
    assert [words[0] for words in told] == ["install", "quickstart", "check", "test", "mutants"]
    assert {words[1] for words in told} == {"CI=true"}
    assert os.environ["HOME"] not in {words[2].removeprefix("HOME=") for words in told}
    assert {words[3] for words in told} == {"entries=0"}
    assert {words[4] for words in told} == {f"data={tmp_path / 'shared/data'}"}
    rows = [line.split()[0] for line in done.stdout.splitlines() if line.split()[1:] and line.split()[-1].isdigit()]
    assert rows == ["install", "quickstart", "check", "test", "mutants"]
    assert not Path(told[0][2].removeprefix("HOME=")).exists()


def test_the_first_failure_ends_it(script: str, tmp_path: Path) -> None:
    done = run(script, tmp_path, command='test "$@" != check')
    assert done.returncode != 0
    assert "failed in stage 'check'" in done.stderr
    assert "\ntest CI=" not in done.stdout


def test_named_sample_data_are_kept(script: str, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    done = run(script, tmp_path / "tree", data=str(tmp_path / "mine"))
    assert f"data={tmp_path / 'mine'}\n" in done.stdout


def test_it_stops_itself(script: str, tmp_path: Path) -> None:
    assert script.count("LIMIT_MINUTES=85\n") == 1
    done = run(script.replace("LIMIT_MINUTES=85\n", "LIMIT_MINUTES=0.02\n"), tmp_path, command="sleep 30")
    assert done.returncode == 124
    assert "stopped at its limit of 0.02 minutes" in done.stderr


NEEDED = "slurmctld slurmd slurm-client munge libjemalloc2"
INSTALL = f"install -y --no-install-recommends {NEEDED}"


@pytest.mark.parametrize(
    ("user", "fails", "calls", "have"),
    [
        (0, "nothing", [INSTALL], ""),
        (0, "nothing", [INSTALL], "Slurm"),
        (0, "install", [INSTALL, "update", INSTALL], ""),
        (1000, "nothing", [], ""),
        (0, "nothing", [], "Slurm and jemalloc"),
    ],
)
def test_what_is_missing_of_slurm_and_jemalloc_is_installed_or_said(
    script: str, tmp_path: Path, user: int, *, fails: str, calls: list[str], have: str
) -> None:
    tools, asked = tmp_path / "tools", tmp_path / "asked"
    programs(tools, "id", text=f"#!/bin/sh\necho {user}\n")
    programs(tools, "apt-get", text=f'#!/bin/sh\necho "$*" >>{asked}\n[ "$1" != {fails} ]\n')
    for tool in "env bash sh make mktemp mkdir realpath timeout rm dirname ls wc tail true".split():
        (tools / tool).symlink_to(shutil.which(tool) or f"{tool} is missing")
    if have:
        programs(tools, "slurmctld", "slurmd", "munged", "sbatch", text="#!/bin/sh\n")
        library = "libjemalloc.so.2 (libc6,x86-64)" if "jemalloc" in have else ""
        programs(tools, "ldconfig", text=f"#!/bin/sh\necho '{library}'\n")
    # There Slurm and ldconfig may be installed on this machine.
    done = run(script.replace("/usr/sbin:/sbin", "/nowhere"), tmp_path / "tree", path=str(tools))
    assert done.returncode == 0, done.stderr
    assert (asked.read_text().splitlines() if asked.exists() else []) == calls
    if calls == [INSTALL]:
        assert f".ci/run: installed {NEEDED}\n" in done.stdout
    elif "jemalloc" in have:
        assert "remedy" not in done.stderr
    else:
        assert "Slurm or jemalloc is missing" in done.stderr and f"remedy: install {NEEDED}" in done.stderr
