"""The memory allocator of a run's processes on CPUs: jemalloc, since glibc's heap breaks into pieces in a long run."""

from __future__ import annotations

import ctypes.util
import os
import sys
from collections.abc import Mapping
from pathlib import Path

CHOSEN = ("LD_PRELOAD", "GLIBC_TUNABLES")  # and MALLOC_*: who sets them has an allocator in mind
DRIVERS = (Path("/proc/driver/nvidia"), Path("/dev/kfd"))
INSTALL = "`apt-get install libjemalloc2`, or jemalloc of conda-forge or of your cluster's modules"


def preload(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What the environment of a run's processes needs beside the launcher's own, for jemalloc.

    Empty where it is not installed, on a GPU's host, and where the environment chooses an allocator or sets glibc's.
    docs/faults.md has the measurements.
    """
    library = find()
    return {} if library is None or left_alone(environ) else {"LD_PRELOAD": library}


def left_alone(environ: Mapping[str, str] = os.environ) -> str:
    """Why a run has the allocator that it has anyway; "" where jemalloc would be taken."""
    chosen = [name for name in environ if name in CHOSEN or name.startswith("MALLOC_")]
    if chosen:
        return f"the environment chooses: {chosen[0]}={environ[chosen[0]]}"
    if sys.platform != "linux" or any(driver.exists() for driver in DRIVERS):
        return "the system's: on a GPU's host, and not on Linux, it is left alone"
    return ""


def find() -> str | None:
    """jemalloc's library, as the loader knows it: of this Python's own prefix, else of the system; None without one."""
    own = Path(sys.prefix) / "lib" / "libjemalloc.so.2"
    return str(own) if own.exists() else ctypes.util.find_library("jemalloc")


if __name__ == "__main__":  # for a torchrun by hand: env $(python -m sci_launch.allocator) torchrun ..
    print(" ".join(f"{name}={value}" for name, value in preload().items()))
