"""The processes of a run: joins them over gloo through DeepSpeed, and carries the one small all-reduce of a step."""

from __future__ import annotations

import faulthandler
import logging
import os
import warnings
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from sci_gpt.errors import ConfigError
from sci_gpt.parallel.worker import RENDEZVOUS_VARIABLE


@dataclass(frozen=True, kw_only=True)
class World:
    """This process's place among the run's processes; made by `World.start`, ended by `stop`.

    Attributes:
        rank, size: this process's number and how many there are.
        device: where the model lives.
        agreement_group: gloo group for host values (the default group itself on CPU).
        timeout_seconds: how long a collective waits for a lost rank before it raises.
    """

    rank: int
    size: int
    device: torch.device
    agreement_group: Any = field(default=None, repr=False)
    timeout_seconds: float = 600.0

    @classmethod
    def start(cls, *, threads: int = 1, timeout_seconds: float = 600.0) -> World:
        """Join the process group described by RANK, WORLD_SIZE, ...; without them this is a world of one process.

        Args:
            threads: CPU threads of this process.
            timeout_seconds: how long a collective waits for a lost rank before it raises.

        Raises:
            ConfigError: RANK or WORLD_SIZE is not a number, or they contradict each other; torchrun on several machines
                would not be able to start the workers again.
        """
        if not faulthandler.is_enabled():
            faulthandler.enable(2)  # a crash below Python (gloo, NCCL) says where Python stood
        rank, size = _place()
        _check_restarts(size)
        torch.set_num_threads(threads)
        torch.set_flush_denormal(True)  # a CPU product with subnormals ran 150 times slower
        # torch 2.13 warns once per collective that DeepSpeed calls by its older name.
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|deepspeed)\..*")
        gpu = torch.cuda.is_available()
        if not gpu:
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        _init_deepspeed(rank=rank, size=size, gpu=gpu, timeout_seconds=timeout_seconds)
        if not gpu:
            return cls(rank=rank, size=size, device=torch.device("cpu"), timeout_seconds=timeout_seconds)
        local = int(os.environ["LOCAL_RANK"])
        torch.cuda.set_device(local)
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
        return cls(
            rank=rank,
            size=size,
            device=torch.device("cuda", local),
            agreement_group=group,
            timeout_seconds=timeout_seconds,
        )

    def sum(self, values: list[float]) -> list[float]:
        """Elementwise sum over all ranks of float64 numbers; the same on every rank, bit for bit.

        Each rank's numbers travel in slots of their own and are added in rank order, so that no reduction tree of the
        backend decides the rounding.
        """
        if self.size == 1:
            return list(values)
        return [sum(column) for column in zip(*self.gather(values), strict=True)]

    def gather(self, values: list[float]) -> list[list[float]]:
        """Every rank's numbers (equally many), in rank order: one all-reduce of a (size, len(values)) float64 table."""
        table = torch.zeros(self.size, len(values), dtype=torch.float64)
        table[self.rank] = torch.tensor(values, dtype=torch.float64)
        if self.size > 1:
            dist.all_reduce(table, group=self.agreement_group)
        rows: list[list[float]] = table.tolist()
        return rows

    def share(self, value: str) -> str:
        """Rank 0's text, on every rank."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0, group=self.agreement_group)
        return box[0]

    def gather_texts(self, value: str) -> list[str]:
        """Every rank's text, in rank order."""
        if self.size == 1:
            return [value]
        texts: list[str] = [""] * self.size
        dist.all_gather_object(texts, value, group=self.agreement_group)
        return texts

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.sum([0.0])

    def stop(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()


def _place() -> tuple[int, int]:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        os.environ.setdefault(name, value)
    try:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except ValueError as error:
        raise ConfigError(f"RANK and WORLD_SIZE in the environment must be numbers: {error}") from error
    if not 0 <= rank < size:
        raise ConfigError(f"RANK is within 0..WORLD_SIZE - 1, got RANK={rank} and WORLD_SIZE={size}")
    return rank, size


def _init_deepspeed(*, rank: int, size: int, gpu: bool, timeout_seconds: float) -> None:
    # Imported here: DeepSpeed takes 3 s to import and picks its accelerator from DS_ACCELERATOR while doing so.
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if not gpu:
        # A private name: without it the first start on CPU compiles a shared-memory collective for a minute. Where the
        # name is gone nothing breaks, DeepSpeed only compiles again (tests/test_parallel_engine.py would tell).
        deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    rendezvous = os.environ.get(RENDEZVOUS_VARIABLE)
    method = f"file://{rendezvous}" if rendezvous else None
    if method is None and "MASTER_PORT" not in os.environ:
        if size > 1:
            raise ConfigError(
                f"WORLD_SIZE is {size}, but neither MASTER_PORT nor {RENDEZVOUS_VARIABLE} says where the ranks meet; "
                "start them with `sci-gpt pretrain --processes` or torchrun"
            )
        os.environ["MASTER_PORT"] = "0"  # a world of one: any free port
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault(
        "MASTER_PORT", "0"
    )  # DeepSpeed wants the name to exist also where a file is the meeting place
    _meet_after_restart(rank=rank, size=size, gpu=gpu, timeout_seconds=timeout_seconds)
    deepspeed.init_distributed(
        dist_backend="nccl" if gpu else "gloo",
        auto_mpi_discovery=False,
        verbose=False,
        timeout=timedelta(seconds=timeout_seconds),
        init_method=method,
        rank=rank,
        world_size=size,
    )


def _check_restarts(size: int) -> None:
    """torch 2.13 keeps one store for all starts of `torchrun --max-restarts`, without a prefix: a worker may find the
    address that another left there before it was killed, and wait for it. With a variable of torch's own each start has
    a new store; on one machine `_meet_after_restart` does without.
    """
    of_agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    several = os.environ.get("LOCAL_WORLD_SIZE", str(size)) != str(size)
    if of_agents and several and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        raise ConfigError(
            "torchrun --max-restarts on several machines shares one store among all starts, so that workers that are "
            "started again look for dead ones; give every torchrun --rdzv-backend=c10d, and set "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment, or leave --max-restarts out"
        )


def _meet_after_restart(*, rank: int, size: int, gpu: bool, timeout_seconds: float) -> None:
    """Form the group under a name of its own where torchrun has started the workers of one machine again.

    Without it they would meet in the store of the start before (see `_check_restarts`). The agents of several machines
    may count differently, so that no name could be made of their counts there.
    """
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restart == "0" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    if os.environ.get("LOCAL_WORLD_SIZE") != str(size):
        return
    timeout = timedelta(seconds=timeout_seconds)
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, size, is_master=False, timeout=timeout)
    dist.init_process_group(
        "nccl" if gpu else "gloo",
        store=dist.PrefixStore(f"restart-{restart}", store),
        rank=rank,
        world_size=size,
        timeout=timeout,
    )
