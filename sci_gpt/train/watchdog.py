"""Watchdog: a run in which nothing moves says where every rank stands, names who is behind, and ends."""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from sci_gpt.train.run_folder import naming, write_whole

FOLDER, PAGE = "hang", "report.txt"
HANGS = 75  # exit code of a rank that ended because nothing moved: like any crash, not "refused" (2)
# In the order of a step. In those marked True a rank waits for the others (in the forward pass at ZeRO 3 and on a
# tensor or sequence axis).
PHASES = {
    "reading the rows": False,
    "agreeing on the step": True,
    "forward pass": True,
    "backward pass and update": True,
    "validation": True,
    "saving": True,
}
_LAST_PASS, _AFTER = "backward pass and update", 10**9
_LOOKS = 20  # a limit is looked at this many times
_LONGEST_LOOK, _GRACE = 5.0, 1.0
_TIMER = 60.0  # seconds beyond twice the limit, after which Python's own timer ends the process


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Where a rank stands: the step it is in (1 is the first), the phase of it and, in passes, the micro-batch (1 is
    the first), for how long, with which rows."""

    rank: int
    step: int
    phase: str
    seconds: float
    keys: tuple[str, ...] = ()
    micro: int = 0
    who: str = field(default_factory=lambda: f"process {os.getpid()} on {socket.gethostname()}")

    def text(self) -> str:
        """The head of a rank's file; `read` takes it back."""
        rows = ", ".join(self.keys) or "none yet"
        return (
            f"rank: {self.rank}\nwho: {self.who}\nstep: {self.step}\nphase: {self.phase}\nmicro-batch: {self.micro}\n"
            f"seconds without a move: {self.seconds:.1f}\nrows: {rows}\n"
        )

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """What a rank wrote; None where its file is not whole."""
        lines = path.read_text(encoding="utf-8").split("\n\n")[0].splitlines()
        facts = dict(line.split(": ", 1) for line in lines if ": " in line)
        if "rows" not in facts:
            return None
        return cls(
            rank=int(facts["rank"]),
            step=int(facts["step"]),
            phase=facts["phase"],
            seconds=float(facts["seconds without a move"]),
            keys=tuple(facts["rows"].split(", ")),
            micro=int(facts["micro-batch"]),
            who=facts["who"],
        )

    @property
    def place(self) -> tuple[int, int, int]:
        """For comparison: what comes later in a run is greater."""
        phase = list(PHASES).index(self.phase)
        after = phase > list(PHASES).index(_LAST_PASS)  # of all micro-batches
        return self.step, _AFTER if after else self.micro, phase


class Unwatched:
    """No watchdog: a trainer without a run folder."""

    def at(self, phase: str, *, step: int, keys: Sequence[str] = (), micro: int = 0) -> None:
        """Nothing is noted."""


