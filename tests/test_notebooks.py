"""Each notebook of the docs runs from its first cell to its last in a process of its own, on a model made here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from toy_model import make_run

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "docs" / "notebooks").glob("*.ipynb"))


def test_there_is_a_notebook() -> None:
    assert [path.name for path in NOTEBOOKS] == ["finetune.ipynb"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_a_notebook_runs(notebook: Path, tmp_path: Path) -> None:
    """Its code cells, in order, as one program (they hold plain Python, no magic)."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    script = tmp_path / "cells.py"
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    script.write_text("\n\n".join(code) + "\n", encoding="utf-8")
    run = make_run(tmp_path / "toy").output
    environment = os.environ | {"SCI_GPT_MODEL": str(run), "SCI_GPT_OUT": "out", "SCI_GPT_STEPS": "4"}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "pretraining" in done.stdout and "R2 of the next month" in done.stdout
    assert (tmp_path / "out" / "finetune.png").stat().st_size > 20_000
