"""The model: embeddings of three modalities, one frame-causal trunk, a head per modality."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from sci_gpt.errors import ConfigError
from sci_gpt.model.attention import Reach
from sci_gpt.model.cache import KeyValueCache, LayerCache
from sci_gpt.model.checkpointing import Checkpointing, run_layer
from sci_gpt.model.embed import ContextEmbedding, PayloadEmbedding
from sci_gpt.model.heads import (
    GaussianHead,
    MixtureHead,
    Prediction,
    SampleHead,
    SamplePrediction,
)
from sci_gpt.model.inputs import ModelInputs, NoiseSettings
from sci_gpt.model.layers import Block, RMSNorm, Rotary
from sci_gpt.model.shapes import ModelShape
from sci_tokenizers.tokenizer import TokenizerSettings
from sci_tokenizers.variables import VARIABLES

_PIECES = 4  # of `attend` where nothing is trained: a quarter to a third less time than in one on a CPU


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """What beside the trunk's shape decides what the model computes.

    Attributes:
        tokenizer: sizes of tokens.
        mixture_components: logistics in the series head.
        num_variables: rows of the variable table when the model was made.
        radius: farthest patch that a token of a grid sees, in rows and in columns; None: all.
        global_every: every so-manieth layer sees all patches, whatever the radius.
        id_table: an id of a series is embedded by its value and by a row of its own.
        base_width: of the muP rule, at which it changes nothing (see `width`); None: the standard rule.
        noise: of a trunk that is conditioned on noise, whose predictions are members; by default none.
    """

    tokenizer: TokenizerSettings
    mixture_components: int = 3
    num_variables: int = len(VARIABLES)
    radius: int | None = None
    global_every: int = 2
    id_table: bool = True
    base_width: int | None = None
    noise: NoiseSettings = NoiseSettings()


class SciGPT(nn.Module):
    """One transformer over frames x slots: embeddings and heads by modality, one trunk.

    `checkpointing` says what of a layer its backward pass computes again; it changes memory and time, no number.
    """

    def __init__(self, shape: ModelShape, settings: ModelSettings) -> None:
        super().__init__()
        self.shape, self.settings = shape, settings
        values = {
            "grid": settings.tokenizer.grid_patch**2,
            "series": 1,
            "trace": settings.tokenizer.trace_samples,
        }
        rows, width = settings.num_variables, shape.width
        self.checkpointing: Checkpointing = "none"
        self.context = ContextEmbedding(width)
        ids = {"series": settings.tokenizer.series_ids} if settings.id_table else {}
        self.embed = nn.ModuleDict(
            {
                m: PayloadEmbedding(k, rows, width=width, num_ids=ids.get(m, 0), levels=m == "grid")
                for m, k in values.items()
            }
        )
        self.blocks = nn.ModuleList(Block(shape, noise=settings.noise.width) for _ in range(shape.layers))
        self.norm = RMSNorm(width)
        # Where the trunk's tokens are divided among processes: to those of this one, and back to all.
        self.scatter: Callable[[Tensor], Tensor] = _whole
        self.gather: Callable[[Tensor], Tensor] = _whole
        self.heads = nn.ModuleDict(_heads(width, settings, values=values))

    def forward(
        self, inputs: ModelInputs, *, last_frames: bool = False, cache: KeyValueCache | None = None
    ) -> dict[str, Prediction]:
        """Predictions of every asked unit, by modality; a rank's batch holds every modality, absent ones empty.

        Args:
            inputs: the batch.
            last_frames: the units ask the last frame of each document alone, as those of a batch that `collate` made
                with `context_only`: the last layer leaves all others out. The same predictions, to float rounding.
            cache: keys and values of the documents' earlier frames; those of the batch are added.

        Raises:
            ValueError: `last_frames`, but a unit asks another frame; `last_frames` or a cache where tokens are divided
                among processes, which is for training.
            ConfigError: a cache, and a document of which a layer's tokens see a neighbourhood alone.
        """
        if last_frames:
            _check_asked(inputs)
        if (last_frames or cache is not None) and self.scatter is not _whole:
            raise ValueError("last_frames and cache need all tokens on one process; load the checkpoint without a plan")
        if (inputs.noise is not None) != bool(self.settings.noise.width):
            came = "without noise" if inputs.noise is None else "with noise"
            raise ValueError(
                f"a model with noise of width {self.settings.noise.width} got inputs {came}: make them with "
                "noise.noisy_inputs and the model's own settings"
            )
        x = self.trunk(inputs, last_frames=last_frames, cache=cache)
        if inputs.noise is not None:
            return self.members(x, inputs)
        return {
            modality: self.heads[modality](x[payload.index], payload) for modality, payload in inputs.payloads.items()
        }

    def trunk(self, inputs: ModelInputs, *, last_frames: bool = False, cache: KeyValueCache | None = None) -> Tensor:
        """(T, width): what the model knows at each token; with `last_frames` at those of `ModelInputs.last_frames`; 0
        elsewhere. A model whose layers were left out (`LoadedModel.untrained`) knows nothing: 0. With noise member by
        member, (M * T, width); inputs without give what a trunk conditioned on noise knows at z = 0.
        """
        copies = 1 if inputs.noise is None else len(inputs.noise.values)
        if not len(self.blocks):
            return inputs.features.new_zeros(copies * len(inputs.frame), self.shape.width)
        x = self.context(inputs.features)
        for modality, payload in inputs.payloads.items():
            x = x.index_add(0, payload.index, self.embed[modality](payload).to(x.dtype))
        z = None
        if inputs.noise is not None:
            x, z, inputs = (
                x.repeat(copies, 1),
                inputs.noise.values.flatten(0, 1)[:, : self.settings.noise.width],
                inputs.repeated(copies),
            )
        order, laid = inputs.by_document()
        phase = Rotary.of(laid, self.shape.head_width).phase
        x, rotary = self.scatter(x[order]), Rotary(phase=self.scatter(phase))
        z = None if z is None else self.scatter(z[order])
        wide, radius = Reach.of(laid), self.settings.radius
        near = wide if radius is None else Reach.of(laid, radius=radius)
        asked, pieces = (laid.last_frames, _PIECES) if last_frames else (None, 1)
        for number, block in enumerate(self.blocks, start=1):
            only = asked if number == len(self.blocks) else None
            reach = near if number % self.settings.global_every else wide
            held = None if cache is None else _held(cache, number, reach=reach, radius=radius)
            layer = partial(block, rotary=rotary, reach=reach, asked=only, pieces=pieces, noise=z, held=held)
            x = run_layer(layer, x, checkpointing=self.checkpointing)
        known = order if asked is None else order[asked]
        x = self.gather(self.norm(x))[: len(known)]  # float32 under autocast on a GPU
        return x.new_zeros(len(inputs.frame), x.shape[1]).index_copy(0, known, x)

    def members(self, x: Tensor, inputs: ModelInputs) -> dict[str, Prediction]:
        """Members of every asked unit from the trunk's output (M * T, width), by modality."""
        noise = inputs.noise
        assert noise is not None
        found: dict[str, Prediction] = {}
        for modality, payload in inputs.payloads.items():
            head = cast(SampleHead, self.heads[modality])
            members = [head.member(own[payload.index], payload) for own in x.chunk(len(noise.values))]
            found[modality] = SamplePrediction(
                location=torch.stack([location for location, _ in members]),
                hangs=torch.stack([hangs for _, hangs in members]),
                noise=noise.values[:, payload.index[payload.unit_token], self.settings.noise.width :],
                together=noise.together[modality],
                pooled_weight=self.settings.noise.pooled_weight,
            )
        return found

    @property
    def num_parameters(self) -> int:
        """All parameters, each once."""
        return sum(p.numel() for p in self.parameters())


