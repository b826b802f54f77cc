"""Configurations as files: one complete YAML file into a tree, keys overridden, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from sci_gpt.config import Node
from sci_gpt.errors import ConfigError
from sci_gpt.plain_tree import explain, override_key, read_plain

Config = TypeVar("Config", bound=Node)


def load_config(path: Path, kind: type[Config], *, overrides: tuple[str, ...] = ()) -> Config:
    """Read a complete YAML file into a tree of `kind`, with `--set a.b=c` overrides (values are YAML).

    Raises:
        ConfigError: no such file, not YAML, a key twice, an unknown key (the nearest real one is named), a value of the
            wrong type, an override that leads nowhere.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"no configuration file {str(path)!r}; the examples are in configs/") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration file {str(path)!r} cannot be read: {error}") from error
    tree = read_plain(text, where=str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping of keys, got {type(tree).__name__}")
    for override in overrides:
        override_key(tree, override)
    return parse_config(tree, kind, where=str(path))


def parse_config(tree: dict[str, Any], kind: type[Config], *, where: str) -> Config:
    """Check a tree of plain values; `where` (a file or a checkpoint) begins the message.

    Raises:
        ConfigError: as `load_config`.
    """
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        # Unknown keys first: a misspelt required key is also a missing one, and the misspelling is what must be mended.
        items = sorted(error.errors(), key=lambda item: item["type"] != "extra_forbidden")
        # A list whose entries are wrong is also too short; only the entries are worth a word.
        places = [item["loc"] for item in items]
        items = [
            row
            for row in items
            if not any(len(row["loc"]) < len(p) and p[: len(row["loc"])] == row["loc"] for p in places)
        ]
        raise ConfigError(f"{where}: " + "; ".join(explain(kind, item) for item in items[:3])) from error


def show_config(config: Node) -> str:
    """The resolved tree as YAML (`--show`); `load_config` reads it back to an equal tree."""
    return str(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120))
