"""Statistics of one channel on the training split: moments, climatology, and the linear prior fitted to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from sci_tokenizers.prior import PRIOR_FEATURES, LinearPrior

_PLACE_DIGITS = 4  # of a degree: about 10 m


def harmonics(year_phase: np.ndarray, day_phase: np.ndarray, *, num_year: int, num_day: int) -> np.ndarray:
    """Design matrix of a climatology: 1, cos and sin of the first harmonics of the year, then of the day.

    Args:
        year_phase, day_phase: (time,) in [0, 1).
        num_year, num_day: harmonics kept of each cycle.

    Returns:
        float64 (time, 1 + 2 num_year + 2 num_day).
    """
    columns = [np.ones(len(year_phase))]
    for phase, count in ((year_phase, num_year), (day_phase, num_day)):
        angle = 2 * np.pi * np.asarray(phase, np.float64)
        for k in range(1, count + 1):
            columns += [np.cos(k * angle), np.sin(k * angle)]
    return np.stack(columns, axis=1)


@dataclass(frozen=True, kw_only=True, eq=False)
class CellClimatology:
    """The climatology of each cell of a grid, for cells that the training split saw often enough.

    Attributes:
        place: int64 (cell,), ascending, of `place_number`.
        coefficients: float (cell, 1 + 2 num_year + 2 num_day) of `harmonics`.
        products: (pattern, coefficient, coefficient), the sum of products of `harmonics` over the values that a cell's
            coefficients were fitted to, once for all cells seen at the same times; None in stores of earlier versions.
        pattern: int64 (cell,), rows of `products`.
    """

    place: np.ndarray
    coefficients: np.ndarray
    products: np.ndarray | None = None
    pattern: np.ndarray | None = None

    def at(self, latitude: np.ndarray, longitude: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Coefficients (Y, X, coefficient) of the cells at these places (Y, X), and which are known (Y, X)."""
        wanted = place_number(latitude, longitude)
        row = np.minimum(np.searchsorted(self.place, wanted), len(self.place) - 1)
        return self.coefficients[row].astype(np.float64), self.place[row] == wanted


def place_number(latitude: np.ndarray, longitude: np.ndarray) -> np.ndarray:
    """One whole number per place, the same for a longitude of -10 and of 350 degrees."""
    unit = 10**_PLACE_DIGITS
    north = np.round(np.asarray(latitude, np.float64) * unit).astype(np.int64) + 90 * unit
    east = np.round(np.mod(np.asarray(longitude, np.float64), 360.0) * unit).astype(np.int64) % (360 * unit)
    return north * (360 * unit) + east


@dataclass(frozen=True, kw_only=True)
class ChannelStatistics:
    """What the training split says of one channel (variable and level) of one source, in the variable's transformed
    unit.

    Attributes:
        count: valid values seen.
        mean, std: over all valid values.
        step_std: standard deviation of one-step differences (both ends valid).
        num_year, num_day: harmonics of the climatology.
        climatology: coefficients of `harmonics`, least squares over the training split.
        minimum, maximum: extremes seen.
        cells: the climatology of each cell of a grid with a cycle; None elsewhere.
        products: (coefficient, coefficient) of `climatology`, as in `CellClimatology`.
        prior: the linear forecast fitted for a run's leads; None until a run has fitted it.
    """

    count: int
    mean: float
    std: float
    step_std: float
    num_year: int
    num_day: int
    climatology: tuple[float, ...]
    minimum: float
    maximum: float
    cells: CellClimatology | None = None
    products: tuple[tuple[float, ...], ...] | None = None
    prior: LinearPrior | None = None

    def climatology_at(self, year_phase: np.ndarray, day_phase: np.ndarray) -> np.ndarray:
        """The climatology at these phases, float64 (time,), in the variable's transformed unit."""
        return harmonics(year_phase, day_phase, num_year=self.num_year, num_day=self.num_day) @ np.asarray(
            self.climatology
        )

    def cycle_at(
        self, year_phase: np.ndarray, day_phase: np.ndarray, *, latitude: np.ndarray, longitude: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Each cell's own climatology, float64 (time, Y, X), 0 where it is not known; and where it is, bool (Y, X)."""
        if self.cells is None:
            return np.zeros((len(year_phase), *latitude.shape)), np.zeros(latitude.shape, bool)
        coefficients, known = self.cells.at(latitude, longitude)
        design = harmonics(year_phase, day_phase, num_year=self.num_year, num_day=self.num_day)
        return np.einsum("th,yxh->tyx", design, coefficients) * known, known

    def to_json(self) -> dict[str, Any]:
        """Plain numbers for `statistics.json`."""
        row = {field.name: getattr(self, field.name) for field in fields(self)}
        row["cells"] = None
        if self.cells is not None:
            # float32 in its shortest digits
            cells = [[float(str(number)) for number in cell] for cell in self.cells.coefficients]
            row["cells"] = {"place": self.cells.place.tolist(), "coefficients": cells}
            if self.cells.products is not None and self.cells.pattern is not None:
                row["cells"] |= {"products": self.cells.products.tolist(), "pattern": self.cells.pattern.tolist()}
        row["prior"] = self.prior.to_json() if self.prior is not None else None
        return row

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ChannelStatistics:
        """The inverse of `to_json`."""
        cells, prior = data["cells"], data["prior"]
        products = data.get("products")
        known = {
            "climatology": tuple(data["climatology"]),
            "products": None if products is None else tuple(map(tuple, products)),
            "prior": LinearPrior.from_json(prior) if prior is not None else None,
            "cells": None
            if cells is None
            else CellClimatology(
                place=np.asarray(cells["place"], np.int64),
                coefficients=np.asarray(cells["coefficients"], np.float32),
                products=np.asarray(cells["products"]) if "products" in cells else None,
                pattern=np.asarray(cells["pattern"], np.int64) if "pattern" in cells else None,
            ),
        }
        return cls(**{**data, **known})


SourceStatistics = dict[str, ChannelStatistics]


def statistics_to_json(statistics: Mapping[str, SourceStatistics]) -> dict[str, Any]:
    """{source: {channel: statistics}} as plain numbers."""
    return {source: {channel: row.to_json() for channel, row in rows.items()} for source, rows in statistics.items()}


def statistics_from_json(data: Mapping[str, Mapping[str, Any]]) -> dict[str, SourceStatistics]:
    """The inverse of `statistics_to_json`."""
    return {
        source: {channel: ChannelStatistics.from_json(row) for channel, row in rows.items()}
        for source, rows in data.items()
    }


def known_priors(
    statistics: Mapping[str, ChannelStatistics] | None, channels: tuple[str, ...], *, leads: tuple[int, ...]
) -> list[LinearPrior] | None:
    """The priors of a sample's channels; None unless every channel has one that knows every lead."""
    rows = [statistics.get(channel) if statistics else None for channel in channels]
    priors = [row.prior for row in rows if row is not None and row.prior is not None]
    size = len(channels) * PRIOR_FEATURES + 1
    fits = all(set(leads) <= set(prior.leads) and len(prior.weights[0]) == size for prior in priors)
    return priors if len(priors) == len(channels) and fits else None
