"""What a finetuning was worth: against from scratch, the pretrained model itself and dressed baselines; a verdict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from sci_evals import scores
from sci_evals.baseline import Forecast
from sci_evals.baselines import forecast_baselines
from sci_evals.metrics import LEVELS
from sci_evals.scores import Bootstrap, LeadGroup, Score, WindowScores, score_baseline, score_quantiles
from sci_evals.tasks import lead_name, task_for
from sci_evals.windowset import WindowSet, WindowShape, choose_starts, cut
from sci_gpt.errors import DataError
from sci_gpt.model.predict import Predictor
from sci_gpt.recipes import parts
from sci_gpt.recipes.adapt import Adapted, AdaptSettings, adapt, from_scratch, introduce
from sci_gpt.recipes.finetune import Finetuned
from sci_gpt.recipes.load import LoadedModel
from sci_tokenizers.sample import Sample

FINETUNED, SCRATCH, PRETRAINED, PRIOR = "finetuned", "from scratch", "pretrained, as it is", "linear prior alone"
_SAID = {"season ago": "seasonal naive"}  # what a table calls a baseline
INTERVAL, RESAMPLES = 0.9, 1000
_TEST_WINDOWS, _TRAIN_WINDOWS = 512, 8000
_BLOCKS = 10  # at least, where the leads are short enough for it


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How much lower the finetuned model's score is than another's, as a share of the other's, with its interval."""

    other: str
    score: float
    other_score: float
    share: float
    low: float
    high: float
    num_blocks: int

    @property
    def sign(self) -> int:
        """1: better, -1: worse, 0: the interval holds 0 or there is none."""
        if not (np.isfinite(self.low) and np.isfinite(self.high)):
            return 0
        return int(self.low > 0) - int(self.high < 0)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All scores on the test part.

    Attributes:
        rows: (name, CRPS, MAE, skill against from scratch with its interval), models first, then baselines by CRPS.
        unit: of the scores ("1" where several channels or records are pooled).
        verdict: in words.
        differences: against from scratch, the baseline of reference (ridge; AR(32) for records) and the best baseline.
        windows, quantiles: of the test part, for the picture; quantiles by model name.
        forecasts: of the baselines.
        finetuned, scratch: how the two trainings went.
        left_out: baselines that do not apply, and why.
    """

    rows: tuple[dict[str, Any], ...]
    unit: str
    verdict: str
    differences: tuple[Difference, ...]
    windows: WindowSet
    quantiles: dict[str, list[np.ndarray]]
    forecasts: dict[str, Forecast]
    finetuned: Adapted
    scratch: Adapted
    left_out: dict[str, str]


def compare(
    start: LoadedModel, result: Finetuned, *, settings: AdaptSettings, say: Callable[[str], None] = print
) -> Comparison:
    """Train from scratch on the same examples, score all on the test part.

    Baselines are fitted to the training and the validation part together: they need nothing to stop on.

    Args:
        start: the pretrained model.
        result: of `finetune` with it.
        settings: of the finetuning; from scratch gets the same steps and learning rate.
        say: takes the lines of progress.

    Raises:
        DataError: no test window with a value.
    """
    prepared = result.prepared
    say("from scratch, on the same examples:")
    scratch = adapt(from_scratch(start, seed=settings.seed), prepared.examples, settings=settings, say=say)
    train, test = _windows(result)
    forecasts = forecast_baselines(train, test)
    models = {
        FINETUNED: result.model.predictor,
        SCRATCH: scratch.model.predictor,
        PRETRAINED: _zero_shot(start, result),
        PRIOR: introduce(start, prepared.examples).anchor().predictor,
    }
    quantiles = {name: _quantiles(predictor, test) for name, predictor in models.items()}
    own = {name: score_quantiles(test, arrays) for name, arrays in quantiles.items()}
    simple = {name: score_baseline(test, forecast) for name, forecast in forecasts.items()}
    reference = "ridge" if "ridge" in simple else "AR(32)"
    against = {**own, **simple}
    rows = {name: _row(name, test, against=against, target=prepared.target) for name in against}
    order = sorted(simple, key=lambda name: rows[name]["crps"])
    differences = tuple(
        _difference(test, {FINETUNED: own[FINETUNED]}, other={name: against[name]}, target=prepared.target)
        for name in (SCRATCH, reference, order[0])
    )
    return Comparison(
        rows=tuple(rows[name] for name in (*own, *order)),
        unit=rows[FINETUNED]["unit"],
        verdict=verdict(*differences[:2], best=differences[2], steps=(result.adapted.best_step, scratch.best_step)),
        differences=differences,
        windows=test,
        quantiles=quantiles,
        forecasts=forecasts,
        finetuned=result.adapted,
        scratch=scratch,
        left_out=_left_out(test, simple),
    )


def verdict(scratch: Difference, reference: Difference, *, best: Difference, steps: tuple[int, int]) -> str:
    """The verdict in words, with intervals: first pretraining against none, then the model against the baselines.

    Args:
        scratch, reference, best: against from scratch, the baseline of reference, the best baseline.
        steps: the best step of the finetuned model and of the one from scratch; 0 where no step made it better.
    """
    shown = f"CRPS against from scratch {_percent(scratch)}"
    if not np.isfinite(scratch.low):
        first = f"pretraining: no verdict, the test part is one block ({shown})"
    elif steps[1] == 0 and scratch.sign > 0:
        first = f"pretraining: no verdict, from scratch was best before its first step: it was not trained ({shown})"
    elif scratch.sign > 0:
        first = f"pretraining is worth it here: {shown}"
    elif scratch.sign < 0:
        first = f"pretraining is not worth it here, it does harm: {shown}"
    else:
        first = f"pretraining is not shown to be worth it here: {shown}; the interval holds 0"
    words = {1: "better than", 0: "level with", -1: "worse than"}
    rows = [reference] if best.other == reference.other else [reference, best]
    said = " and ".join(f"{words[row.sign]} {_SAID.get(row.other, row.other)}: CRPS {_percent(row)}" for row in rows)
    more = "" if len(rows) == 1 else ", the best baseline"
    none = " No step of the finetuning made it better on the validation part." if steps[0] == 0 else ""
    return f"{first}. The finetuned model is {said}{more}.{none}"


def table(comparison: Comparison) -> list[str]:
    """Lines of the table, as printed."""
    metric = "scaled CRPS" if comparison.windows.modality == "trace" else "CRPS"
    lines = [f"{'':24}{metric + ', ' + comparison.unit:>18}{'MAE':>12}  finetuned is better by (90 %)"]
    for row in comparison.rows:
        own = row["name"] == FINETUNED
        gain = "" if own else f"{100 * row['share']:+6.1f} % [{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]"
        lines.append(f"{row['name']:24}{row['crps']:18.4g}{row['mae']:12.4g}  {gain}".rstrip())
    first = comparison.differences[0]
    windows = comparison.windows
    leads = lead_name(windows.shape.leads, float(np.median(windows.step_seconds)) * windows.shape.frame_times)
    lines.append(f"{windows.num_windows} forecasts of the test part, {leads} ahead, {first.num_blocks} blocks of time")
    own, usual = _block_seconds(windows)
    if own < usual:
        lines.append(
            f"the record is short: blocks of {own / 86400:.3g} days in place of {usual / 86400:.3g}; the intervals may "
            "be too narrow"
        )
    lines.append(
        f"best of {comparison.finetuned.steps} steps: {comparison.finetuned.best_step}; from scratch, best of "
        f"{comparison.scratch.steps}: {comparison.scratch.best_step}"
    )
    lines += [f"left out: {name}: {reason}" for name, reason in comparison.left_out.items()]
    return lines


def plain(comparison: Comparison) -> dict[str, Any]:
    """Plain numbers for finetune.json."""
    return {
        "verdict": comparison.verdict,
        "unit": comparison.unit,
        "interval": INTERVAL,
        "rows": list(comparison.rows),
        "differences": [asdict(one) for one in comparison.differences],
        "num_windows": comparison.windows.num_windows,
        "leads": list(comparison.windows.shape.leads),
        "left_out": comparison.left_out,
        "finetuned": {"best_step": comparison.finetuned.best_step, "steps": comparison.finetuned.steps},
        "scratch": {"best_step": comparison.scratch.best_step, "steps": comparison.scratch.steps},
    }


def _percent(difference: Difference) -> str:
    """The change of CRPS, negative where the finetuned model is better."""
    return f"{-100 * difference.share:+.1f} % [{-100 * difference.high:+.1f}, {-100 * difference.low:+.1f}]"


def _windows(result: Finetuned) -> tuple[WindowSet, WindowSet]:
    """Windows to fit baselines on, and windows of the test part that hold a value of the target."""
    blocks = result.prepared.blocks
    spec = blocks.spec
    shape = WindowShape(num_context=spec.context_frames[1], leads=spec.leads, frame_times=result.prepared.frame_times)
    train = _cut((*blocks.train, *blocks.valid), shape, count=_TRAIN_WINDOWS)
    test = _cut(blocks.test, shape, count=_TEST_WINDOWS)
    channel = test.channels.index(result.prepared.target) if result.prepared.target else slice(None)
    seen = test.valid[:, : shape.context_times].reshape(test.num_windows, -1).any(axis=1)
    asked = test.valid[:, shape.future_index][:, :, :, channel].reshape(test.num_windows, -1).any(axis=1)
    useful = np.flatnonzero(seen & asked)
    if not len(useful):
        raise DataError(f"source {test.source!r}: its test part holds no value to forecast; give a longer record")
    return train, test.take(useful)


def _cut(stretches: Sequence[Sample], shape: WindowShape, *, count: int) -> WindowSet:
    lengths = np.array([sample.num_times for sample in stretches])
    return cut(stretches, shape, starts=choose_starts(lengths, shape, count=count))


def _zero_shot(start: LoadedModel, result: Finetuned) -> Predictor:
    """The pretrained weights, which know nothing of the source (but have a row for each of its variables)."""
    known = introduce(start, result.prepared.examples)
    return Predictor(known.model, parts.tokenizer_settings(start.config), statistics=start.statistics)


def _quantiles(predictor: Predictor, windows: WindowSet) -> list[np.ndarray]:
    shape = windows.shape
    return predictor.quantiles(list(windows.samples()), num_context=shape.num_context, leads=shape.leads, levels=LEVELS)


def _block_seconds(windows: WindowSet) -> tuple[float, float]:
    """Length of the blocks, and that which the task has: shorter where the test part would have fewer than ten, but
    never shorter than the longest lead.
    """
    step = float(np.median(windows.step_seconds)) * windows.shape.frame_times
    task = task_for(windows.modality, float(np.median(windows.step_seconds)))
    span, usual = float(np.ptp(windows.origin)) + step, float(task.block_length(windows).min())
    return max(min(usual, span / _BLOCKS), max(windows.shape.leads) * step), usual


def _bootstrap(windows: WindowSet) -> Bootstrap:
    length, _ = _block_seconds(windows)
    blocks = np.floor((windows.origin - windows.origin.min()) / length + 1e-6).astype(int)
    return Bootstrap(
        blocks=blocks,
        regions=np.full(windows.num_windows, scores.ALL, dtype=object),
        resamples=RESAMPLES,
        interval=INTERVAL,
    )


def _scored(
    windows: WindowSet, models: dict[str, WindowScores], *, other: dict[str, WindowScores], target: str | None
) -> dict[str, Score]:
    """The row of the target (of all channels where there is none) by metric, all leads together."""
    group = LeadGroup(name="all", leads=windows.shape.leads)
    rows = scores.compare(windows, models, baselines=other, lead_groups=[group], bootstrap=_bootstrap(windows))
    if not rows:
        raise DataError(
            f"source {windows.source!r}: {next(iter(other))} errs nowhere on the test part, which holds one value; "
            "give a record that changes"
        )
    wanted = target or (scores.ALL if any(row.channel == scores.ALL for row in rows) else rows[0].channel)
    return {row.metric: row for row in rows if row.channel == wanted}


def _difference(
    windows: WindowSet, models: dict[str, WindowScores], *, other: dict[str, WindowScores], target: str | None
) -> Difference:
    row, (name,) = _scored(windows, models, other=other, target=target)[_metric(windows)], other
    return Difference(
        other=name,
        score=row.score,
        other_score=row.baseline_score,
        share=row.skill,
        low=row.low,
        high=row.high,
        num_blocks=row.num_blocks,
    )


def _row(name: str, windows: WindowSet, *, against: dict[str, WindowScores], target: str | None) -> dict[str, Any]:
    """One line of the table: this forecast's scores, and the finetuned model's skill against it."""
    rows = _scored(windows, {FINETUNED: against[FINETUNED]}, other={name: against[name]}, target=target)
    main = rows[_metric(windows)]
    means = {metric: _mean(against[name], windows, metric=metric, target=target) for metric in rows}
    unit = "1" if windows.modality == "trace" else main.unit
    return {
        "name": _SAID.get(name, name),
        "crps": means[_metric(windows)],
        "mae": means["mae"],
        "unit": unit,
        "share": main.skill,
        "low": main.low,
        "high": main.high,
    }


def _mean(own: WindowScores, windows: WindowSet, *, metric: str, target: str | None) -> float:
    channel = [windows.channels.index(target)] if target else list(range(len(windows.channels)))
    weight = own.weight[:, :, channel].sum()
    return float(own.total[metric][:, :, channel].sum() / weight)


def _metric(windows: WindowSet) -> str:
    return "scaled crps" if windows.modality == "trace" else "crps"


def _left_out(windows: WindowSet, simple: dict[str, WindowScores]) -> dict[str, str]:
    if windows.modality == "trace" or "season ago" in simple:
        return {}
    return {_SAID["season ago"]: f"a context of {windows.shape.context_times} steps holds no whole season"}
