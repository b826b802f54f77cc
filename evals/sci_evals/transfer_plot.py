"""The figure of a transfer: test error over the number of examples, both arms and the linear prior, with intervals."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from sci_evals.figures import BLUE, GREY, ORANGE, new_figure
from sci_evals.transfer_curves import ANCHOR, FINETUNED, SCRATCH, Curves

_COLOURS = {FINETUNED: BLUE, SCRATCH: ORANGE, ANCHOR: GREY}


def draw_transfer(tasks: Mapping[str, Curves], *, units: Mapping[str, str], title: str) -> Figure:
    """One panel per task; points are seeds, lines their means, bands the intervals over test blocks and seeds."""
    figure = new_figure(5.2 * len(tasks), 4.4)
    figure.suptitle(title, fontsize=12)
    for axis, (task, curves) in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks.items(), strict=True):
        x = np.asarray(curves.examples)
        for shift, (arm, colour) in zip((0.97, 1.03, 1.0), _COLOURS.items(), strict=True):
            low, high = np.array([curves.interval(column) for column in curves.resampled[arm].T]).T
            mean = curves.errors[arm].mean(axis=0)
            ends = np.maximum([mean - low, high - mean], 0.0)
            axis.errorbar(
                x * shift, mean, yerr=ends, color=colour, marker="o", capsize=3, linewidth=1.4,
                linestyle="--" if arm == ANCHOR else "-", label=arm,
            )  # fmt: skip
            for row in curves.errors[arm]:
                axis.plot(x * shift, row, ".", color=colour, markersize=3, alpha=0.6)
        axis.set_xscale("log", base=2)
        axis.set_xticks(x, [str(count) for count in x])
        axis.set(xlabel="examples, windows to learn and validate on (1)", ylabel=f"test CRPS ({units[task]})")
        axis.set_title(task.replace("_", " "), fontsize=10)
        axis.legend(frameon=False, fontsize=8)
    return figure
