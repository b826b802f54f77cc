"""Signals that ask a run to stop or to save: they only raise flags, which the step in progress carries to all ranks."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from sci_gpt.parallel.worker import PARENT_VARIABLE

_STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Requests:
    """What this process has been asked for since it started; a signal may come twice."""

    def __init__(self) -> None:
        self._stop = False
        self._save = False
        parent = os.environ.get(PARENT_VARIABLE)
        self._parent = int(parent) if parent else None

    @property
    def stop(self) -> bool:
        """Asked to finish the step, save and end (or the launcher is gone)."""
        return self._stop or (self._parent is not None and os.getppid() != self._parent)

    def take_save(self) -> bool:
        """Asked to save after the step (SIGUSR2); the request is taken."""
        asked, self._save = self._save, False
        return asked

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle SIGTERM, SIGINT and SIGUSR1 (stop) and SIGUSR2 (save) inside the block.

        The launcher starts workers with these signals blocked, so that one that comes while they still import is not
        lost and does not kill them; it is delivered here.
        """
        before = {number: signal.signal(number, self._ask_stop) for number in _STOP}
        before[signal.SIGUSR2] = signal.signal(signal.SIGUSR2, self._ask_save)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, before)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _ask_stop(self, number: int, frame: FrameType | None) -> None:
        self._stop = True

    def _ask_save(self, number: int, frame: FrameType | None) -> None:
        self._save = True
