"""Results of an evaluation: the printed table, evaluation.json and evaluation.csv, and their copy in the MLflow run."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from sci_evals.coverage import Coverage, coverage_headline
from sci_evals.exhibits import Exhibit
from sci_evals.phases import PhaseScore
from sci_evals.scores import ALL, Score
from sci_gpt.config import PretrainConfig
from sci_gpt.model.calibration import CALIBRATION, Calibration, SourceCalibration
from sci_gpt.train.run_folder import TRACKING
from sci_gpt.train.tracker import warn_untracked

TRAINED, UNTRAINED, ANCHOR, SHUFFLED = "trained", "untrained", "anchor", "time-shuffled"
LEARNED = "trained over anchor"
CALIBRATED, RECALIBRATED = "calibrated", "calibrated over trained"


@dataclass(frozen=True, kw_only=True)
class Results:
    """What an evaluation found.

    Attributes:
        run: the run folder.
        step: of the checkpoint that was scored.
        config: of the run.
        rows: scores of all models, in the order of the table.
        coverage: of the bands of models and baselines.
        phases: of traces, scores of noise, P to S and coda.
        calibrations: {source: factors fitted on its validation split; None where it has no such windows}.
        fingerprint: of the data that the model was trained on.
        left_out: {source: why it has no score}.
        exhibits: examples to draw.
        manifest: the store's, with licences and citations.
    """

    run: Path
    step: int
    config: PretrainConfig
    rows: tuple[Score, ...]
    coverage: tuple[Coverage, ...]
    phases: tuple[PhaseScore, ...]
    calibrations: dict[str, SourceCalibration | None]
    fingerprint: str
    left_out: dict[str, str]
    exhibits: tuple[Exhibit, ...]
    manifest: dict[str, Any]


def headline(rows: Iterable[Score]) -> list[Score]:
    """Rows that stand for a source: those of all channels and regions together, or of the only one."""
    rows = list(rows)
    pooled = {(row.model, row.source, row.lead, row.metric) for row in rows if row.channel == ALL}
    return [row for row in rows if row.channel == ALL or (row.model, row.source, row.lead, row.metric) not in pooled]


def table_rows(rows: Iterable[Score]) -> list[Score]:
    """Every row of the trained model and the headlines of the controls, in their order."""
    rows = list(rows)
    heads = set(map(id, headline(rows)))
    return [row for row in rows if row.model == TRAINED or id(row) in heads]


def columns(interval: float) -> tuple[str, ...]:
    """Heads of the table's columns."""
    return (
        "source",
        "model",
        "region",
        "channel",
        "lead",
        "metric",
        "skill",
        f"{100 * interval:g} % interval",
        "score",
        "best baseline",
        "its score",
        "unit",
        "windows",
        "blocks",
    )


def cells(row: Score) -> tuple[str, ...]:
    """A row as texts, one per column."""
    return (
        row.source,
        row.model,
        row.region,
        row.channel,
        row.lead,
        row.metric,
        f"{row.skill:+.4f}",
        "one block" if math.isnan(row.low) else f"[{row.low:+.4f}, {row.high:+.4f}]",
        "" if math.isnan(row.score) else f"{row.score:.4g}",
        row.baseline,
        "" if math.isnan(row.baseline_score) else f"{row.baseline_score:.4g}",
        row.unit,
        str(row.num_windows),
        str(row.num_blocks),
    )


COVERAGE_COLUMNS = ("source", "model", "region", "channel", "lead", "band", "holds", "interval", "windows", "blocks")


def coverage_table(results: Results) -> list[tuple[str, ...]]:
    """Lines of the table of coverage: every row of the trained model, before and after calibration, and the headlines
    of the others.
    """
    heads = set(map(id, coverage_headline(results.coverage)))
    return [
        (
            row.source,
            row.model,
            row.region,
            row.channel,
            row.lead,
            f"{100 * row.nominal:g} %",
            f"{100 * row.coverage:.1f} %",
            "one block" if math.isnan(row.low) else f"[{100 * row.low:.1f}, {100 * row.high:.1f}]",
            str(row.num_windows),
            str(row.num_blocks),
        )
        for row in results.coverage
        if row.model in (TRAINED, CALIBRATED) or id(row) in heads
    ]


def uncalibrated(results: Results) -> dict[str, str]:
    """{source: why it was not recalibrated}."""
    return {
        source: "no good window in its validation split: not recalibrated"
        for source, calibration in results.calibrations.items()
        if calibration is None
    }


def phase_line(part: PhaseScore) -> str:
    """A phase in words: its skill by metric with the counts, or why it has none."""
    skills = [
        f"{row.metric} skill {row.skill:+.4f}" + ("" if math.isnan(row.low) else f" [{row.low:+.4f}, {row.high:+.4f}]")
        for row in headline(part.rows)
    ]
    counts = f"{part.num_frames} target frames of {part.num_records} records"
    return f"{part.phase} ({counts}): {part.missing or '; '.join(skills)}"


