"""The recipe of `sci-gpt inspect --tokens`: measure, a table, a page with plots under the run's folder, and MLflow."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sci_gpt.config import PretrainConfig
from sci_gpt.data.store import Store
from sci_gpt.recipes import parts
from sci_gpt.recipes.page import MODALITY_COLOURS, figure, new_figure, page, png, table, text
from sci_gpt.recipes.token_report import (
    MOST_CLIPPED,
    WIDEST_BIN,
    ChannelTokens,
    SourceTokens,
    refusals,
    to_json,
    token_report,
)
from sci_gpt.train.nested import Study

FOLDER, PAGE, IMAGE, RESULT = "tokens", "tokens.html", "tokens.png", "tokens.json"
_HEAD = ("channel", "unit", "max error", "mean error", "bin/step", "clipped", "of top 1 %", "ids used", "bits")
_SOURCE_HEAD = ("source", "modality", "windows", "frames", "tokens per sample", "tokens per second")
_CAPTION = (
    "Every channel of the run. From the left: largest round-trip error by the standard deviation of one-step changes; "
    "for series the width of a bin by that deviation and the share of the largest 1 % of values clipped (dashed: "
    "what is refused), the entropy of the ids, and where on the scaled axis values lie (darker: more, by logarithm)."
)


def inspect_tokens(config: PretrainConfig, say: Callable[[str], None] = print) -> tuple[SourceTokens, ...]:
    """Measure what the run's tokens keep of its data; write page, picture and numbers into its folder, and log them.

    Tracking that fails costs a warning, not the report.

    Raises:
        DataError: no store at `data`, or one that has not what the run asks for.
    """
    report = token_report(config, Store.open(config.data))
    folder = config.output / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    drawn = draw(report)
    (folder / IMAGE).write_bytes(png(drawn))
    (folder / RESULT).write_text(json.dumps(to_json(report), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (folder / PAGE).write_text(_page(config, report, drawn=drawn), encoding="utf-8")
    target = replace(parts.tracking_target(config), run_name=f"{config.name}-tokens")
    study = Study(target, folder, parameters={"data": str(config.data), **config.tokenizer.model_dump()})
    study.close(metrics=metrics(report), artifacts=[folder / name for name in (PAGE, IMAGE, RESULT)])
    say(f"tokens of {config.name}: {folder / PAGE}")
    return report


def metrics(report: Iterable[SourceTokens]) -> dict[str, float]:
    """Numbers by name for MLflow: tokens/SOURCE/.. and tokens/SOURCE/CHANNEL/.. (other signs become _)."""
    found: dict[str, float | None] = {}
    for source in report:
        name = f"tokens/{source.source}"
        found[f"{name}/tokens_per_sample"] = source.tokens_per_sample
        found[f"{name}/tokens_per_second"] = source.tokens_per_second
        for row in source.channels:
            one = f"{name}/{row.channel}"
            found |= {f"{one}/max_error": row.max_error, f"{one}/mean_error": row.mean_error}
            if row.use is not None:
                for key in ("bin_over_step", "clipped", "clipped_top", "ids_used", "entropy_bits"):
                    found[f"{one}/{key}"] = getattr(row.use, key)
    return {re.sub(r"[^A-Za-z0-9_./ -]", "_", key): float(value) for key, value in found.items() if value is not None}


def table_of(report: Sequence[SourceTokens]) -> str:
    """The report as text: a block per source, a line per channel."""
    lines = []
    for source in report:
        lines += [
            f"{source.source} ({source.modality}): {source.windows} windows of {source.frames} frames, "
            f"{source.tokens_per_sample} tokens each, {source.tokens_per_second:,.0f} tokens/s",
            f"  {_HEAD[0]:<42} {_HEAD[1]:<9}" + "".join(f"{name:>12}" for name in _HEAD[2:]),
        ]
        for row in source.channels:
            cells = _cells(row)
            mark = "" if row.refused is None else "  allowed" if row.allowed else "  REFUSED"
            lines.append(f"  {cells[0]:<42} {cells[1]:<9}" + "".join(f"{cell:>12}" for cell in cells[2:]) + mark)
    return "\n".join(lines)


def draw(report: Sequence[SourceTokens]) -> Figure:
    """A row per channel, a panel per question."""
    rows = [(source, row) for source in report for row in source.channels]
    height = 0.85 + 0.24 * len(rows)
    drawn = new_figure(12.5, height)
    drawn.subplots_adjust(left=0.27, right=0.985, bottom=0.35 / height, top=1 - 0.35 / height, wspace=0.16)
    panels = drawn.subplots(1, 5, sharey=True, width_ratios=(1, 1, 1, 1, 1.6))
    for place, (source, row) in enumerate(rows):
        colour = MODALITY_COLOURS[source.modality]
        if row.step_std:
            _dot(panels[0], row.max_error / row.step_std, place=place, colour=colour)
        if row.use is not None:
            if row.use.bin_over_step is not None:
                _dot(panels[1], row.use.bin_over_step, place=place, colour=colour)
            _dot(panels[2], 100.0 * row.use.clipped_top, place=place, colour=colour)
            _dot(panels[3], row.use.entropy_bits, place=place, colour=colour)
            many = np.log1p(row.use.bands)[None]
            box = (-1, 1, place + 0.4, place - 0.4)
            panels[4].imshow(many, extent=box, aspect="auto", cmap="Blues", vmin=0, vmax=many.max())
    titles = ("largest error / step", "bin / step", "% of top 1 % clipped", "entropy of ids (bits)", "scaled values")
    for axis, title in zip(panels, titles, strict=True):
        axis.set_title(title, fontsize=9)
        axis.tick_params(labelsize=7)
        axis.grid(axis="x", color="#E3E3E3", linewidth=0.6)
        axis.set_axisbelow(True)
    panels[0].set_xscale("log")
    panels[1].set_xscale("log")
    panels[1].axvline(WIDEST_BIN, color="black", linestyle="--", linewidth=0.8)
    panels[2].axvline(100 * MOST_CLIPPED, color="black", linestyle="--", linewidth=0.8)
    panels[3].set_xlim(left=0)
    panels[4].set(xlim=(-1, 1), xticks=(-1, 0, 1), xticklabels=("-limit", "0", "limit"))
    panels[4].get_xticklabels()[0].set_horizontalalignment("left")
    panels[4].get_xticklabels()[-1].set_horizontalalignment("right")
    panels[0].set_yticks(range(len(rows)), [f"{source.source}: {_short(row.channel)}" for source, row in rows])
    panels[0].set_ylim(len(rows) - 0.4, -0.6)
    return drawn


def _dot(axis: Axes, value: float, *, place: int, colour: str) -> None:
    axis.plot([value], [place], "o", color=colour, markersize=4.5)


def _short(channel: str) -> str:
    return channel if len(channel) <= 30 else channel[:29] + "…"


def _cells(row: ChannelTokens) -> tuple[str, ...]:
    use = row.use
    wide = "-" if use is None or use.bin_over_step is None else f"{use.bin_over_step:.3g}"
    rest = (
        ("-",) * 4
        if use is None
        else (f"{use.clipped:.2%}", f"{use.clipped_top:.2%}", f"{use.ids_used}/{use.ids}", f"{use.entropy_bits:.2f}")
    )
    return (row.channel, row.unit, f"{row.max_error:.3g}", f"{row.mean_error:.3g}", wide, *rest)


def _page(config: PretrainConfig, report: Sequence[SourceTokens], *, drawn: Figure) -> str:
    sources = [
        (
            source.source,
            source.modality,
            str(source.windows),
            str(source.frames),
            f"{source.tokens_per_sample:,}",
            f"{source.tokens_per_second:,.0f}",
        )
        for source in report
    ]
    rows = [(source.source, *_cells(row)) for source in report for row in source.channels]
    said = [f"<li>{text(line)}</li>" for line in refusals(report)]
    said += [
        f"<li>{text(source.source)}/{text(row.channel)}: {text(row.refused)}; allowed by the data's configuration</li>"
        for source in report
        for row in source.channels
        if row.allowed
    ]
    sizes = ", ".join(f"{name} {size}" for name, size in config.tokenizer.model_dump().items())
    parts_of_page = [
        f"<h1>{text(config.name)}: tokens</h1>",
        f"<p class='quiet'>Data {text(config.data)}; {text(sizes)}. Windows of the training split, scaled by its "
        "statistics.</p>",
        "<h2>Refused</h2>",
        f"<ul>{''.join(said)}</ul>" if said else "<p>Nothing.</p>",
        "<h2>Channels</h2>",
        figure(drawn, _CAPTION),
        table(("source", *_HEAD), rows, numbers=_HEAD[2:]),
        "<h2>Sources</h2>",
        table(_SOURCE_HEAD, sources, numbers=_SOURCE_HEAD[2:]),
    ]
    return page(f"{config.name}: tokens", parts_of_page)
