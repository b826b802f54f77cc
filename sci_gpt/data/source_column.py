"""Reads climate-model columns (CMIP netCDF: one variable on levels over a small box) into series, one per model run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import netCDF4
import numpy as np

from sci_gpt.data.calendars import clock
from sci_gpt.data.cf_grid import slug
from sci_gpt.data.series_sample import Station, converted, in_range, regular_samples
from sci_gpt.data.source import Part, SourceSettings, locate
from sci_gpt.errors import DataError
from sci_tokenizers.sample import Modality, Sample


@dataclass(frozen=True, kw_only=True)
class _Column:
    """One file: box means (time, level) in the table's unit (NaN missing), the days that they are known, the place."""

    group: str
    means: np.ndarray
    days: np.ndarray
    units: str
    calendar: str
    latitude: float
    longitude: float


class NetcdfColumnSeries:
    """CMIP netCDF (time, level, lat, lon) -> series of variable x level: the area-weighted mean of the box.

    netCDF4 is used directly: fifty small files take 0.3 s, through xarray 3 s. Files of one group are joined in time.
    """

    modality: ClassVar[Modality] = "series"
    options: ClassVar[Mapping[str, str]] = {
        "variable": "name of the variable in the file",
        "name": "its name in the variable table",
        "levels": "list of levels in the file's unit (Pa)",
        "group_by": "global attribute that names the group of a file (default source_id)",
        "exclude": "groups that are left out",
    }
    required: ClassVar[tuple[str, ...]] = ("variable", "name", "levels")

    def parts(self, settings: SourceSettings) -> list[Part]:
        """See `Source.parts`: a group's files each."""
        groups: dict[str, list[Path]] = {}
        for path in locate(settings):
            with _opened(path) as file:
                groups.setdefault(_group(file, settings, path=path), []).append(path)
        excluded = [str(name) for name in settings.options.get("exclude", ())]
        for name in excluded:
            if name not in groups:
                raise DataError(f"{settings.where}: option exclude names {name!r}; the files hold {', '.join(groups)}")
        return [
            Part(name=group, select={"paths": paths}, bytes=sum(path.stat().st_size for path in paths))
            for group, paths in groups.items()
            if group not in excluded
        ]

    def read(self, settings: SourceSettings, part: Part) -> Iterator[Sample]:
        """See `Source.read`."""
        columns = [_read_column(path, settings) for path in part.select["paths"]]
        yield from _samples(sorted(columns, key=lambda column: float(column.days[0])), settings)


