"""Areas of cells against the sphere's own: whole globes, polar rows, uneven latitudes, a projection's area factor."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sci_evals.metrics import area_weights
from sci_tokenizers.sphere import EARTH_RADIUS_M, cell_areas, cell_weights, row_bounds

GLOBE = 4 * np.pi * EARTH_RADIUS_M**2


def meshed(rows: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Latitude and longitude (row, column)."""
    latitude, longitude = np.meshgrid(rows, columns, indexing="ij")
    return latitude, longitude


def tilted(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """A lat-lon grid of 20 x 30 degrees about the equator, turned by 40 degrees about the x axis: known areas, and rows
    that are no parallels.
    """
    phi, lam = (np.radians(x) for x in meshed(np.linspace(-10, 10, rows), np.linspace(-15, 15, columns)))
    x, y, z = np.cos(phi) * np.cos(lam), np.cos(phi) * np.sin(lam), np.sin(phi)
    turn = np.radians(40.0)
    y, z = y * np.cos(turn) - z * np.sin(turn), y * np.sin(turn) + z * np.cos(turn)
    return np.degrees(np.arcsin(z)), np.degrees(np.arctan2(y, x))


@pytest.mark.parametrize(
    "rows",
    [
        np.linspace(-90.0, 90.0, 37),  # rows at the poles
        np.linspace(87.5, -87.5, 36),  # edges at the poles, from north to south
        np.degrees(np.arcsin(np.polynomial.legendre.leggauss(64)[0])),  # Gaussian
        90.0 * np.linspace(-1.0, 1.0, 41) ** 3,  # uneven, poles included
    ],
    ids=["polar rows", "descending", "gaussian", "uneven"],
)
@pytest.mark.parametrize("first", [0.0, -180.0, 7.5])
def test_a_globes_cells_are_the_globe(rows: np.ndarray, first: float) -> None:
    """The sum is 4 pi R^2; each row is its zone, 2 pi R^2 (sin upper - sin lower); all cells of a row are equal."""
    latitude, longitude = meshed(rows, (first + np.arange(48) * 7.5 + 180.0) % 360.0 - 180.0)
    areas = cell_areas(latitude, longitude)
    assert areas.sum() == pytest.approx(GLOBE, rel=1e-10)
    middle = (rows[1:] + rows[:-1]) / 2
    lower, upper = np.minimum(middle[1:], middle[:-1]), np.maximum(middle[1:], middle[:-1])
    zones = GLOBE / 2 * (np.sin(np.radians(upper)) - np.sin(np.radians(lower)))
    np.testing.assert_allclose(areas.sum(axis=1)[1:-1], zones, rtol=1e-9)
    np.testing.assert_allclose(areas, areas[:, :1].repeat(48, axis=1), rtol=1e-10)


def test_a_row_at_the_pole_is_a_cap() -> None:
    """Rows at 90, 80, ..: the first ends at 85 degrees; a cap of 5 degrees has 2 pi R^2 (1 - cos 5)."""
    areas = cell_areas(*meshed(np.arange(90.0, 40.0, -10.0), np.arange(36) * 10.0))
    assert areas[0].sum() == pytest.approx(GLOBE / 2 * (1 - np.cos(np.radians(5.0))), rel=1e-10)


def test_uneven_columns_share_their_parallel() -> None:
    """Edges half way: widths 2, 3, 4 for longitudes 0, 2, 6 beside one step of 2 and one of 4."""
    areas = cell_areas(*meshed(np.array([40.0, 42.0]), np.array([359.0, 1.0, 5.0])))
    np.testing.assert_allclose(areas[0] / areas[0, 0], [1.0, 1.5, 2.0], rtol=1e-10)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(-90, 90, allow_subnormal=False), min_size=2, max_size=20, unique_by=lambda x: round(x, 3)),
    st.booleans(),
)
def test_scores_weigh_rows_as_the_loss_does(rows: list[float], falling: bool) -> None:
    """`sci_evals.metrics.area_weights` and the tokenizer's cells say the same of any monotonic rows."""
    latitude = np.array(sorted(rows, reverse=falling))
    weights = cell_weights(*meshed(latitude, np.arange(5.0)))
    np.testing.assert_allclose(weights[:, 2], area_weights(latitude), rtol=1e-9, atol=1e-12)
    assert weights.mean() == pytest.approx(1.0)
    assert (np.abs(row_bounds(latitude)) <= 90.0).all()


