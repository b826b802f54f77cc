"""Evaluate a run: held-out windows of every source against every baseline, with two controls that must not win."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sci_evals.baseline import Forecast
from sci_evals.baselines import forecast_baselines
from sci_evals.coverage import Coverage, coverage_rows
from sci_evals.exhibits import Exhibit, make_exhibits
from sci_evals.metrics import LEVELS
from sci_evals.phases import PhaseScore, frame_phases, phase_scores, record_arrivals
from sci_evals.recalibration import calibrate
from sci_evals.report import write_report
from sci_evals.results import (
    ANCHOR,
    CALIBRATED,
    LEARNED,
    RECALIBRATED,
    SHUFFLED,
    TRAINED,
    UNTRAINED,
    Results,
    log_results,
    plain_rows,
    print_table,
    write_results,
)
from sci_evals.scores import (
    QuantileModel,
    Score,
    WindowScores,
    compare,
    score_baseline,
    score_quantiles,
    scored_channels,
)
from sci_evals.tasks import EvalTask, task_for
from sci_evals.windowset import WindowSet, WindowShape, read_windows
from sci_gpt.config import MixtureEntry, PretrainConfig
from sci_gpt.data.store import Store
from sci_gpt.errors import CheckpointError, DataError
from sci_gpt.model.calibration import SourceCalibration
from sci_gpt.recipes.load import LoadedModel, load_model
from sci_gpt.recipes.parts import tokenizer_settings
from sci_tokenizers.table import make_tokenizer

_CONTROL_WINDOWS = 256
_SHUFFLED_TRAIN_WINDOWS = 6_000
_CHUNK = 64


@dataclass(frozen=True, kw_only=True)
class Contest:
    """Windows of one source and what every baseline scored on them."""

    task: EvalTask
    test: WindowSet
    forecasts: dict[str, Forecast]
    baselines: dict[str, WindowScores]
    arrivals: tuple[dict[str, float], ...] = ()  # of the records of traces

    def over(self, name: str, models: Mapping[str, WindowScores]) -> Contest:
        """The same windows with one of the models as the only one to beat: over the anchor, what was learned."""
        return replace(self, baselines={name: models[name]})

    def rows(self, models: Mapping[str, WindowScores], *, config: PretrainConfig, index: np.ndarray) -> list[Score]:
        """Models, scored on the windows `index`, against the baselines on the same windows."""
        windows = self.test.take(index)
        return compare(
            windows,
            models,
            baselines={name: scores.take(index) for name, scores in self.baselines.items()},
            lead_groups=self.task.lead_groups(windows),
            bootstrap=self.task.bootstrap(windows, config.evaluate),
        )

    def coverage(self, models: Mapping[str, WindowScores], *, config: PretrainConfig) -> list[Coverage]:
        """Coverage of the models' bands and of every baseline's, on all windows."""
        return coverage_rows(
            self.test,
            {**models, **self.baselines},
            lead_groups=self.task.lead_groups(self.test),
            bootstrap=self.task.bootstrap(self.test, config.evaluate),
        )

    def phases(self, models: Mapping[str, WindowScores], *, config: PretrainConfig) -> list[PhaseScore]:
        """Scores of noise, P to S and coda; none of what is no trace, or has no record with known arrivals."""
        if not any(self.arrivals):
            return []
        return phase_scores(
            self.test,
            frame_phases(self.test, self.arrivals),
            models=models,
            baselines=self.baselines,
            bootstrap=self.task.bootstrap(self.test, config.evaluate),
        )


def evaluate(config: PretrainConfig, run: Path) -> dict[str, Any]:
    """Score a run, print the table, write `run`/report/{evaluation.json, evaluation.csv, calibration.json, report.html,
    *.png}, log to MLflow.

    Args:
        config: of the run: its mixture says which sources and windows, `evaluate` how many.
        run: the run folder.

    Returns:
        {"rows": [...], "left_out": {source: reason}, "report": path, "seconds": ...}.

    Raises:
        CheckpointError: no checkpoint, or one trained on another store.
        DataError: the store is missing or broken.
    """
    begin, store = time.monotonic(), Store.open(config.data)
    loaded = load_matching(run, store)
    anchor, start = loaded.anchor(), loaded.untrained(trunk=False)
    models = {TRAINED: loaded.predictor, ANCHOR: anchor.predictor, UNTRAINED: start.predictor}
    control = load_matching(config.evaluate.shuffled_run, store) if config.evaluate.shuffled_run else None
    rows, coverage, phases = list[Score](), list[Coverage](), list[PhaseScore]()
    exhibits: list[Exhibit] = []
    left_out: dict[str, str] = {}
    calibrations: dict[str, SourceCalibration | None] = {}
    for entry in config.mixture:
        contest, train = open_contest(store, entry, config=config)
        if contest is None or train is None:
            left_out[entry.source] = "no good window of its test (or training) split fits; nothing can be said of it"
            print(f"evaluate {entry.source}: left out: {left_out[entry.source]}", flush=True)
            continue
        left_out |= unscored(contest.test) | poor_windows(contest.test)
        calibrations[entry.source] = calibrate(
            store, contest.test, model=loaded.predictor, task=contest.task, settings=config.evaluate
        )
        found = score_contest(contest, models, config=config, calibration=calibrations[entry.source])
        rows, coverage, phases = rows + found.rows, coverage + found.coverage, phases + found.phases
        if control is not None:
            rows += score_shuffled(contest, train, control=control, config=config)
        exhibits += make_exhibits(
            store, contest.test, model=loaded.predictor, forecasts=contest.forecasts, baselines=contest.baselines
        )
        print(f"evaluate {entry.source}: done, {time.monotonic() - begin:.0f} s", flush=True)
    results = Results(
        run=run,
        step=loaded.step,
        rows=tuple(rows),
        coverage=tuple(coverage),
        phases=tuple(phases),
        calibrations=calibrations,
        fingerprint=loaded.fingerprint,
        left_out=left_out,
        exhibits=tuple(exhibits),
        manifest=store.manifest,
        config=config,
    )
    report = publish(results)
    seconds = round(time.monotonic() - begin, 1)
    print(f"evaluate: {seconds:.0f} s; report: {report}", flush=True)
    return {"rows": plain_rows(rows), "left_out": left_out, "report": str(report), "seconds": seconds}


@dataclass(frozen=True, kw_only=True)
class Found:
    """Scores of one source, coverage of the bands, and scores by phase."""

    rows: list[Score]
    coverage: list[Coverage]
    phases: list[PhaseScore]


def score_contest(
    contest: Contest,
    models: Mapping[str, QuantileModel],
    *,
    config: PretrainConfig,
    calibration: SourceCalibration | None,
) -> Found:
    """What is found of a source: model, anchor, what was learned, what calibration changes, the untrained control.

    Args:
        models: `TRAINED` (first), `ANCHOR` and `UNTRAINED`.
        calibration: of this source; None where it has none.
    """
    total = contest.test.num_windows
    every, some = np.arange(total), control_windows(total)
    whole = score_models(models, contest.test, only={UNTRAINED: some}, calibration=calibration)
    rows = contest.rows({name: whole[name] for name in (TRAINED, ANCHOR)}, config=config, index=every)
    rows += contest.over(ANCHOR, whole).rows({LEARNED: whole[TRAINED]}, config=config, index=every)
    if calibration is not None:
        rows += contest.over(TRAINED, whole).rows({RECALIBRATED: whole[CALIBRATED]}, config=config, index=every)
    rows += contest.rows({UNTRAINED: whole[UNTRAINED]}, config=config, index=some)
    banded = {name: whole[name] for name in (TRAINED, CALIBRATED, ANCHOR) if name in whole}
    return Found(
        rows=rows,
        coverage=contest.coverage(banded, config=config),
        phases=contest.phases({TRAINED: whole[TRAINED]}, config=config),
    )


def publish(results: Results) -> Path:
    """Print the table, write the report, log it to MLflow; the report's path."""
    print_table(results)
    folder = write_results(results)
    report = write_report(results, folder)
    log_results(results, folder)
    return report


