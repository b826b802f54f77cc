"""The table of films: which class understands which kind of data object."""

from __future__ import annotations

from typing import Any

import obspy
import pandas as pd
import xarray as xr

from sci_gpt.errors import DataError
from sci_gpt.recipes.film import Film
from sci_gpt.recipes.film_grid import GridFilm
from sci_gpt.recipes.film_series import SeriesFilm
from sci_gpt.recipes.film_trace import TraceFilm

FILMS: dict[type, type[Film]] = {
    xr.Dataset: GridFilm,
    xr.DataArray: GridFilm,
    pd.DataFrame: SeriesFilm,
    obspy.Stream: TraceFilm,
}


def film_kind(data: Any) -> type[Film]:
    """The class that understands this object.

    Raises:
        DataError: no row of FILMS fits.
    """
    for kind, film in FILMS.items():
        if isinstance(data, kind):
            return film
    kinds = ", ".join(f"{kind.__module__.split('.')[0]}.{kind.__name__}" for kind in FILMS)
    raise DataError(
        f"a forecast takes {kinds}, got {type(data).__module__}.{type(data).__name__}; convert it to one of these"
    )
