"""When a mean over an interval is known: at the interval's end, by its bounds; rows that stand for one step."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from sci_gpt.data.cf_grid import interval_ends
from sci_gpt.data.source import SourceSettings
from sci_gpt.data.source_series import table_samples
from sci_gpt.errors import DataError


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


@pytest.mark.parametrize(
    ("step", "stamps", "message"),
    [
        ("hour", ["00:00", "01:00", "01:05", "02:00"], "2021-03-01T01:00:00 and 2021-03-01T01:05:00 stand for one"),
        ("month", ["00:00", "01:00"], "2021-03-01T00:00:00 and 2021-03-01T01:00:00 stand for one"),
    ],
)
def test_rows_of_two_times_that_stand_for_one_step_are_refused(step: str, stamps: list[str], message: str) -> None:
    """One would be lost without a word; a time that stands twice, as where files overlap, is taken once."""
    options = {"time": "when", "step": step, "columns": {"t": {"variable": "air_temperature", "unit": "degC"}}}
    settings = SourceSettings(name="here", reader="csv_series", modality="series", files=(), options=options)

    def table(times: list[str]) -> pd.DataFrame:
        return pd.DataFrame({"when": [f"2021-03-01T{time}" for time in times], "t": np.arange(len(times)) + 1.0})

    with pytest.raises(DataError, match=message + r" and the same step; correct option step, or keep one row"):
        list(table_samples(table(stamps), settings))
    if step == "hour":
        (sample,) = table_samples(table(["00:00", "01:00", "01:00", "02:00"]), settings)
        np.testing.assert_allclose(sample.values[:, 0, 0, 0], 273.15 + np.array([1.0, 2.0, 4.0]), rtol=1e-6)