def print_coverage(results: Results) -> None:
    """Coverage of the trained model's bands before and after calibration, pooled by source and lead."""
    heads = coverage_headline(results.coverage)
    after = {
        (row.source, row.region, row.channel, row.lead, row.nominal): row for row in heads if row.model == CALIBRATED
    }
    for row in heads:
        if row.model != TRAINED:
            continue
        then = after.get((row.source, row.region, row.channel, row.lead, row.nominal))
        text = f"; {100 * then.coverage:.1f} % after calibration on validation" if then else ""
        print(
            f"coverage {row.source} {row.lead}: the {100 * row.nominal:g} % band holds {100 * row.coverage:.1f} %{text}"
        )
    for source, reason in uncalibrated(results).items():
        print(f"{source}: {reason}")


def print_table(results: Results) -> None:
    """The table on standard output: skill = 1 - score / best baseline's score."""
    lines = [columns(results.config.evaluate.interval), *(cells(row) for row in table_rows(results.rows))]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for number, line in enumerate(lines):
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())
        if number == 0:
            print("  ".join("-" * width for width in widths))
    print(
        "skill = 1 - score / score of the best baseline on the same windows, interval over resampled blocks; "
        f"{ANCHOR}: the fitted linear prior or autoregression that the model corrects, alone; {LEARNED}: against it "
        f"instead of the baselines; {RECALIBRATED}: its spread set on validation, "
        f"against itself as it was; {UNTRAINED} and {SHUFFLED} are scored on a fixed subset of the windows"
    )
    print_coverage(results)
    for part in results.phases:
        print(f"{part.source}, {phase_line(part)}")
    for source, reason in results.left_out.items():
        print(f"{source}: {reason}")
    sys.stdout.flush()


def write_results(results: Results) -> Path:
    """Write evaluation.json, evaluation.csv and calibration.json into `run`/report; the folder."""
    folder = results.run / "report"
    folder.mkdir(parents=True, exist_ok=True)
    rows = plain_rows(results.rows)
    content = {
        "run": results.config.name,
        "step": results.step,
        "data_fingerprint": results.manifest.get("fingerprint"),
        "interval": results.config.evaluate.interval,
        "left_out": results.left_out,
        "rows": rows,
        "coverage": plain_rows(results.coverage),
        "uncalibrated": uncalibrated(results),
        "phases": [
            {name: value for name, value in vars(part).items() if name != "rows"} | {"rows": plain_rows(part.rows)}
            for part in results.phases
        ],
    }
    (folder / "evaluation.json").write_text(json.dumps(content, indent=1, allow_nan=False), encoding="utf-8")
    with (folder / "evaluation.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Score)])
        writer.writeheader()
        writer.writerows(rows)
    fitted = {source: part for source, part in results.calibrations.items() if part is not None}
    Calibration(step=results.step, fingerprint=results.fingerprint, sources=fitted).write(folder / CALIBRATION)
    return folder


def log_results(results: Results, folder: Path) -> None:
    """Skills as metrics and the report as artifacts of the training's MLflow run, where there is one.

    A tracking server that fails costs a warning, not the evaluation: everything is in the report folder.
    """
    marker = results.run / TRACKING
    if not marker.exists():
        return
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    known = json.loads(marker.read_text(encoding="utf-8"))
    try:
        # Imported here: MLflow takes seconds to load, and only tracked runs need it.
        from mlflow.tracking import MlflowClient

        client = MlflowClient(tracking_uri=known["uri"])
        now = max(int(path.stat().st_mtime * 1000) for path in folder.iterdir())
        client.log_batch(known["run_id"], metrics=_metrics(results, now))
        client.log_artifacts(known["run_id"], str(folder), "report")
    except Exception as error:  # noqa: BLE001  servers fail in many ways, and none may cost the evaluation
        warn_untracked(known["uri"], error, rest=f"the evaluation is in {folder}")


def _metrics(results: Results, now: int) -> list[Any]:
    # Imported here, as in log_results.
    from mlflow.entities import Metric

    found = []
    for row in headline(results.rows):
        name = f"evaluation/{row.source}/{row.model}/{row.metric}/{row.lead}"
        for part, value in (("skill", row.skill), ("skill_low", row.low), ("skill_high", row.high)):
            if math.isfinite(value):
                found.append(Metric(f"{_plain_name(name)}/{part}", value, now, 0))
    for phase in results.phases:
        for row in headline(phase.rows):
            name = f"evaluation/{row.source}/{row.model}/{row.metric}/{phase.phase}/skill"
            if math.isfinite(row.skill):
                found.append(Metric(_plain_name(name), row.skill, now, 0))
    for band in coverage_headline(results.coverage):
        name = f"evaluation/{band.source}/{band.model}/coverage {100 * band.nominal:g}/{band.lead}"
        found.append(Metric(_plain_name(name), band.coverage, now, 0))
    return found


def _plain_name(name: str) -> str:
    """A metric's name in the letters that MLflow takes."""
    return re.sub(r"[^A-Za-z0-9_./ -]", "_", name)


def plain_rows(rows: Iterable[Score | Coverage]) -> list[dict[str, Any]]:
    """Rows for JSON, which has no NaN: None where a row has no single score, or no interval."""

    def plain(value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return [{key: plain(value) for key, value in asdict(row).items()} for row in rows]
