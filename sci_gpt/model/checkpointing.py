"""Activation checkpointing of a layer: what its backward pass computes again instead of keeping it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Checkpointing = Literal["none", "selective", "full"]

_aten = torch.ops.aten
# What is dear to compute again: matrix products, and attention in each of its kernels.
_KEPT = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
}


def run_layer(layer: Callable[[Tensor], Tensor], x: Tensor, *, checkpointing: Checkpointing) -> Tensor:
    """The layer's output.

    Args:
        layer: from (T, width) to (T, width); draws no random numbers.
        x: (T, width).
        checkpointing: none: autograd keeps what it needs; selective: the results of matrix products and attention;
            full: the layer's input alone.
    """
    if checkpointing == "none" or not torch.is_grad_enabled():
        return layer(x)
    contexts: dict[str, Any] = {}
    if checkpointing == "selective":
        contexts["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    result: Tensor = checkpoint(layer, x, use_reentrant=False, preserve_rng_state=False, **contexts)
    return result


def _policy(context: Any, operator: Any, *arguments: Any, **named: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
