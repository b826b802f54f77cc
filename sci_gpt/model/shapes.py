"""The table of model sizes: what a size name means in layers, width and heads."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A trunk: layers, width, heads (head width is width / heads, a multiple of 8), SwiGLU hidden width."""

    layers: int
    width: int
    heads: int
    hidden: int

    def __post_init__(self) -> None:
        if self.width % self.heads or (self.width // self.heads) % 8:
            raise ValueError(f"width {self.width} must give {self.heads} heads a width that is a multiple of 8")

    @property
    def head_width(self) -> int:
        """Channels of one attention head."""
        return self.width // self.heads

    @property
    def trunk_parameters(self) -> int:
        """Parameters of the layers: attention 4 w^2, SwiGLU 3 w h, two norms, two query-key norms."""
        return self.layers * (4 * self.width**2 + 3 * self.width * self.hidden + 2 * self.width + 2 * self.head_width)


# From 30M on the name is the parameters of the whole model within 5 %, and heads have 64 or 128 channels.
SHAPES: dict[str, ModelShape] = {
    "tiny": ModelShape(layers=2, width=32, heads=2, hidden=64),
    "100k": ModelShape(layers=4, width=48, heads=3, hidden=112),
    "200k": ModelShape(layers=4, width=64, heads=4, hidden=160),
    "300k": ModelShape(layers=4, width=80, heads=5, hidden=208),
    "1M": ModelShape(layers=5, width=128, heads=4, hidden=344),
    "3M": ModelShape(layers=7, width=192, heads=6, hidden=512),
    "30M": ModelShape(layers=9, width=512, heads=8, hidden=1248),
    "125M": ModelShape(layers=12, width=896, heads=14, hidden=2392),
    "350M": ModelShape(layers=22, width=1152, heads=18, hidden=3072),
    "1.3B": ModelShape(layers=25, width=2048, heads=16, hidden=5632),
    "7B": ModelShape(layers=34, width=4096, heads=32, hidden=11008),
    "13B": ModelShape(layers=40, width=5120, heads=40, hidden=13824),
    "70B": ModelShape(layers=86, width=8192, heads=64, hidden=22016),
}
