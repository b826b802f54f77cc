"""The report: one HTML page with every figure inside, which opens without a network, and the figures as PNG."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterator
from pathlib import Path

from matplotlib.figure import Figure

from sci_evals.exhibits import Exhibit, MapExhibit, SeriesExhibit
from sci_evals.figures import save
from sci_evals.plot_coverage import draw_coverage
from sci_evals.plots import draw_map, draw_series, draw_skill, draw_training, draw_wave
from sci_evals.results import (
    COVERAGE_COLUMNS,
    TRAINED,
    Results,
    cells,
    columns,
    coverage_table,
    headline,
    phase_line,
    table_rows,
    uncalibrated,
)
from sci_gpt.recipes.coastline import SOURCE as COASTLINE_SOURCE
from sci_gpt.train.run_folder import LOG, read_lines

_STYLE = """
body { font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif; color: #1a1a1a;
  margin: 0 auto; max-width: 84rem; padding: 2rem 1.5rem 5rem; }
h1 { font-size: 1.9rem; margin: 0 0 .3rem; }
h2 { font-size: 1.3rem; margin: 2.6rem 0 .6rem; }
p, li { max-width: 48rem; }
.quiet { color: #555; }
figure { margin: 1.2rem 0; }
figcaption { color: #444; font-size: .92rem; max-width: 52rem; }
img { max-width: 100%; height: auto; }
.wide { overflow: auto; max-height: 46rem; }
table { border-collapse: collapse; font-size: .82rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .22rem .6rem; white-space: nowrap; border-bottom: 1px solid #e3e3e3; }
th { position: sticky; top: 0; background: #fff; border-bottom: 2px solid #1a1a1a; }
td.number { text-align: right; }
tr.control td { color: #666; }
tr.above td.skill { font-weight: 600; }
"""
_NUMBERS = ("score", "its score", "skill", "windows", "blocks")
_SKILL_CAPTION = """
Skill with {interval} block-bootstrap intervals: the share of the best baseline's score that the model saves, per
source and lead, channels together (geometric mean). Above zero the model is better. The axis is linear within 0.05 of
zero and logarithmic beyond; skill below it is written at its edge.
"""
_TRAINING_CAPTION = """
Training: loss per modality, each in its own unit, and skill on validation windows against the baselines that a batch
holds (persistence, the head's anchor and the offset, weaker than those of the table).
"""
_COVERAGE_CAPTION = """
Coverage: the share of the test truth inside the 50 % and 90 % bands (vertical lines), per source and lead, channels
together, with {interval} block-bootstrap intervals: the model, the model after its spread was set on the validation
split, and the best of the baselines in CRPS at that lead (none where channels differ in it).
"""
_PHASES = """
Target frames by the first P and S arrivals that the Earth model iasp91 (Kennett and Engdahl 1991) gives for the event's
origin and the station's place: noise ends before P, P to S begins at P and ends before S, coda begins at S. Frames with
an arrival inside count in none. The trained model against the best baseline on these frames, all leads, records and
components pooled.
"""
_METHOD = """
Truth is the raw data in physical units, neither quantized nor clipped; missing values count nowhere; grid cells count
by their area.

skill = 1 - score / score of the best baseline on the same windows. Its interval comes from resampled blocks of
dependent windows (90 days of one climate model or station, seven days of hourly data, years of fields, 300 samples of
one record); the best baseline is chosen anew in each resample. One block gives no interval.

Every baseline is probabilistic: its point forecast with the distribution of its own training errors, their spread by
variable, lead and calendar month, their shape by variable and lead; recent mean and spread takes the spread of its own
context instead, so that knowing no more than how a context scatters is no skill. Ridges see the same context as the
model; their strength is cross-validated over whole groups, and their errors are those of held-back folds.

For traces: AR(32) by Burg's method, the median, the last value and zero, each fitted to the context alone and dressed
with its errors inside it.

CRPS of model and baselines alike is twice the mean pinball loss at 45 levels, 0.04 % above the exact CRPS of a
calibrated Gaussian.

Traces are scored record by record in counts, and over the context's root mean square (scaled crps); their pooled rows
are geometric means over records and components.

A band that covers less than its name is too narrow. A truth that equals an end of a band (a dry hour) counts by the
part of the forecast's probability there that the band holds. calibrated: factors on the spread below and above the
median, per source, channel and lead, with which the bands cover what they should on the validation split, which holds
no test data; drawn to 1 where validation holds few independent blocks. All other scores are of the model as it is.

untrained is the same model before training; time-shuffled was trained and is scored on windows whose values were
drawn from them at random in time, against baselines fitted and scored on such windows. Neither should show skill.
Both are scored on a fixed subset of the windows (their number stands in the row). anchor is what the model's heads
correct, alone: a linear forecast fitted to the training split (grids, series) or an average of autoregressions of the
record's own past (traces). trained over anchor has the anchor for its only baseline, on the same windows: what the
network learned.
"""


def write_report(results: Results, folder: Path) -> Path:
    """Draw the figures into `folder` as PNG and write report.html with copies of them inside; its path."""
    figures = []
    for name, figure, caption in _figures(results):
        path = save(figure, folder / f"{name}.png")
        image = base64.b64encode(path.read_bytes()).decode()
        text = html.escape(" ".join(caption.split()))
        source = f"data:image/png;base64,{image}"
        figures.append(f'<figure><img alt="{text}" src="{source}"><figcaption>{text}</figcaption></figure>')
    parts = [
        _head(results),
        *figures[:1],
        _table(results),
        _coverage(results),
        _phases(results),
        "<h2>Figures</h2>",
        *figures[1:],
    ]
    parts += [_method(), _sources(results)]
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(results.config.name)}: evaluation</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _figures(results: Results) -> Iterator[tuple[str, Figure, str]]:
    """(file name, figure, caption), in the report's order."""
    if results.rows:
        interval = f"{100 * results.config.evaluate.interval:g} %"
        yield "skill", draw_skill(results.rows), _SKILL_CAPTION.format(interval=interval)
        yield "coverage", draw_coverage(results.coverage, results.rows), _COVERAGE_CAPTION.format(interval=interval)
    training = draw_training(read_lines(results.run / LOG))
    if training is not None:
        yield "training", training, _TRAINING_CAPTION
    for number, exhibit in enumerate(results.exhibits):
        yield f"{number:02d}-{exhibit.source}", _draw(exhibit), _caption(exhibit)


def _draw(exhibit: Exhibit) -> Figure:
    if isinstance(exhibit, SeriesExhibit):
        return draw_series(exhibit)
    return draw_map(exhibit) if isinstance(exhibit, MapExhibit) else draw_wave(exhibit)


def _caption(exhibit: Exhibit) -> str:
    what = f"{exhibit.source}, {exhibit.channel}"
    if isinstance(exhibit, SeriesExhibit):
        return (
            f"{what}: forecasts from origins spread evenly over the test split, chosen without looking at scores. The "
            "dotted vertical line is the origin; bands hold 10 to 90 %."
        )
    if isinstance(exhibit, MapExhibit):
        return (
            f"{what}: the middle window of the test split, lead {exhibit.lead}. Grey cells have no truth. Both errors "
            "share one colour scale."
        )
    known = (
        "P and S: first arrivals through iasp91 (the causal filter shows them a little later)."
        if exhibit.arrivals
        else "Its place is unknown, or no arrival is in it."
    )
    return f"{what}, {exhibit.record}: a record of an event held out whole. {known} Bands hold 10 to 90 %."


def _head(results: Results) -> str:
    rows = [row for row in headline(results.rows) if row.model == TRAINED and row.metric == "crps"]
    above = [row for row in rows if row.low > 0]
    below = [row for row in rows if row.high < 0]
    fingerprint = html.escape(str(results.manifest.get("fingerprint", ""))[:12])
    listed = "; ".join(f"{row.source} at {row.lead} ({row.skill:+.3f})" for row in above) or "none"
    return (
        f"<h1>{html.escape(results.config.name)}</h1>\n"
        f"<p class='quiet'>Evaluation on held-out windows; data fingerprint {fingerprint}.</p>\n"
        f"<p>In CRPS against the best of its baselines, the model is better beyond the interval in {len(above)} of "
        f"{len(rows)} rows, worse in {len(below)}, and not distinguishable in {len(rows) - len(above) - len(below)}. "
        f"Better: {html.escape(listed)}.</p>"
    )


def _table(results: Results) -> str:
    names = columns(results.config.evaluate.interval)
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    body = []
    for row in table_rows(results.rows):
        kind = "control" if row.model != TRAINED else "above" if row.low > 0 else ""
        texts = []
        for name, text in zip(names, cells(row), strict=True):
            classes = " ".join(filter(None, ["number" if name in _NUMBERS else "", "skill" if name == "skill" else ""]))
            texts.append(f'<td class="{classes}">{html.escape(text)}</td>')
        body.append(f'<tr class="{kind}">{"".join(texts)}</tr>')
    left = "".join(f"<p>{html.escape(name)}: {html.escape(why)}.</p>" for name, why in results.left_out.items())
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    return f"<h2>Scores</h2><div class='wide'>{table}</div>{left}"


def _coverage(results: Results) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in COVERAGE_COLUMNS)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in line) + "</tr>" for line in coverage_table(results)
    )
    left = "".join(f"<p>{html.escape(name)}: {html.escape(why)}.</p>" for name, why in uncalibrated(results).items())
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f"<h2>Coverage</h2><div class='wide'>{table}</div>{left}"


def _phases(results: Results) -> str:
    if not results.phases:
        return ""
    items = "".join(
        f"<li><b>{html.escape(part.source)}</b>, {html.escape(phase_line(part))}</li>" for part in results.phases
    )
    return f"<h2>Traces by phase</h2><p>{html.escape(' '.join(_PHASES.split()))}</p><ul>{items}</ul>"


def _method() -> str:
    points = [" ".join(text.split()) for text in _METHOD.strip().split("\n\n")]
    return "<h2>How it was scored</h2><ul>" + "".join(f"<li>{html.escape(text)}</li>" for text in points) + "</ul>"


def _sources(results: Results) -> str:
    used = {entry.source for entry in results.config.mixture}
    items = []
    for name, row in results.manifest.get("sources", {}).items():
        if name in used:
            nature, citation, licence = (
                html.escape(str(row.get(part, ""))) for part in ("nature", "citation", "licence")
            )
            items.append(f"<li><b>{html.escape(name)}</b> ({nature}). {citation}. Licence: {licence}.</li>")
    items.append(f"<li><b>coastlines</b>. {html.escape(COASTLINE_SOURCE)}.</li>")
    return f"<h2>Data, licences and citations</h2><ul>{''.join(items)}</ul>"
