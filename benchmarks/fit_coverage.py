"""How often the 90 % intervals of `sci-gpt fit` hold the truth, over simulated experiments; tables into RESULTS.md."""

from __future__ import annotations

import argparse
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
import scipy

from benchmarks.results import machine, write_section
from sci_evals.law_fit import LEVEL, fit
from sci_evals.scaling_points import Points, make_points

# Hoffmann et al. 2022, section 3.3.
CHINCHILLA = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}
SHOWN = ("E", "A", "B", "alpha", "beta", "exponent_params")


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A sweep of `levels` sizes x `levels` budgets, each loss off by normal noise of relative size `noise`."""

    levels: int
    noise: float
    truth: dict[str, float]
    params: tuple[float, float] = (7e7, 1.6e10)
    tokens: tuple[float, float] = (5e9, 5e11)

    def points(self, seed: int) -> Points:
        """The points of one simulated experiment."""
        axes = (np.geomspace(*self.params, self.levels), np.geomspace(*self.tokens, self.levels))
        params, tokens = (axis.ravel() for axis in np.meshgrid(*axes, indexing="ij"))
        law = self.truth
        loss = law["E"] + law["A"] * params ** -law["alpha"] + law["B"] * tokens ** -law["beta"]
        noise = self.noise * np.random.default_rng(seed).standard_normal(len(loss))
        return make_points({"params": params, "tokens": tokens, "loss": loss * np.exp(noise)})


EXPERIMENTS = (
    Experiment(levels=6, noise=0.005, truth=CHINCHILLA),
    Experiment(levels=3, noise=0.005, truth=CHINCHILLA),
)


def simulate(experiment: Experiment, seed: int, *, replicates: int) -> dict[str, str]:
    """Where the truth lies of each quantity: "inside" its interval, "below" or "above" it, or "open" (an end None)."""
    found = fit(experiment.points(seed), replicates=replicates, seed=seed)
    truth = experiment.truth
    known = truth | {"exponent_params": truth["beta"] / (truth["alpha"] + truth["beta"])}
    where = {}
    for name in SHOWN:
        low, high = found.intervals[name]
        if low is not None and known[name] < low:
            where[name] = "below"
        elif high is not None and known[name] > high:
            where[name] = "above"
        else:
            where[name] = "open" if low is None or high is None else "inside"
    return where


def run(experiment: Experiment, *, count: int, replicates: int, processes: int) -> list[dict[str, str]]:
    """`count` simulated experiments, with a line of progress every tenth of them."""
    began, found = time.monotonic(), []
    with ProcessPoolExecutor(processes) as pool:
        jobs = [pool.submit(simulate, experiment, seed, replicates=replicates) for seed in range(count)]
        for number, job in enumerate(jobs, 1):
            found.append(job.result())
            if number % max(1, count // 10) == 0:
                rate = number / (time.monotonic() - began)
                print(f"{number} of {count}, {rate:.2f} a second, {(count - number) / rate:.0f} s left", flush=True)
    return found


def table(experiment: Experiment, found: list[dict[str, str]], *, replicates: int) -> list[str]:
    """Lines of Markdown: share of experiments whose interval holds the truth, misses on each side, open intervals."""
    spread = 1.96 * np.sqrt(LEVEL * (1 - LEVEL) / len(found))
    lines = [
        f"{experiment.levels} x {experiment.levels} points, noise {100 * experiment.noise:g} % of the loss, "
        f"{len(found)} experiments, {replicates} resamples each. By chance a nominal {100 * LEVEL:g} % would show "
        f"{100 * (LEVEL - spread):.1f} to {100 * (LEVEL + spread):.1f} % (95 of 100 times).",
        "",
        "| quantity | covered | truth below | truth above | open interval |",
        "|---|---|---|---|---|",
    ]
    for name in SHOWN:
        share = {key: sum(row[name] == key for row in found) / len(found) for key in ("below", "above", "open")}
        covered = 1 - share["below"] - share["above"]
        cells = " | ".join(f"{100 * value:.1f} %" for value in (covered, *share.values()))
        lines.append(f"| {name} | {cells} |")
    return [*lines, ""]


def main(arguments: list[str]) -> int:
    """Run all experiments, print the tables and write them into RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experiments", type=int, default=200)
    parser.add_argument("--bootstrap", type=int, default=250)
    parser.add_argument("--processes", type=int, default=2)
    parsed = parser.parse_args(arguments)
    began, lines = time.monotonic(), []
    for experiment in EXPERIMENTS:
        found = run(experiment, count=parsed.experiments, replicates=parsed.bootstrap, processes=parsed.processes)
        lines += table(experiment, found, replicates=parsed.bootstrap)
    used = os.times()
    busy = used.user + used.system + used.children_user + used.children_system
    lines.append(
        f"Made by `python -m benchmarks.fit_coverage` in {time.monotonic() - began:.0f} s ({busy:.0f} s of processor "
        f"time) with {parsed.processes} processes ({machine()}, SciPy {scipy.__version__})."
    )
    print("\n".join(lines))
    write_section("fit_coverage", lines, title="Coverage of the intervals of `sci-gpt fit`")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
