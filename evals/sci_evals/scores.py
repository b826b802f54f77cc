"""Scores against the raw truth, and the skill of a model over the best baseline with its bootstrap interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from sci_evals.baseline import Forecast
from sci_evals.metrics import BANDS, LEVELS, MEDIAN, covered_values, crps_from_quantiles_values
from sci_evals.windowset import WindowSet
from sci_gpt.errors import DataError
from sci_tokenizers.sample import Sample
from sci_tokenizers.variables import VARIABLES, inverse_transform

# CRPS and MAE in the variable's unit; `scaled crps` (traces only): CRPS over the context's root mean square.
METRICS = ("crps", "mae", "scaled crps")
ALL = "all"


class QuantileModel(Protocol):
    """What evaluation needs of a model: `sci_gpt.model.predict.Predictor`."""

    def documents(self, samples: Sequence[Sample], *, num_context: int, leads: tuple[int, ...]) -> list[Any]:
        """The samples as the model reads them."""
        ...

    def answers(self, documents: Sequence[Any], *, levels: tuple[float, ...]) -> list[np.ndarray]:
        """What `quantiles` gives for the samples of these documents."""
        ...

    def quantiles(
        self, samples: Sequence[Sample], *, num_context: int, leads: tuple[int, ...], levels: tuple[float, ...]
    ) -> list[np.ndarray]:
        """Per sample float32 (level, lead, frame_times, variable, row, column), physical units."""
        ...


@dataclass(frozen=True, kw_only=True)
class WindowScores:
    """Score sums and weights of each window, so that a mean over any windows leaves missing values out of both.

    Attributes:
        total: {metric: float64 (N, lead, V)}, weighted sums over the frame's times and cells, in physical units.
        weight: float64 (N, lead, V), sum of the cells' weights where the truth is known.
        covered: {nominal share of a central band: float64 (N, lead, V)}, weights of the values inside it.
    """

    total: dict[str, np.ndarray]
    weight: np.ndarray
    covered: dict[float, np.ndarray] = field(default_factory=dict)

    def take(self, index: np.ndarray) -> WindowScores:
        """Those windows."""
        return WindowScores(
            total={name: part[index] for name, part in self.total.items()},
            weight=self.weight[index],
            covered={band: part[index] for band, part in self.covered.items()},
        )

    @classmethod
    def concatenate(cls, parts: Sequence[WindowScores]) -> WindowScores:
        """The windows of all parts, in their order."""
        return cls(
            total={name: np.concatenate([part.total[name] for part in parts]) for name in parts[0].total},
            weight=np.concatenate([part.weight for part in parts]),
            covered={band: np.concatenate([part.covered[band] for part in parts]) for band in parts[0].covered},
        )


@dataclass(frozen=True, kw_only=True)
class LeadGroup:
    """Leads whose scores are averaged: a name to print and their numbers in frames."""

    name: str
    leads: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Score:
    """One row of the table: a model against the best baseline of its channel, leads, region and metric.

    `score` and `baseline_score` are in `unit`; skill = 1 - score / baseline_score, with its interval [low, high]. The
    row of all channels holds the geometric mean of their ratios; its scores are NaN.
    """

    model: str
    source: str
    region: str
    channel: str
    lead: str
    metric: str
    unit: str
    score: float
    baseline: str
    baseline_score: float
    skill: float
    low: float
    high: float
    num_windows: int
    num_blocks: int


@dataclass(frozen=True, kw_only=True)
class Bootstrap:
    """Resampling of blocks.

    Attributes:
        blocks: int (N,), the block of each window: windows of one block are not independent.
        regions: str (N,), windows scored together; a block lies in one region.
        resamples: number of resamples.
        interval: probability inside [low, high].
        seed: of the resampling.
    """

    blocks: np.ndarray
    regions: np.ndarray
    resamples: int
    interval: float
    seed: int = 0


def score_baseline(windows: WindowSet, forecast: Forecast) -> WindowScores:
    """CRPS and absolute error of the median of a baseline's quantiles at `LEVELS`, like a model's, against the raw
    truth.
    """
    truth = windows.truth
    crps, error = np.empty(truth.shape), np.empty(truth.shape)
    inside = {band: np.empty(truth.shape) for band in BANDS}
    for i, name in enumerate(windows.variables):
        quantiles = [inverse_transform(forecast.quantile(level, i), name) for level in range(len(LEVELS))]
        crps[:, :, :, i] = crps_from_quantiles_values(quantiles, truth[:, :, :, i], levels=LEVELS)
        error[:, :, :, i] = np.abs(quantiles[MEDIAN] - truth[:, :, :, i])
        for band, part in inside.items():
            part[:, :, :, i] = covered_values(quantiles, truth[:, :, :, i], levels=LEVELS, nominal=band)
    return _sums(windows, inside=inside, crps=crps, mae=error)


def score_quantiles(windows: WindowSet, quantiles: Sequence[np.ndarray]) -> WindowScores:
    """CRPS and absolute error of the median of a model's quantiles at `LEVELS`.

    Args:
        quantiles: per window (level, lead, frame_times, V, Y, X), physical units.
    """
    truth, values = windows.truth, np.stack(quantiles, axis=1)
    crps = crps_from_quantiles_values(values, truth, levels=LEVELS)
    inside = {band: covered_values(values, truth, levels=LEVELS, nominal=band) for band in BANDS}
    return _sums(windows, inside=inside, crps=crps, mae=np.abs(values[MEDIAN] - truth))


def _sums(windows: WindowSet, *, inside: Mapping[float, np.ndarray], **values: np.ndarray) -> WindowScores:
    known = ~np.isnan(windows.truth)
    for name, part in values.items():
        if not np.isfinite(part[known]).all():
            # Left out like a missing truth, such a forecast would score better than any other.
            window, _, _, channel, *_ = np.argwhere(known & ~np.isfinite(part))[0]
            raise DataError(
                f"source {windows.source!r}: a forecast of {windows.channels[channel]!r} has no finite {name} in "
                f"window {window} ({windows.groups[window]}): the model diverged, or its tokenizer cannot hold it"
            )
    weight = windows.cell_weights * known
    axes = (2, 4, 5)
    total = {name: (np.nan_to_num(part) * weight).sum(axis=axes) for name, part in values.items()}
    if windows.modality == "trace":
        # Counts of two digitizers, or noise and surface waves, are no one unit: a second score is free of it. A context
        # that never moves has no scale and counts in neither forecast's sum.
        past = slice(0, windows.shape.context_times)
        power = (windows.valid * windows.values.astype(np.float64) ** 2)[:, past].sum(axis=(1, 3, 4))
        known = windows.valid[:, past].sum(axis=(1, 3, 4))
        scale = np.sqrt(power / np.maximum(known, 1))[:, None]  # (N, 1, V)
        total["scaled crps"] = np.where(scale > 0, total["crps"] / np.where(scale > 0, scale, 1.0), 0.0)
    covered = {band: (part * weight).sum(axis=axes) for band, part in inside.items()}
    return WindowScores(total=total, weight=weight.sum(axis=axes), covered=covered)


@dataclass(frozen=True, kw_only=True)
class Draws:
    """One region's windows, the block of each, and how often each block is drawn: counts (1 + resamples, block),
    first once each.
    """

    windows: np.ndarray
    block: np.ndarray
    counts: np.ndarray


@dataclass(frozen=True, kw_only=True)
class _Case:
    """What is scored together: one metric, region, channel and group of leads."""

    metric: str
    region: str
    channel: int
    group: LeadGroup


def scored_channels(windows: WindowSet) -> list[int]:
    """Channels with an order: an absolute error of an angle or a category means nothing (winds come as u and v)."""
    unordered = ("circular", "categorical")
    return [i for i, name in enumerate(windows.variables) if VARIABLES[name].kind not in unordered]


def compare(
    windows: WindowSet,
    models: Mapping[str, WindowScores],
    *,
    baselines: Mapping[str, WindowScores],
    lead_groups: Sequence[LeadGroup],
    bootstrap: Bootstrap,
) -> list[Score]:
    """Skill of each model by metric, leads, region and channel, then of all regions and channels together.

    The best baseline is the one with the lowest score on these windows. In each resample of whole blocks (with
    replacement, within each region) the best is chosen anew, so that the interval pays for the choice.
    """
    draws = {str(region): draw_blocks(bootstrap, str(region)) for region in np.unique(bootstrap.regions)}
    rows: list[Score] = []
    for metric in next(iter(models.values())).total:
        for group in lead_groups:
            logs: dict[str, list[np.ndarray]] = {name: [] for name in models}
            own: list[Score] = []
            for region, draw in draws.items():
                for channel in scored_channels(windows):
                    case = _Case(metric=metric, region=region, channel=channel, group=group)
                    scored, ratios = _score_case(
                        windows, case, models=models, baselines=baselines, draw=draw, bootstrap=bootstrap
                    )
                    own += scored
                    for name, ratio in ratios.items():
                        logs[name].append(np.log(np.maximum(ratio, 1e-12)))
            rows += own + _pool(own, logs, bootstrap=bootstrap)
    return rows


def draw_blocks(bootstrap: Bootstrap, region: str) -> Draws:
    """How often each block of a region is drawn in each resample."""
    windows = np.flatnonzero(bootstrap.regions == region)
    _, block = np.unique(bootstrap.blocks[windows], return_inverse=True)
    num = int(block.max()) + 1
    generator = np.random.default_rng([bootstrap.seed, num, len(windows)])
    drawn = generator.multinomial(num, np.full(num, 1.0 / num), size=bootstrap.resamples)
    return Draws(windows=windows, block=block, counts=np.concatenate([np.ones((1, num)), drawn]))


def _score_case(
    windows: WindowSet,
    case: _Case,
    *,
    models: Mapping[str, WindowScores],
    baselines: Mapping[str, WindowScores],
    draw: Draws,
    bootstrap: Bootstrap,
) -> tuple[list[Score], dict[str, np.ndarray]]:
    """Rows of one case and each model's ratios (1 + resamples,); none where no truth is known or no baseline errs."""
    model_means, weights = _means(models, case, windows=windows, draw=draw)
    baseline_means, _ = _means(baselines, case, windows=windows, draw=draw)
    best = int(baseline_means[:, 0].argmin())
    if not weights.any() or not baseline_means[best, 0] > 0:
        return [], {}
    floor = baseline_means.min(axis=0)
    num_blocks = len(np.unique(draw.block[weights > 0]))
    rows, ratios = [], {}
    for name, means in zip(models, model_means, strict=True):
        ratio = means / np.where(floor > 0, floor, np.nan)
        skill, low, high = _interval(ratio, bootstrap.interval, num_blocks=num_blocks)
        ratios[name] = ratio
        rows.append(
            Score(
                model=name,
                source=windows.source,
                region=case.region,
                channel=windows.channels[case.channel],
                lead=case.group.name,
                metric=case.metric,
                unit="1" if case.metric == "scaled crps" else VARIABLES[windows.variables[case.channel]].unit,
                score=float(means[0]),
                baseline=list(baselines)[best],
                baseline_score=float(baseline_means[best, 0]),
                skill=skill,
                low=low,
                high=high,
                num_windows=int((weights > 0).sum()),
                num_blocks=num_blocks,
            )
        )
    return rows, ratios


