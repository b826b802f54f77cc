"""`make mutants`: breaks the product one line at a time, in a copy, and fails where the named test does not notice."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import types
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import pytest
import torch

from house_tree import FILES, FOLDERS, PACKAGES

ROOT = Path(__file__).resolve().parents[1]
FIELDS = {"name", "file", "old", "new", "test"}
WORKERS, SECONDS = 2, 300.0
OUTPUT = 20_000  # characters of pytest's output that are shown where a test of the unbroken product fails
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["pytest", "hypothesis", "pandas", "xarray", "scipy.signal", "torch", "matplotlib"])
# Prints where Python finds the packages: it must be the copy, whatever is installed beside it.
WHERE = "import sys, importlib; print(*(importlib.import_module(name).__file__ for name in sys.argv[1:]))"


class MutationError(ValueError):
    """The list is wrong: a key, a file, a text that is not there exactly once; or the copy is not what is imported."""


@dataclass(frozen=True, kw_only=True)
class Mutation:
    """One break: `old` becomes `new` in `file`, and `test` (a pytest node id) must fail."""

    name: str
    file: str
    old: str
    new: str
    test: str


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a test ended: passed, failed (pytest's exit code 1), or broken (no test found, a crash, too long)."""

    verdict: str
    seconds: float
    last_line: str
    output: str = ""


def read_mutations(path: Path, root: Path) -> tuple[Mutation, ...]:
    """The entries `[[mutation]]` of the list, each checked against the tree.

    Raises:
        MutationError: an unknown or missing key, a name used twice, a missing file, `old` not there exactly once.
    """
    with path.open("rb") as file:
        rows = tomllib.load(file).get("mutation", [])
    found: dict[str, Mutation] = {}
    for row in rows:
        if set(row) != FIELDS:
            raise MutationError(f"mutation {row.get('name')!r}: keys are {sorted(FIELDS)}, got {sorted(row)}")
        mutation = Mutation(**row)
        if mutation.name in found:
            raise MutationError(f"mutation {mutation.name!r} stands twice")
        for named in (mutation.file, mutation.test.split("::")[0]):
            if not (root / named).is_file():
                raise MutationError(f"mutation {mutation.name!r}: no file {named!r}")
        count = (root / mutation.file).read_text(encoding="utf-8").count(mutation.old)
        if count != 1 or mutation.old == mutation.new:
            what = f"`old` must differ from `new` and stand in {mutation.file} once, it stands there {count} times"
            raise MutationError(f"mutation {mutation.name!r}: {what}: {mutation.old!r}")
        found[mutation.name] = mutation
    if not found:
        raise MutationError(f"{path} lists no mutation")
    return tuple(found.values())


def copy_tree(root: Path, target: Path) -> None:
    """Copy the product (no `.venv`, `data`, `runs`, caches) and check that Python imports the copy.

    Raises:
        MutationError: a package would be imported from elsewhere.
    """
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", "*_cache", ".hypothesis")
    for name in FOLDERS:
        shutil.copytree(root / name, target / name, ignore=ignore)
    for name in FILES:
        shutil.copy2(root / name, target / name)
    command = [sys.executable, "-c", WHERE, *PACKAGES.values()]
    answer = subprocess.run(command, cwd=target, env=environment(target), capture_output=True, text=True, check=True)
    outside = [path for path in answer.stdout.split() if not Path(path).resolve().is_relative_to(target.resolve())]
    if outside:
        raise MutationError(f"Python imports {outside}, not the copy in {target}")


def environment(tree: Path) -> dict[str, str]:
    """The process environment in which the packages of `tree` come before installed ones."""
    homes = [str(tree / folder) for folder in PACKAGES]
    return os.environ | {"PYTHONPATH": os.pathsep.join(homes), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}


