"""The recipe of `sci-gpt inspect`: what a file or a store holds, in the words of the variable table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cftime
import numpy as np
import pandas as pd

from sci_gpt.data.cf_grid import nominal_step, open_netcdf, physical_values
from sci_gpt.data.series_sample import converted, in_range
from sci_gpt.data.source_ghcn import ELEMENTS, read_dly
from sci_gpt.data.source_series import read_table
from sci_gpt.data.source_trace import COMPONENT, COMPONENTS, read_waveforms
from sci_gpt.data.store import Store
from sci_gpt.errors import ConfigError, DataError
from sci_gpt.recipes.facts import iso, store_facts
from sci_tokenizers.variables import VARIABLES, UnitError, nearest

MISSING_CODES = (-9999.0, -999.0, -99.99)
_UNIT_SECONDS = {"days": 86400.0, "hours": 3600.0, "minutes": 60.0, "seconds": 1.0}


def inspect_file(path: Path, family: str) -> dict[str, Any]:
    """What one file holds.

    Returns:
        family, variables [{name, source_name, units, missing_share, min, max, mapped}], num_samples (times), start and
        end (ISO 8601, the file's own stamps and calendar), step_seconds, or rate_hz for waveforms. A mapped variable is
        one of the variable table, with its name, unit and valid range; another is as in the file.

    Raises:
        ConfigError: no such family.
        DataError: no such file, or one that is not of the family.
    """
    if family not in FAMILIES:
        raise ConfigError(
            f"no family {family!r}; nearest: {nearest(family, FAMILIES)!r}; there are {', '.join(FAMILIES)}"
        )
    if not path.is_file():
        raise DataError(f"no file {str(path)!r}")
    return {"family": family, "file": str(path), **FAMILIES[family](path)}


def inspect_store(path: Path | str) -> dict[str, Any]:
    """What a built store, in a folder or behind a URL, holds: the facts of its data card (see `facts.store_facts`).

    Raises:
        DataError: no store there, or a damaged one.
    """
    return store_facts(Store.open(path))


def _netcdf(path: Path) -> dict[str, Any]:
    with open_netcdf(path) as dataset:
        axes = [
            name for name, v in dataset.variables.items() if " since " in str(v.attrs.get("units", "")) and v.ndim == 1
        ]
        axes = [name for name in axes if name in dataset.dims] or axes
        if not axes:
            raise DataError(f"{path}: no time axis (units 'days since ...'); not CF")
        axis = dataset[axes[0]]
        rows = []
        for name, variable in dataset.data_vars.items():
            held = axis.dims[0] in variable.dims and variable.dtype.kind in "fiu" and "bnds" not in str(name)
            if held and " since " not in str(variable.attrs.get("units", "")):
                standard = str(variable.attrs.get("standard_name", name))
                rows.append(
                    _row(str(name), standard, unit=variable.attrs.get("units"), values=physical_values(variable))
                )
        units, calendar = str(axis.attrs["units"]), str(axis.attrs.get("calendar", "standard"))
        times = np.asarray(axis.values, np.float64)
        step = nominal_step(np.diff(times) * _UNIT_SECONDS[units.split()[0].rstrip("s") + "s"], str(path))
        first, last = cftime.num2date(times[[0, -1]], units, calendar=calendar)
    return {
        "variables": rows,
        "num_samples": len(times),
        "start": first.isoformat(),
        "end": last.isoformat(),
        "step_seconds": step,
        "calendar": calendar,
    }


def _csv(path: Path) -> dict[str, Any]:
    table = read_table(path, {})
    stamps = None
    for column in table.columns:
        if table[column].dtype.kind not in "iufb":
            parsed = pd.to_datetime(table[column], errors="coerce", utc=True, format="mixed")
            if parsed.notna().mean() > 0.9:
                stamps = parsed.dropna()
                break
    if stamps is None:
        raise DataError(f"{path}: no column of dates; a station table has one (ISO 8601)")
    rows = []
    for column in table.columns:
        numbers = pd.to_numeric(table[column], errors="coerce").to_numpy(np.float64, copy=True)
        if np.isfinite(numbers).any() and table[column].dtype.kind in "iuf":
            numbers[np.isin(numbers, MISSING_CODES)] = np.nan
            rows.append(_row(str(column), str(column), unit=None, values=numbers))
    distinct = np.unique(stamps.dt.tz_localize(None).to_numpy().astype("datetime64[us]").astype(np.int64) / 1e6)
    return {
        "variables": rows,
        "num_samples": len(table),
        "start": stamps.min().isoformat(),
        "end": stamps.max().isoformat(),
        "step_seconds": nominal_step(np.diff(distinct), str(path)),
    }


def _ghcn(path: Path) -> dict[str, Any]:
    table = read_dly(path)
    rows = []
    for element, values in table.values.items():
        variable, unit, scale = ELEMENTS.get(element, (element, None, 1.0))
        rows.append(_row(element, variable, unit=unit, values=values * scale))
    days = len(next(iter(table.values.values())))
    return {
        "variables": rows,
        "num_samples": days,
        "start": iso(table.first_day * 86400.0),
        "end": iso((table.first_day + days - 1) * 86400.0),
        "step_seconds": 86400.0,
        "station": table.station,
    }


def _waveforms(path: Path) -> dict[str, Any]:
    stream = read_waveforms(path)
    rows, samples = [], []
    for name in sorted({trace.id for trace in stream}):
        traces = [trace for trace in stream if trace.id == name]
        data = np.concatenate([np.asarray(trace.data, np.float64) for trace in traces])
        seconds = max(t.stats.endtime for t in traces) - min(t.stats.starttime for t in traces)
        whole = round(seconds * traces[0].stats.sampling_rate) + 1
        component = COMPONENT.get(name[-1:].upper())
        variable = name if component is None else f"digitizer_counts_{COMPONENTS[component]}"
        row = _row(name, variable, unit="count", values=data)
        rows.append({**row, "missing_share": 1.0 - np.isfinite(data).sum() / max(whole, 1)})
        samples.append(whole)
    return {
        "variables": rows,
        "num_samples": max(samples),
        "start": str(min(trace.stats.starttime for trace in stream)),
        "end": str(max(trace.stats.endtime for trace in stream)),
        "rate_hz": float(stream[0].stats.sampling_rate),
    }


def _row(source_name: str, name: str, *, unit: str | None, values: np.ndarray) -> dict[str, Any]:
    """One variable: in the table's unit and range where it is in the table and its unit converts."""
    values = np.asarray(values, np.float64)
    mapped, units = name in VARIABLES, unit
    if mapped:
        try:
            values, units = converted(values, str(unit), variable=name, where=source_name), VARIABLES[name].unit
        except (DataError, UnitError):
            mapped = False
    valid = in_range(values, name) if mapped else np.isfinite(values) & (np.abs(values) < 1e30)
    known = values[valid]
    return {
        "name": name if mapped else source_name,
        "source_name": source_name,
        "units": units,
        "missing_share": float(1.0 - valid.mean()) if valid.size else 1.0,
        "min": float(known.min()) if known.size else None,
        "max": float(known.max()) if known.size else None,
        "mapped": mapped,
    }


# Names of data families that these readers open, beside the formats' own names.
FAMILIES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "netcdf": _netcdf,
    "cmip6": _netcdf,
    "era5": _netcdf,
    "ilamb": _netcdf,
    "csv": _csv,
    "ghcn": _ghcn,
    "miniseed": _waveforms,
    "earthscope": _waveforms,
}
