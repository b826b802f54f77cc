"""The picture of a finetuning: forecasts of the test part with their band beside the truth, and the scores as bars."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

from sci_evals.figures import BLACK, BLUE, GREY, ORANGE, new_figure, save
from sci_evals.finetune_report import FINETUNED, PRETRAINED, SCRATCH, Comparison
from sci_evals.metrics import LEVELS, MEDIAN
from sci_evals.tasks import lead_name
from sci_tokenizers.variables import VARIABLES, convert

_LOW, _HIGH = (int(np.argmin(np.abs(np.asarray(LEVELS) - level))) for level in (0.1, 0.9))
_SHOWN = 160  # forecasts at most
_COLOURS = {FINETUNED: BLUE, SCRATCH: ORANGE, PRETRAINED: "#56B4E9"}


def draw(comparison: Comparison, path: Path, *, target: str | None, unit: str | None) -> Path:
    """Write the PNG.

    Args:
        comparison: of the finetuning.
        path: of the file.
        target: the channel that is shown; None: the first.
        unit: of the user's data; None: the table's.
    """
    figure = new_figure(11.0, 4.6)
    left, right = figure.subplots(1, 2, width_ratios=(1.7, 1.0))
    _forecasts(left, comparison, target=target, unit=unit)
    _bars(right, comparison)
    return save(figure, path)


def _forecasts(axes: Axes, comparison: Comparison, *, target: str | None, unit: str | None) -> None:
    """Truth, median and 10-90 % band at the longest lead, of one place: the newest windows of the first stretch."""
    windows = comparison.windows
    channel = windows.channels.index(target) if target else 0
    variable = windows.variables[channel]
    unit = unit or VARIABLES[variable].unit
    zero, one = convert(np.array([0.0, 1.0]), unit, variable=variable, where="the picture")
    chosen = np.flatnonzero(windows.stretch == windows.stretch[0])[-_SHOWN:]
    row, column = _cell(comparison, channel, chosen=chosen)
    arrays = np.stack([comparison.quantiles[FINETUNED][i][:, -1, -1, channel, row, column] for i in chosen], axis=1)
    arrays = (arrays - zero) / (one - zero)
    truth = (windows.truth[chosen][:, -1, -1, channel, row, column] - zero) / (one - zero)
    at = windows.time[chosen][:, windows.shape.future_index[-1, -1]]
    trace = windows.modality == "trace"
    x: Any = at - at[0] if trace else [datetime.fromtimestamp(float(s), UTC) for s in at]
    axes.fill_between(x, arrays[_LOW], arrays[_HIGH], color=BLUE, alpha=0.25, linewidth=0, label="finetuned, 10-90 %")
    axes.plot(x, arrays[MEDIAN], color=BLUE, linewidth=1.4, label="finetuned, median")
    axes.plot(x, truth, color=BLACK, linewidth=1.1, marker="." if len(x) < 80 else None, markersize=4, label="truth")
    step = float(np.median(windows.step_seconds)) * windows.shape.frame_times
    axes.set_title(f"Test part, forecast {lead_name(windows.shape.leads[-1:], step)} ahead", fontsize=11)
    axes.set_ylabel(f"{variable.replace('_', ' ')} ({unit})")
    if trace:
        axes.set_xlabel(f"time (s after {datetime.fromtimestamp(float(at[0]), UTC):%Y-%m-%d %H:%M:%S} UTC)")
    else:
        locator = AutoDateLocator()
        axes.xaxis.set_major_locator(locator)
        axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))
        axes.set_xlabel("time (UTC)")
    axes.legend(loc="upper left", bbox_to_anchor=(0.0, -0.14), ncols=3, fontsize=9, frameon=False)


def _cell(comparison: Comparison, channel: int, *, chosen: np.ndarray) -> tuple[int, int]:
    """The cell nearest to the middle that has a truth."""
    known = np.isfinite(comparison.windows.truth[chosen][:, -1, -1, channel]).sum(axis=0)
    rows, columns = np.indices(known.shape)
    away = (rows - (known.shape[0] - 1) / 2) ** 2 + (columns - (known.shape[1] - 1) / 2) ** 2
    flat = int(np.where(known == known.max(), away, np.inf).argmin())
    return flat // known.shape[1], flat % known.shape[1]


def _bars(axes: Axes, comparison: Comparison) -> None:
    rows = comparison.rows[::-1]
    names = [row["name"] for row in rows]
    crps = [row["crps"] for row in rows]
    axes.barh(names, crps, color=[_COLOURS.get(name, GREY) for name in names])
    for at, value in enumerate(crps):
        axes.text(value, at, f" {value:.3g}", va="center", fontsize=8)
    trace = comparison.windows.modality == "trace"
    label = "CRPS (of the context's root mean square)" if trace else f"CRPS ({comparison.unit})"
    axes.set_xlabel(f"{label}, lower is better")
    axes.set_xlim(0, max(crps) * 1.18)
    axes.set_title("Scores on the test part", fontsize=11)
    axes.tick_params(axis="y", labelsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
