"""Fits the linear priors of a run: closed form, on the training split alone, once before the first step."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from sci_gpt.data.faults import UnreadableError
from sci_gpt.data.windows import Windows
from sci_gpt.errors import DataError
from sci_tokenizers.left_out import without
from sci_tokenizers.prior import LinearPrior, Past
from sci_tokenizers.statistics import ChannelStatistics
from sci_tokenizers.tokenizer import Tokenizer
from sci_tokenizers.tokens import Tokens

_MAX_DOCUMENTS = 600
_MAX_ROWS = 60_000
_OVERLAP = 3  # documents that see each time, where there are not too many
_FOLDS = 5
_STRENGTHS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """Features (R, P), targets (R, channels, leads) with NaN where missing, in transformed units; fold of each row."""

    features: np.ndarray
    targets: np.ndarray
    fold: np.ndarray


def with_priors(
    windows: Windows, tokenizer: Tokenizer, *, statistics: Mapping[str, ChannelStatistics]
) -> dict[str, ChannelStatistics]:
    """A source's statistics with the linear prior of each channel for every lead up to the longest that is asked.

    Ridge regression on the memories of all channels; cells of a grid are pooled. The strength is chosen per channel and
    lead by 5-fold cross-validation over contiguous documents, whose errors also give the spread.

    Args:
        windows: of the training split.
        tokenizer: of the source's modality; a modality without memories (traces) has no prior.
        statistics: of the source, by channel.

    Returns:
        The same statistics where no prior can be fitted: fewer rows than features.
    """
    if windows.split != "train":
        raise ValueError(f"a prior is fitted to the training split alone, got {windows.split!r}")
    spec = windows.spec
    leads = tuple(range(1, max(spec.leads) + 1))
    if tokenizer.modality == "trace":
        return dict(statistics)
    rows = _rows(windows, tokenizer, statistics=statistics, leads=leads)
    priors = _fit(rows, leads)
    if priors is None:
        return dict(statistics)
    return {name: replace(row, prior=prior) for (name, row), prior in zip(statistics.items(), priors, strict=True)}


def _rows(
    windows: Windows, tokenizer: Tokenizer, *, statistics: Mapping[str, ChannelStatistics], leads: tuple[int, ...]
) -> _Rows:
    """Rows of documents spread evenly over the split; the context's length goes through the range of training."""
    spec = windows.spec
    wanted = _OVERLAP * (windows.num_windows * spec.stride // spec.frames + 1)
    numbers = np.unique(
        np.linspace(0, windows.num_windows - 1, min(wanted, _MAX_DOCUMENTS, windows.num_windows)).astype(int)
    )
    low, high = spec.context_frames
    random = np.random.default_rng(0)
    unfitted = {name: replace(row, prior=None) for name, row in statistics.items()}
    features, targets, fold = [], [], []
    for place, number in enumerate(numbers):
        try:
            sample = windows.stored(int(number))
        except UnreadableError as error:  # one window of thousands: the fit goes on without it, and says so
            print(f"warning: the prior of {spec.source} is fitted without {error}", file=sys.stderr, flush=True)
            continue
        tokens = tokenizer.encode(
            windows.shuffled(sample, int(number)),
            num_context=low + place % (high - low + 1),
            leads=(1,),
            statistics=without(unfitted, sample),
        )
        x, y = _document(tokens, leads)
        most = -(-_MAX_ROWS // len(numbers))
        kept = np.arange(len(x)) if len(x) <= most else np.sort(random.choice(len(x), most, replace=False))
        features.append(x[kept])
        targets.append(y[kept])
        fold.append(np.full(len(kept), place * _FOLDS // len(numbers)))
    if not features:
        raise DataError(f"source {spec.source!r}: none of the {len(numbers)} windows that its prior needs can be read")
    return _Rows(features=np.concatenate(features), targets=np.concatenate(targets), fold=np.concatenate(fold))


def _document(tokens: Tokens, leads: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Features (R, P) and targets (R, channels, leads) from the context's end on, of frames that every lead follows."""
    past = Past(
        payload=tokens.payload,
        valid=tokens.valid,
        last=tokens.last,
        memory=tokens.memory,
        scale=tokens.scale.astype(np.float64),
        slots_are_channels=tokens.modality == "series",
    )
    start, stop = tokens.num_context - 1, tokens.num_frames - max(leads)
    x, truth = past.features()[start:stop], past.truth()
    y = np.stack([truth[start + lead : stop + lead] for lead in leads], axis=-1)  # frame cell channel lead
    return x.reshape(-1, x.shape[-1]), y.reshape(-1, *y.shape[2:])


def _fit(rows: _Rows, leads: tuple[int, ...]) -> list[LinearPrior] | None:
    """One prior per channel; None where a channel has fewer rows than features."""
    size = rows.features.shape[1]
    deviation = np.sqrt((rows.features**2).mean(axis=0)) if len(rows.features) else np.ones(size)
    unit = np.where(deviation > 0, deviation, 1.0)
    x = rows.features / unit
    limits = tuple(np.abs(rows.features).max(axis=0).tolist())
    grams: dict[bytes, np.ndarray] = {}
    out = []
    for channel in range(rows.targets.shape[1]):
        weights, spread = [], []
        for lead in range(len(leads)):
            y = rows.targets[:, channel, lead]
            known = np.isfinite(y)
            if known.sum() < 2 * size:
                return None
            key = np.packbits(known).tobytes()
            parts = [known & (rows.fold == fold) for fold in range(_FOLDS)]
            if key not in grams:
                grams[key] = np.stack([x[part].T @ x[part] for part in parts])
            right = np.stack([x[part].T @ y[part] for part in parts])
            solved, error = _ridge(
                grams[key], right, counts=np.array([part.sum() for part in parts]), power=float((y[known] ** 2).sum())
            )
            weights.append(tuple((solved / unit).tolist()))
            spread.append(float(np.sqrt(error / known.sum())))
        out.append(LinearPrior(leads=leads, weights=tuple(weights), spread=tuple(spread), limits=limits))
    return out


def _ridge(gram: np.ndarray, right: np.ndarray, *, counts: np.ndarray, power: float) -> tuple[np.ndarray, float]:
    """Coefficients at the strength of least cross-validated squared error, and that error.

    Args:
        gram: (fold, P, P). right: (fold, P). counts: rows of each fold.
        power: sum of squared targets.
    """
    whole_gram, whole_right = gram.sum(axis=0), right.sum(axis=0)
    penalty = np.append(np.ones(len(whole_right) - 1), 0.0)  # not of the constant
    best, least = None, np.inf
    for strength in _STRENGTHS:
        error = power
        for fold in range(len(gram)):
            damping = np.diag(penalty * strength * max(counts.sum() - counts[fold], 1) + 1e-9)
            solved = np.linalg.solve(whole_gram - gram[fold] + damping, whole_right - right[fold])
            error += float(solved @ gram[fold] @ solved - 2 * solved @ right[fold])
        if error < least:
            best, least = strength, error
    assert best is not None
    damping = np.diag(penalty * best * counts.sum() + 1e-9)
    return np.linalg.solve(whole_gram + damping, whole_right), max(least, 0.0)
