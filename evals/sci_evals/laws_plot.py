"""Figures of a fitted law: predicted against measured loss, contours over size and tokens, and the IsoFLOP picture."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator, StrMethodFormatter

from sci_evals.allocation import isoflops, log_optimum
from sci_evals.figures import BLACK, GREY, ORANGE, new_figure
from sci_evals.law_fit import ALLOCATION, Fit
from sci_evals.laws import PARAMETERS, Design, predict

MANY_EPOCHS = 4.0  # repeated data is worth about as much as new up to here (Muennighoff et al. 2023)
_COLOURS = "viridis"
_CURVES = 9  # IsoFLOP curves of the law at most
_LOSS = "loss (unit of the table)"


def draw_fit(result: Fit, *, title: str | None) -> Figure:
    """Predicted against measured loss, and the law's contours with the points; beyond MANY_EPOCHS points are hollow."""
    figure = new_figure(10.5, 5.2)
    left, right = figure.subplots(1, 2)
    _head(figure, result, title=title)
    _draw_agreement(left, result)
    _draw_contours(right, result)
    return figure


def draw_isoflops(result: Fit, *, title: str | None) -> Figure:
    """Loss against size, coloured by compute: points, the law at that compute, and parabolas with their minima."""
    figure = new_figure(8.5, 5.2)
    axis = figure.subplots()
    _head(figure, result, title=title)
    points, groups = result.points, isoflops(result.points)
    norm = _norm(points.flops)
    colours = ScalarMappable(norm=norm, cmap=_COLOURS)
    chosen = np.unique(np.linspace(0, len(groups) - 1, _CURVES).astype(int))
    shown = [groups[i] for i in chosen]
    reach = np.log(points.params.min() / 1.5), np.log(points.params.max() * 1.5)
    low, high = points.loss.min(), points.loss.max()
    sizes = np.exp(np.linspace(*reach, 200))
    for group in shown:
        tokens = group.flops / points.flops_per_param_token / sizes
        curve = _law(result, sizes, tokens=tokens)
        axis.plot(sizes, curve, color=_colour(colours, group.flops), linewidth=1.0)
    for group in groups:
        if group.coefficients is None:
            continue
        colour = _colour(colours, group.flops)
        own = np.log(points.params[group.members])
        x = np.linspace(own.min(), own.max(), 60)
        axis.plot(np.exp(x), np.exp(np.polyval(group.coefficients, x)), color=colour, linewidth=1.3, linestyle=":")
        if group.best is not None:
            axis.plot(*group.best, marker="*", markersize=13, color=colour, markeredgecolor=BLACK, linestyle="")
    _scatter(axis, result, x=points.params, y=points.loss, colours=colours, values=points.flops)
    axis.set(xscale="log", yscale="log", xlabel="params N (1)", ylabel=_LOSS, ylim=(low * 0.97, high * 1.06))
    _plain_loss_ticks(axis, "y")
    bar = figure.colorbar(colours, ax=axis)
    bar.set_label("compute C of a point, and of a curve (FLOPs)")
    handles = [
        Line2D([], [], color=GREY, linewidth=1.0, label="the fitted law at one compute"),
        Line2D([], [], color=GREY, linestyle=":", label="parabola through the points of one compute"),
        Line2D([], [], color=GREY, marker="*", markersize=11, linestyle="", label="its minimum"),
    ]
    parabolas = any(group.coefficients is not None for group in groups)
    minima = any(group.best is not None for group in groups)
    kept = [handles[0], *(handles[1:2] if parabolas else []), *(handles[2:] if minima else [])]
    figure.legend(
        handles=[*kept, *_mark_legend(result)], loc="outside lower center", ncols=3, frameon=False, fontsize=8
    )
    return figure


def _head(figure: Figure, result: Fit, *, title: str | None) -> None:
    symbols = {"alpha": "$\\alpha$", "beta": "$\\beta$"}
    law = "L(N, D) = E + A / N$^{\\alpha}$ + B / D$^{\\beta}$"
    shown = ", ".join(f"{symbols.get(name, name)} {_with_interval(result, name)}" for name in ("E", "alpha", "beta"))
    unknown = [symbols.get(name, name) for name in PARAMETERS if name in result.not_identifiable]
    lines = [title] if title else []
    lines += [law, f"{len(result.points)} points: {shown} ({100 * result.level:g} % intervals)"]
    lines += [f"NOT identifiable from these points: {', '.join(unknown)}"] if unknown else []
    figure.suptitle("\n".join(lines), fontsize=11)


def _with_interval(result: Fit, name: str) -> str:
    if result.intervals[name] == (None, None):
        return "?"
    ends = ("open" if end is None else f"{end:.3g}" for end in result.intervals[name])
    return f"{result.values[name]:.3g} [{', '.join(ends)}]"


def _draw_agreement(axis: Axes, result: Fit) -> None:
    points = result.points
    predicted = np.exp(predict(result.theta, result.design)[0])
    ends = min(points.loss.min(), predicted.min()) * 0.99, max(points.loss.max(), predicted.max()) * 1.01
    axis.plot(ends, ends, color=BLACK, linewidth=0.8)
    colours = ScalarMappable(norm=_norm(points.flops), cmap=_COLOURS)
    _scatter(axis, result, x=predicted, y=points.loss, colours=colours, values=points.flops)
    axis.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
    axis.set(xlabel=f"predicted {_LOSS}", ylabel=f"measured {_LOSS}")
    axis.set_title(f"residual {100 * result.residual_rms:.2g} % (root mean square)", fontsize=10)
    for which in ("x", "y"):
        _plain_loss_ticks(axis, which)
    axis.set_box_aspect(1)
    bar = axis.figure.colorbar(colours, ax=axis, location="bottom", shrink=0.8)
    ticks = np.geomspace(result.points.flops.min(), result.points.flops.max(), 4)
    bar.set_ticks(list(ticks), labels=[f"{tick:.1e}" for tick in ticks])  # labels at every digit would overlap
    bar.minorticks_off()
    bar.set_label("compute C (FLOPs)")


