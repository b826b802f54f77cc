"""The C library's heap: settings with which a long run on CPUs takes little more memory than a short one."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable
from itertools import count

import torch

_TRIM_THRESHOLD, _TOP_PAD = -1, -2  # mallopt(3)
_MOST = 2**31 - 1  # that mallopt takes
_LEAST, _LATER = 2**28, 2**20  # bytes by which the heap grows: at first, and when it has what a step needs
_TRIM_EVERY = 100  # steps; a call took 26 to 66 ms in the quickstart's run


def steady(need: float, device: torch.device) -> bool:
    """Let large pieces that find no room in the heap come from the system and go back to it at once; whether it is set.

    By default glibc raises the size from which it does so to 32 MB, and each batch's tensors, which have sizes of their
    own, then break the heap into pieces: the quickstart's processes grew by 41 % in 2,000 steps, with nothing more in
    use (docs/faults.md). Setting any threshold ends that. Pieces from the system cost time (each page is cleared), so
    the heap grows by twice what a step needs, in one go.

    Nothing is set on a GPU's host, where another C library is, or where the environment sets the heap itself (MALLOC_*,
    glibc's tunables, an allocator in LD_PRELOAD).

    Args:
        need: bytes that a step takes on this process.
        device: where the model is.
    """
    if not _ours(device):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    pad = round(min(max(2 * need, _LEAST), _MOST))
    return bool(mallopt(_TRIM_THRESHOLD, _MOST)) and bool(mallopt(_TOP_PAD, pad))


def after_each_step(check: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """`check`, and every 100 calls what the heap holds free goes back to the system, where `steady` sets the heap.

    From the first time on the heap grows in small steps: it has by then what a step needs.
    """
    if not _ours(device):
        return check
    library, steps = ctypes.CDLL(None), count(1)

    def both() -> None:
        check()
        if next(steps) % _TRIM_EVERY == 0:
            library.mallopt(_TOP_PAD, _LATER)
            library.malloc_trim(0)

    return both


def _ours(device: torch.device) -> bool:
    chosen = any(name.startswith("MALLOC_") or name in ("GLIBC_TUNABLES", "LD_PRELOAD") for name in os.environ)
    return device.type == "cpu" and not chosen and platform.libc_ver()[0] == "glibc"
