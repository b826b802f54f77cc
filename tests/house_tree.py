"""Reads the product tree with `ast` for the house rules: modules, their functions, and who imports whom."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

# folder that holds a package -> the package
PACKAGES = {".": "sci_gpt", "tokenizers": "sci_tokenizers", "evals": "sci_evals", "launch": "sci_launch"}
FOLDERS = ("sci_gpt", "tokenizers", "evals", "launch", "configs", "tests", "benchmarks", "docs", ".ci")
FILES = ("README.md", "LICENSE", "Makefile", "pyproject.toml", "constraints.txt", ".gitignore")

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, kw_only=True)
class Import:
    """One name that a module imports: the module (`sci_gpt.data.store`), the line, and whether a function holds it."""

    target: str
    line: int
    nested: bool


@dataclass(frozen=True, kw_only=True)
class Module:
    """One Python file: `name` is its dotted name for product files, else empty."""

    path: Path
    name: str
    source: str

    @cached_property
    def tree(self) -> ast.Module:
        """The parsed file."""
        return ast.parse(self.source, str(self.path))

    @cached_property
    def lines(self) -> list[str]:
        """The file's lines."""
        return self.source.splitlines()

    @property
    def is_package(self) -> bool:
        """Whether this is an `__init__.py`."""
        return self.path.name == "__init__.py"

    def functions(self) -> Iterator[tuple[Function, bool, bool]]:
        """Every function with (is it a method, is it public: reachable by names without an underscore)."""
        yield from _functions(self.tree, in_class=False, public=True)

    def imports(self) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
        """Every import statement, with whether a function holds it."""
        nested = {
            id(inner)
            for node in ast.walk(self.tree)
            if isinstance(node, Function)
            for inner in ast.walk(node)
            if isinstance(inner, ast.Import | ast.ImportFrom)
        }
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                yield node, id(node) in nested


@dataclass(frozen=True, kw_only=True)
class Tree:
    """The repository at `root`: product modules (`modules`), and all Python files (`files`)."""

    root: Path
    files: tuple[Module, ...]

    @cached_property
    def modules(self) -> dict[str, Module]:
        """Dotted name -> product module."""
        return {module.name: module for module in self.files if module.name}

    def imports_of(self, module: Module) -> list[Import]:
        """What the module imports; `from package import name` counts as `package.name` where that is a module."""
        found = []
        for node, nested in module.imports():
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            else:
                base = node.module or ""
                targets = [
                    f"{base}.{alias.name}" if f"{base}.{alias.name}" in self.modules else base for alias in node.names
                ]
            found += [Import(target=target, line=node.lineno, nested=nested) for target in targets]
        return found

    def relative(self, path: Path) -> str:
        """The path as a person would type it at the root."""
        return path.relative_to(self.root).as_posix()


def read_tree(root: Path) -> Tree:
    """Read all Python files of the repository at `root` (nothing under `.venv`, `data`, `runs` or a cache)."""
    files = []
    for path in sorted(path for folder in FOLDERS for path in (root / folder).rglob("*.py")):
        if not is_made(path.relative_to(root)):
            files.append(
                Module(path=path, name=_dotted(path.relative_to(root)), source=path.read_text(encoding="utf-8"))
            )
    return Tree(root=root, files=tuple(files))


def text_files(root: Path) -> list[Path]:
    """Every file of the product that people read, sorted: the top-level files and all in the prescribed folders."""
    found = [root / name for name in FILES if (root / name).is_file()]
    for folder in FOLDERS:
        found += [path for path in (root / folder).rglob("*") if path.is_file() and not is_made(path.relative_to(root))]
    return sorted(found)


def is_made(path: Path) -> bool:
    """Whether a tool made this file (caches, install records)."""
    return any(part in ("__pycache__", ".hypothesis") or part.endswith((".egg-info", "_cache")) for part in path.parts)


def is_optional_comment(module: Module, line: int) -> bool:
    """Whether the import at `line` (1-based) has a comment on its line, or above it or above the imports before it."""
    if "#" in module.lines[line - 1]:
        return True
    above = line - 2
    while above >= 0 and module.lines[above].strip().startswith(("import ", "from ")):
        above -= 1
    return above >= 0 and module.lines[above].strip().startswith("#")


def _dotted(path: Path) -> str:
    for folder, package in PACKAGES.items():
        home = Path(folder) / package
        if path.is_relative_to(home):
            parts = [package, *path.relative_to(home).with_suffix("").parts]
            return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    return ""


def _functions(node: ast.AST, *, in_class: bool, public: bool) -> Iterator[tuple[Function, bool, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function):
            named = public and not child.name.startswith("_")
            yield child, in_class, named
            yield from _functions(child, in_class=False, public=False)
        elif isinstance(child, ast.ClassDef):
            yield from _functions(child, in_class=True, public=public and not child.name.startswith("_"))
        else:
            yield from _functions(child, in_class=in_class, public=public)
