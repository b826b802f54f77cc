"""`sci-gpt fit`: reads the points, fits the law, writes its folder and prints it."""

from __future__ import annotations

import argparse

from sci_evals.fit_report import describe, write_fit
from sci_evals.law_fit import fit
from sci_evals.scaling_points import read_points
from sci_launch.results import print_result, progress


def run(parsed: argparse.Namespace) -> int:
    """Carry out the command; 0. With --json stdout holds one object alone, progress goes to stderr.

    Raises:
        DataError, ConfigError: points that cannot be fitted, or options that say nothing.
    """
    points = read_points(parsed.points, modality=parsed.modality)
    with progress(parsed.json):
        result = fit(points, replicates=parsed.bootstrap, seed=parsed.seed)
        files = [] if parsed.out is None else write_fit(result, parsed.out, title=parsed.title)
    if parsed.json:
        return print_result(result.to_json() | {"files": [str(path) for path in files]}, as_json=True)
    if parsed.title:
        print(parsed.title)
    print(describe(result))
    for path in files:
        print(f"wrote {path}")
    return 0
