"""The figure of a sweep: validation loss over tokens, a line per size, with the passes over the data at each point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any

from matplotlib.figure import Figure

from sci_evals.figures import BLUE, GREEN, GREY, ORANGE, new_figure

_COLOURS = (BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00")
_LETTERS_PER_INCH = 15


def draw_sweep(rows: Sequence[Mapping[str, Any]], *, title: str, notes: Mapping[str, str]) -> Figure:
    """One panel per modality; beside each point of the smallest size stands how often the data were passed.

    Args:
        rows: lines of POINTS.csv.
        title: of the figure.
        notes: {modality: what its fit cannot tell}, below the panel.
    """
    modalities = sorted({row["modality"] for row in rows})
    figure = new_figure(4.4 * len(modalities), 4.8)
    figure.suptitle(title, fontsize=12, fontweight="bold")
    for axis, modality in zip(figure.subplots(1, len(modalities), squeeze=False)[0], modalities, strict=True):
        here = [row for row in rows if row["modality"] == modality]
        sizes = sorted({row["size"]: row["params"] for row in here}.items(), key=lambda item: item[1])
        for number, (size, params) in enumerate(sizes):
            own = sorted((row["tokens"], row["loss"]) for row in here if row["size"] == size)
            colour = _COLOURS[number % len(_COLOURS)]
            axis.plot(*zip(*own, strict=True), marker="o", color=colour, label=f"{params / 1e6:.2f} M")
        for tokens in sorted({row["tokens"] for row in here}):
            column = [row for row in here if row["tokens"] == tokens]
            axis.annotate(
                f"{column[0]['epochs']:.2g} ep.",
                (tokens, max(row["loss"] for row in column)),
                xytext=(0, 7), textcoords="offset points", ha="center", fontsize=8, color=GREY,
            )  # fmt: skip
        axis.set_xscale("log")
        axis.margins(x=0.12, y=0.15)
        axis.set(xlabel="training tokens, all modalities (1)", ylabel=f"validation loss ({here[0]['unit']})")
        axis.set_title(modality, fontsize=10)
        axis.legend(title="parameters", fontsize=8, frameon=False)
        note = notes.get(modality, "")
        axis.annotate(
            fill(note, int(4.2 * _LETTERS_PER_INCH)), (0, -0.2), xycoords="axes fraction", va="top", fontsize=7.5
        )
    figure.set_layout_engine("constrained", rect=(0, 0.02, 1, 0.98))
    return figure