def load_matching(run: Path, store: Store) -> LoadedModel:
    """A run's model, whose statistics are those of this store.

    Raises:
        CheckpointError: it was trained on another store.
    """
    loaded = load_model(run)
    if loaded.fingerprint != store.fingerprint:
        raise CheckpointError(
            f"{run} was trained on data of fingerprint {loaded.fingerprint[:12]}, the store {str(store.path)!r} has "
            f"{store.fingerprint[:12]}; its statistics and splits differ: train on this store or evaluate on that one"
        )
    return loaded


def open_contest(
    store: Store, entry: MixtureEntry, *, config: PretrainConfig
) -> tuple[Contest | None, WindowSet | None]:
    """Test and training windows of a source, and the baselines' scores; None where no window fits.

    The context is what a training document leaves before its longest lead.
    """
    begin = time.monotonic()
    task = task_for(store.modality(entry.source), store.step_seconds(entry.source))
    tokenizer = make_tokenizer(store.modality(entry.source), tokenizer_settings(config))
    num_context = entry.frames - max(entry.leads)
    if num_context < 1:
        raise DataError(
            f"source {entry.source!r}: documents of {entry.frames} frames leave no context before lead "
            f"{max(entry.leads)}; raise mixture frames"
        )
    shape = WindowShape(num_context=num_context, leads=entry.leads, frame_times=tokenizer.frame_times)
    count = config.evaluate.windows_by_source.get(entry.source, config.evaluate.windows)
    test = read_windows(store, entry.source, split="test", shape=shape, count=count)
    train = read_windows(store, entry.source, split="train", shape=shape, count=task.train_windows)
    if test is None or train is None:
        return None, None
    forecasts = forecast_baselines(train, test)
    baselines = {name: score_baseline(test, forecast) for name, forecast in forecasts.items()}
    print(
        f"evaluate {entry.source}: {test.num_windows} test windows, {len(baselines)} baselines fitted on "
        f"{train.num_windows} training windows in {time.monotonic() - begin:.0f} s",
        flush=True,
    )
    arrivals: tuple[dict[str, float], ...] = ()
    if test.modality == "trace":
        options = store.manifest["sources"][entry.source].get("options", {})
        arrivals = record_arrivals(test, options.get("events", {}))
    return Contest(task=task, test=test, forecasts=forecasts, baselines=baselines, arrivals=arrivals), train


