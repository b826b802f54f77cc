"""Draws docs/images/samples.png from the code itself: members, shuffled members, and what the process says of them."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import toy_correlated as toy
from sci_evals.metrics import energy_score
from sci_gpt.model.inputs import NoiseSettings

TARGET = Path(__file__).resolve().parent / "images" / "samples.png"
BLUE, RED, GREY = "#4477aa", "#aa3377", "#888888"
MEMBERS, CONTEXTS, SHOWN = 24, 96, 3
COLOURS = {"process": GREY, "members": BLUE, "shuffled": RED}


def made() -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """True next frames (context, variable, row, column) and ensembles of them (context, member, ..): of the process
    itself, of a model trained as in tests/test_coherence.py, and of that one shuffled."""
    model = toy.trained(toy.STEPS, documents=toy.DOCUMENTS, noise=NoiseSettings(width=32))
    films = toy.contexts(CONTEXTS, num_times=9)
    found = toy.predictor(model).trajectories(films, num_context=8, num_frames=1, num_samples=MEMBERS, seed=1)
    members = (np.stack(found)[:, :, 0, 0] - toy.LEVEL) / toy.SPREAD
    known = (np.stack([film.values for film in films]) - toy.LEVEL) / toy.SPREAD
    drawn = [toy.frames(1, seed=500 + i, start=one[7], runs=MEMBERS)[:, 0] for i, one in enumerate(known)]
    return known[:, 8], {"process": np.stack(drawn), "members": members, "shuffled": toy.shuffled(members)}


def draw_maps(axes: np.ndarray, ensembles: dict[str, np.ndarray]) -> None:
    """One context's next frame, a row per ensemble: some members less their mean."""
    for row, (name, title) in enumerate((("process", "process"), ("members", "model"), ("shuffled", "shuffled"))):
        away = toy.away(ensembles[name])[0, :SHOWN, 0] / toy.INNOVATION
        for column, field in enumerate(away):
            axes[row, column].imshow(field, cmap="RdBu_r", vmin=-2.5, vmax=2.5)
            axes[row, column].set_xticks([])
            axes[row, column].set_yticks([])
            if row == 0:
                axes[row, column].set_title(f"member {column + 1}", fontsize=9)
        axes[row, 0].set_ylabel(title, fontsize=9, color=COLOURS[name])


def draw_spectrum(axes: Axes, ensembles: dict[str, np.ndarray]) -> None:
    """Power of each zonal wave number."""
    for name, ensemble in ensembles.items():
        power = toy.zonal_power(toy.away(ensemble)) / toy.INNOVATION**2
        axes.semilogy(power, color=COLOURS[name], marker="o", markersize=4, label=name)
    axes.set_xticks(range(toy.SIDE // 2 + 1))
    axes.set_xlabel("zonal wave number", fontsize=9)
    axes.set_title("Power", fontsize=10)
    axes.legend(fontsize=8, frameon=False)


def draw_area_mean(axes: Axes, ensembles: dict[str, np.ndarray]) -> None:
    """How far the members' area means lie from the ensemble's."""
    edges = np.linspace(-2.0, 2.0, 34)
    for name, ensemble in ensembles.items():
        means = toy.away(ensemble).mean(axis=(-1, -2)).ravel() / toy.INNOVATION
        label = f"{name}: {means.std():.2f}"
        axes.hist(means, edges.tolist(), density=True, histtype="step", color=COLOURS[name], linewidth=1.4, label=label)
    axes.set_ylim(0.0, 1.05)
    axes.set_yticks([])
    axes.set_xlabel("spreads of a cell", fontsize=9)
    axes.set_title("Area mean, and its spread (shuffled: cut off)", fontsize=10)
    axes.legend(fontsize=8, frameon=False)


def draw_energy_scores(axes: Axes, truth: np.ndarray, ensembles: dict[str, np.ndarray]) -> None:
    """Mean energy scores less that of the model's members, with two standard errors of the paired difference."""
    scores = {
        name: np.array([energy_score(one, true) for one, true in zip(ensemble, truth, strict=True)])
        for name, ensemble in ensembles.items()
    }
    for place, (name, score) in enumerate(scores.items()):
        worse = score - scores["members"]
        error = 2 * worse.std(ddof=1) / np.sqrt(len(worse))
        axes.errorbar(place, worse.mean(), yerr=error, fmt="o", color=COLOURS[name], capsize=4)
    axes.axhline(0.0, color="black", linewidth=0.6)
    axes.set_xticks(range(len(scores)), [f"{name}\n{score.mean():.4f}" for name, score in scores.items()])
    axes.set_xlim(-0.5, len(scores) - 0.5)
    axes.set_title("Energy score less the members'", fontsize=10)


def main() -> None:
    """Draw the figure."""
    truth, ensembles = made()
    figure = plt.figure(figsize=(14.0, 3.9), constrained_layout=True)
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(1.0, 3.1))[0]
    draw_maps(left.subplots(3, SHOWN), ensembles)
    panels = right.subplots(1, 3)
    draw_spectrum(panels[0], ensembles)
    draw_area_mean(panels[1], ensembles)
    draw_energy_scores(panels[2], truth, ensembles)
    for each in panels:
        each.tick_params(labelsize=8)
    figure.savefig(TARGET, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
