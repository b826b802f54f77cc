"""What a launcher and its workers agree on: environment variables, how a refusal travels, how a worker ends."""

from __future__ import annotations

import atexit
import errno
import json
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from sci_gpt import errors
from sci_gpt.errors import CheckpointError, SciGptError

# A file through which the ranks of one machine find each other: unlike a port it cannot be taken by somebody else.
RENDEZVOUS_VARIABLE = "SCI_GPT_RENDEZVOUS"
# The launcher's process id: a worker whose launcher is gone must not train on unseen.
PARENT_VARIABLE = "SCI_GPT_PARENT"
# What a launcher passes on to its workers: stop (the first three), save.
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
_NOT_WRITTEN = 120  # Python's own exit code where the last of the output could not be written
REFUSED = 2  # exit code of a worker that refused to go on, for a reason that a person can mend

_PREFIX = "sci-gpt refusal: "
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def leaving() -> Iterator[None]:
    """Around a worker's whole work: the process then ends with its exit code, and without the end of Python itself.

    While Python ends, a thread of gloo that gives a tensor back to it is ended on the spot, which aborts the process
    ("terminate called without an active exception", https://github.com/pytorch/pytorch/issues/190489). DeepSpeed at
    ZeRO 3 holds its groups, and so those threads, to the last. Threads that are not daemons are waited for, and what
    registers with `atexit` inside the block is done before; what was registered earlier is not, but for logging. A
    request to stop that comes after the block is too late: ignored.

    Raises:
        SystemExit: always, so that nothing comes after the block: with code 0, or that of a SystemExit in it.
    """
    code = 1

    def leave() -> None:
        nonlocal code
        try:
            logging.shutdown()
            for stream in (sys.stdout, sys.stderr):
                if stream is not None:
                    stream.flush()
        except (OSError, ValueError):
            code = code or _NOT_WRITTEN
        finally:
            os._exit(code)

    atexit.register(leave)
    try:
        yield
        raise SystemExit(0)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise
    finally:
        for number in PASSED_ON:
            signal.signal(number, signal.SIG_IGN)


@contextmanager
def refusing() -> Iterator[None]:
    """Around a worker's whole work: an error for a person becomes one line on stderr and exit code 2.

    Raises:
        SystemExit: with code 2, for a SciGptError and for a full disk.
    """
    try:
        yield
    except SciGptError as error:
        _refuse(error)
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        where = f" while writing {str(error.filename)!r}" if error.filename else ""
        _refuse(CheckpointError(f"no space left on the disk{where}; make room, and the same command resumes the run"))


def _refuse(error: SciGptError) -> None:
    print(_PREFIX + json.dumps([type(error).__name__, str(error)]), file=sys.stderr, flush=True)
    raise SystemExit(REFUSED) from error


def read_refusal(line: str) -> SciGptError | None:
    """The error that a line of a worker's stderr carries, None for any other line."""
    if not line.startswith(_PREFIX):
        return None
    kind, message = json.loads(line.removeprefix(_PREFIX))
    known: type[SciGptError] = getattr(errors, kind, SciGptError)
    return known(message)