def _draw_contours(axis: Axes, result: Fit) -> None:
    points = result.points
    log_params = np.linspace(np.log(points.params.min() / 1.7), np.log(points.params.max() * 1.7), 120)
    log_tokens = np.linspace(np.log(points.tokens.min() / 1.7), np.log(points.tokens.max() * 1.7), 120)
    sizes, tokens = np.meshgrid(np.exp(log_params), np.exp(log_tokens))
    field = _law(result, sizes, tokens=tokens)
    norm = Normalize(min(field.min(), points.loss.min()), max(field.max(), points.loss.max()))
    levels = np.exp(np.linspace(np.log(field.min()), np.log(field.max()), 11))[1:-1]
    lines = axis.contour(sizes, tokens, field, levels=levels, colors=GREY, linewidths=0.8)
    axis.set(xscale="log", yscale="log", xlabel="params N (1)", ylabel="training tokens D (1)")
    axis.clabel(lines, fmt="%.3g", fontsize=7)
    colours = ScalarMappable(norm=norm, cmap=_COLOURS + "_r")
    _scatter(axis, result, x=points.params, y=points.tokens, colours=colours, values=points.loss)
    if points.epochs is not None:
        for params, count, epochs in zip(points.params, points.tokens, points.epochs, strict=True):
            axis.annotate(f"{epochs:.2g}", (params, count), xytext=(5, 4), textcoords="offset points", fontsize=7)
    handles = [Line2D([], [], color=GREY, linewidth=0.8, label="the law's loss"), *_mark_legend(result)]
    if ALLOCATION not in result.not_identifiable:
        flops = np.geomspace(points.flops.min() / 10, points.flops.max() * 10, 50)
        best = [
            log_optimum(result.theta, result.design, flops=c, per_param_token=points.flops_per_param_token)
            for c in flops
        ]
        axis.plot(*np.exp(np.array(best)).T, color=ORANGE, linewidth=1.5)
        handles.append(Line2D([], [], color=ORANGE, linewidth=1.5, label="N_opt, D_opt"))
    axis.set_xlim(sizes.min(), sizes.max())
    axis.set_ylim(tokens.min(), tokens.max())
    axis.set_title("numbers at points: epochs" if points.epochs is not None else "points and contours", fontsize=10)
    axis.figure.colorbar(colours, ax=axis, location="bottom", shrink=0.8).set_label(f"measured {_LOSS}")
    axis.figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)


def _law(result: Fit, params: np.ndarray, *, tokens: np.ndarray) -> np.ndarray:
    design = Design(
        log_params=np.log(params).ravel() - result.design.centre[0],
        log_tokens=np.log(tokens).ravel() - result.design.centre[1],
        log_loss=np.zeros(params.size),
        centre=result.design.centre,
    )
    return np.exp(predict(result.theta, design)[0]).reshape(params.shape)


def _colour(colours: ScalarMappable, value: float) -> np.ndarray:
    return colours.to_rgba(np.array([value]))[0]


def _hollow(result: Fit) -> np.ndarray:
    epochs = result.points.epochs
    return np.zeros(len(result.points), dtype=bool) if epochs is None else epochs > MANY_EPOCHS


def _scatter(
    axis: Axes, result: Fit, *, x: np.ndarray, y: np.ndarray, colours: ScalarMappable, values: np.ndarray
) -> None:
    shades, hollow = colours.to_rgba(values), _hollow(result)
    axis.scatter(x[~hollow], y[~hollow], s=42, color=shades[~hollow], edgecolors=BLACK, linewidths=0.6, zorder=3)
    axis.scatter(x[hollow], y[hollow], s=42, facecolors="white", edgecolors=shades[hollow], linewidths=2.0, zorder=3)


def _mark_legend(result: Fit) -> list[Line2D]:
    full = Line2D([], [], color=GREY, marker="o", markeredgecolor=BLACK, linestyle="", label="a trained model")
    if not _hollow(result).any():
        return [full]
    label = f"one trained for more than {MANY_EPOCHS:g} epochs"
    return [full, Line2D([], [], color=GREY, marker="o", markerfacecolor="white", linestyle="", label=label)]


def _norm(flops: np.ndarray) -> LogNorm:
    return LogNorm(flops.min() / 1.001, flops.max() * 1.001)


def _plain_loss_ticks(axis: Axes, which: str) -> None:
    """Losses that span less than a decade get evenly spaced ticks in plain numbers: there a log axis may have none."""
    one = axis.xaxis if which == "x" else axis.yaxis
    low, high = sorted(axis.get_xlim() if which == "x" else axis.get_ylim())
    if high < 10 * low:
        one.set_major_locator(MaxNLocator(6))
        one.set_major_formatter(StrMethodFormatter("{x:.4g}"))
        one.set_minor_locator(NullLocator())
