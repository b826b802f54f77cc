"""Reads gridded CF netCDF files (analyses, climate models) into samples: whole grids or tiles of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np

from sci_gpt.data.cf_grid import film_clock, grid_axes, open_netcdf, packing_of, pick, slug, table_name, table_unit
from sci_gpt.data.grid_blocks import GridBlock, GridHeader, grid_blocks
from sci_gpt.data.series_sample import converted, in_range
from sci_gpt.data.source import Part, SourceSettings, locate
from sci_gpt.data.store_writer import Packing
from sci_gpt.errors import DataError
from sci_tokenizers.sample import Modality, Sample

_VALUES_AT_ONCE = 2_000_000  # converted in float64


class NetcdfGrid:
    """CF netCDF -> grid. Files that share a group are one film, in the order of their times."""

    modality: ClassVar[Modality] = "grid"
    options: ClassVar[Mapping[str, str]] = {
        "variable": "name of the variable in the file",
        "name": "its name in the variable table (default: its standard_name)",
        "unit": "its unit (default: its units attribute)",
        "group_by": "global attribute that names the group (run) of a file, or 'file' (default: all files are one)",
        "tile": "[rows, columns] of the tiles that are stored (default: the whole grid)",
    }
    required: ClassVar[tuple[str, ...]] = ("variable",)

    def parts(self, settings: SourceSettings) -> list[Part]:
        """See `Source.parts`: a time block of a band of tiles each; of the files only headers are read."""
        groups: dict[str, list[GridHeader]] = {}
        for path in locate(settings):
            group, header = self._header(path, settings)
            groups.setdefault(group, []).append(header)
        return [
            Part(
                name=f"{group}, stretch {block.stretch}, rows {block.rows[0]} to {block.rows[1] - 1}",
                select={"group": group, "block": block},
                bytes=4 * block.values,
            )
            for group, headers in groups.items()
            for block in grid_blocks(
                headers,
                tile=settings.options.get("tile"),
                stretch_bytes=settings.stretch_bytes,
                where=f"{settings.where}, {group}",
            )
        ]

    def read(self, settings: SourceSettings, part: Part) -> Iterator[Sample]:
        """See `Source.read`."""
        group, block = part.select["group"], part.select["block"]
        name, values, valid = self._values(block, settings)
        for suffix, box, inside in block.tiles():
            yield Sample(
                key=f"{settings.name}/{group}{suffix}/{block.stretch}",
                source=settings.name,
                modality="grid",
                variables=(name,),
                levels=(float("nan"),),
                values=np.ascontiguousarray(values[:, None, *inside]),
                valid=np.ascontiguousarray(valid[:, None, *inside]),
                time=block.clock.time,
                year_phase=block.clock.year_phase,
                day_phase=block.clock.day_phase,
                step_seconds=block.step_seconds,
                latitude=block.latitude[box],
                longitude=block.longitude[box],
                elevation=np.full(block.tile, np.nan, np.float32),
            )

    def packing(self, settings: SourceSettings) -> Packing | None:
        """The first file's own integers, in the table's unit, where the file is packed."""
        path = locate(settings)[0]
        with open_netcdf(path) as dataset:
            variable = pick(dataset, str(settings.options["variable"]), where=str(path))
            return packing_of(variable, settings.options, where=str(path))

    def _header(self, path: Path, settings: SourceSettings) -> tuple[str, GridHeader]:
        with open_netcdf(path) as dataset:
            variable = pick(dataset, str(settings.options["variable"]), where=str(path))
            rule = settings.options.get("group_by")
            if rule is None:
                group = "grid"
            elif rule == "file":
                group = path.stem
            elif rule in dataset.attrs:
                group = str(dataset.attrs[rule])
            else:
                raise DataError(f"{path}: no global attribute {rule!r}; name another in option group_by")
            table_name(variable, settings.options)  # refuses a name that is not in the table before anything is read
            axes = grid_axes(dataset, variable, where=str(path))
            times, step = film_clock(dataset, variable, axis=axes.time, where=str(path))
            latitude, longitude = axes.places(dataset)
            return slug(group), GridHeader(
                path=path, clock=times, step_seconds=step, latitude=latitude, longitude=longitude
            )

    def _values(self, block: GridBlock, settings: SourceSettings) -> tuple[str, np.ndarray, np.ndarray]:
        """Name in the table, float32 values (time, row, column) in its unit, 0 where not valid, and which are valid.

        Files are read a few times at once: what is converted in float64 stays small.
        """
        shape = (len(block.clock.time), block.rows[1] - block.rows[0], block.latitude.shape[1])
        values, valid = np.empty(shape, np.float32), np.empty(shape, bool)
        name, done = "", 0
        for path, first, last in block.runs:
            with open_netcdf(path) as dataset:
                variable = pick(dataset, str(settings.options["variable"]), where=str(path))
                axes = grid_axes(dataset, variable, where=str(path))
                name, unit = table_name(variable, settings.options), table_unit(variable, settings.options)
                at_once = max(1, _VALUES_AT_ONCE // (shape[1] * shape[2]))
                for start in range(first, last, at_once):
                    times = slice(start, min(start + at_once, last))
                    cut = variable.isel({axes.time: times, axes.rows: slice(*block.rows)})
                    converted_values = converted(axes.values(cut), unit, variable=name, where=str(path))
                    here = slice(done, done + len(converted_values))
                    valid[here] = in_range(converted_values, name)
                    values[here] = np.where(valid[here], converted_values, 0.0)
                    done = here.stop
        return name, values, valid
