"""The mutants runner tells a noticed break from a missed one, and refuses a list that proves nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

import run_mutants
from planted_tree import plant, write

PRODUCT = '"""Adds."""\n\n\ndef add(a: int, b: int) -> int:\n    """The sum."""\n    return a + b\n'
TESTS = '"""Adds."""\nfrom sci_gpt.data.sums import add\n\n\ndef test_strong(): assert add(2, 3) == 5\n'
TESTS += "def test_weak(): assert add(0, 0) == 0\ndef test_wrong(): assert add(1, 1) == 3\n"
ROW = '[[mutation]]\nname = "{name}"\nfile = "sci_gpt/data/sums.py"\nold = "{old}"\nnew = "{new}"\n'
ROW += 'test = "tests/test_sums.py::{test}"\n'
MINUS = {"old": "a + b", "new": "a - b"}


def list_of(root: Path, *rows: dict[str, str]) -> Path:
    """A repository with one function and three tests, and a list of these mutations."""
    plant(root)
    write(root / "sci_gpt/data/sums.py", PRODUCT)
    write(root / "tests/test_sums.py", TESTS)
    write(root / "tests/mutations.toml", "# A list.\n" + "".join(ROW.format(**row) for row in rows))
    return root / "tests/mutations.toml"


def test_a_missed_break_fails_the_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    strong = {"name": "minus", "test": "test_strong", **MINUS}
    weak = {"name": "minus, hardly tested", "test": "test_weak", **MINUS}
    syntax = {"name": "no Python", "test": "test_strong", "old": "a + b", "new": "a +"}
    path = list_of(tmp_path, strong, weak, syntax)
    assert run_mutants.main(["--list", str(path), "--root", str(tmp_path)]) == 1
    told = capfd.readouterr().out.splitlines()
    assert told[-1] == "1 of 3 mutations noticed"
    assert "not noticed: minus, hardly tested: the test passed: 1 passed" in told[-3]
    assert "not noticed: no Python: the test broken" in told[-2]
    assert (tmp_path / "sci_gpt/data/sums.py").read_text() == PRODUCT
    assert run_mutants.main(["--list", str(path), "--root", str(tmp_path), "--only", "minus"]) == 1


def test_all_noticed(tmp_path: Path) -> None:
    path = list_of(tmp_path, {"name": "minus", "test": "test_strong", **MINUS})
    assert run_mutants.main(["--list", str(path), "--root", str(tmp_path)]) == 0


def test_a_test_that_fails_unbroken_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = list_of(tmp_path, {"name": "minus", "test": "test_wrong", **MINUS})
    assert run_mutants.main(["--list", str(path), "--root", str(tmp_path)]) == 2
    told = capfd.readouterr()
    assert "must pass on the unbroken product" in told.err
    assert "def test_wrong(): assert add(1, 1) == 3" in told.out, "what pytest said of it must be shown"


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"old": "a * b", "new": "a"}, "it stands there 0 times"),
        ({"old": "a", "new": "b"}, "it stands there 3 times"),
        ({"old": "a + b", "new": "a + b"}, "`old` must differ"),
        ({"old": "a + b", "new": "a - b", "name": "first"}, "stands twice"),
    ],
)
def test_a_list_that_proves_nothing_is_refused(row: dict[str, str], complaint: str, tmp_path: Path) -> None:
    first = {"name": "first", "test": "test_strong", **MINUS}
    path = list_of(tmp_path, first, {"name": "second", "test": "test_strong", **row})
    with pytest.raises(run_mutants.MutationError, match=complaint):
        run_mutants.read_mutations(path, tmp_path)


def test_a_mutation_names_every_field(tmp_path: Path) -> None:
    path = list_of(tmp_path)
    with pytest.raises(run_mutants.MutationError, match="lists no mutation"):
        run_mutants.read_mutations(path, tmp_path)
    write(path, '[[mutation]]\nname = "half"\n')
    with pytest.raises(run_mutants.MutationError, match="'half': keys are"):
        run_mutants.read_mutations(path, tmp_path)


def test_a_copy_that_is_not_imported_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    list_of(tmp_path / "tree")
    elsewhere = tmp_path / "elsewhere"
    write(elsewhere / "sci_evals/__init__.py", "")
    good = run_mutants.environment

    def shadowed(tree: Path) -> dict[str, str]:
        return good(tree) | {"PYTHONPATH": f"{elsewhere}:{good(tree)['PYTHONPATH']}"}

    monkeypatch.setattr(run_mutants, "environment", shadowed)
    (tmp_path / "copy").mkdir()
    with pytest.raises(run_mutants.MutationError, match="not the copy"):
        run_mutants.copy_tree(tmp_path / "tree", tmp_path / "copy")


def test_a_test_that_hangs_is_no_proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    list_of(tmp_path)
    write(tmp_path / "tests/test_slow.py", '"""Slow."""\nimport time\n\n\ndef test_slow(): time.sleep(60)\n')
    monkeypatch.setattr(run_mutants, "SECONDS", 1.5)
    assert run_mutants.run_tests(tmp_path, ["tests/test_slow.py"]).last_line == "took too long"
