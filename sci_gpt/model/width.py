"""Width scaling (muP): which parameters learn more slowly in a wider model, so that one rate fits all widths."""

from __future__ import annotations

from dataclasses import replace

import torch

from sci_gpt.model.transformer import SciGPT


def rate_factors(model: SciGPT) -> dict[str, float]:
    """Factor of the learning rate by parameter name; those that are not named have 1.

    Yang et al. 2022 (arXiv:2203.03466), table 8, for Adam: hidden matrices, both of whose sides grow with the width,
    learn at base width / width times the rate; everything else at the rate itself. The last layer of a head multiplies
    its input by the same factor (`heads.Head`). The initial spreads are those of the standard rule: 1 / sqrt(fan in)
    for hidden matrices, the same at all widths for what reads the inputs, 0 for the last layers. Heads of attention
    keep their width and become more; their queries and keys are normalised.

    Args:
        model: whose settings name the base width; under the standard rule nothing is scaled.
    """
    base, shape = model.settings.base_width, model.shape
    if base is None:
        return {}
    doubled = replace(shape, width=2 * shape.width, heads=2 * shape.heads, hidden=2 * shape.hidden)
    with torch.device("meta"):
        wider = dict(SciGPT(doubled, model.settings).named_parameters())
    return {
        name: base / shape.width
        for name, parameter in model.named_parameters()
        if parameter.dim() == 2 and all(a < b for a, b in zip(parameter.shape, wider[name].shape, strict=True))
    }
