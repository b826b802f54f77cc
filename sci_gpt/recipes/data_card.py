"""The data card of a built store: one HTML page with every figure inside, which opens without a network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from sci_gpt.data.store import SPLITS
from sci_gpt.recipes.coastline import SOURCE as COASTLINE_SOURCE
from sci_gpt.recipes.coastline import coastlines
from sci_gpt.recipes.page import MODALITY_COLOURS, figure, new_figure, page, table, text

CARD = "card.html"
SPLIT_COLOURS = {"train": "#0072B2", "valid": "#E69F00", "test": "#D55E00"}
MOST_PANELS = 48  # histograms that are drawn; the table has every channel
_YEAR = 365.2425 * 86400.0


def write_card(facts: Mapping[str, Any], path: Path) -> Path:
    """Write the page.

    Args:
        facts: of `facts.store_facts`.
        path: where to; returned.
    """
    sources = facts["sources"]
    sizes = ", ".join(f"{name} {size}" for name, size in facts["tokenizer"].items())
    panels = sum(len(source["histograms"]) for source in sources)
    few = f" The first {MOST_PANELS} of {panels} channels are drawn." if panels > MOST_PANELS else ""
    parts = [
        f"<h1>{text(facts['name'])}: data card</h1>",
        f"<p class='quiet'>Store {text(facts['path'])}, fingerprint {text(facts['fingerprint'])}, built by commit "
        f"{text(facts['commit'] or 'unknown')}.</p>",
        f"<p>{len(sources)} sources, {facts['tokens']:,} tokens over all splits (at the tokenizers' default sizes: "
        f"{text(sizes)}).</p>",
        "<h2>Counts, tokens and periods</h2>",
        _counts(sources),
        figure(draw_periods(sources), "When each source's splits begin and end; dates are the corpus calendar's."),
        "<h2>Places</h2>",
        figure(draw_map(sources), _map_caption(sources)),
        "<h2>Values</h2>",
        figure(
            draw_histograms(sources),
            "Physical values of the training split, in pieces spread evenly over it; heights are log(1 + count)." + few,
        ),
        _channels(sources),
        "<h2>Quality</h2>",
        _quality(facts),
        "<h2>Licences and citations</h2>",
        _licences(sources),
    ]
    path.write_text(page(f"{facts['name']}: data card", parts), encoding="utf-8")
    return path


def draw_map(sources: Iterable[Mapping[str, Any]]) -> Figure:
    """Where the sources are: a grid's tiles as rectangles, stations and receivers as points."""
    figure = new_figure(10.5, 5.6)
    axis = figure.add_axes((0.06, 0.09, 0.925, 0.89))
    for line in coastlines():
        axis.plot(line[:, 0], line[:, 1], color="#8A8A8A", linewidth=0.6, zorder=1)
    labels: dict[str, None] = {}
    for source in sources:
        colour = MODALITY_COLOURS[source["modality"]]
        for bounds in source["places"]["bounds"]:
            label = source["modality"] if source["modality"] not in labels else None
            labels[source["modality"]] = None
            _place(axis, bounds, colour=colour, label=label)
        if source["places"]["bounds"]:
            first = source["places"]["bounds"][0]
            spot = (_wrapped(first["west"]), first["north"])
            away = (8, -3) if first["north"] > 80 else (4, 4)
            axis.annotate(source["source"], spot, xytext=away, textcoords="offset points", fontsize=8, zorder=4)
    axis.set(xlim=(-180, 180), ylim=(-90, 90), xlabel="longitude (°E)", ylabel="latitude (°N)")
    axis.set(xticks=range(-180, 181, 60), yticks=range(-90, 91, 30))
    axis.grid(color="#E3E3E3", linewidth=0.6, zorder=0)
    axis.set_axisbelow(True)
    if labels:
        axis.legend(loc="lower left", fontsize=8)
    return figure


def draw_periods(sources: Sequence[Mapping[str, Any]]) -> Figure:
    """The splits of every source in time, a bar each; what is shorter than a pixel is still a mark."""
    height = 0.9 + 0.42 * len(sources)
    figure = new_figure(10.5, height)
    axis = figure.add_axes((0.2, 0.55 / height, 0.78, 1 - 0.85 / height))
    for row, source in enumerate(sources):
        for lane, split in enumerate(SPLITS):
            part = source["splits"][split]
            if part["start"] is None:
                continue
            begin, end = (_year(part[edge]) for edge in ("start", "end"))
            level = row + (lane - 1) * 0.27
            axis.plot([begin, end], [level, level], color=SPLIT_COLOURS[split], linewidth=5, solid_capstyle="butt")
            axis.plot([begin], [level], color=SPLIT_COLOURS[split], marker="|", markersize=5)
    for split, colour in SPLIT_COLOURS.items():
        axis.plot([], [], color=colour, linewidth=5, label=split)
    axis.set_yticks(range(len(sources)), [source["source"] for source in sources], fontsize=8)
    axis.set(ylim=(len(sources) - 0.4, -0.6), xlabel="year")
    axis.grid(axis="x", color="#E3E3E3", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), fontsize=8, ncols=3, frameon=False)
    return figure


