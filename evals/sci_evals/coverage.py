"""Coverage: what share of the truth the 50 % and 90 % bands of a forecast hold, with block-bootstrap intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from sci_evals.scores import ALL, Bootstrap, Draws, LeadGroup, WindowScores, draw_blocks, scored_channels
from sci_evals.windowset import WindowSet


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """One row: a forecast's central band of nominal probability `nominal`, and the share of the truth inside it.

    [low, high] is the block-bootstrap interval of `coverage`, NaN where one block says nothing.
    """

    model: str
    source: str
    region: str
    channel: str
    lead: str
    nominal: float
    coverage: float
    low: float
    high: float
    num_windows: int
    num_blocks: int


def coverage_rows(
    windows: WindowSet,
    forecasts: Mapping[str, WindowScores],
    *,
    lead_groups: Sequence[LeadGroup],
    bootstrap: Bootstrap,
) -> list[Coverage]:
    """Coverage of each forecast by band, leads, region and channel, then the mean over all regions and channels.

    Args:
        windows: that were scored.
        forecasts: {name: scores of the same windows}, of models and baselines.
        lead_groups: leads that count together.
        bootstrap: blocks of dependent windows, resampled whole within each region.
    """
    draws = {str(region): draw_blocks(bootstrap, str(region)) for region in np.unique(bootstrap.regions)}
    rows: list[Coverage] = []
    for name, scores in forecasts.items():
        for nominal in scores.covered:
            for group in lead_groups:
                own: list[Coverage] = []
                resampled: list[np.ndarray] = []
                for region, draw in draws.items():
                    for channel in scored_channels(windows):
                        shares, known = _shares(windows, scores, draw=draw, nominal=nominal, at=(channel, group))
                        if not known.any():
                            continue
                        resampled.append(shares)
                        row = Coverage(
                            model=name,
                            source=windows.source,
                            region=region,
                            channel=windows.channels[channel],
                            lead=group.name,
                            nominal=nominal,
                            coverage=float(shares[0]),
                            low=float("nan"),
                            high=float("nan"),
                            num_windows=int(known.sum()),
                            num_blocks=len(np.unique(draw.block[known])),
                        )
                        own.append(_with_interval(row, shares, interval=bootstrap.interval))
                rows += own + _pooled(own, resampled, interval=bootstrap.interval)
    return rows


def coverage_headline(rows: Sequence[Coverage]) -> list[Coverage]:
    """Rows that stand for a source: those of all channels and regions together, or of the only one."""
    pooled = {(row.model, row.source, row.lead, row.nominal) for row in rows if row.channel == ALL}
    return [row for row in rows if row.channel == ALL or (row.model, row.source, row.lead, row.nominal) not in pooled]


def _shares(
    windows: WindowSet, scores: WindowScores, *, draw: Draws, nominal: float, at: tuple[int, LeadGroup]
) -> tuple[np.ndarray, np.ndarray]:
    """Share inside the band in each resample (1 + resamples,), and which of the region's windows know a truth."""
    channel, group = at
    leads = [windows.shape.leads.index(lead) for lead in group.leads]
    num = draw.counts.shape[1]
    inside = scores.covered[nominal][draw.windows][:, leads, channel].sum(axis=1)
    weight = scores.weight[draw.windows][:, leads, channel].sum(axis=1)
    held = draw.counts @ np.bincount(draw.block, inside, num)
    total = draw.counts @ np.bincount(draw.block, weight, num)
    return np.where(total > 0, held / np.where(total > 0, total, 1.0), np.nan), weight > 0


def _with_interval(row: Coverage, shares: np.ndarray, *, interval: float) -> Coverage:
    if row.num_blocks < 2 or np.isnan(shares[1:]).all():
        return row
    low, high = np.nanquantile(shares[1:], [(1 - interval) / 2, (1 + interval) / 2])
    return replace(row, low=float(low), high=float(high))


def _pooled(own: list[Coverage], resampled: list[np.ndarray], *, interval: float) -> list[Coverage]:
    """One row over all regions and channels, each counting the same; none where there is only one."""
    if len(own) < 2:
        return []
    regions = {row.region: row for row in own}
    shares = np.mean(resampled, axis=0)
    row = replace(
        own[0],
        region=ALL,
        channel=ALL,
        coverage=float(shares[0]),
        low=float("nan"),
        high=float("nan"),
        num_windows=sum(row.num_windows for row in regions.values()),
        num_blocks=sum(row.num_blocks for row in regions.values()),
    )
    return [_with_interval(row, shares, interval=interval)]
