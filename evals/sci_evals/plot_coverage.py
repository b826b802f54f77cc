"""The figure of coverage: nominal against observed, before and after calibration, beside the best baseline."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sci_evals.coverage import Coverage, coverage_headline
from sci_evals.figures import BLUE, GREEN, GREY, ORANGE, new_figure
from sci_evals.metrics import BANDS
from sci_evals.results import CALIBRATED, TRAINED, headline
from sci_evals.scores import Score

_BASELINE = "best baseline"
_LOOKS = {TRAINED: (BLUE, "o", -0.2), CALIBRATED: (ORANGE, "D", 0.0), _BASELINE: (GREY, "s", 0.2)}


def draw_coverage(rows: Sequence[Coverage], scores: Sequence[Score]) -> Figure:
    """Share of the truth inside each band, per source and lead, with intervals; the vertical line is the band's name.

    Args:
        rows: of models and baselines.
        scores: the baseline with the lowest pooled CRPS at a lead stands for all of them where there is one; several
            channels with different best ones have none.
    """
    heads = coverage_headline(rows)
    best = {
        (row.source, row.region, row.channel, row.lead): row.baseline
        for row in headline(scores)
        if row.model == TRAINED and row.metric == "crps"
    }
    places = list(dict.fromkeys((row.source, row.region, row.channel, row.lead) for row in heads))
    figure = new_figure(11.0, 1.6 + 0.34 * len(places))
    panels = figure.subplots(1, len(BANDS), sharey=True, squeeze=False)[0]
    for nominal, axes in zip(BANDS, panels, strict=True):
        for row in heads:
            place = (row.source, row.region, row.channel, row.lead)
            name = _BASELINE if row.model == best.get(place) else row.model
            if row.nominal == nominal and name in _LOOKS:
                _point(axes, row, y=places.index(place), name=name)
        axes.axvline(nominal, color=GREEN, linewidth=1.2, zorder=0)
        axes.set_xlim(max(0.0, nominal - 0.5), min(1.0, nominal + 0.5) + 0.01)
        axes.set_xlabel(f"share of the truth inside the {100 * nominal:g} % band (1)")
        axes.grid(axis="x", color="#e3e3e3", linewidth=0.6)
    labels = [f"{source}, {lead}" for source, _, _, lead in places]
    panels[0].set_yticks(range(len(places)), labels, fontsize=8)
    panels[0].invert_yaxis()
    for name, (colour, marker, _) in _LOOKS.items():
        panels[0].plot([], [], color=colour, marker=marker, linestyle="", markersize=5, label=name)
    figure.legend(loc="outside upper center", ncols=len(_LOOKS), frameon=False, fontsize=9)
    return figure


def _point(axes: Axes, row: Coverage, *, y: float, name: str) -> None:
    colour, marker, shift = _LOOKS[name]
    axes.plot([row.coverage], [y + shift], color=colour, marker=marker, markersize=5, linestyle="")
    if not math.isnan(row.low):
        axes.plot([row.low, row.high], [y + shift] * 2, color=colour, linewidth=1.2)