def run_tests(tree: Path, nodes: Sequence[str]) -> Outcome:
    """Run pytest on these node ids in `tree`, at most `SECONDS` long for each of them.

    In a process forked from one that has imported the libraries: most of the tests are shorter than those imports.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutant-") as scratch:
        output = Path(scratch) / "output.txt"
        child = FORKS.Process(target=_pytest, args=(tree, list(nodes), output))
        child.start()
        child.join(SECONDS * len(nodes))
        if child.exitcode is None:
            assert child.pid is not None
            os.killpg(child.pid, signal.SIGKILL)  # its own session: the test and the processes that it started
            child.join()
            return Outcome(verdict="broken", seconds=time.monotonic() - began, last_line="took too long")
        text = output.read_text(encoding="utf-8", errors="replace")
    lines = [line for line in text.splitlines() if line.strip()]
    verdict = {0: "passed", 1: "failed"}.get(child.exitcode, "broken")
    told = next((line for line in lines if line.startswith(("FAILED", "ERROR"))), lines[-1] if lines else "no output")
    return Outcome(verdict=verdict, seconds=time.monotonic() - began, last_line=told, output=text)


def _pytest(tree: Path, nodes: Sequence[str], output: Path) -> None:
    """In a forked process: pytest in `tree`, its packages and test modules first, everything said into a file."""
    os.setsid()
    with output.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(tree)
    os.environ.update(environment(tree))
    torch.set_num_threads(1)
    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [str(tree / folder) for folder in PACKAGES] + [path for path in sys.path if path != here]
    for name in [name for name, module in sys.modules.items() if str(getattr(module, "__file__", "")).startswith(here)]:
        del sys.modules[name]
    sys.modules["__main__"] = types.ModuleType("__main__")  # processes that a test spawns need not import this script
    sys.exit(pytest.main(["-q", "-x", "--no-header", "-p", "no:cacheprovider", *nodes]))


def run_mutation(tree: Path, mutation: Mutation) -> Outcome:
    """Apply one break to `tree`, run its test, and put the file back."""
    path = tree / mutation.file
    good = path.read_text(encoding="utf-8")
    path.write_text(good.replace(mutation.old, mutation.new), encoding="utf-8")
    try:
        return run_tests(tree, [mutation.test])
    finally:
        path.write_text(good, encoding="utf-8")


def shared_out(nodes: Sequence[str]) -> list[list[str]]:
    """The tests without repetition, one share per worker; a file's tests (and so its fixtures) stay together."""
    files: dict[str, list[str]] = {}
    for node in dict.fromkeys(nodes):
        files.setdefault(node.split("::")[0], []).append(node)
    shares: list[list[str]] = [[] for _ in range(WORKERS)]
    for own in sorted(files.values(), key=len, reverse=True):
        min(shares, key=len).extend(own)
    return [share for share in shares if share]


def run_all(mutations: Sequence[Mutation], root: Path) -> dict[str, Outcome]:
    """The outcome of every mutation's test, two at a time, each worker in a copy of its own.

    Raises:
        MutationError: a named test does not pass on the unbroken product.
    """
    with tempfile.TemporaryDirectory(prefix="mutants-") as scratch:
        trees: SimpleQueue[Path] = SimpleQueue()
        for number in range(WORKERS):
            copy_tree(root, Path(scratch) / str(number))
            trees.put(Path(scratch) / str(number))
        shares = shared_out([mutation.test for mutation in mutations])
        with ThreadPoolExecutor(WORKERS) as pool:
            wholes = list(pool.map(lambda i: run_tests(Path(scratch) / str(i), shares[i]), range(len(shares))))
        for nodes, whole in zip(shares, wholes, strict=True):
            print(f"unbroken: {len(nodes)} tests {whole.verdict} in {whole.seconds:.1f} s", flush=True)
            if whole.verdict != "passed":
                print(whole.output[-OUTPUT:], flush=True)
                raise MutationError(f"the named tests must pass on the unbroken product: {whole.last_line}")

        def work(mutation: Mutation) -> Outcome:
            tree = trees.get()
            try:
                outcome = run_mutation(tree, mutation)
            finally:
                trees.put(tree)
            print(f"{_noticed(outcome):<9} {outcome.seconds:>6.1f} s  {mutation.name}", flush=True)
            return outcome

        with ThreadPoolExecutor(WORKERS) as pool:
            outcomes = list(pool.map(work, mutations))
    return {mutation.name: outcome for mutation, outcome in zip(mutations, outcomes, strict=True)}


def main(arguments: Sequence[str]) -> int:
    """Run the list, or those mutations whose name holds `--only`. Returns 0 where every break was noticed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--list", type=Path, default=ROOT / "tests" / "mutations.toml", help="the list of mutations")
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository")
    parser.add_argument("--only", default="", help="run only mutations whose name holds this")
    parsed = parser.parse_args(arguments)
    try:
        mutations = [row for row in read_mutations(parsed.list, parsed.root) if parsed.only in row.name]
        outcomes = run_all(mutations, parsed.root)
    except MutationError as error:
        print(f"mutants: {error}", file=sys.stderr)
        return 2
    missed = {name: outcome for name, outcome in outcomes.items() if outcome.verdict != "failed"}
    for name, outcome in missed.items():
        print(f"not noticed: {name}: the test {outcome.verdict}: {outcome.last_line}")
    print(f"{len(outcomes) - len(missed)} of {len(outcomes)} mutations noticed")
    return 1 if missed else 0


def _noticed(outcome: Outcome) -> str:
    return {"failed": "noticed", "passed": "MISSED"}.get(outcome.verdict, outcome.verdict)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