def _heads(width: int, settings: ModelSettings, *, values: dict[str, int]) -> dict[str, nn.Module]:
    """A head per modality, for `values` numbers in a token's variable; with noise all are heads of members."""
    rows, noise = settings.num_variables, settings.noise.width
    output_scale = 1.0 if settings.base_width is None else settings.base_width / width
    heads: dict[str, nn.Module] = {
        name: (SampleHead if noise else GaussianHead)(
            width,
            rows,
            modality=name,
            num_values=count,
            output_scale=output_scale,
            noise=noise,
        )
        for name, count in values.items()
        if noise or name != "series"
    }
    if not noise:
        heads["series"] = MixtureHead(
            width,
            rows,
            components=settings.mixture_components,
            bin_width=settings.tokenizer.series_bin_width,
            output_scale=output_scale,
        )
    return {name: heads[name] for name in values}


def _held(cache: KeyValueCache, number: int, *, reach: Reach, radius: int | None) -> LayerCache:
    """Of layer `number`: its queries all meet the same keys, so no document may have a neighbourhood of its own there;
    those within the radius (series and traces always are) have none.
    """
    if reach.near:
        raise ConfigError(
            f"samples of a grid of {reach.near[0].group.slots} patches: a trajectory keeps the keys of all of them, "
            f"and in layer {number} of this model a patch sees those within attention.radius {radius}; ask for "
            "quantiles, give a smaller region, or train a model whose attention.radius is null"
        )
    return cache.layers[number - 1]


def _check_asked(inputs: ModelInputs) -> None:
    last = inputs.last_frames
    for modality, payload in inputs.payloads.items():
        early = ~torch.isin(payload.index[payload.unit_token], last)
        if early.any():
            raise ValueError(
                f"last_frames: {int(early.sum())} of {len(early)} {modality} units ask before the last frame of their "
                "document; collate with context_only, or leave last_frames out"
            )


def _whole(x: Tensor) -> Tensor:
    return x


def build_model(shape: ModelShape, settings: ModelSettings, *, device: str = "cpu") -> SciGPT:
    """A model whose parameters are allocated but not drawn (see `init.initialize`); on the device "meta" they take no
    memory, and the buffers, which are constants, are there (see `parallel.weights.place`)."""
    with torch.device(device):
        return SciGPT(shape, settings)
