"""The C library's heap: settings with which a long run on CPUs takes no more memory than a short one."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable
from itertools import count

_TRIM_THRESHOLD, _TOP_PAD = -1, -2  # mallopt(3)
_PAD, _LATER = 256 * 2**20, 2**20  # bytes by which the heap grows: at first, and when it has what a step needs
_MOST_FREE = 2**31 - 1
_TRIM_EVERY = 100  # steps; a call takes some 50 ms, and the pages that are used again some 200


def steady() -> bool:
    """Let large pieces that find no room in the heap come from the system and go back to it at once; whether it is set.

    By default glibc raises the size from which it does so to 32 MB, and each batch's tensors, which have sizes of their
    own, then break the heap into pieces: the quickstart's processes grew by 41 % in 2,000 steps, with nothing more in
    use (docs/faults.md). Setting any threshold ends that; the heap grows in steps of 256 MB and is kept.

    Nothing is set where the C library is another, or where the environment sets the heap itself (MALLOC_*, glibc's
    tunables, an allocator in LD_PRELOAD).
    """
    chosen = [name for name in os.environ if name.startswith("MALLOC_")]
    if chosen or "GLIBC_TUNABLES" in os.environ or "LD_PRELOAD" in os.environ:
        return False
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_TRIM_THRESHOLD, _MOST_FREE)) and bool(mallopt(_TOP_PAD, _PAD))


def after_each_step(check: Callable[[], None]) -> Callable[[], None]:
    """`check`, and every 100 calls what the heap holds free goes back to the system, where `steady` sets the heap.

    From the first time on the heap grows in small steps: it has by then what a step needs.
    """
    if not steady():
        return check
    library, steps = ctypes.CDLL(None), count(1)

    def both() -> None:
        check()
        if next(steps) % _TRIM_EVERY == 0:
            library.mallopt(_TOP_PAD, _LATER)
            library.malloc_trim(0)

    return both
