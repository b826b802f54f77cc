"""A worker of test_launch_local.py that ends in the way it is told to."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from sci_gpt.errors import DataError
from sci_gpt.parallel.worker import refusing
from sci_gpt.train.signals import Requests


def main() -> None:
    """`local_worker FOLDER HOW`."""
    folder, how, rank = Path(sys.argv[1]), sys.argv[2], os.environ["RANK"]
    if how == "late":
        time.sleep(0.6)  # as a worker that still imports: it does not listen yet
    requests = Requests()
    with refusing(), requests.listening():
        (folder / f"started-{rank}").write_text(f"{os.environ['WORLD_SIZE']} {os.environ['OMP_NUM_THREADS']}")
        (folder / f"preload-{rank}").write_text(os.environ.get("LD_PRELOAD", ""))
        if how == "refuse":
            print("noise that nobody needs", file=sys.stderr)
            raise DataError("no store at 'data/x'; build it")
        if how == "full":
            raise OSError(28, "No space left on device", "runs/x/log.jsonl")
        if how == "abort" and rank == "1":
            os.abort()
        if (how, rank) in (("crash", "1"), ("abort", "0")):
            raise ZeroDivisionError("one divided by nothing")
        deadline = time.monotonic() + 60
        while how in ("crash", "late") and not requests.stop and time.monotonic() < deadline:
            time.sleep(0.02)
        print(f"warning: rank {rank} ends", file=sys.stderr)
        (folder / f"ended-{rank}").write_text(str(requests.stop))


if __name__ == "__main__":
    main()
