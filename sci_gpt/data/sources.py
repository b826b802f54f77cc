"""The table of source readers: adding a line here also enrols the reader in the contract tests."""

from __future__ import annotations

from sci_gpt.data.source import Source, SourceSettings, check_options, digest, locate
from sci_gpt.data.source_column import NetcdfColumnSeries
from sci_gpt.data.source_ghcn import GhcnDaily
from sci_gpt.data.source_grid import NetcdfGrid
from sci_gpt.data.source_series import CsvSeries
from sci_gpt.data.source_trace import EventRecords
from sci_gpt.data.source_zarr import ZarrGrid
from sci_gpt.errors import DataError
from sci_tokenizers.variables import nearest

SOURCES: dict[str, type[Source]] = {
    "netcdf_grid": NetcdfGrid,
    "zarr_grid": ZarrGrid,
    "netcdf_column_series": NetcdfColumnSeries,
    "csv_series": CsvSeries,
    "ghcn_daily": GhcnDaily,
    "obspy_records": EventRecords,
}


def make_source(settings: SourceSettings) -> Source:
    """The reader of a source, its options checked.

    Raises:
        DataError: no such reader, or options that it does not take.
    """
    if settings.reader not in SOURCES:
        raise DataError(
            f"{settings.where}: no reader {settings.reader!r}; nearest: {nearest(settings.reader, SOURCES)!r}"
        )
    reader = SOURCES[settings.reader]()
    check_options(settings, reader)
    return reader


def contents(settings: SourceSettings) -> dict[str, str]:
    """SHA-256 by file, for the fingerprint: of contents, or of what the reader takes for them (see `ZarrGrid.digest`).

    Raises:
        DataError: files that are not there or cannot be read.
    """
    reader = make_source(settings)
    return reader.digest(settings) if isinstance(reader, ZarrGrid) else digest(locate(settings))


def file_bytes(settings: SourceSettings) -> int:
    """Bytes that `contents` reads (of a Zarr none)."""
    if isinstance(make_source(settings), ZarrGrid):
        return 0
    return sum(path.stat().st_size for path in locate(settings))
