"""Draws docs/images/masked.png from the code itself: what masked documents hide, and the anchors of what is hidden."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap

from sci_tokenizers.masked import masked_tokens
from sci_tokenizers.sample import Modality, Sample
from sci_tokenizers.table import make_tokenizer
from sci_tokenizers.tokenizer import TokenizerSettings
from sci_tokenizers.tokens import Tokens

TARGET = Path(__file__).resolve().parent / "images" / "masked.png"
BLUE, RED, GREY, PALE = "#4477aa", "#aa3377", "#888888", "#dddddd"
FRAMES, CONTEXT, KEY = 48, 16, 11
SETTINGS = TokenizerSettings(grid_patch=4, trace_samples=5)
# modality -> (variable, rows, columns, step in seconds, level, spread)
MADE: dict[Modality, tuple[str, int, int, float, float, float]] = {
    "grid": ("air_temperature", 12, 16, 86400.0, 285.0, 6.0),
    "series": ("air_temperature", 1, 1, 3600.0, 285.0, 6.0),
    "trace": ("digitizer_counts_vertical", 1, 1, 0.1, 0.0, 40.0),
}


def made_sample(modality: Modality) -> Sample:
    """A slow wave and what is left of yesterday's noise; a trace is noise that grows threefold half way."""
    variable, rows, columns, step, level, spread = MADE[modality]
    times = FRAMES * make_tokenizer(modality, SETTINGS).frame_times
    noise = np.random.default_rng(3).standard_normal((times, 1, rows, columns))
    if modality == "trace":
        film = noise * np.where(np.arange(times) < times / 2, 1.0, 3.0)[:, None, None, None]
    else:
        for t in range(1, times):
            noise[t] = 0.8 * noise[t - 1] + 0.6 * noise[t]
        film = np.sin(np.arange(times) / 6.0)[:, None, None, None] + 0.3 * noise
    seconds = np.arange(times) * step
    latitude, longitude = np.meshgrid(np.linspace(40.0, 30.0, rows), np.linspace(0.0, 15.0, columns), indexing="ij")
    return Sample(
        key="made",
        source="made",
        modality=modality,
        variables=(variable,),
        levels=(float("nan"),),
        values=(level + spread * film).astype(np.float32),
        valid=np.ones(film.shape, bool),
        time=seconds,
        year_phase=np.zeros(times, np.float32),
        day_phase=np.zeros(times, np.float32),
        step_seconds=step,
        latitude=latitude.astype(np.float32),
        longitude=longitude.astype(np.float32),
        elevation=np.zeros((rows, columns), np.float32),
    )


def made_tokens(modality: Modality) -> Tokens:
    """The masked document of the made-up sample."""
    tokenizer = make_tokenizer(modality, SETTINGS)
    return masked_tokens(tokenizer, made_sample(modality), key=KEY, num_context=CONTEXT, leads=(1,))


def draw_tubes(axes: Axes) -> None:
    """Which tokens of a grid's document are hidden."""
    tokens = made_tokens("grid")
    assert tokens.masked is not None
    hidden = tokens.masked.hidden
    axes.imshow(hidden.T, aspect="auto", interpolation="nearest", cmap=ListedColormap([PALE, RED]))
    axes.axvline(CONTEXT - 0.5, color="black", linewidth=0.8)
    axes.text(CONTEXT - 0.2, -0.8, "end of context", fontsize=8)
    axes.set_xlabel("frame", fontsize=9)
    axes.set_ylabel("slot (patch)", fontsize=9)
    share = f"{100 * hidden.mean():.0f} % of {hidden.size} tokens hidden"
    axes.set_title(f"A grid: {share}", fontsize=10, pad=18)


def draw_line(axes: Axes, modality: Modality, *, title: str) -> None:
    """The values of a document of one slot in scaled units: what it holds, what it hides, anchor and spread."""
    tokens = made_tokens(modality)
    assert tokens.masked is not None
    values = tokens.payload.shape[3]
    at = np.arange(FRAMES * values) / values
    hidden = np.repeat(tokens.masked.hidden[:, 0], values)
    shown, truth = tokens.payload[:, 0, 0].ravel(), tokens.masked.truth[:, 0, 0].ravel()
    anchor, spread = tokens.anchor[:, 0, 0, :, 0].ravel(), np.exp(tokens.anchor_spread[:, 0, 0, :, 0].ravel())
    axes.plot(at, np.where(hidden, np.nan, shown), color=BLUE, linewidth=1, marker=".", markersize=3, label="visible")
    axes.plot(at, np.where(hidden, truth, np.nan), ".", color=RED, markersize=4, label="hidden: the answers")
    axes.plot(at, np.where(hidden, anchor, np.nan), color="black", linewidth=1, label="their anchor")
    low, high = (np.where(hidden, anchor + side * spread, np.nan) for side in (-1.0, 1.0))
    axes.fill_between(at, low, high, color=GREY, alpha=0.35, linewidth=0, label="and its spread")
    axes.axvline(CONTEXT, color="black", linewidth=0.8)
    axes.set_xlabel("frame", fontsize=9)
    axes.set_ylabel("scaled value", fontsize=9)
    axes.set_title(title, fontsize=10, pad=18)
    axes.legend(fontsize=8, frameon=False, loc="upper left")
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom, top + 0.45 * (top - bottom))


def main() -> None:
    """Draw the figure."""
    figure, axes = plt.subplots(1, 3, figsize=(13.0, 4.0), constrained_layout=True)
    draw_tubes(axes[0])
    draw_line(axes[1], "series", title="A series: a line between what is visible")
    draw_line(axes[2], "trace", title="A trace: 0, as wide as the frames beside it")
    for each in axes:
        each.tick_params(labelsize=8)
    figure.savefig(TARGET, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
