"""Workers of a build: Dask's LocalCluster, a scheduler elsewhere, or this process; memory planned before they start."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from sci_gpt.config import BuildConfig, DataConfig
from sci_gpt.data.build_job import Job, is_done, run_job
from sci_gpt.errors import ConfigError, DataError

# Measured on Linux with the packages of constraints.txt; Dask keeps the bound by ending a worker above it.
OWN_BYTES = 400_000_000  # of this process, which plans, draws the card and runs Dask's scheduler
COMPARED_BYTES = 10  # of this process for each byte of series and traces, whose every value is compared for duplicates
WORKER_BYTES = 250_000_000  # of a worker before it has read anything
PER_BYTE = 8  # bytes at work for each byte of a part's float32 values: float64 copies, masks, the shard's copy
_EVERY_SECONDS = 2.0  # between progress lines
_CONNECT_SECONDS = 10


def run_jobs(config: DataConfig, jobs: Sequence[Job], *, folder: Path, say: Callable[[str], None]) -> None:
    """Run every job that is not done yet; its output lies under `folder` afterwards.

    Args:
        config: `build` of it says who works.
        jobs: of all sources.
        folder: shared by the workers.
        say: where progress lines go.

    Raises:
        ConfigError: no scheduler answers, or memory for less than one worker.
        DataError: of a job, or a worker that was ended again and again.
    """
    todo = [job for job in jobs if not is_done(job, folder)]
    whole, left = sum(job.bytes for job in jobs), sum(job.bytes for job in todo)
    if len(todo) < len(jobs):
        say(f"build {config.name}: {len(jobs) - len(todo)} of {len(jobs)} jobs were finished before; kept")
    began = last = time.monotonic()
    done = 0
    with _workers(config, todo) as run:
        for number, job in enumerate(run(folder), start=len(jobs) - len(todo) + 1):
            done += job.bytes
            now = time.monotonic()
            if now - last >= _EVERY_SECONDS or number == len(jobs):
                rate = done / max(now - began, 1e-9)
                say(
                    f"build {config.name}: {number}/{len(jobs)} jobs, last {job.settings.name}; "
                    f"{(whole - left + done) / 1e6:,.0f} of {whole / 1e6:,.0f} MB of values, {rate / 1e6:,.1f} MB/s, "
                    f"ETA {(left - done) / max(rate, 1e-9):.0f} s"
                )
                last = now


@contextmanager
def _workers(config: DataConfig, jobs: Sequence[Job]) -> Iterator[Callable[[Path], Iterator[Job]]]:
    """What runs the jobs: a function of their folder that gives each when it is finished."""
    build = config.build
    if build.workers == 0 or not jobs:
        _refuse_little_memory(build, jobs, workers=1, own=_compared(jobs))
        yield lambda folder: _here(jobs, folder)
        return
    with _quiet():
        # Imported here: half a second, which a build in this process need not wait for.
        from distributed import Client, LocalCluster
    if build.scheduler is not None:
        try:
            client = Client(build.scheduler, timeout=_CONNECT_SECONDS)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"build.scheduler: no Dask scheduler answers at {build.scheduler!r} ({error}); start `dask scheduler` "
                "and `dask worker`, or leave the key out"
            ) from error
        with client:
            yield lambda folder: _there(client, jobs, folder=folder)
        return
    workers, limit = _planned(build, jobs)
    with (
        LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            memory_limit=limit,
            dashboard_address="127.0.0.1:0",
            host="127.0.0.1",
        ) as cluster,
        Client(cluster) as client,
    ):
        yield lambda folder: _there(client, jobs, folder=folder)


def _here(jobs: Sequence[Job], folder: Path) -> Iterator[Job]:
    for job in jobs:
        run_job(job, folder)
        yield job


def _there(client: Any, jobs: Sequence[Job], *, folder: Path) -> Iterator[Job]:
    # Imported here: see `_workers`.
    from distributed import KilledWorker, as_completed

    where = folder.resolve()  # workers of a scheduler elsewhere have another working folder
    largest_first = sorted(jobs, key=lambda job: -job.bytes)
    futures = {client.submit(_refusal, job, where, pure=False): job for job in largest_first}
    for future in as_completed(list(futures)):
        job = futures[future]
        try:
            refusal = future.result()
        except KilledWorker as error:
            names = ", ".join(part.name for part in job.parts)
            raise DataError(
                f"{job.settings.where}: workers were ended again and again while they read {names[:200]}; if memory "
                "ended them, raise build.memory_megabytes, lower stretch_megabytes, or cut the file"
            ) from error
        if refusal is not None:
            raise refusal
        yield job


def _refusal(job: Job, folder: Path) -> DataError | OSError | None:
    """Run a job on a worker; bad data and a full disk come back as a result, which the worker logs as no failure."""
    try:
        run_job(job, folder)
    except DataError as error:
        return DataError(str(error))  # its kinds are made of more than words, and would not arrive
    except OSError as error:
        return error
    return None


def _planned(build: BuildConfig, jobs: Sequence[Job]) -> tuple[int, int]:
    """Number of workers, and bytes that each may take."""
    wanted = min(build.workers or len(os.sched_getaffinity(0)), len(jobs))
    own = OWN_BYTES + _compared(jobs)
    memory = _memory(build) - own
    workers = max(1, min(wanted, int(memory // _need(jobs))))
    _refuse_little_memory(build, jobs, workers=workers, own=own)
    return workers, int(memory // workers)


def _memory(build: BuildConfig) -> float:
    if build.memory_megabytes is not None:
        return build.memory_megabytes * 1e6
    return 0.8 * psutil.virtual_memory().available


def _need(jobs: Sequence[Job]) -> float:
    """Bytes that a worker takes for the largest part of all."""
    return WORKER_BYTES + PER_BYTE * max((part.bytes for job in jobs for part in job.parts), default=0)


def _compared(jobs: Sequence[Job]) -> int:
    """Bytes that this process holds to compare the splits; of a grid few cells are compared."""
    return COMPARED_BYTES * sum(job.bytes for job in jobs if job.settings.modality != "grid")


def _refuse_little_memory(build: BuildConfig, jobs: Sequence[Job], *, workers: int, own: int) -> None:
    need = own + workers * _need(jobs)
    if need > _memory(build):
        part, name = max((part.bytes, f"{job.settings.name}: {part.name}") for job in jobs for part in job.parts)
        raise ConfigError(
            f"a build of these files takes about {need / 1e6:,.0f} MB, {_memory(build) / 1e6:,.0f} MB are given: the "
            f"largest part ({name}) has {part / 1e6:,.0f} MB of values, and comparing series and traces for duplicates "
            f"takes {_compared(jobs) / 1e6:,.0f} MB; raise build.memory_megabytes, lower stretch_megabytes, or cut the "
            "files or the corpus"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Dask without its log of connections that end, and without the warning of a package that it looks for."""
    # Imported here: see `_workers`.
    import dask

    dask.config.set(
        {
            "logging.distributed": "error",
            "distributed.nanny.pre-spawn-environ.PYTHONWARNINGS": "ignore:The pynvml package is deprecated",
        }
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The pynvml package is deprecated", category=FutureWarning)
        yield
