"""Bytes that each collective of a training step carries, counted, against theory; exits 1 beyond what is explained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# What a collective moves per process, in units of the whole tensor, for many processes (a ring takes (n - 1) / n).
VOLUME = {"allreduce": 2.0, "allgather": 1.0, "reduce_scatter": 1.0, "broadcast": 1.0, "alltoall": 1.0}


class Counted(TorchDispatchMode):
    """Counts calls and bytes of c10d's collectives while it is entered: {(kind, processes, type): [calls, bytes]}.

    The bytes of a collective are those of the whole tensor: what is summed, what is gathered, what is exchanged.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[tuple[str, int, str]] = Counter()
        self.bytes: Counter[tuple[str, int, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            kind = next(
                (
                    name
                    for name in VOLUME
                    if name in func.__name__.replace("_", "").replace("reducescatter", "reduce_scatter")
                ),
                None,
            )
            if kind is not None:
                tensors = [list(_tensors(argument)) for argument in args]
                whole = max(tensors, key=lambda parts: sum(part.nbytes for part in parts))
                group = next(a for a in args if isinstance(a, torch.ScriptObject) and "ProcessGroup" in str(a._type()))
                size = torch.distributed.ProcessGroup.unbox(group).size()
                key = (kind, size, str(whole[0].dtype).removeprefix("torch."))
                self.calls[key] += 1
                self.bytes[key] += sum(part.nbytes for part in whole)
        return func(*args, **(kwargs or {}))


def _tensors(argument: Any) -> Iterable[torch.Tensor]:
    if isinstance(argument, torch.Tensor):
        yield argument
    elif isinstance(argument, (list, tuple)):
        for one in argument:
            yield from _tensors(one)
