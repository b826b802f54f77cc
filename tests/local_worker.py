"""A worker of test_launch_local.py that ends in the way it is told to."""

from __future__ import annotations

import atexit
import logging
import logging.handlers
import os
import sys
import threading
import time
from pathlib import Path

from sci_gpt.errors import DataError
from sci_gpt.parallel.worker import leaving, refusing
from sci_gpt.train.signals import Requests


def main() -> None:
    """`local_worker FOLDER HOW`."""
    folder, how, rank = Path(sys.argv[1]), sys.argv[2], os.environ["RANK"]
    if how == "late":
        time.sleep(0.6)  # as a worker that still imports: it does not listen yet
    requests = Requests()
    if how == "past":
        atexit.register(os.abort)  # as Python's own end may
    with leaving(), refusing(), requests.listening():
        if how == "past":
            sys.stdout = open(1, "w", closefd=False)
            note = logging.FileHandler(folder / f"log-{rank}")
            logging.getLogger().addHandler(logging.handlers.MemoryHandler(100, target=note))
            logging.getLogger().warning("kept until the end")
            atexit.register((folder / f"registered-{rank}").touch)
            threading.Timer(0.3, (folder / f"thread-{rank}").touch).start()
            print("not yet written", end="")
            sys.exit(0 if rank == "0" else 7)
        (folder / f"started-{rank}").write_text(f"{os.environ['WORLD_SIZE']} {os.environ['OMP_NUM_THREADS']}")
        (folder / f"preload-{rank}").write_text(os.environ.get("LD_PRELOAD", ""))
        if how == "refuse":
            print("noise that nobody needs", file=sys.stderr)
            raise DataError("no store at 'data/x'; build it")
        if how == "full":
            raise OSError(28, "No space left on device", "runs/x/log.jsonl")
        if how == "abort" and rank == "1":
            print(*(f"line {number} of a long dump" for number in range(150)), sep="\n", file=sys.stderr)
            os.abort()
        if how == "lost" and rank == "0":
            raise ConnectionError("connection closed by peer")
        if (how, rank) == ("crash", "1"):
            raise ZeroDivisionError("one divided by nothing")
        deadline = time.monotonic() + 60
        while how in ("crash", "abort", "late", "lost") and not requests.stop and time.monotonic() < deadline:
            time.sleep(0.02)
        if how == "lost":
            time.sleep(0.3)  # the others have ended
            raise ZeroDivisionError("one divided by nothing")
        print(f"warning: rank {rank} ends", file=sys.stderr)
        (folder / f"ended-{rank}").write_text(str(requests.stop))


if __name__ == "__main__":
    main()
