"""Keys and values of earlier frames, layer by layer, so that a rollout computes only the tokens of each new frame."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from sci_gpt.model.shapes import ModelShape


class LayerCache:
    """Of one layer: keys and values (documents, heads, capacity, head_width), the first `filled` tokens of which stand.

    Documents are alike in frames and slots, and lie one after another in the batch.
    """

    def __init__(self, shape: ModelShape, *, documents: int, capacity: int) -> None:
        self.filled = 0
        self._keys = torch.empty(documents, shape.heads, capacity, shape.head_width)
        self._values = torch.empty_like(self._keys)

    def mix(self, q: Tensor, k: Tensor, *, v: Tensor) -> Tensor | None:
        """Keep k and v, (documents * tokens, heads, head_width); what q attends to: all that is kept, q's own frame
        included. None for the first frames, whose queries may see only a part of them.
        """
        first, tokens = not self.filled, len(k) // len(self._keys)
        end = self.filled + tokens
        for kept, new in ((self._keys, k), (self._values, v)):
            kept[:, :, self.filled : end] = rearrange(new, "(d t) h c -> d h t c", t=tokens)
        self.filled = end
        if first:
            return None
        of_q = rearrange(q, "(d t) h c -> d h t c", t=tokens)
        mixed = F.scaled_dot_product_attention(of_q, self._keys[:, :, :end], self._values[:, :, :end])
        return rearrange(mixed, "d h t c -> (d t) h c")


class KeyValueCache:
    """A `LayerCache` per layer of a model, allocated once.

    Args:
        shape: of the trunk.
        documents: times members, alike in frames and slots.
        capacity: tokens that a document will have at most.
    """

    def __init__(self, shape: ModelShape, *, documents: int, capacity: int) -> None:
        self.layers = [LayerCache(shape, documents=documents, capacity=capacity) for _ in range(shape.layers)]
