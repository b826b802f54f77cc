"""Draws docs/images/coordinates.png: how far a few steps move each layer's output, by width, under both width rules."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor, nn

from sci_gpt.model.init import initialize
from sci_gpt.model.inputs import ModelInputs, to_inputs
from sci_gpt.model.loss import valid_weights, weighted_sums
from sci_gpt.model.shapes import ModelShape
from sci_gpt.model.transformer import ModelSettings, SciGPT, build_model
from sci_gpt.model.width import rate_factors
from sci_tokenizers.packing import collate
from sci_tokenizers.sample import Sample
from sci_tokenizers.table import make_tokenizer
from sci_tokenizers.tokenizer import TokenizerSettings

TARGET = Path(__file__).resolve().parent / "images" / "coordinates.png"
WIDTHS = (32, 64, 128, 256, 512)
BASE_WIDTH, LAYERS, HEAD_WIDTH, STEPS = 32, 2, 16, 4
RATE = 2e-3
SETTINGS = TokenizerSettings(grid_patch=4, trace_samples=5)
COLOURS = {"standard": "#aa3377", "mup": "#4477aa"}


def example() -> ModelInputs:
    """One row with a small field and a station, made of waves and noise."""
    tokens = []
    facts: tuple[tuple[str, int, int, int, float], ...] = (("grid", 8, 12, 10, 86400.0), ("series", 1, 1, 40, 3600.0))
    for modality, rows, columns, times, step in facts:
        random = np.random.default_rng(rows)
        shape = (times, 1, rows, columns)
        waves = np.sin(np.arange(times) / 3.0)[:, None, None, None] + 0.4 * random.standard_normal(shape)
        seconds = 1.0e9 + np.arange(times) * step
        sample = Sample(
            key=modality,
            source=modality,
            modality=modality,  # type: ignore[arg-type]
            variables=("air_temperature",),
            levels=(float("nan"),),
            values=(280.0 + 6.0 * waves).astype(np.float32),
            valid=np.ones(shape, bool),
            time=seconds,
            year_phase=((seconds / 31556952.0) % 1.0).astype(np.float32),
            day_phase=((seconds / 86400.0) % 1.0).astype(np.float32),
            step_seconds=step,
            latitude=np.repeat(np.linspace(55.0, 50.0, rows, dtype=np.float32)[:, None], columns, axis=1),
            longitude=np.repeat(np.linspace(5.0, 12.0, columns, dtype=np.float32)[None], rows, axis=0),
            elevation=np.full((rows, columns), 100.0, np.float32),
        )
        tokens.append(make_tokenizer(sample.modality, SETTINGS).encode(sample, num_context=times // 2, leads=(1,)))
    return to_inputs(collate([tokens], sum(document.num_tokens for document in tokens)))


def outputs(model: SciGPT, inputs: ModelInputs) -> dict[str, Tensor]:
    """What each layer, the trunk and the heads' last layers give."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: object, result: Tensor) -> None:
            found[name] = result.detach().clone()

        return hook

    watched: dict[str, nn.Module] = {f"layer {n}": block for n, block in enumerate(model.blocks, start=1)}
    watched |= {f"{name} head": model.get_submodule(f"heads.{name}.head.out") for name in inputs.payloads}
    handles = [module.register_forward_hook(keep(name)) for name, module in watched.items()]
    with torch.no_grad():
        model(inputs)
    for handle in handles:
        handle.remove()
    return found


def moved(width: int, *, rule: str, inputs: ModelInputs) -> dict[str, float]:
    """Mean |change| of each output over STEPS steps of Adam at the same rate."""
    shape = ModelShape(layers=LAYERS, width=width, heads=width // HEAD_WIDTH, hidden=8 * width // 3)
    base = BASE_WIDTH if rule == "mup" else None
    model = build_model(shape, ModelSettings(tokenizer=SETTINGS, base_width=base))
    initialize(model, 0)
    factors = rate_factors(model)
    adam = torch.optim.Adam(
        [{"params": [p], "lr": RATE * factors.get(name, 1.0)} for name, p in model.named_parameters()],
        betas=(0.9, 0.95),
    )
    before, weight = outputs(model, inputs), sum(valid_weights(inputs).values())
    for _ in range(STEPS):
        adam.zero_grad()
        torch.stack(list(weighted_sums(model(inputs), inputs, settings=SETTINGS).values())).sum().div(weight).backward()
        adam.step()
    after = outputs(model, inputs)
    return {name: float((after[name] - before[name]).abs().mean()) for name in before}


def table(rule: str, widths: Iterable[int] = WIDTHS) -> dict[str, list[float]]:
    """`moved` by output, over widths."""
    inputs = example()
    rows = [moved(width, rule=rule, inputs=inputs) for width in widths]
    return {name: [row[name] for row in rows] for name in rows[0]}


def main() -> None:
    """Draw the picture."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for axes, (rule, title) in zip(panels, {"standard": "standard", "mup": "muP"}.items(), strict=True):
        for number, (name, values) in enumerate(table(rule).items()):
            style = ("-", "--", "-.", ":")[number % 4]
            axes.loglog(WIDTHS, values, style, marker="o", markersize=4, color=COLOURS[rule], label=name)
        axes.set_title(f"{title} (base width {BASE_WIDTH})" if rule == "mup" else title, fontsize=10)
        axes.set_xlabel("width", fontsize=9)
        axes.set_xticks(WIDTHS, [str(width) for width in WIDTHS])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, frameon=False)
    panels[0].set_ylabel(f"mean |change| of the output\nin {STEPS} steps at one rate", fontsize=9)
    TARGET.parent.mkdir(exist_ok=True)
    figure.savefig(TARGET, dpi=110, bbox_inches="tight", metadata={"Software": None})


if __name__ == "__main__":
    main()
