"""The model: embeddings of three modalities, one frame-causal trunk, a head per modality."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sci_gpt.model.embed import ContextEmbedding, PayloadEmbedding
from sci_gpt.model.heads import GRID_PACE, START_LEAN, GaussianHead, MixtureHead, Prediction
from sci_gpt.model.inputs import ModelInputs
from sci_gpt.model.layers import Block, RMSNorm, Rotary
from sci_gpt.model.shapes import ModelShape
from sci_tokenizers.memory import MEMORIES
from sci_tokenizers.tokenizer import TokenizerSettings
from sci_tokenizers.variables import VARIABLES


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """What beside the trunk's shape decides the parameters.

    Attributes:
        tokenizer: sizes of tokens.
        mixture_components: logistics in the series head.
        num_variables: rows of the variable table when the model was made.
    """

    tokenizer: TokenizerSettings
    mixture_components: int = 3
    num_variables: int = len(VARIABLES)


class SciGPT(nn.Module):
    """One transformer over frames x slots: embeddings and heads by modality, one trunk."""

    def __init__(self, shape: ModelShape, settings: ModelSettings) -> None:
        super().__init__()
        self.shape, self.settings = shape, settings
        values = {
            "grid": settings.tokenizer.grid_patch**2,
            "series": 1,
            "trace": settings.tokenizer.trace_samples,
        }
        rows, width = settings.num_variables, shape.width
        self.context = ContextEmbedding(width)
        self.embed = nn.ModuleDict({m: PayloadEmbedding(k, rows, width=width) for m, k in values.items()})
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = RMSNorm(width)
        self.heads = nn.ModuleDict(
            {
                "grid": GaussianHead(
                    width,
                    rows,
                    num_values=values["grid"],
                    num_memories=len(MEMORIES),
                    start=START_LEAN["grid"],
                    pace=GRID_PACE,
                ),
                "series": MixtureHead(
                    width,
                    rows,
                    components=settings.mixture_components,
                    bin_width=settings.tokenizer.series_bin_width,
                ),
                "trace": GaussianHead(
                    width, rows, num_values=values["trace"], num_memories=0, start=START_LEAN["trace"]
                ),
            }
        )

    def forward(self, inputs: ModelInputs) -> dict[str, Prediction]:
        """Predictions of every asked unit, by modality; a rank's batch holds every modality, absent ones empty."""
        x = self.trunk(inputs)
        return {
            modality: self.heads[modality](x[payload.index], payload) for modality, payload in inputs.payloads.items()
        }

    def trunk(self, inputs: ModelInputs) -> Tensor:
        """(T, width): what the model knows at each token."""
        x = self.context(inputs.features)
        for modality, payload in inputs.payloads.items():
            x = x.index_add(0, payload.index, self.embed[modality](payload).to(x.dtype))
        rotary = Rotary.of(inputs, self.shape.head_width)
        for block in self.blocks:
            x = block(x, rotary=rotary, groups=inputs.groups)
        return self.norm(x)

    @property
    def num_parameters(self) -> int:
        """All parameters, each once."""
        return sum(p.numel() for p in self.parameters())


def build_model(shape: ModelShape, settings: ModelSettings) -> SciGPT:
    """A model whose parameters are allocated but not drawn (see `init.initialize`)."""
    with torch.device("cpu"):
        return SciGPT(shape, settings)