def test_a_stereographic_grid_has_its_projections_areas() -> None:
    """Polar stereographic, 25 km, tangent at the pole: a cell's area is 25^2 km^2 ((1 + sin latitude) / 2)^2 (Snyder
    1987, eq. 21-4: the scale is 2 / (1 + sin latitude)). The grid's edges are as exact as its middle.
    """
    step = 25e3
    x, y = np.meshgrid((np.arange(60) - 20.5) * step, (np.arange(50) - 44.0) * step)
    distance = np.hypot(x, y)
    latitude = 90.0 - np.degrees(2 * np.arctan(distance / (2 * EARTH_RADIUS_M)))
    areas = cell_areas(latitude, np.degrees(np.arctan2(x, -y)))
    expected = step**2 * ((1 + np.sin(np.radians(latitude))) / 2) ** 2
    np.testing.assert_allclose(areas, expected, rtol=1e-4)


def test_a_tilted_grid_has_the_areas_of_the_upright_one() -> None:
    """Corners that are means of centres are off by about the square of the step in radians."""
    for rows, columns, step in ((21, 31, 1.0), (81, 121, 0.25)):
        upright = cell_areas(*meshed(np.linspace(-10, 10, rows), np.linspace(-15, 15, columns)))
        np.testing.assert_allclose(cell_areas(*tilted(rows, columns)), upright, rtol=1.5 * np.radians(step) ** 2)


def test_unknown_places_have_no_area_and_weigh_the_mean() -> None:
    """The disc of a geostationary image: cells off the Earth have no place."""
    latitude, longitude = tilted(21, 31)
    off = np.hypot(*np.meshgrid(np.arange(31) - 15, np.arange(21) - 10)) > 9
    latitude[off] = np.nan
    areas, weights = cell_areas(latitude, longitude), cell_weights(latitude, longitude)
    assert np.isnan(areas[off]).all() and np.isfinite(areas[10, 15])
    known = np.isfinite(areas)
    assert weights[known].mean() == pytest.approx(1.0)
    assert (weights[~known] == 1.0).all()
    assert (cell_weights(np.full((2, 3), np.nan), np.zeros((2, 3))) == 1.0).all()


def test_lines_of_cells() -> None:
    """A lone parallel (meridian): cells as high as wide (as wide as high); a line across both has no areas."""
    lone = cell_areas(*meshed(np.array([60.0]), np.arange(4.0)))
    assert lone[0, 0] == pytest.approx((np.radians(1.0) * EARTH_RADIUS_M) ** 2 / 2, rel=1e-4)
    column = cell_areas(*meshed(np.array([-1.0, 0.0, 1.0]), np.array([7.0])))
    assert column[1, 0] == pytest.approx((np.radians(1.0) * EARTH_RADIUS_M) ** 2, rel=1e-4)
    transect = cell_weights(*meshed(np.array([59.0, 60.0, 61.0]), np.full(4, 10.0)))
    np.testing.assert_allclose(transect[:, 3], area_weights([59.0, 60.0, 61.0]), rtol=1e-10)
    assert np.isnan(cell_areas(np.array([[1.0, 2.0, 3.0]]), np.array([[1.0, 2.0, 3.0]]))).all()


def test_rows_that_turn_back_are_no_axis() -> None:
    with pytest.raises(ValueError, match="rise or fall"):
        row_bounds([0.0, 10.0, 5.0])
    with pytest.raises(ValueError, match=r"-90\.\.90"):
        row_bounds([0.0, 95.0])
