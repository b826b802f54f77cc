"""Grids on the sphere: areas of their cells, and whether their columns go once around it."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

_EVEN = 0.01  # of a step: what float32 longitudes and rounded axes may be off


def goes_around(latitude: ArrayLike, longitude: ArrayLike) -> bool:
    """Whether the last column's neighbour is the first: a lat-lon grid with even columns once around the globe.

    Args:
        latitude, longitude: (row, column), degrees. Projected and curvilinear grids (rows of unequal longitudes) do not
            go around, nor do grids with the first column repeated at the end.
    """
    north, east = np.asarray(latitude, np.float64), np.asarray(longitude, np.float64)
    columns = east.shape[1]
    if columns < 2 or not (np.isfinite(north).all() and np.isfinite(east).all()):
        return False
    if (north != north[:, :1]).any() or (east != east[:1]).any():
        return False
    step = 360.0 / columns
    rising = np.diff(east[0], append=east[0, 0]) % 360.0
    falling = -np.diff(east[0], append=east[0, 0]) % 360.0
    return bool(min(np.abs(rising - step).max(), np.abs(falling - step).max()) < _EVEN * step)