def draw_histograms(sources: Iterable[Mapping[str, Any]]) -> Figure:
    """A panel per channel."""
    panels = [
        (source["source"], source["modality"], name, histogram)
        for source in sources
        for name, histogram in source["histograms"].items()
    ][:MOST_PANELS]
    columns = 4
    rows = max(-(-len(panels) // columns), 1)
    figure = new_figure(10.5, 0.3 + 1.75 * rows)
    figure.subplots_adjust(left=0.05, right=0.985, bottom=0.45 / (1.75 * rows + 0.3), top=1 - 0.3 / (1.75 * rows + 0.3))
    figure.subplots_adjust(hspace=0.8, wspace=0.28)
    for number, (source, modality, name, histogram) in enumerate(panels, start=1):
        axis = figure.add_subplot(rows, columns, number)
        low, high, counts = histogram["low"], histogram["high"], histogram["counts"]
        edges = np.linspace(low, high if high > low else low + 1.0, len(counts) + 1)
        axis.stairs(np.log10(1.0 + np.asarray(counts)), edges, fill=True, color=MODALITY_COLOURS[modality])
        axis.set_yticks([])
        axis.set_title(f"{source}\n{_short_name(name)}", fontsize=7, pad=3)
        axis.set_xlabel(histogram["unit"] or "", fontsize=7, labelpad=1)
        axis.locator_params(axis="x", nbins=4)
        axis.tick_params(labelsize=6, pad=2)
    return figure


def _place(axis: Axes, bounds: Mapping[str, float], *, colour: str, label: str | None) -> None:
    width, height = bounds["east"] - bounds["west"], bounds["north"] - bounds["south"]
    west = _wrapped(bounds["west"])
    if width == 0 and height == 0:
        axis.plot([west], [bounds["south"]], "o", color=colour, markersize=5, label=label, zorder=3)
        return
    for turn in (0.0, -360.0) if west + width > 180 else (0.0,):  # a tile over the date line is on both edges
        corner = (west + turn, bounds["south"])
        axis.add_patch(
            Rectangle(corner, width, height, facecolor=colour, edgecolor=colour, alpha=0.25, label=label, zorder=2)
        )
        label = None


def _wrapped(longitude: float) -> float:
    return (longitude + 180.0) % 360.0 - 180.0


def _year(stamp: str) -> float:
    return 1970.0 + float(np.datetime64(stamp, "s").astype(np.int64)) / _YEAR


def _short_name(channel: str) -> str:
    return channel if len(channel) <= 34 else channel[:33] + "…"


def _map_caption(sources: Iterable[Mapping[str, Any]]) -> str:
    lost = [
        f"{source['source']} {source['places']['stretches_without_place']}"
        for source in sources
        if source["places"]["stretches_without_place"]
    ]
    more = f" Stretches without a known place: {', '.join(lost)}." if lost else ""
    return (
        f"Where the data are: tiles of grids, points of stations and receivers.{more} Coastlines: {COASTLINE_SOURCE}."
    )


def _counts(sources: Iterable[Mapping[str, Any]]) -> str:
    rows = [
        (
            source["source"],
            source["modality"],
            source["nature"],
            split,
            f"{part['stretches']:,}",
            f"{part['times']:,}",
            f"{part['tokens']:,}",
            f"{part['missing_share']:.1%}",
            part["start"] or "",
            part["end"] or "",
        )
        for source in sources
        for split, part in source["splits"].items()
    ]
    head = ("source", "modality", "nature", "split", "stretches", "times", "tokens", "missing", "start", "end")
    return table(head, rows, numbers=("stretches", "times", "tokens", "missing"))


def _channels(sources: Iterable[Mapping[str, Any]]) -> str:
    rows = [
        (
            source["source"],
            name,
            (source["histograms"].get(name) or {}).get("unit") or "",
            f"{row['count']:,}",
            *(f"{row[key]:.6g}" for key in ("mean", "std", "minimum", "maximum")),
        )
        for source in sources
        for name, row in source["statistics"].items()
    ]
    head = ("source", "channel", "unit", "values", "mean", "std", "minimum", "maximum")
    note = (
        "<p>Statistics of the training split alone, after the variable's transform (rain and the like are logarithms, "
        "not in the unit named).</p>"
    )
    return note + table(head, rows, numbers=head[3:])


def _quality(facts: Mapping[str, Any]) -> str:
    rules = "".join(f"<li><b>{text(name)}</b>: {text(what)}.</li>" for name, what in facts["quality_rules"].items())
    rows = [
        (source["source"], split, rule, f"{found['spans']:,}", f"{found['times']:,}")
        for source in facts["sources"]
        for split, part in source["splits"].items()
        for rule, found in part["quality"].items()
        if found["spans"]
    ]
    told = table(("source", "split", "rule", "spans", "times"), rows, numbers=("spans", "times"))
    none = "<p>No rule holds anywhere in this store.</p>"
    return (
        f"<p>A window of which one of these holds is left out of training and validation:</p><ul>{rules}</ul>"
        "<p>Windows belong to a run: it says how many it leaves out. Spans in which a rule holds:</p>"
        f"{told if rows else none}"
    )


def _licences(sources: Iterable[Mapping[str, Any]]) -> str:
    items = [
        f"<li><b>{text(source['source'])}</b> ({text(source['nature'])}). {text(source['citation'])}. Licence: "
        f"{text(source['licence'])}.</li>"
        for source in sources
    ]
    return f"<ul>{''.join(items)}</ul>"
