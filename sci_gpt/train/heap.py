"""glibc's heap in a long run: what it holds free goes back to the system every 100 steps."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable
from itertools import count

import torch

_EVERY = 100  # steps; a call takes some 50 ms in the quickstart's run


def after_each_step(check: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """`check`, and every 100 calls glibc gives back what is free; docs/faults.md has the measurements.

    jemalloc (`sci_launch.allocator`) does so by itself, and the call does nothing then.

    Args:
        check: called in each step before that.
        device: where the model is; a GPU's host is left as it is.
    """
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc":
        return check
    library, steps = ctypes.CDLL(None), count(1)

    def both() -> None:
        check()
        if next(steps) % _EVERY == 0:
            library.malloc_trim(0)

    return both
