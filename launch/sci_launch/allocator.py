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
    chosen = any(name in CHOSEN or name.startswith("MALLOC_") for name in environ)
    if sys.platform != "linux" or chosen or any(driver.exists() for driver in DRIVERS):
        return {}
    library = find()
    return {} if library is None else {"LD_PRELOAD": library}


def find() -> str | None:
    """jemalloc's library, as the loader knows it: of this Python's own prefix, else of the system; None without one."""
    own = Path(sys.prefix) / "lib" / "libjemalloc.so.2"
    return str(own) if own.exists() else ctypes.util.find_library("jemalloc")


if __name__ == "__main__":  # for a torchrun by hand: export LD_PRELOAD=$(python -m sci_launch.allocator)
    print(preload().get("LD_PRELOAD", ""))
