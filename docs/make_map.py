"""Writes docs/map.md, the file tree with a phrase per file from each file's first line; `--check` only compares."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOP = ("README.md", "pyproject.toml", "constraints.txt", "Makefile", ".ci")
FOLDERS = ("tokenizers", "sci_gpt", "evals", "launch", "configs", "tests", "benchmarks", "docs")
HEAD = """# Map of the repository

Made by `make map` from the first line of each file; `make check` fails where it is out of date.
"""


def first_line(path: Path) -> str:
    """What a file is for: the first line of its docstring, comment or heading; "" for a picture."""
    if path.suffix in (".png", ".jpg"):
        return ""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return (ast.get_docstring(ast.parse(text)) or "").split("\n")[0]
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith(("#!", "---"))]
    first = lines[0].strip() if lines else ""
    return re.sub(r"^<!--\s*|\s*-->$|^#+\s*", "", first) if first.startswith(("#", "<!--")) else ""


def make_map(root: Path) -> str:
    """The text of docs/map.md for the repository at `root`."""
    lines = [HEAD]
    for name in TOP:
        lines += _entry(root / name, 0) if (root / name).exists() else []
    for name in FOLDERS:
        lines += _entry(root / name, 0) if (root / name).is_dir() else []
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    """Write the map, or with `--check` say whether it is up to date (exit code 1 where it is not)."""
    target, text = ROOT / "docs" / "map.md", make_map(ROOT)
    if "--check" not in arguments:
        target.write_text(text, encoding="utf-8")
        return 0
    if not target.is_file() or target.read_text(encoding="utf-8") != text:
        print("docs/map.md is out of date: run `make map`", file=sys.stderr)
        return 1
    return 0


def _entry(path: Path, depth: int) -> list[str]:
    indent = "  " * depth
    if path.is_file():
        phrase = first_line(path)
        return [f"{indent}- `{path.name}`" + (f": {phrase}" if phrase else "")]
    inner = [
        child for child in sorted(path.iterdir(), key=lambda child: (child.is_dir(), child.name)) if not _is_made(child)
    ]
    lines = [
        line for child in inner if child.name not in ("__init__.py", "map.md") for line in _entry(child, depth + 1)
    ]
    if not lines and not (path / "__init__.py").is_file():
        return []
    package = first_line(path / "__init__.py") if (path / "__init__.py").is_file() else ""
    return [f"{indent}- **{path.name}/**" + (f" {package}" if package else ""), *lines]


def _is_made(path: Path) -> bool:
    return path.name in ("__pycache__", ".hypothesis") or path.name.endswith((".egg-info", "_cache", ".pyc"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
