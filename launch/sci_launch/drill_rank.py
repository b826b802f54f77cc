"""A rank of a drill over several nodes: `srun .. python -m sci_launch.drill_rank NAME THREADS MODULE ARGUMENTS`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from sci_gpt.train.run_folder import write_whole
from sci_launch.allocator import preload


def main(arguments: list[str]) -> None:
    """Note node and process id in NAME-rank-N.json, where the drill looks for them, and become the worker.

    What torchrun would say of the rank, Slurm says under other names; the allocator is the one of any run.
    """
    name, threads, *module = arguments
    rank = int(os.environ["SLURM_PROCID"])
    os.environ["RANK"], os.environ["LOCAL_RANK"] = str(rank), os.environ["SLURM_LOCALID"]
    os.environ["WORLD_SIZE"], os.environ["OMP_NUM_THREADS"] = os.environ["SLURM_STEP_NUM_TASKS"], threads
    os.environ |= preload()
    note = {"rank": rank, "node": os.environ["SLURMD_NODENAME"], "pid": os.getpid()}
    write_whole(Path(f"{name}-rank-{rank}.json"), json.dumps(note))
    os.execv(sys.executable, [sys.executable, "-m", *module])


if __name__ == "__main__":
    main(sys.argv[1:])
