"""Results of commands on stdout: JSON for programs, indented lines for people."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any


@contextlib.contextmanager
def progress(to_stderr: bool) -> Iterator[None]:
    """With `--json`, progress lines go to stderr, so that stdout holds the result alone."""
    if not to_stderr:
        yield
        return
    with contextlib.redirect_stdout(sys.stderr):
        yield


@contextlib.contextmanager
def progress_of_processes(to_stderr: bool) -> Iterator[None]:
    """As `progress`, for commands that start processes of their own: what those write goes to stderr as well."""
    if not to_stderr:
        yield
        return
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with progress(True):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def print_result(result: Mapping[str, Any], *, as_json: bool) -> int:
    """Print a result as JSON or as indented lines."""
    if as_json:
        print(json.dumps(_finite(result), indent=2, default=str, allow_nan=False))
    else:
        print("\n".join(_lines(result)))
    return 0


def _finite(tree: Any) -> Any:
    """The tree with null for numbers that JSON has not (NaN, infinities)."""
    if isinstance(tree, Mapping):
        return {str(key): _finite(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def _lines(tree: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """Nested mappings and lists of mappings as indented lines; a mapping of plain values alone is one line."""
    for key, value in tree.items():
        entries = (
            value if isinstance(value, list | tuple) and any(isinstance(entry, Mapping) for entry in value) else ()
        )
        if entries:
            yield f"{indent}{key}:"
            for entry in entries:
                plain = {name: item for name, item in entry.items() if not isinstance(item, Mapping)}
                yield f"{indent}  {_inline(plain)}"
                yield from _lines({name: entry[name] for name in entry if name not in plain}, indent + "      ")
        elif isinstance(value, Mapping) and any(isinstance(item, Mapping) for item in value.values()):
            yield f"{indent}{key}:"
            yield from _lines(value, indent + "  ")
        else:
            yield f"{indent}{key}: {_inline(value) if isinstance(value, Mapping) else _short(value)}"


def _inline(values: Mapping[str, Any]) -> str:
    return "  ".join(f"{name}={_short(value)}" for name, value in values.items())


def _short(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_short(item) for item in value) + "]"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
