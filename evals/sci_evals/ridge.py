"""Ridge regression of the future on the model's own context, plain and with coefficients that follow the season."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from sci_evals.baseline import DressedBaseline
from sci_evals.climatology import DAY_SECONDS, context_anomalies, season_seconds
from sci_evals.windowset import WindowSet

_MAX_LAGS_FEATURES = 256
_MAX_ROWS = 60_000
_CHUNK = 4096
_FOLDS = 5
_STRENGTHS = np.array([1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0])


@dataclass(frozen=True, kw_only=True)
class _Sums:
    """Normal equations by fold and group of channels: gram (F, G, K, K), right (F, G, K, T), power (F, G, T), count
    (F, G).
    """

    gram: np.ndarray
    right: np.ndarray
    power: np.ndarray
    count: np.ndarray

    def add(self, fold: int, group: int, *, x: np.ndarray, y: np.ndarray) -> None:
        """Rows of features (R, K) and targets (R, T) without NaN."""
        self.gram[fold, group] += x.T @ x
        self.right[fold, group] += x.T @ y
        self.power[fold, group] += (y**2).sum(axis=0)
        self.count[fold, group] += len(y)


class Ridge(DressedBaseline):
    """Linear regression of the anomaly at each lead on the anomalies of all channels in the context.

    Anomalies are from the training climatology, missing ones carried forward. All lags are features up to 256 of
    them; beyond, the most recent lags stay single and the older ones become means over stretches of doubling length.
    Cells of a grid are pooled: each is a row with the cell's own past. Features are scaled by their training
    deviation; float64 normal equations. The strength is chosen per channel and lead by 5-fold cross-validation over
    whole groups (contiguous times where there are fewer than 5 groups), and the dressing's errors are those of the
    held-back folds.
    """

    interacts = False
    few_parameters = False

    def fit_point(self, train: WindowSet) -> None:
        """Normal equations per fold, strength by cross-validation, coefficients on all folds."""
        self.blocks = lag_blocks(train.shape.context_times, len(train.channels))
        rows = _row_numbers(train)
        self.fold = _folds(train)
        self.scale = self._feature_scale(train, rows)
        # One set of normal equations for all channels where most rows have every target; else one per channel.
        complete = train.valid[:, train.shape.future_index].all(axis=(1, 2, 3))
        groups = 1 if complete.mean() > 0.5 else len(train.channels)
        features, targets = len(self.scale), train.shape.future_index.size * len(train.channels) // groups
        sums = _Sums(
            gram=np.zeros((_FOLDS, groups, features, features)),
            right=np.zeros((_FOLDS, groups, features, targets)),
            power=np.zeros((_FOLDS, groups, targets)),
            count=np.zeros((_FOLDS, groups)),
        )
        for chunk, feature, future in self._chunks(train, rows):
            wanted = future.reshape(len(future), groups, targets)
            fold = self.fold[chunk // self._cells(train)]
            for number in np.unique(fold):
                for group in range(groups):
                    known = (fold == number) & ~np.isnan(wanted[:, group]).any(axis=1)
                    sums.add(number, group, x=feature[known], y=wanted[known, group])
        self._choose(sums)

    def _choose(self, sums: _Sums) -> None:
        """Coefficients (fold or none, group, feature, target) at the strength of least cross-validated error."""
        folds, groups, features, targets = sums.right.shape
        trials = np.zeros((len(_STRENGTHS), folds, groups, features, targets))
        error = np.tile(sums.power.sum(axis=0), (len(_STRENGTHS), 1, 1))
        whole = {name: part.sum(axis=0) for name, part in vars(sums).items()}
        for fold in range(folds):
            for group in range(groups):
                own_gram, own_right = sums.gram[fold, group], sums.right[fold, group]
                rows = max(whole["count"][group] - sums.count[fold, group], 1.0)
                rest, wanted = whole["gram"][group] - own_gram, whole["right"][group] - own_right
                for i, strength in enumerate(_STRENGTHS):
                    solved = _solve(rest, wanted, damping=strength * rows)
                    trials[i, fold, group] = solved
                    error[i, group] += (solved * (own_gram @ solved - 2 * own_right)).sum(axis=0)
        best = error.argmin(axis=0)  # (group, target)
        self.strength = _STRENGTHS[best]
        self.fold_coefficients = np.take_along_axis(trials, best[None, None, :, None], axis=0)[0]
        self.coefficients = np.empty((groups, features, targets))
        for group in range(groups):
            rows = max(whole["count"][group], 1.0)
            for strength in np.unique(self.strength[group]):
                chosen = self.strength[group] == strength
                wanted = whole["right"][group][:, chosen]
                self.coefficients[group][:, chosen] = _solve(whole["gram"][group], wanted, damping=strength * rows)

    def point(self, windows: WindowSet) -> np.ndarray:
        """Climatology + coefficients x features."""
        return self._apply(windows, fold=None)

    def training_point(self, train: WindowSet) -> np.ndarray:
        """Each training window forecast by the coefficients fitted without its fold."""
        return self.filled(train, self._apply(train, fold=self.fold))

    def _apply(self, windows: WindowSet, fold: np.ndarray | None) -> np.ndarray:
        cells = self._cells(windows)
        leads, times = windows.shape.future_index.shape
        channels, rows, columns = windows.values.shape[2:]
        groups, _, targets = self.coefficients.shape
        out = np.empty((windows.num_windows * cells, groups, targets))
        for chunk, features, _ in self._chunks(windows, np.arange(len(out))):
            if fold is None:
                out[chunk] = np.einsum("rk,gkt->rgt", features, self.coefficients, optimize=True)
                continue
            for number in np.unique(fold[chunk // cells]):
                own = fold[chunk // cells] == number
                out[chunk[own]] = np.einsum("rk,gkt->rgt", features[own], self.fold_coefficients[number], optimize=True)
        shaped = out.reshape(-1, rows, columns, channels, leads, times).transpose(0, 4, 5, 3, 1, 2)
        return np.asarray(self.climatology.of_future(windows) + shaped)

    def _feature_scale(self, train: WindowSet, rows: np.ndarray) -> np.ndarray:
        self.scale = np.ones(1)
        thinned = rows[:: max(1, len(rows) // 4000)]
        sample = np.concatenate([features for _, features, _ in self._chunks(train, thinned)])
        deviation = np.sqrt((sample**2).mean(axis=0))
        return np.where(deviation > 0, deviation, 1.0)

    def _chunks(self, windows: WindowSet, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Per piece of `rows` (window x cell, ascending): row numbers, features (R, K), future anomalies (R, V,
        target).
        """
        cells = self._cells(windows)
        per_piece = max(1, _CHUNK // cells)
        anomalies = context_anomalies(self.climatology, windows)
        future = windows.future - self.climatology.of_future(windows)
        season = _season(windows)
        for first in range(0, windows.num_windows, per_piece):
            low, high = np.searchsorted(rows, (first * cells, (first + per_piece) * cells))
            if low == high:
                continue
            window, cell = np.divmod(rows[low:high], cells)
            past = anomalies.reshape(*anomalies.shape[:3], cells)[window, :, :, cell]  # (R, C, V)
            ahead = future.reshape(len(future), -1, future.shape[3], cells)[window, :, :, cell]  # (R, target, V)
            features = self._features(past.astype(np.float64), season[window])
            yield rows[low:high], features, np.moveaxis(ahead, 1, 2)

    def _features(self, past: np.ndarray, season: np.ndarray) -> np.ndarray:
        """Features of rows, scaled: lags, and 1, sin, cos of the season (times the lags where coefficients change)."""
        past = _carried_forward(past)
        lags = np.concatenate([past[:, low:high].mean(axis=1) for low, high in self.blocks], axis=1)  # (R, blocks V)
        if self.interacts:
            lags = (season[:, :, None] * lags[:, None]).reshape(len(lags), -1)
        return np.concatenate([lags, season], axis=1) / self.scale

    @staticmethod
    def _cells(windows: WindowSet) -> int:
        return int(np.prod(windows.values.shape[3:]))


class SeasonalRidge(Ridge):
    """The same, each coefficient a + b sin + c cos of the season (day of sub-daily, year of daily to monthly data)."""

    interacts = True

    @classmethod
    def applies(cls, windows: WindowSet) -> bool:
        """Where there is a season."""
        return super().applies(windows) and season_seconds(float(np.median(windows.step_seconds))) is not None


def _carried_forward(past: np.ndarray) -> np.ndarray:
    """Missing anomalies take the last valid one before them, 0 where there is none; (R, C, V)."""
    newest = np.where(np.isnan(past), 0, np.arange(past.shape[1])[None, :, None])
    return np.nan_to_num(np.take_along_axis(past, np.maximum.accumulate(newest, axis=1), axis=1))


def _solve(gram: np.ndarray, right: np.ndarray, *, damping: float) -> np.ndarray:
    """(gram + damping I)^-1 right, by Cholesky."""
    damped = gram.copy()
    damped.flat[:: len(gram) + 1] += damping
    return np.asarray(cho_solve(cho_factor(damped, lower=True, overwrite_a=True), right))


def lag_blocks(num_times: int, num_channels: int) -> list[tuple[int, int]]:
    """Stretches of the context that become one feature per channel, as (start, stop), latest last.

    Single lags while 256 features last; older lags in means of doubling length.
    """
    budget = max(8, _MAX_LAGS_FEATURES // num_channels)
    if num_times <= budget:
        return [(i, i + 1) for i in range(num_times)]
    for single in range(budget, 0, -1):
        blocks = [(i, i + 1) for i in range(num_times - single, num_times)]
        stop, length = num_times - single, 2
        while stop > 0:
            start = max(0, stop - length)
            blocks.insert(0, (start, stop))
            stop, length = start, length * 2
        if len(blocks) <= budget:
            break
    return blocks


def _season(windows: WindowSet) -> np.ndarray:
    """1, sin and cos of the season's phase at the end of the context, float64 (N, 3); only 1 without a season."""
    last = windows.shape.context_times - 1
    season = season_seconds(float(np.median(windows.step_seconds)))
    one = np.ones(windows.num_windows)
    if season is None:
        return one[:, None]
    phase = windows.day_phase[:, last] if season == DAY_SECONDS else windows.year_phase[:, last]
    angle = 2 * np.pi * phase.astype(np.float64)
    return np.stack([one, np.sin(angle), np.cos(angle)], axis=1)


def _row_numbers(train: WindowSet) -> np.ndarray:
    """Rows (window x cell) to fit on, ascending, at most 60,000 drawn evenly."""
    total = train.num_windows * int(np.prod(train.values.shape[3:]))
    if total <= _MAX_ROWS:
        return np.arange(total)
    return np.sort(np.random.default_rng(0).choice(total, _MAX_ROWS, replace=False))


def _folds(train: WindowSet) -> np.ndarray:
    """Fold of each training window: whole groups dealt by size, or five contiguous stretches of time."""
    names, group, sizes = np.unique(np.asarray(train.groups), return_inverse=True, return_counts=True)
    if len(names) >= _FOLDS:
        fold_of = np.empty(len(names), int)
        filled = np.zeros(_FOLDS)
        for number in np.argsort(-sizes, kind="stable"):
            fold_of[number] = int(filled.argmin())
            filled[fold_of[number]] += sizes[number]
        return fold_of[group]
    order = np.argsort(np.argsort(train.origin, kind="stable"), kind="stable")
    return np.minimum(order * _FOLDS // max(train.num_windows, 1), _FOLDS - 1)
