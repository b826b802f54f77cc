"""The heap of a long run: what the allocator holds free goes back to the system every few steps."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable
from itertools import count

import torch

_JEMALLOC_EVERY, _GLIBC_EVERY = 20, 100  # steps; in the quickstart's run a call takes 50 ms
_PURGE = b"arena.4096.purge"  # of all arenas: MALLCTL_ARENAS_ALL


def after_each_step(check: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """`check`, and every few calls memory goes back: of jemalloc, which else would keep it for good (as a run sets it,
    `sci_launch.allocator`), and of glibc. docs/faults.md has the measurements.

    Args:
        check: called in each step before that.
        device: where the model is; a GPU's host is left as it is.
    """
    give_back, every = _giving_back()
    if device.type != "cpu" or give_back is None:
        return check
    steps = count(1)

    def both() -> None:
        check()
        if next(steps) % every == 0:
            give_back()

    return both


def _giving_back() -> tuple[Callable[[], None] | None, int]:
    """What does it, and how many steps lie between; None where the allocator is another."""
    library = ctypes.CDLL(None)
    if hasattr(library, "mallctl"):
        return lambda: _purge(library), _JEMALLOC_EVERY
    if platform.libc_ver()[0] == "glibc":
        return lambda: _trim(library), _GLIBC_EVERY
    return None, 0


def _purge(library: ctypes.CDLL) -> None:
    if error := library.mallctl(_PURGE, None, None, None, ctypes.c_size_t(0)):
        raise OSError(error, f"jemalloc does not know {_PURGE.decode()!r}: is its version older than 5?")


def _trim(library: ctypes.CDLL) -> None:
    library.malloc_trim(0)
