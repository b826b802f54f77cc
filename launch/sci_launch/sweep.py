"""`sci-gpt sweep`: train every point that is not finished, collect POINTS.csv, fit a law per modality, draw it."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sci_evals.figures import save
from sci_evals.fit_report import describe, write_fit
from sci_evals.law_fit import fit
from sci_evals.scaling_points import read_points
from sci_evals.sweep_plot import draw_sweep
from sci_gpt.config import PretrainConfig
from sci_gpt.config_file import load_config
from sci_gpt.data.store import Store
from sci_gpt.errors import DataError
from sci_gpt.recipes import parts
from sci_gpt.recipes.plan import plan
from sci_gpt.recipes.points import COLUMNS, Point, is_finished, points_of, rows_of
from sci_gpt.recipes.studies import SweepConfig
from sci_gpt.train.nested import Study
from sci_launch import local

POINTS = "POINTS.csv"


def sweep(config: SweepConfig) -> dict[str, Any]:
    """Run a sweep, or go on with it: a finished point is not trained again, a stopped one goes on where it stood.

    Returns:
        {"complete": whether all points are finished, "trained": names of those trained now, "points": lines of
        POINTS.csv, "table": its path, "figure", "fits": {modality: the fit's result, or {"error": why there is none}}}.

    Raises:
        ConfigError, DataError, CheckpointError: see `points_of`, `is_finished` and the pretraining.
        WorkerFailure: a worker of a point crashed.
    """
    base = load_config(config.pretrain, PretrainConfig, overrides=config.overrides)
    Store.open(base.data)
    finished = [is_finished(point) for point in points_of(config, parent_run=None)]  # refuses before anything is made
    target = parts.tracking_target(base)
    study = Study(
        type(target)(uri=target.uri, artifacts=target.artifacts, experiment=config.name, run_name=config.name),
        config.output,
        parameters=config.model_dump(mode="json"),
    )
    points = points_of(config, parent_run=study.run_id)
    trained = train(points, finished)
    if trained is None:
        return {"complete": False, "trained": [], "points": [], "table": None, "figure": None, "fits": {}}
    rows = [row for point in points for row in rows_of(point)]
    table = write_points(rows, config.output / POINTS)
    fits = fit_all(table, config)
    figure = save(draw_sweep(rows, title=config.title, notes=notes_of(rows, fits)), config.output / "sweep.png")
    print(f"sweep: {len(points)} points in {table}; figure: {figure}", flush=True)
    study.close(
        metrics={
            f"loss/{row['modality']}/{row['size']}-{row['tokens']}-seed{row['seed']}": row["loss"] for row in rows
        },
        artifacts=[table, figure, *sorted(config.output.glob("fit-*/*"))],
    )
    return {
        "complete": True,
        "trained": trained,
        "points": rows,
        "table": str(table),
        "figure": str(figure),
        "fits": fits,
    }


def train(points: Sequence[Point], finished: Sequence[bool]) -> list[str] | None:
    """Train the points that are not finished; their names, or None where a signal stopped one of them."""
    flops = [float(plan(point.config)["flops_per_run"]) for point in points]
    left = [number for number, done in enumerate(finished) if not done]
    print(f"sweep: {len(points)} points, {len(points) - len(left)} of them finished before", flush=True)
    taken: list[tuple[float, float]] = []  # (FLOPs, seconds) of those trained now
    for place, number in enumerate(left):
        point, begin = points[number], time.monotonic()
        eta = remaining(taken, [flops[other] for other in left[place:]])
        print(
            f"=== point {len(points) - len(left) + place + 1}/{len(points)}: {point.name} | ETA of the sweep {eta}",
            flush=True,
        )
        local.pretrain(point.config)
        if not is_finished(point):
            print("sweep: stopped; called again, it goes on from here", flush=True)
            return None
        taken.append((flops[number], time.monotonic() - begin))
    return [points[number].name for number in left]


def remaining(taken: Sequence[tuple[float, float]], flops: Sequence[float]) -> str:
    """Minutes and seconds that points of these FLOPs will take: a start and a rate fitted to those taken so far."""
    if not taken:
        return "not known yet"
    work, seconds = np.array(taken).T
    start, rate = 0.0, float(seconds.sum() / work.sum())
    if len(np.unique(work)) > 1:
        slope, level = np.polyfit(work, seconds, 1)
        start, rate = (float(level), float(slope)) if slope > 0 and level > 0 else (start, rate)
    left = round(len(flops) * start + rate * sum(flops))
    return f"{left // 60}:{left % 60:02d}"


def write_points(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """POINTS.csv: a line per point and modality."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return path


def fit_all(table: Path, config: SweepConfig) -> dict[str, Any]:
    """A law per modality, in words on stdout and as files beside the table; too few points are said, not fitted."""
    with table.open(newline="", encoding="utf-8") as file:
        modalities = sorted({row["modality"] for row in csv.DictReader(file)})
    found: dict[str, Any] = {}
    for modality in modalities:
        print(f"\n--- {modality}: {config.title}", flush=True)
        try:
            result = fit(read_points(table, modality=modality))
        except DataError as error:
            found[modality] = {"error": str(error)}
            print(str(error), flush=True)
            continue
        print(describe(result), flush=True)
        write_fit(result, config.output / f"fit-{modality}", title=f"{config.title} ({modality})")
        found[modality] = result.to_json()
    (config.output / "fits.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def notes_of(rows: Sequence[dict[str, Any]], fits: dict[str, Any]) -> dict[str, str]:
    """What the figure says below each modality: what its fit cannot tell, and how often each source was passed."""
    notes = {}
    for modality, result in fits.items():
        unknown = result.get("not_identifiable", {})
        said = (
            result.get("error")
            or (f"not identifiable from these points: {', '.join(unknown)}. " if unknown else "")
            or "all parameters have intervals (wide ones; see fit.json). "
        )
        last = max((row for row in rows if row["modality"] == modality), key=lambda row: row["tokens"])
        passes = ", ".join(f"{source} {count:.2g}" for source, count in last["epochs_by_source"].items())
        notes[modality] = f"{said} Passes over each source at the largest budget: {passes}."
    return notes