def unscored(test: WindowSet) -> dict[str, str]:
    """Channels without a score, as entries of `left_out`."""
    return {
        f"{test.source} {channel}": "an angle or a category has no absolute error; give it as components"
        for number, channel in enumerate(test.channels)
        if number not in scored_channels(test)
    }


def poor_windows(test: WindowSet) -> dict[str, str]:
    """What rules of quality cost of a source's test windows, as an entry of `left_out`; empty where nothing."""
    if not test.left_out:
        return {}
    cost = ", ".join(f"{rule} {count}" for rule, count in test.left_out.items())
    return {f"{test.source} windows": f"rules of quality leave out {sum(test.left_out.values())} test windows ({cost})"}


def score_model(model: QuantileModel, windows: WindowSet) -> WindowScores:
    """Scores of a model's quantiles on every window."""
    return score_models({TRAINED: model}, windows)[TRAINED]


def score_models(
    models: Mapping[str, QuantileModel],
    windows: WindowSet,
    *,
    only: Mapping[str, np.ndarray] | None = None,
    calibration: SourceCalibration | None = None,
) -> dict[str, WindowScores]:
    """Scores of several models on the same windows, which are encoded once: a chunk at a time, by the first of them.

    Args:
        models: of one tokenizer and the same statistics.
        windows: to score.
        only: {model: ascending numbers of the windows that it is scored on}; every one where a model is not named.
        calibration: of the source: the trained model's quantiles after it are scored too, as `CALIBRATED`.
    """
    shape, reader = windows.shape, next(iter(models.values()))
    names = [*models, *([CALIBRATED] if calibration is not None else [])]
    parts: dict[str, list[WindowScores]] = {name: [] for name in names}
    for first in range(0, windows.num_windows, _CHUNK):
        numbers = np.arange(first, min(first + _CHUNK, windows.num_windows))
        samples = list(windows.take(numbers).samples())
        documents = reader.documents(samples, num_context=shape.num_context, leads=shape.leads)
        for name, model in models.items():
            own = np.intersect1d(numbers, only[name]) if only and name in only else numbers
            if len(own):
                answers = model.answers([documents[i - first] for i in own], levels=LEVELS)
                parts[name].append(score_quantiles(windows.take(own), answers))
                if name == TRAINED and calibration is not None:
                    beside = np.concatenate(answers, axis=-1)  # windows side by side as columns: one call for all
                    moved = calibration.apply(beside, levels=LEVELS, leads=shape.leads, channels=windows.channels)
                    parts[CALIBRATED].append(score_quantiles(windows.take(own), np.split(moved, len(own), axis=-1)))
    return {name: WindowScores.concatenate(pieces) for name, pieces in parts.items()}


def score_shuffled(contest: Contest, train: WindowSet, *, control: LoadedModel, config: PretrainConfig) -> list[Score]:
    """The control run on time-shuffled windows, against baselines fitted and scored on time-shuffled windows."""
    test = contest.test.take(control_windows(contest.test.num_windows)).shuffled(config.seed)
    forecasts = forecast_baselines(
        train.take(thin(train.num_windows, _SHUFFLED_TRAIN_WINDOWS)).shuffled(config.seed + 1), test
    )
    baselines = {name: score_baseline(test, forecast) for name, forecast in forecasts.items()}
    shuffled = Contest(task=contest.task, test=test, forecasts=forecasts, baselines=baselines)
    scores = score_model(control.predictor, test)
    return shuffled.rows({SHUFFLED: scores}, config=config, index=np.arange(test.num_windows))


def thin(total: int, count: int) -> np.ndarray:
    """`count` of `total` numbers, evenly spread; all where there are no more."""
    return np.unique(np.linspace(0, total - 1, min(count, total)).astype(int))


def control_windows(total: int) -> np.ndarray:
    """The windows that controls are scored on: half of them, but 128 to 256 (they need no fine interval)."""
    return thin(total, int(np.clip(total // 2, _CONTROL_WINDOWS // 2, _CONTROL_WINDOWS)))
