"""Plain trees from YAML: read without surprises, one key overridden (`--set a.b=c`), what was wrong said in words."""

from __future__ import annotations

import reprlib
import types
import typing
from difflib import get_close_matches
from typing import Any

import yaml
from pydantic import BaseModel

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


def explain(kind: type[BaseModel], item: Any) -> str:
    """One complaint of pydantic (`ValidationError.errors()`) about a tree of `kind`, in one clause."""
    location = tuple(part for part in item["loc"] if part != "[key]")
    where = ".".join(str(part) for part in location)
    if item["type"] == "missing":
        return f"missing key {where!r}"
    if item["type"] == "extra_forbidden" or item["loc"][-1:] == ("[key]",):
        inner = [
            name for name in _keys_at(kind, location[:-1]) if _holds(kind, (*location[:-1], name), key=location[-1])
        ]
        if inner:
            path = ".".join(str(part) for part in (*location[:-1], inner[0], 0, location[-1]))
            return f"unknown key {where!r}; it belongs to an entry of {inner[0]!r}, as {path!r}"
        close = get_close_matches(str(location[-1]), _keys_at(kind, location[:-1]), n=1, cutoff=0.0)
        return f"unknown key {where!r}; nearest: {close[0]!r}" if close else f"unknown key {where!r}"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":  # one of our own checks: it says what came
        return f"{where}: {message}" if where else message
    return f"{where}: {message}, got {reprlib.repr(item.get('input'))}"


def _index(node: list[Any], key: str, *, override: str) -> int:
    """The place in a list that `key` names: a number, or the `name` or `source` of one of its entries."""
    names = [entry.get("name", entry.get("source")) if isinstance(entry, dict) else None for entry in node]
    if key in names:
        return names.index(key)
    if key.isdecimal() and int(key) < len(node):
        return int(key)
    known = [name for name in names if isinstance(name, str)]
    numbers = "it is empty" if not node else "use 0" if len(node) == 1 else f"use 0..{len(node) - 1}"
    close = f", or a name; nearest: {get_close_matches(key, known, n=1, cutoff=0.0)[0]!r}" if known else ""
    raise ConfigError(f"--set {override!r}: {key!r} is no entry of a list of {len(node)}; {numbers}{close}")


def _child(node: Any, key: str, *, override: str) -> Any:
    if not isinstance(node, dict):
        raise ConfigError(f"--set {override!r}: {key!r} is looked for in {node!r}, which has no keys")
    if node.get(key) is None:  # an optional part that the file leaves out or sets to null
        node[key] = {}
    return node[key]


def _keys_at(kind: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """The keys allowed at a place of the tree: the fields of a node, or the literal keys of a mapping."""
    node: Any = kind
    for part in location:
        if isinstance(part, str) and hasattr(node, "model_fields"):
            node = node.model_fields[part].annotation
        else:  # an entry of a tuple or of a mapping
            node = typing.get_args(node)[-1] if isinstance(part, str) else typing.get_args(node)[0]
        if typing.get_origin(node) in (typing.Union, types.UnionType):
            node = next(arg for arg in typing.get_args(node) if arg is not type(None))
    if typing.get_origin(node) is dict:
        return [str(key) for key in typing.get_args(typing.get_args(node)[0])]
    return list(getattr(node, "model_fields", {}))


def _holds(kind: type[BaseModel], location: tuple[Any, ...], *, key: object) -> bool:
    """Whether entries of the list at a place have a key of this name (a key that slipped out of its entry)."""
    annotation: Any = kind
    for part in location:
        annotation = annotation.model_fields[part].annotation if hasattr(annotation, "model_fields") else None
    return typing.get_origin(annotation) is tuple and key in _keys_at(kind, (*location, 0))
