"""A small repository that keeps every house rule, planted in a temporary folder for the tests of the rules."""

from __future__ import annotations

from pathlib import Path

from house_text import PILLARS
from house_tree import FILES, FOLDERS, PACKAGES


def plant(root: Path) -> None:
    """A small tree that keeps every rule."""
    for folder, package in PACKAGES.items():
        write(root / folder / package / "__init__.py", '"""A package."""\n')
    for pillar in PILLARS:
        write(root / "sci_gpt" / pillar / "__init__.py", '"""A pillar."""\n')
    for name, text in {
        "sci_gpt/errors.py": "",
        "sci_gpt/config.py": 'import yaml\n\nclass Node:\n    """A part."""\n',
        "sci_gpt/data/store.py": "import sci_gpt.errors\n",
        "sci_gpt/data/order.py": "from sci_gpt.data import store\n",
        "sci_gpt/model/loss.py": "import torch\n",
        "sci_gpt/parallel/engine.py": "import torch.distributed\nfrom sci_gpt.model.loss import f\n",
        "sci_gpt/recipes/build.py": "def _f() -> None:\n    # optional\n    import torch\n",
        "launch/sci_launch/cli.py": "def _f() -> None:\n    import sci_gpt.recipes.build\n",
        "tests/test_cli.py": 'COMMAND = "build"\n',
    }.items():
        write(root / name, '"""One sentence."""\n' + text)
    for folder in FOLDERS:
        (root / folder).mkdir(exist_ok=True)
    for name in FILES:
        write(root / name, "# A file.\n")
    write(root / "Makefile", "# Targets.\nquickstart: x\n\ttrue\n")
    write(root / "pyproject.toml", PYPROJECT)
    write(root / "configs/data/a.yaml", "# A run.\nname: a\n")
    write(
        root / "README.md", "# S\n```sh\ngit clone x && cd x\nmake quickstart\nsci-gpt build configs/data/a.yaml\n```\n"
    )


PYPROJECT = """# A project.
[project]
dependencies = ["torch>=2", "xarray>=2", "PyYAML>=6"]
[project.optional-dependencies]
dev = ["pytest"]
"""


def write(path: Path, text: str) -> None:
    """Write a file and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
