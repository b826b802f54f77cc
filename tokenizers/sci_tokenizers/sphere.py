"""Grids on the sphere: areas of their cells, and whether their columns go once around it."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

EARTH_RADIUS_M = 6371229.0
_EVEN = 0.01  # of a step: what float32 longitudes and rounded axes may be off


def is_lat_lon(latitude: np.ndarray, longitude: np.ndarray) -> bool:
    """Whether rows are parallels, rising or falling throughout, and columns meridians; (row, column) degrees."""
    if not (np.isfinite(latitude).all() and np.isfinite(longitude).all()):
        return False
    steps = np.diff(latitude[:, 0])
    straight = (latitude == latitude[:, :1]).all() and (longitude == longitude[:1]).all()
    return bool(straight and ((steps > 0).all() or (steps < 0).all()))


def goes_around(latitude: ArrayLike, longitude: ArrayLike) -> bool:
    """Whether the last column's neighbour is the first: a lat-lon grid with even columns once around the globe.

    Args:
        latitude, longitude: (row, column), degrees. Projected and curvilinear grids (rows of unequal longitudes) do not
            go around, nor do grids with the first column repeated at the end.
    """
    north, east = np.asarray(latitude, np.float64), np.asarray(longitude, np.float64)
    columns = east.shape[1]
    if columns < 2 or not is_lat_lon(north, east):
        return False
    step = 360.0 / columns
    rising = np.diff(east[0], append=east[0, 0]) % 360.0
    falling = -np.diff(east[0], append=east[0, 0]) % 360.0
    return bool(min(np.abs(rising - step).max(), np.abs(falling - step).max()) < _EVEN * step)


def row_bounds(latitude: ArrayLike) -> np.ndarray:
    """Edges of rows, float64 (row + 1,) degrees: half way between centres; the outer ones half a step outside, and at
    the pole where less than half a step is left (as in WeatherBench 2). A row at a pole is half a cell.

    Args:
        latitude: (row,), two at least, degrees north, strictly monotonic, in either order.

    Raises:
        ValueError: fewer than two, not monotonic, or not within -90..90.
    """
    degrees = np.asarray(latitude, np.float64)
    steps = np.diff(degrees)
    if not (degrees.size > 1 and ((steps > 0).all() or (steps < 0).all())):
        raise ValueError(f"latitudes must rise or fall throughout, got {degrees.tolist()[:6]} ..")
    if np.abs(degrees).max() > 90.0:
        raise ValueError(f"latitudes are within -90..90 degrees, got {degrees[np.abs(degrees).argmax()]}")
    bounds = np.empty(degrees.size + 1)
    bounds[1:-1] = (degrees[1:] + degrees[:-1]) / 2
    for end, inner, step in ((0, degrees[0], -steps[0]), (-1, degrees[-1], steps[-1])):
        outer = inner + step / 2
        at_pole = 90.0 - abs(outer) < abs(step) / 2 and abs(outer) > abs(inner)
        bounds[end] = np.copysign(90.0, outer) if at_pole else outer
    return bounds


def cell_areas(latitude: ArrayLike, longitude: ArrayLike) -> np.ndarray:
    """Area of each cell in square metres, float64 (row, column); NaN where a cell's place is unknown.

    Lat-lon grids: (sin(upper edge) - sin(lower edge)) x (eastern - western edge), edges half way between centres, exact
    on the sphere, the poles included. All others: the spherical quadrangle whose corners are the means of the four
    neighbouring centres as unit vectors, continued by a parabola at the grid's edge.

    A grid of one row (column, or all columns on one meridian) has cells as high as wide (as wide as high). One row or
    column across the meridians, or a cell without known neighbours, has no area: NaN.

    Args:
        latitude, longitude: (row, column), degrees north and east, of the cells' centres.
    """
    north, east = np.asarray(latitude, np.float64), np.asarray(longitude, np.float64)
    if is_lat_lon(north, east):
        return _lat_lon_areas(north, east)
    if min(north.shape) < 2:
        return np.full(north.shape, np.nan)
    vectors = _around_edges(_around_edges(_unit_vectors(north, east)).swapaxes(0, 1)).swapaxes(0, 1)
    corners = vectors[:-1, :-1] + vectors[:-1, 1:] + vectors[1:, :-1] + vectors[1:, 1:]
    corners /= np.linalg.norm(corners, axis=-1, keepdims=True)
    first, second, third, fourth = corners[:-1, :-1], corners[:-1, 1:], corners[1:, 1:], corners[1:, :-1]
    areas = _triangle(first, second, third=third) + _triangle(first, third, third=fourth)
    return areas * EARTH_RADIUS_M**2


def cell_weights(latitude: ArrayLike, longitude: ArrayLike) -> np.ndarray:
    """`cell_areas` with mean 1 over the cells whose area is known and above 0, and 1 at all others."""
    areas = cell_areas(latitude, longitude)
    known = areas > 0
    return np.where(known, areas / areas[known].mean(), 1.0) if known.any() else np.ones(areas.shape)


def _lat_lon_areas(north: np.ndarray, east: np.ndarray) -> np.ndarray:
    steps = (np.diff(east[0]) + 180.0) % 360.0 - 180.0
    if goes_around(north, east):
        seam = (np.diff(east[0], append=east[0, 0]) + 180.0) % 360.0 - 180.0
        widths = np.abs(seam + np.roll(seam, 1)) / 2
    elif len(steps):
        widths = np.abs(np.concatenate([steps[:1], (steps[1:] + steps[:-1]) / 2, steps[-1:]]))
    else:
        widths = np.zeros(1)
    if not widths.any():
        widths = np.full(len(widths), np.abs(np.diff(north[:, 0])).mean() if len(north) > 1 else 1.0)
    if len(north) > 1:
        bounds = row_bounds(north[:, 0])
    else:
        bounds = np.clip(north[0, 0] + np.array([-0.5, 0.5]) * widths.mean(), -90.0, 90.0)
    heights = np.abs(np.diff(np.sin(np.radians(bounds))))
    return EARTH_RADIUS_M**2 * heights[:, None] * np.radians(widths)


def _unit_vectors(north: np.ndarray, east: np.ndarray) -> np.ndarray:
    """(row, column, 3)."""
    phi, lam = np.radians(north), np.radians(east)
    return np.stack([np.cos(phi) * np.cos(lam), np.cos(phi) * np.sin(lam), np.sin(phi)], axis=-1)


def _around_edges(vectors: np.ndarray) -> np.ndarray:
    """(n, m, 3) -> (n + 2, m, 3): one more line before the first and after the last, a parabola through the nearest
    three (a straight line through two).
    """
    ends = []
    for inwards in (vectors, vectors[::-1]):
        near = inwards[:3]
        ends.append(3 * near[0] - 3 * near[1] + near[2] if len(near) == 3 else 2 * near[0] - near[1])
    return np.concatenate([ends[0][None], vectors, ends[1][None]])


def _triangle(first: np.ndarray, second: np.ndarray, *, third: np.ndarray) -> np.ndarray:
    """Solid angle of spherical triangles of unit vectors (.., 3) (Van Oosterom & Strackee 1983)."""
    volume = np.abs((first * np.cross(second, third)).sum(-1))
    cosines = (first * second).sum(-1) + (second * third).sum(-1) + (third * first).sum(-1)
    return 2 * np.arctan2(volume, 1 + cosines)
