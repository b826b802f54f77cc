"""Plain trees from YAML: read without surprises, and one key overridden (`--set a.b=c`)."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

import yaml

from sci_gpt.errors import ConfigError


class _StrictLoader(yaml.SafeLoader):
    """Plain values only, and no key twice in a mapping (the second would silently win)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} stands twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


def read_plain(text: str, *, where: str) -> Any:
    """The mapping, list or value that a YAML text holds.

    Raises:
        ConfigError: not YAML, a tag that asks for an object, or a key twice; `where` begins the message.
    """
    try:
        loader = _StrictLoader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not YAML: {' '.join(str(error).split())}") from error


def override_key(tree: dict[str, Any], override: str) -> None:
    """Set one key of the tree in place, from "a.b=VALUE" with a YAML value.

    Entries of a list are named by number or by their `name` or `source`; an absent part in between is made.

    Raises:
        ConfigError: no "=", a value that is not YAML, or a path that leads through something without such keys.
    """
    path, sign, text = override.partition("=")
    if not sign or not path:
        raise ConfigError(f"--set wants key.subkey=value, got {override!r}")
    value = read_plain(text, where=f"--set {override!r}: the value")
    *parents, last = path.split(".")
    node: Any = tree
    for key in parents:
        if isinstance(node, list):
            node = node[_index(node, key, override=override)]
        else:
            node = _child(node, key, override=override)
    if isinstance(node, list):
        node[_index(node, last, override=override)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise ConfigError(f"--set {override!r}: {'.'.join(parents)!r} holds {node!r}, which has no keys")


def _index(node: list[Any], key: str, *, override: str) -> int:
    """The place in a list that `key` names: a number, or the `name` or `source` of one of its entries."""
    names = [entry.get("name", entry.get("source")) if isinstance(entry, dict) else None for entry in node]
    if key in names:
        return names.index(key)
    if key.isdigit() and int(key) < len(node):
        return int(key)
    known = [name for name in names if isinstance(name, str)]
    close = f", or a name; nearest: {get_close_matches(key, known, n=1, cutoff=0.0)[0]!r}" if known else ""
    raise ConfigError(
        f"--set {override!r}: {key!r} is no entry of a list of {len(node)}; use 0..{len(node) - 1}{close}"
    )


def _child(node: Any, key: str, *, override: str) -> Any:
    if not isinstance(node, dict):
        raise ConfigError(f"--set {override!r}: {key!r} is looked for in {node!r}, which has no keys")
    if node.get(key) is None:  # an optional part that the file leaves out or sets to null
        node[key] = {}
    return node[key]
