"""When a mean over an interval is known: at the interval's end, by its bounds."""

from __future__ import annotations

import numpy as np
import xarray as xr

from sci_gpt.data.cf_grid import interval_ends


def test_a_monthly_mean_is_known_when_its_month_ends() -> None:
    """January to April 2001: stamps in the middle, the months end 31, 59, 90 and 120 days after New Year."""
    ends = np.array([31.0, 59.0, 90.0, 120.0])
    starts = np.array([0.0, 31.0, 59.0, 90.0])
    stamps = (starts + ends) / 2
    attributes = {"units": "days since 2001-01-01", "bounds": "time_bnds"}
    dataset = xr.Dataset(
        {
            "tas": ("time", np.zeros(4), {"cell_methods": "time: mean"}),
            "time_bnds": (("time", "bnds"), np.stack([starts, ends], axis=1)),
        },
        coords={"time": ("time", stamps, attributes)},
    )
    known, _ = interval_ends(dataset, dataset["tas"], axis="time", where="made here")
    np.testing.assert_array_equal(known, ends)
