"""Statistics without a window: what the rest of the training split says, for documents that training learns from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from sci_tokenizers.sample import Sample
from sci_tokenizers.statistics import CellClimatology, ChannelStatistics, harmonics, place_number
from sci_tokenizers.variables import forward_transform

# Of the normal equations of what remains: a cycle that is seen in part has a far worse condition.
_WORST_CONDITION, _PER_COEFFICIENT = 1e3, 3


def without(statistics: Mapping[str, ChannelStatistics], sample: Sample) -> dict[str, ChannelStatistics]:
    """The climatologies of a source as they would be without this sample's values.

    A climatology of a few years has seen the window that is to be forecast, so the window comes back to it sooner than
    any later one does, and a head that learns from such windows trusts it too much. With the window's rows X and
    residuals r, least squares of the rest are c - (G - X'X)^-1 X'r. The mean of r is taken out of the constant alone,
    and the rest of r by this formula: in a record with a trend a gap would otherwise pass for a season. Where the rest
    does not determine the coefficients (a window as long as most of the split) they stay as they are.

    Args:
        statistics: of the source, by channel.
        sample: a window of the training split, its values as they are stored.

    Returns:
        Statistics to encode this sample with; those of cells hold the sample's cells alone.
    """
    found = dict(statistics)
    for v, channel in enumerate(sample.channels):
        row = found.get(channel)
        if row is None or row.num_year + row.num_day == 0:
            continue
        design = harmonics(sample.year_phase, sample.day_phase, num_year=row.num_year, num_day=row.num_day)
        values = forward_transform(sample.values[:, v].astype(np.float64), sample.variables[v])
        valid = sample.valid[:, v]
        if row.cells is not None and row.cells.products is not None:
            found[channel] = replace(
                row, cells=_cells_without(row.cells, sample, values=values, valid=valid, design=design)
            )
        elif row.cells is None and row.products is not None:
            whole = np.asarray(row.climatology)[None]
            flat, seen = values.reshape(len(values), -1), valid.reshape(len(valid), -1)
            (rest,) = _refit(
                whole,
                np.asarray(row.products)[None],
                pattern=np.zeros(1, np.int64),
                design=np.repeat(design, flat.shape[1], axis=0),
                values=flat.reshape(-1, 1),
                valid=seen.reshape(-1, 1),
            )
            found[channel] = replace(row, climatology=tuple(rest.tolist()))
    return found


def _cells_without(
    cells: CellClimatology, sample: Sample, *, values: np.ndarray, valid: np.ndarray, design: np.ndarray
) -> CellClimatology:
    """Of the sample's cells, values and valid (time, Y, X)."""
    assert cells.products is not None and cells.pattern is not None
    wanted = place_number(sample.latitude, sample.longitude).ravel()
    places, first = np.unique(wanted, return_index=True)
    row = np.minimum(np.searchsorted(cells.place, places), len(cells.place) - 1)
    known = cells.place[row] == places
    row, first = row[known], first[known]
    if not len(row):
        return cells
    rest = _refit(
        cells.coefficients[row].astype(np.float64),
        cells.products,
        pattern=cells.pattern[row],
        design=design,
        values=values.reshape(len(values), -1)[:, first],
        valid=valid.reshape(len(valid), -1)[:, first],
    )
    return CellClimatology(place=cells.place[row], coefficients=rest)


def _refit(
    coefficients: np.ndarray,
    products: np.ndarray,
    *,
    pattern: np.ndarray,
    design: np.ndarray,
    values: np.ndarray,
    valid: np.ndarray,
) -> np.ndarray:
    """Coefficients (cell, P) without the rows of `design` (time, P) at which values (time, cell) are valid.

    Args:
        products: (pattern, P, P), of the design over all that coefficients were fitted to.
        pattern: (cell,), rows of `products`.
    """
    count = valid.sum(axis=0)
    residual = np.where(valid, values - design @ coefficients.T, 0.0)
    level = residual.sum(axis=0) / np.maximum(count, 1)
    shape = np.where(valid, residual - level, 0.0)
    first, group = _alike(pattern, valid)  # most cells are seen at the same times: few equations
    seen = valid[:, first].astype(np.float64)
    left = products[pattern[first]] - np.einsum("tc,ti,tj->cij", seen, design, design, optimize=True)
    spectrum = np.linalg.eigvalsh(left)
    rest = products[pattern[first], 0, 0] - seen.sum(axis=0)
    sound = (spectrum[:, 0] * _WORST_CONDITION > spectrum[:, -1]) & (rest >= _PER_COEFFICIENT * design.shape[1])
    inverse = np.linalg.inv(np.where(sound[:, None, None], left, np.eye(design.shape[1])))
    less = np.einsum("cij,cj->ci", inverse[group], shape.T @ design)
    less[:, 0] += count * level / np.maximum(products[pattern, 0, 0] - count, 1.0)
    return np.asarray(coefficients - np.where(sound[group][:, None], less, 0.0))


def _alike(pattern: np.ndarray, valid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first cell of each group that was seen at the same times, in the split and in the window; group of each."""
    if (valid == valid[:, :1]).all() and (pattern == pattern[0]).all():
        return np.zeros(1, np.int64), np.zeros(len(pattern), np.int64)
    key = np.concatenate([pattern[:, None].view(np.uint8), np.packbits(valid, axis=0).T], axis=1)
    whole = np.ascontiguousarray(key).view(np.dtype((np.void, key.shape[1])))[:, 0]
    _, first, group = np.unique(whole, return_index=True, return_inverse=True)
    return first, group.reshape(-1)