def _opened(path: Path) -> netCDF4.Dataset:
    try:
        return netCDF4.Dataset(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read as a column on levels: {error}") from error


def _group(file: netCDF4.Dataset, settings: SourceSettings, *, path: Path) -> str:
    attribute = str(settings.options.get("group_by", "source_id"))
    if attribute not in file.ncattrs():
        raise DataError(f"{path}: no global attribute {attribute!r}; name another in option group_by")
    return slug(str(file.getncattr(attribute)))


def _read_column(path: Path, settings: SourceSettings) -> _Column:
    options = settings.options
    try:
        with _opened(path) as file:
            # Raw numbers: undeclared fill values differ from file to file, the valid range finds them all.
            file.set_auto_mask(False)
            if options["variable"] not in file.variables:
                raise DataError(
                    f"{path}: no variable {options['variable']!r}; the file has {', '.join(file.variables)}"
                )
            variable = file[str(options["variable"])]
            if len(variable.dimensions) != 4:
                raise DataError(
                    f"{path}: {variable.name} has dimensions {variable.dimensions}, expected (time, level, y, x)"
                )
            axis, level, y, x = (file[name] for name in variable.dimensions)
            rows = level_rows(np.asarray(level[:], np.float64), options["levels"], where=str(path))
            values = converted(
                np.asarray(variable[:], np.float64)[:, rows],
                str(variable.units),
                variable=str(options["name"]),
                where=str(path),
            )
            weights = _band_weights(file, y)
            unit = str(axis.units)
            if not unit.startswith("days since"):
                raise DataError(f"{path}: time has units {unit!r}, expected 'days since ...'")
            return _Column(
                group=_group(file, settings, path=path),
                means=_box_means(values, weights, name=str(options["name"])),
                days=_known_at(file, axis, averaged="mean" in str(getattr(variable, "cell_methods", ""))),
                units=unit,
                calendar=str(getattr(axis, "calendar", "standard")),
                latitude=float(np.average(np.asarray(y[:]), weights=weights)),
                longitude=_mean_longitude(np.asarray(x[:], np.float64)),
            )
    except (OSError, AttributeError, IndexError) as error:
        raise DataError(f"{path} cannot be read as a column on levels: {error}") from error


def level_rows(levels: np.ndarray, wanted: Any, *, where: str) -> list[int]:
    """Numbers of the wanted levels (one, or a list) among `levels`, in the same unit.

    Raises:
        DataError: a level that is not there; those that are there are listed.
    """
    rows = []
    for level in wanted if isinstance(wanted, list | tuple) else [wanted]:
        near = int(np.abs(levels - float(level)).argmin())
        if abs(levels[near] - float(level)) > 1e-6 * abs(float(level)):
            raise DataError(f"{where}: no level {level}; the file has {levels.tolist()}")
        rows.append(near)
    return rows


def _band_weights(file: netCDF4.Dataset, latitude: netCDF4.Variable) -> np.ndarray:
    """Share of each latitude band in the box's area: difference of the sines of its bounds."""
    bounds = getattr(latitude, "bounds", None)
    if bounds in file.variables:
        edges = np.clip(np.asarray(file[bounds][:], np.float64), -90.0, 90.0)
        weights = np.abs(np.diff(np.sin(np.deg2rad(edges)), axis=1))[:, 0]
        if weights.min() > 0:
            return np.asarray(weights / weights.sum())
    centres = np.asarray(latitude[:], np.float64)
    middle = (centres[1:] + centres[:-1]) / 2
    edges = np.clip(np.concatenate([2 * centres[:1] - middle[:1], middle, 2 * centres[-1:] - middle[-1:]]), -90.0, 90.0)
    weights = np.abs(np.diff(np.sin(np.deg2rad(edges))))
    return np.asarray(weights / weights.sum())


def _box_means(values: np.ndarray, weights: np.ndarray, *, name: str) -> np.ndarray:
    """(time, level) means of (time, level, lat, lon) over valid cells; NaN where less than half the area is valid."""
    valid = in_range(values, name)
    area = np.broadcast_to(weights[:, None] / values.shape[3], values.shape) * valid
    share = area.sum(axis=(2, 3))
    total = (area * np.where(valid, values, 0.0)).sum(axis=(2, 3))
    return np.where(share >= 0.5 - 1e-9, total / np.maximum(share, 1e-12), np.nan)


def _known_at(file: netCDF4.Dataset, axis: netCDF4.Variable, *, averaged: bool) -> np.ndarray:
    """Days at which the values are known: a daily mean at the end of its day."""
    days = np.asarray(axis[:], np.float64)
    if not averaged:
        return days
    bounds = getattr(axis, "bounds", None)
    if bounds in file.variables:
        ends = np.asarray(file[bounds][:], np.float64).max(axis=1)
        if (ends >= days).all() and (ends - days).max() <= 1.0:
            return ends
    return days + 0.5


def _mean_longitude(degrees: np.ndarray) -> float:
    angle = np.deg2rad(degrees)
    return float(np.rad2deg(np.arctan2(np.sin(angle).mean(), np.cos(angle).mean())))


def _samples(columns: list[_Column], settings: SourceSettings) -> Iterator[Sample]:
    first = columns[0]
    where = f"{settings.where}, {first.group}"
    if any(column.calendar != first.calendar for column in columns):
        raise DataError(f"{where}: files of one group have calendars {sorted({c.calendar for c in columns})}")
    # Files of one group may count from different epochs; a day's number on the first file's epoch is common to all.
    days = np.concatenate([_on_epoch(column, first.units) for column in columns])
    steps, keep = np.unique(np.floor(days + 1e-6).astype(np.int64), return_index=True)
    whole = np.arange(steps[0], steps[-1] + 1) + (days[keep][0] - steps[0])
    levels = settings.options["levels"]
    station = Station(
        key=f"{settings.name}/{first.group}",
        source=settings.name,
        variables=(str(settings.options["name"]),) * len(levels),
        levels=tuple(float(level) for level in levels),
        step_seconds=86400.0,
        latitude=first.latitude,
        longitude=first.longitude,
    )
    means = np.concatenate([column.means for column in columns])[keep]
    times = clock(whole, first.units, calendar=first.calendar, where=where)
    yield from regular_samples(station, steps, values=means, clock=times)


def _on_epoch(column: _Column, units: str) -> np.ndarray:
    if column.units == units:
        return column.days
    dates = netCDF4.num2date(column.days, column.units, calendar=column.calendar)
    return np.asarray(netCDF4.date2num(dates, units, calendar=column.calendar), np.float64)
