"""SciGPT: one pretrained model for grids, sensor series and seismic traces; `load_model` is the public face."""

from __future__ import annotations

import importlib
from typing import Any

# Lazy, so that `import sci_gpt` (and `sci-gpt --help`) loads no torch: {public name: module that holds it}.
_PUBLIC = {"load_model": "sci_gpt.recipes.public", "LoadedModel": "sci_gpt.recipes.load"}

__all__ = ["LoadedModel", "load_model"]


def __getattr__(name: str) -> Any:
    """The public name, loaded on first use."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'sci_gpt' has no attribute {name!r}; public: {sorted(_PUBLIC)}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
