"""Figures of the report: every axis with its unit, every map with a colour bar and a lead time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure

from sci_evals.exhibits import Band, MapExhibit, SeriesExhibit, SeriesPanel, WaveExhibit
from sci_evals.figures import BLACK, BLUE, GREEN, GREY, ORANGE, new_figure
from sci_evals.results import ANCHOR, SHUFFLED, TRAINED, UNTRAINED, headline
from sci_evals.scores import Score
from sci_gpt.recipes.coastline import coastlines_between
from sci_tokenizers.variables import VARIABLES

_MODEL_COLOURS = {TRAINED: BLUE, ANCHOR: GREEN, UNTRAINED: "#E69F00", SHUFFLED: "#CC79A7"}
_LOSS_UNITS = {
    "series": "cross-entropy (nat per token)",
    "grid": "CRPS (of the scaled value)",
    "trace": "CRPS (in spreads of the anchor)",
}
_SHORT = {
    "mole_fraction_of_carbon_dioxide_in_air": "CO$_2$ mole fraction",
    "air_pressure_at_mean_sea_level": "sea-level pressure",
    "air_temperature_daily_maximum": "daily maximum temperature",
    "air_temperature_daily_minimum": "daily minimum temperature",
}
_SKILL_RANGE = (-1.5, 0.5)
_SKILL_TICKS = (-1, -0.3, -0.05, 0, 0.05, 0.3)


def quantity(channel: str, *, prefix: str = "", power: int = 0) -> str:
    """Axis label of a channel: its name in words, its level, its unit (times 10^power)."""
    variable, _, level = channel.partition("@")
    unit = VARIABLES[variable].unit
    powers = {"m s-1": "m s$^{-1}$", "kg m-2": "kg m$^{-2}$", "1e-6": "10$^{-6}$", "kg m-2 s-1": "kg m$^{-2}$ s$^{-1}$"}
    words = (
        _SHORT.get(variable, variable)
        .replace("digitizer_counts_", "ground motion, ")
        .replace("ground_velocity_", "ground velocity, ")
    )
    height = (
        "" if not level else f" at {float(level) / 100:g} hPa" if float(level) > 1000 else f" at {float(level):g} m"
    )
    scale = f"10$^{{{power}}}$ " if power else ""
    return f"{prefix}{words.replace('_', ' ')}{height} ({scale}{powers.get(unit, unit)})"


def draw_skill(rows: Sequence[Score]) -> Figure:
    """Skill of every source and lead with its interval, CRPS beside MAE; linear within 0.05 of 0, logarithmic beyond.

    Bars beyond the axis are labelled at its edge.
    """
    shown = [row for row in headline(rows) if row.model in _MODEL_COLOURS]
    names = list(dict.fromkeys((row.source, row.lead) for row in shown))
    models = [model for model in _MODEL_COLOURS if any(row.model == model for row in shown)]
    figure = new_figure(10.5, 1.6 + 0.36 * len(names))
    axes = figure.subplots(1, 2, sharey=True)
    thickness = 0.8 / len(models)
    for axis, metric, title in zip(axes, ("crps", "mae"), ("CRPS", "MAE of the median"), strict=True):
        for row in (row for row in shown if row.metric == metric):
            place = names.index((row.source, row.lead)) + (models.index(row.model) - (len(models) - 1) / 2) * thickness
            skill = float(np.clip(row.skill, *_SKILL_RANGE))
            axis.barh(place, skill, thickness * 0.9, color=_MODEL_COLOURS[row.model])
            low, high = np.clip([row.low, row.high], *_SKILL_RANGE)
            axis.plot([low, high], [place, place], color=BLACK, linewidth=1.0)
            if row.skill != skill:
                axis.text(skill, place, f" {row.skill:+.3g}", va="center", fontsize=7, color="white")
        axis.axvline(0, color=BLACK, linewidth=0.8)
        axis.set_xscale("symlog", linthresh=0.05, linscale=1.5)
        axis.set_xticks(_SKILL_TICKS, [f"{tick:g}" for tick in _SKILL_TICKS])
        axis.set_xticks([], minor=True)
        axis.set(xlim=_SKILL_RANGE, xlabel=f"skill in {title} (1)")
        axis.grid(axis="x", color="#DDDDDD", linewidth=0.6)
        axis.set_axisbelow(True)
    axes[0].set_yticks(range(len(names)), [f"{source.replace('_', ' ')}, {lead}" for source, lead in names])
    axes[0].set_ylim(len(names) - 0.4, -0.6)
    handles = [axes[1].barh(np.nan, np.nan, color=_MODEL_COLOURS[model], label=model) for model in models]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(models), frameon=False)
    return figure


def draw_training(records: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Loss of every modality and validation skill over the steps, from the run's log; None where it holds no step."""
    steps = [record for record in records if "losses" in record]
    if not steps:
        return None
    modalities = sorted({name for record in steps for name in record["losses"]})
    validations = [record for record in records if "validation" in record]
    figure = new_figure(10.5, 3.0)
    axes = figure.subplots(1, len(modalities) + 1, squeeze=False)[0]
    for axis, name in zip(axes, modalities, strict=False):
        points = [
            (record["step"], record["losses"][name]) for record in steps if record["losses"].get(name) is not None
        ]
        step, loss = np.asarray(points, float).T if points else (np.zeros(0), np.zeros(0))
        axis.plot(step, loss, color="#BBBBBB", linewidth=0.6, label="every step")
        width = max(1, len(loss) // 30)
        if len(loss) >= width:
            smooth = np.median(np.lib.stride_tricks.sliding_window_view(loss, width), axis=1)
            axis.plot(step[width - 1 :], smooth, color=BLUE, linewidth=1.5, label=f"median of {width} steps")
        axis.set(xlabel="optimizer step (1)", ylabel=_LOSS_UNITS.get(name, "loss (1)"))
        axis.set_title(f"training loss, {name}", fontsize=10)
        axis.set_yscale("log" if name != "series" and len(loss) and loss.min() > 0 else "linear")
        axis.legend(frameon=False, fontsize=7)
    colours = dict(zip(modalities, (GREEN, BLUE, ORANGE), strict=False))
    names = sorted({name for record in validations for name in record["validation"]})
    for number, name in enumerate(names):
        points = [
            (record["step"], record["validation"][name]["skill"])
            for record in validations
            if "skill" in record["validation"].get(name, {})
        ]
        if points:
            step, skill = np.asarray(points, float).T
            colour = colours.get(name, (BLUE, ORANGE, GREEN, GREY)[number % 4])
            axes[-1].plot(step, skill, marker="o", markersize=3, color=colour, label=name)
    axes[-1].axhline(0, color=BLACK, linewidth=0.8)
    axes[-1].set(xlabel="optimizer step (1)", ylabel="skill (1)")
    axes[-1].set_title("validation skill", fontsize=10)
    if names:
        axes[-1].legend(frameon=False, fontsize=7)
    return figure


def draw_series(exhibit: SeriesExhibit) -> Figure:
    """Forecasts from several origins: 10-90 % bands and medians of model and best baseline, and what came."""
    columns = min(2, len(exhibit.panels))
    figure = new_figure(10.5, 2.7 * -(-len(exhibit.panels) // columns) + 0.4)
    axes = figure.subplots(-(-len(exhibit.panels) // columns), columns, squeeze=False).ravel()
    for axis, panel in zip(axes, exhibit.panels, strict=False):
        _draw_panel(axis, panel)
        axis.set_ylabel(quantity(exhibit.channel), fontsize=9)
        axis.set_title(panel.group.replace("_", " "), fontsize=10)
    for axis in axes[len(exhibit.panels) :]:
        axis.set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    return figure


def _dates(seconds: np.ndarray) -> np.ndarray:
    """Seconds since 1970 as matplotlib's days since 1970."""
    return seconds / 86400.0


def _draw_panel(axis: Axes, panel: SeriesPanel) -> None:
    dates = _dates(panel.past_time)
    ahead = _dates(panel.time)
    axis.plot(dates, panel.past, color=GREY, linewidth=1.0, label="context")
    later = _dates(panel.truth_time)
    axis.plot(later, panel.truth, color=BLACK, marker="o", markersize=2.5, linewidth=0.9, label="truth")
    _draw_bands(axis, ahead, model=panel.model, baseline=panel.baseline, marker="s")
    axis.axvline(dates[-1], color=GREY, linewidth=0.8, linestyle=":")
    axis.xaxis_date()
    locator = AutoDateLocator(maxticks=7)
    axis.xaxis.set_major_locator(locator)
    axis.xaxis.set_major_formatter(ConciseDateFormatter(locator))
    axis.set_xlabel("date (UTC)")


def _draw_bands(axis: Axes, x: Any, *, model: Band, baseline: Band, marker: str = "") -> None:
    low, median, high = model.quantiles
    axis.fill_between(x, low, high, color=BLUE, alpha=0.25, linewidth=0, label="model 10-90 %")
    axis.plot(x, median, color=BLUE, marker=marker, markersize=3.5, linewidth=1.2, label="model median")
    low, median, high = baseline.quantiles
    axis.plot(x, median, color=ORANGE, linestyle="--", linewidth=1.1, label=f"{baseline.name} median")
    axis.plot(x, low, color=ORANGE, linestyle=":", linewidth=0.9, label=f"{baseline.name} 10-90 %")
    axis.plot(x, high, color=ORANGE, linestyle=":", linewidth=0.9)


def draw_map(exhibit: MapExhibit) -> Figure:
    """Truth, forecast, its error and the baseline's, with coastlines; stacked where the region is a strip."""
    height, width = np.ptp(exhibit.latitude), np.ptp(exhibit.longitude)
    strip = width > 4 * height
    figure = new_figure(10.5, 7.2) if strip else new_figure(10.5, 6.6)
    axes = (figure.subplots(4, 1) if strip else figure.subplots(2, 2)).ravel()
    fields = (exhibit.truth, exhibit.model)
    low, high = np.nanpercentile(np.concatenate([field.ravel() for field in fields]), [1, 99])
    errors = (exhibit.model - exhibit.truth, exhibit.baseline - exhibit.truth)
    reach = float(np.nanpercentile(np.abs(np.concatenate([field.ravel() for field in errors])), 99))
    when = datetime.fromtimestamp(exhibit.time, UTC).strftime("%Y-%m")
    panels = (
        (exhibit.truth, f"truth, {when} (lead {exhibit.lead})", "viridis", low, high, ""),
        (exhibit.model, f"forecast (median), lead {exhibit.lead}", "viridis", low, high, ""),
        (errors[0], f"forecast minus truth, lead {exhibit.lead}", "RdBu_r", -reach, reach, "error of "),
        (errors[1], f"{exhibit.baseline_name} minus truth, lead {exhibit.lead}", "RdBu_r", -reach, reach, "error of "),
    )
    for axis, (field, title, colours, least, most, prefix) in zip(axes, panels, strict=True):
        mesh = axis.pcolormesh(
            exhibit.longitude,
            exhibit.latitude,
            field,
            cmap=colours,
            vmin=least,
            vmax=most,
            shading="nearest",
            rasterized=True,
        )
        _draw_coast(axis, exhibit)
        axis.set(title=title, xlabel="longitude (°E)", ylabel="latitude (°N)")
        bar = figure.colorbar(mesh, ax=axis, extend="both", shrink=0.95 if strip else 0.8, pad=0.01)
        label = quantity(exhibit.channel, prefix=prefix)
        bar.set_label(label.replace(" temperature", "\ntemperature", 1) if strip else label, fontsize=8)
    return figure


def _draw_coast(axis: Axes, exhibit: MapExhibit) -> None:
    west, east = float(exhibit.longitude.min()), float(exhibit.longitude.max())
    for line in coastlines_between(west, east):
        axis.plot(line[:, 0], line[:, 1], color=BLACK, linewidth=0.7)
    south, north = float(exhibit.latitude.min()), float(exhibit.latitude.max())
    axis.set_xlim(west, max(east, west + 1e-3))
    axis.set_ylim(south, max(north, south + 1e-3))
    if np.ptp(exhibit.longitude) <= 4 * np.ptp(exhibit.latitude):
        axis.set_aspect(1.0 / np.cos(np.radians(float(np.mean(exhibit.latitude)))))
    axis.set_facecolor("#EEEEEE")


def draw_wave(exhibit: WaveExhibit) -> Figure:
    """The whole record with its arrivals, and the rolling forecasts of a part of it."""
    figure = new_figure(10.5, 6.0)
    whole, part = figure.subplots(2, 1, height_ratios=(1, 1.5))
    start = datetime.fromtimestamp(exhibit.start, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    shown = (exhibit.rolled_time[0], exhibit.rolled_time[-1])
    power = int(np.floor(np.log10(max(float(np.nanmax(np.abs(exhibit.values))), 1e-30))))
    power = power if abs(power) > 2 else 0
    unit = 10.0**power
    values = exhibit.values / unit
    model, baseline = (replace(band, quantiles=band.quantiles / unit) for band in (exhibit.model, exhibit.baseline))
    whole.plot(exhibit.time, values, color=BLACK, linewidth=0.4)
    whole.axvspan(*shown, color=BLUE, alpha=0.15, linewidth=0)
    near = (exhibit.time >= shown[0] - 0.15 * (shown[1] - shown[0])) & (exhibit.time <= shown[1])
    part.plot(exhibit.time[near], values[near], color=BLACK, linewidth=1.0, label="truth")
    _draw_bands(part, exhibit.rolled_time, model=model, baseline=baseline)
    reach = 1.3 * float(np.nanmax(np.abs(values[near])))
    part.set(ylim=(-reach, reach), xlim=(exhibit.time[near][0], exhibit.time[near][-1]))
    whole.set(xlim=(exhibit.time[0], exhibit.time[-1]), title=f"{exhibit.record.replace('_', ' ')}, from {start}")
    part.set_title(f"shaded part: forecasts {exhibit.lead} ahead, renewed after each", fontsize=10)
    for axis in (whole, part):
        for name, second in exhibit.arrivals.items():
            if axis.get_xlim()[0] <= second <= axis.get_xlim()[1]:
                axis.axvline(second, color=GREEN, linewidth=1.4)
                axis.annotate(
                    name, (second, 0.95), xycoords=("data", "axes fraction"), xytext=(4, 0), textcoords="offset points",
                    color=GREEN, fontweight="bold", va="top",
                )  # fmt: skip
        axis.set_xlabel("time after the record's start (s)")
        axis.set_ylabel(quantity(exhibit.channel, power=power), fontsize=8)
    figure.legend(*part.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    return figure
