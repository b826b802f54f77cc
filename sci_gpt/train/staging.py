"""Host memory into which a save copies what a rank holds, so that training goes on while the copy is written."""

from __future__ import annotations

import torch
from torch import Tensor

from sci_gpt.train.fragments import Holding


class Staging:
    """Memory for one save, used again by the next.

    Its pages are touched when it is reserved: the first copy into fresh pages takes twenty times as long as one into
    pages that are there.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0)

    @property
    def num_bytes(self) -> int:
        """Of the memory that is held."""
        return self._memory.numel() * 4

    def reserve(self, holding: Holding) -> None:
        """Make room for a holding of this size, page-locked where any of it lies on a GPU; never shrinks."""
        need = sum(tensor.numel() for tensor in holding.tensors.values())
        if need > self._memory.numel():
            self._memory = torch.empty(0)  # the old memory goes first: never both
            on_gpu = any(tensor.is_cuda for tensor in holding.tensors.values())
            self._memory = torch.empty(need, dtype=torch.float32, pin_memory=on_gpu).zero_()

    @torch.no_grad()
    def copy(self, holding: Holding) -> Holding:
        """The same holding, its tensors copied into this memory; valid until the next copy.

        Raises:
            TypeError: a tensor is not float32.
        """
        self.reserve(holding)
        tensors: dict[str, Tensor] = {}
        at, on_gpu = 0, False
        for name, tensor in holding.tensors.items():
            if tensor.dtype != torch.float32:
                raise TypeError(f"fragment {name!r} must be float32, got {tensor.dtype}")
            place = self._memory[at : at + tensor.numel()].view(tensor.shape)
            place.copy_(tensor, non_blocking=tensor.is_cuda)
            tensors[name] = place
            at, on_gpu = at + tensor.numel(), on_gpu or tensor.is_cuda
        if on_gpu:
            torch.cuda.synchronize()
        return Holding(
            tensors=tensors,
            fragments=holding.fragments,
            parameters=holding.parameters,
            adam_step=holding.adam_step,
        )
