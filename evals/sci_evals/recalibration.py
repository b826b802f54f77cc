"""Recalibration: factors on the spread, fitted so that the bands cover what they should on the validation split."""

from __future__ import annotations

import numpy as np

from sci_evals.scores import QuantileModel
from sci_evals.tasks import EvalTask
from sci_evals.windowset import WindowSet, read_windows
from sci_gpt.config import EvaluateConfig
from sci_gpt.data.store import Store
from sci_gpt.model.calibration import LOWER, UPPER, SourceCalibration
from sci_tokenizers.variables import forward_transform

FIT_LEVELS = (*sorted(LOWER), 0.5, *UPPER)
# Factors count as much as they would if this many independent blocks had shown that nothing needs to change.
_PRIOR_BLOCKS = 20.0
_RANGE = (0.2, 5.0)
_CHUNK = 64
_WINDOWS = 160


def calibrate(
    store: Store, test: WindowSet, *, model: QuantileModel, task: EvalTask, settings: EvaluateConfig
) -> SourceCalibration | None:
    """The calibration of a source by windows of its validation split, shaped as those of `test`; None where no good
    window of such a split is there.
    """
    windows = read_windows(store, test.source, split="valid", shape=test.shape, count=_WINDOWS)
    if windows is None:
        return None
    return fit_calibration(model, windows, blocks=task.bootstrap(windows, settings).blocks)


def fit_calibration(model: QuantileModel, windows: WindowSet, *, blocks: np.ndarray) -> SourceCalibration:
    """Factors for each channel and lead of a source: its model's bands then hold their nominal share of `windows`.

    For the lower end q at level a of a band, the factor is the quantile at 1 - a of (m - y) / (m - q) over all truths
    y with median m: exactly what moves a share a of them below m - factor x (m - q) (a conformal scaling: Romano,
    Patterson and Candes 2019, with the spread in place of the difference). Values whose forecast has q = m (an atom)
    take no part: no factor moves them. The logarithm is shrunk to 0 by n / (n + 20), n the blocks with a truth.

    Args:
        model: gives quantiles at any levels.
        windows: of the validation split.
        blocks: int (N,), windows of one block are not independent.
    """
    quantiles = _quantiles(model, windows)  # (level, N, lead, frame_times, V, Y, X)
    truth, leads, names = windows.truth, windows.shape.leads, windows.variables
    below, above = (np.ones((len(leads), len(names), len(LOWER))) for _ in range(2))
    for lead, v in np.ndindex(len(leads), len(names)):
        known = ~np.isnan(truth[:, lead, :, v])  # (N, frame_times, Y, X)
        weight = (windows.cell_weights * known)[known]
        block = np.broadcast_to(blocks[:, None, None, None], known.shape)[known]
        y = forward_transform(truth[:, lead, :, v][known], names[v])
        at = {
            level: forward_transform(quantiles[i, :, lead, :, v][known].astype(np.float64), names[v])
            for i, level in enumerate(FIT_LEVELS)
        }
        for band, (low, high) in enumerate(zip(LOWER, UPPER, strict=True)):
            m = at[0.5]
            below[lead, v, band] = _factor(m - y, m - at[low], tail=low, weight=weight, block=block)
            above[lead, v, band] = _factor(y - m, at[high] - m, tail=1 - high, weight=weight, block=block)
    return SourceCalibration(
        channels=windows.channels,
        leads=leads,
        below=below,
        above=above,
        num_windows=windows.num_windows,
        num_blocks=len(np.unique(blocks)),
    )


def _quantiles(model: QuantileModel, windows: WindowSet) -> np.ndarray:
    parts: list[np.ndarray] = []
    shape = windows.shape
    for first in range(0, windows.num_windows, _CHUNK):
        numbers = np.arange(first, min(first + _CHUNK, windows.num_windows))
        parts += model.quantiles(
            list(windows.take(numbers).samples()), num_context=shape.num_context, leads=shape.leads, levels=FIT_LEVELS
        )
    return np.stack(parts, axis=1)


def _factor(error: np.ndarray, distance: np.ndarray, *, tail: float, weight: np.ndarray, block: np.ndarray) -> float:
    """The factor on `distance` that leaves a share `tail` of the errors beyond it, shrunk to 1."""
    usable = distance > 0
    if not usable.any():
        return 1.0
    wanted = _weighted_quantile(error[usable] / distance[usable], 1.0 - tail, weight=weight[usable])
    num_blocks = len(np.unique(block[usable]))
    return float(np.clip(wanted, *_RANGE) ** (num_blocks / (num_blocks + _PRIOR_BLOCKS)))


def _weighted_quantile(values: np.ndarray, level: float, *, weight: np.ndarray) -> float:
    order = np.argsort(values, kind="stable")
    reached = np.cumsum(weight[order])
    return float(values[order][min(int(np.searchsorted(reached, level * reached[-1])), len(values) - 1)])
