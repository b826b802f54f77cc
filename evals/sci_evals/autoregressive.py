"""Baselines for traces, fitted to each window's own context and dressed with the spread of their errors inside it."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np

from sci_evals.baseline import Baseline, Forecast
from sci_evals.climatology import Climatology
from sci_evals.windowset import WindowSet
from sci_tokenizers.autoregression import burg, error_spread, newest, one_step_errors, step_coefficients

_CHUNK = 128


class InContextBaseline(Baseline):
    """Learns nothing from training windows: every number comes from the context of the window itself, per component."""

    modalities = ("trace",)

    def fit(self, train: WindowSet, climatology: Climatology) -> None:
        """Nothing: a P onset destroys any spread that was fixed in training."""

    def predict(self, test: WindowSet) -> Forecast:
        """Mean and spread at every sample of every lead."""
        context = np.moveaxis(test.context, 1, -1)  # (N, V, Y, X, C)
        flat = context.reshape(-1, context.shape[-1])
        steps = (test.shape.future_index - (test.shape.context_times - 1)).ravel()  # samples ahead, 1-based
        mean, spread = np.empty((len(flat), len(steps))), np.empty((len(flat), len(steps)))
        for first in range(0, len(flat), _CHUNK):
            part = slice(first, first + _CHUNK)
            mean[part], spread[part] = self.forecast(flat[part], steps)
        shape = (*context.shape[:-1], *test.shape.future_index.shape)  # (N, V, Y, X, lead, frame_times)
        mean, spread = (np.moveaxis(part.reshape(shape), (4, 5), (1, 2)) for part in (mean, spread))
        return Forecast(mean=np.asarray(mean), spread=np.asarray(spread))

    @abstractmethod
    def forecast(self, context: np.ndarray, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and spread (B, len(steps)) from contexts (B, C) with NaN where missing; `steps` are samples ahead."""


class Zero(InContextBaseline):
    """Zero, with the context's root mean square as spread."""

    def forecast(self, context: np.ndarray, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The same at every step."""
        spread = _root_mean_square(context)[:, None]
        return np.zeros((len(context), len(steps))), np.repeat(spread, len(steps), axis=1)


class ContextMedian(InContextBaseline):
    """The context's median, with the root mean square of the context about it."""

    def forecast(self, context: np.ndarray, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The same at every step; 0 where nothing is known."""
        known = ~np.isnan(context)
        ordered = np.sort(context, axis=1)  # NaN last
        count = known.sum(axis=1)
        middle = ordered[
            np.arange(len(context))[:, None], np.stack([np.maximum(count - 1, 0) // 2, count // 2], axis=1)
        ]
        median = np.nan_to_num(middle).mean(axis=1)
        spread = _root_mean_square(context - median[:, None])
        return np.repeat(median[:, None], len(steps), axis=1), np.repeat(spread[:, None], len(steps), axis=1)


class TracePersistence(InContextBaseline):
    """The last valid sample, with the root mean square of the context's differences over as many samples."""

    def forecast(self, context: np.ndarray, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """One difference length per step."""
        known = ~np.isnan(context)
        newest = context.shape[1] - 1 - np.argmax(known[:, ::-1], axis=1)
        last = np.nan_to_num(context[np.arange(len(context)), newest])
        spread = np.stack([_root_mean_square(_difference(context, int(step))) for step in steps], axis=1)
        return np.repeat(last[:, None], len(steps), axis=1), spread


class AutoRegression(InContextBaseline):
    """AR(32) fitted to the context by Burg's method and run forward, with its own multi-step errors inside the context.

    Burg's coefficients are stable by construction and, on the quickstart's records, score 3 to 5 % better in CRPS
    than least squares and 17 to 20 % better than Yule and Walker's. The mean is the context's; missing samples count
    as the mean and as no error.
    """

    order = 32

    def forecast(self, context: np.ndarray, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Every step straight from the newest samples, by the coefficients' powers."""
        known = ~np.isnan(context)
        order = max(1, min(self.order, context.shape[1] // 4))
        level = np.where(known, context, 0.0).sum(axis=1) / np.maximum(known.sum(axis=1), 1)
        anomaly = np.where(known, context - level[:, None], 0.0)
        coefficients = burg(anomaly, (order,))[order]
        weights = step_coefficients(coefficients, int(steps.max()))
        state = newest(anomaly, np.array([context.shape[1] - 1]), order=order)[:, 0]
        ahead = np.einsum("bk,bsk->bs", state, weights)
        single = one_step_errors(anomaly, coefficients=coefficients)
        spread = error_spread(single[None], known, weights=weights[None], orders=np.array([order]))[0]
        return level[:, None] + ahead[:, steps - 1], spread[:, steps - 1]


def _root_mean_square(values: np.ndarray) -> np.ndarray:
    """Over the last axis, NaN left out; 0 where nothing is known."""
    known = ~np.isnan(values)
    return np.sqrt((np.where(known, values, 0.0) ** 2).sum(axis=1) / np.maximum(known.sum(axis=1), 1))


def _difference(context: np.ndarray, step: int) -> np.ndarray:
    """Differences over `step` samples; over as many as the context holds where it is shorter."""
    step = min(step, context.shape[1] - 1)
    return context[:, step:] - context[:, :-step]