def _means(
    scores: Mapping[str, WindowScores], case: _Case, *, windows: WindowSet, draw: Draws
) -> tuple[np.ndarray, np.ndarray]:
    """Mean score of each forecast in each resample (name, 1 + resamples), and each window's weight of known truth."""
    at = [windows.shape.leads.index(lead) for lead in case.group.leads]
    num = draw.counts.shape[1]
    means = []
    weight = np.zeros(len(draw.windows))
    for own in scores.values():
        total = own.total[case.metric][draw.windows][:, at, case.channel].sum(axis=1)
        weight = own.weight[draw.windows][:, at, case.channel].sum(axis=1)
        sums = draw.counts @ np.bincount(draw.block, total, num)
        known = draw.counts @ np.bincount(draw.block, weight, num)
        means.append(np.where(known > 0, sums / np.where(known > 0, known, 1.0), np.nan))
    return np.asarray(means), weight


def _interval(ratio: np.ndarray, interval: float, *, num_blocks: int) -> tuple[float, float, float]:
    """Skill of the observed ratio (first) and the percentile interval of the resampled ones; NaN where one block says
    nothing.
    """
    skill = 1.0 - ratio
    if np.isnan(skill[1:]).all() or num_blocks < 2:
        return float(skill[0]), float("nan"), float("nan")
    low, high = np.nanquantile(skill[1:], [(1 - interval) / 2, (1 + interval) / 2])
    return float(skill[0]), float(low), float(high)


def _pool(own: list[Score], logs: dict[str, list[np.ndarray]], *, bootstrap: Bootstrap) -> list[Score]:
    """One row per model over all regions and channels: the geometric mean of their ratios, resampled together."""
    rows = []
    for name, parts in logs.items():
        mine = [row for row in own if row.model == name]
        if len(mine) < 2:
            continue
        best = [row.baseline for row in mine]
        regions = {row.region: row for row in mine}
        num_blocks = sum(row.num_blocks for row in regions.values())
        skill, low, high = _interval(np.exp(np.mean(parts, axis=0)), bootstrap.interval, num_blocks=num_blocks)
        rows.append(
            replace(
                mine[0],
                region=ALL,
                channel=ALL,
                unit="1",
                score=float("nan"),
                baseline=max(set(best), key=best.count) if len(set(best)) == 1 else "best of each",
                baseline_score=float("nan"),
                skill=skill,
                low=low,
                high=high,
                num_windows=sum(row.num_windows for row in regions.values()),
                num_blocks=num_blocks,
            )
        )
    return rows
