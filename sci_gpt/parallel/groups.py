"""Groups: the process groups of a plan's axes, in the form in which DeepSpeed asks for them."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from sci_gpt.parallel.plan import ParallelPlan, Position
from sci_gpt.parallel.world import World


@dataclass(frozen=True, kw_only=True)
class Groups:
    """This process's groups.

    The methods are those of DeepSpeed's `mpu`. What it takes for data parallelism is the sequence x data group, among
    which it divides states and averages gradients; an mpu with methods for sequences makes it divide by a wrong number.
    Without tensor parallelism that group is all processes, and DeepSpeed gets no mpu: it would add squares of norms
    over a group that is not there, which torch takes for all processes.

    Attributes:
        plan: the layout.
        position: of this process in it.
        tensor, sequence: groups of `plan.tensor_parallel` and `plan.sequence_parallel` processes; None where it is 1.
        zero: the sequence x data group: the processes that hold the same slice of every parameter.
    """

    plan: ParallelPlan
    position: Position
    tensor: Any = field(repr=False)
    sequence: Any = field(repr=False)
    zero: Any = field(repr=False)

    @classmethod
    def join(cls, plan: ParallelPlan, world: World) -> Groups:
        """Make the groups; every process calls this with the same plan.

        Raises:
            ConfigError: the plan is for another number of processes.
        """
        plan.check(world.size)
        ranks = torch.arange(plan.world_size).view(plan.data_parallel, plan.sequence_parallel, plan.tensor_parallel)
        of_tensor = ranks.reshape(-1, plan.tensor_parallel)
        of_sequence = ranks.transpose(1, 2).reshape(-1, plan.sequence_parallel)
        of_zero = ranks.reshape(-1, plan.tensor_parallel).t()
        timeout = world.timeout_seconds
        return cls(
            plan=plan,
            position=plan.position(world.rank),
            tensor=_join(of_tensor.tolist(), timeout, rank=world.rank) if plan.tensor_parallel > 1 else None,
            sequence=_join(of_sequence.tolist(), timeout, rank=world.rank) if plan.sequence_parallel > 1 else None,
            zero=_join(of_zero.tolist(), timeout, rank=world.rank),
        )

    @property
    def zero_rank(self) -> int:
        """This process's place among those that hold the same slices."""
        return self.position.data * self.plan.sequence_parallel + self.position.sequence

    @property
    def mpu(self) -> Groups | None:
        """What DeepSpeed is to be given."""
        return self if self.tensor is not None else None

    def get_model_parallel_group(self) -> Any:
        """For DeepSpeed: the tensor group."""
        return self.tensor

    def get_model_parallel_rank(self) -> int:
        """For DeepSpeed."""
        return self.position.tensor

    def get_model_parallel_world_size(self) -> int:
        """For DeepSpeed."""
        return self.plan.tensor_parallel

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size

    def get_data_parallel_group(self) -> Any:
        """For DeepSpeed: the sequence x data group."""
        return self.zero

    def get_data_parallel_rank(self) -> int:
        """For DeepSpeed."""
        return self.zero_rank

    def get_data_parallel_world_size(self) -> int:
        """For DeepSpeed."""
        return self.plan.zero_ranks

    def get_data_parallel_group_ranks(self) -> list[int]:
        """For DeepSpeed."""
        return dist.get_process_group_ranks(self.zero)


def _join(rows: list[list[int]], timeout_seconds: float, *, rank: int) -> Any:
    """The group of this process among `rows`; every process makes all of them, in one order."""
    mine = None
    for row in rows:
        group = dist.new_group(row, timeout=timedelta(seconds=timeout_seconds))
        if rank in row:
            mine = group
    return mine
