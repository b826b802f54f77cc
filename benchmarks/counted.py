"""Counts what the collectives of a piece of training carry, at the process groups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_KINDS = {
    "allreduce": "all-reduce",
    "allgather": "all-gather",
    "reducescatter": "reduce-scatter",
    "broadcast": "broadcast",
    "alltoall": "all-to-all",
}


class Counted(TorchDispatchMode):
    """Counts calls and bytes of c10d's collectives while it is entered.

    The bytes of a collective are those of the whole tensor on this process: what is summed, gathered, exchanged.

    Args:
        axes: {name of a process group: axis of the plan}; other groups are "world".
    """

    def __init__(self, axes: Mapping[str, str]) -> None:
        super().__init__()
        self.axes = axes
        self.calls: Counter[tuple[str, str, str]] = Counter()
        self.bytes: Counter[tuple[str, str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one operation, and run it."""
        if func.namespace == "c10d":
            name = func.__name__.replace("_", "")
            kind = next((written for short, written in _KINDS.items() if short in name), None)
            if kind is not None:
                tensors = [list(_tensors(argument)) for argument in args]
                whole = max(tensors, key=lambda parts: sum(part.nbytes for part in parts))
                group = next(a for a in args if isinstance(a, torch.ScriptObject) and "ProcessGroup" in str(a._type()))
                process_group = torch.distributed.ProcessGroup.unbox(group)
                if process_group.size() == 1:  # nothing is sent
                    return func(*args, **(kwargs or {}))
                axis = self.axes.get(process_group.group_name, "world")
                key = (axis, kind, str(whole[0].dtype).removeprefix("torch."))
                self.calls[key] += 1
                self.bytes[key] += sum(part.nbytes for part in whole)
        return func(*args, **(kwargs or {}))

    def table(self) -> list[list[Any]]:
        """[axis, kind, type, calls, bytes] for each."""
        return [[*key, self.calls[key], volume] for key, volume in self.bytes.items()]


def _tensors(argument: Any) -> Iterable[torch.Tensor]:
    if isinstance(argument, torch.Tensor):
        yield argument
    elif isinstance(argument, (list, tuple)):
        for one in argument:
            yield from _tensors(one)