class Watchdog:
    """One rank's watchdog: a thread that looks at what the rank noted last. Use it in a `with` around the steps.

    A limit passed on one rank makes all of them write: each looks for the others' files. A rank that is stopped or dead
    cannot write, and its missing file tells that. Where even the thread cannot run (a library holds the interpreter),
    Python's own timer writes the stacks to stderr a while after twice the limit and ends the process.

    Args:
        run: the run folder; files go to its `hang/`, which `set_reports_aside` has emptied.
        rank, size: in the world.
        limit_seconds: longest time without a move: longer than any step, validation or save.
        end: ends the process.
    """

    def __init__(
        self,
        run: Path,
        *,
        rank: int,
        size: int,
        limit_seconds: float,
        end: Callable[[int], object] = os._exit,
    ) -> None:
        self.run, self.rank, self.size, self.limit_seconds = run, rank, size, limit_seconds
        self._end = end
        self._look = min(_LONGEST_LOOK, limit_seconds / _LOOKS)
        self._noted: tuple[float, str, int, tuple[str, ...], int] = (
            time.monotonic(),
            "reading the rows",
            0,
            (),
            0,
        )
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._work, name="watchdog", daemon=True)

    def at(self, phase: str, *, step: int, keys: Sequence[str] = (), micro: int = 0) -> None:
        """Note where this rank is: a phase of PHASES, in the step that it works on, with the keys of its rows."""
        self._noted = (time.monotonic(), phase, step, tuple(keys), micro)
        # File 2 is stderr, also where something has put another object in the place of sys.stderr.
        faulthandler.dump_traceback_later(2 * self.limit_seconds + _TIMER, exit=True, file=2)

    def again(self) -> None:
        """Where this rank is has not changed, but it moves: a save that is waited for goes on."""
        _, phase, step, keys, micro = self._noted
        self.at(phase, step=step, keys=keys, micro=micro)

    def __enter__(self) -> Self:
        self._noted = (time.monotonic(), *self._noted[1:])
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """The steps are done: nobody looks any more; a second call does nothing."""
        self._done.set()
        faulthandler.cancel_dump_traceback_later()
        self._thread.join(5.0)

    def _work(self) -> None:
        while not self._done.wait(self._look):
            since = time.monotonic() - self._noted[0]
            if since > self.limit_seconds or (self.run / FOLDER).exists():
                self._report(since)
                return

    def _report(self, since: float) -> None:
        """This rank's file, then, when the others have had time for theirs, the page; the process ends here."""
        _, phase, step, keys, micro = self._noted
        folder = self.run / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"rank-{self.rank}.txt"
        mine = Standing(rank=self.rank, step=step, phase=phase, seconds=since, keys=keys, micro=micro)
        with naming(path), path.open("w", encoding="utf-8") as file:
            file.write(mine.text() + "\nstacks of all its threads:\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        if self._done.wait(2 * self._look + _GRACE):
            return  # it moved after all, and is through
        try:
            page = report(standings(self.run), size=self.size)
            print(f"error: nothing moves. {page}Where each rank stands: {folder}", file=sys.stderr, flush=True)
            write_whole(folder / PAGE, page)
        finally:  # whatever became of the page
            self._end(HANGS)


def set_reports_aside(run: Path) -> None:
    """Rename what an earlier hang left, so that this start finds no old files (rank 0, before the others begin)."""
    folder = run / FOLDER
    if folder.exists():
        number = 1
        while (run / f"{FOLDER}-{number}").exists():
            number += 1
        folder.rename(run / f"{FOLDER}-{number}")


def standings(run: Path) -> list[Standing]:
    """What the ranks wrote, by rank."""
    found = [Standing.read(path) for path in (run / FOLDER).glob("rank-*.txt")]
    return sorted((one for one in found if one is not None), key=lambda one: one.rank)


def behind(found: Iterable[Standing], *, size: int) -> tuple[list[int], str]:
    """The ranks that the others wait for, and why it is thought so."""
    found = list(found)
    silent = sorted(set(range(size)) - {one.rank for one in found})
    if silent:
        return silent, "it wrote nothing: stopped, dead, or its machine or disk is gone"
    place = {one.rank: one.place for one in found}
    last = [rank for rank in sorted(place) if place[rank] == min(place.values())]
    if len(last) < size or size == 1:
        one = next(one for one in found if one.rank == last[0])
        return last, f"it is still in step {one.step}, {one.phase}; the others are further"
    waits = PHASES[found[0].phase]
    return [], (
        "all ranks are at a place where they may wait for each other: the network between them, or one of them inside "
        "the library that exchanges the numbers (compare the stacks)"
        if waits
        else "all ranks are at the same place and wait for nobody: the store, or watch.hang_seconds is too short"
    )


def report(found: Sequence[Standing], *, size: int) -> str:
    """The page: who is behind first, then a line for each rank."""
    last, why = behind(found, size=size)
    who = f"behind: {', '.join(f'rank {rank}' for rank in last)}: {why}" if last else f"nobody is behind: {why}"
    rows = {one.rank: one for one in found}
    lines = [
        f"  rank {rank}: step {rows[rank].step}, {rows[rank].phase}, {rows[rank].seconds:.0f} s without a move; "
        f"{rows[rank].who}"
        if rank in rows
        else f"  rank {rank}: no word"
        for rank in range(size)
    ]
    return "\n".join([who, *lines]) + "\n"
