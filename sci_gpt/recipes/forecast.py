"""Forecast from a file: netCDF, CSV or miniSEED in, the same kind with quantiles out."""

from __future__ import annotations

import hashlib
import io
import math
import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import obspy
import pandas as pd
import xarray as xr
from obspy.io.mseed import ObsPyMSEEDError

from sci_gpt.errors import ConfigError, DataError, UnlikeTrainingWarning
from sci_gpt.recipes.asked import check_levels
from sci_gpt.recipes.calibrated import load_calibrated
from sci_gpt.recipes.film import Notes
from sci_gpt.recipes.load import LoadedModel, load_model


@dataclass(frozen=True, kw_only=True)
class FileOptions:
    """How a file is read and what is asked: quantile levels or samples and their seed, and what the file does not say
    of itself."""

    levels: tuple[float, ...] = (0.1, 0.5, 0.9)
    num_samples: int | None = None
    seed: int | None = None
    notes: Notes = Notes()

    @classmethod
    def parse(
        cls,
        *,
        quantiles: str = "0.1,0.5,0.9",
        source: str | None = None,
        place: str | None = None,
        time: str | None = None,
        columns: str | None = None,
    ) -> FileOptions:
        """From the words of a command line: "0.1,0.5", "47.5,8.6,420" and "temp=air_temperature:degC,..".

        Raises:
            ConfigError: a level or place that is no number, or a column without its variable.
        """
        levels = check_levels(_numbers(quantiles, "quantiles"))
        numbers = _numbers(place, "place") if place else []
        if place and (len(numbers) not in (2, 3) or abs(numbers[0]) > 90 or abs(numbers[1]) > 360):
            raise ConfigError(f"place is LATITUDE,LONGITUDE[,ELEVATION] in degrees and m, got {place!r}")
        latitude, longitude, elevation = [*numbers, *[math.nan] * (3 - len(numbers))]
        named = {}
        for pair in filter(None, (columns or "").split(",")):
            name, sign, variable = pair.partition("=")
            if not sign or not name.strip() or not variable.strip():
                raise ConfigError(f"columns are COL=VARIABLE[:UNIT],.., got {pair!r}")
            named[name.strip()] = variable.strip()
        notes = Notes(source=source, place=(latitude, longitude, elevation), time=time, columns=named)
        return cls(levels=levels, notes=notes)


@dataclass(frozen=True, kw_only=True)
class FileKind:
    """One kind of file: its name in the registry's signature, its endings, how bytes become an object and back."""

    name: str
    endings: tuple[str, ...]
    read: Callable[[bytes], Any]
    write: Callable[[Any], bytes]


def forecast_file(
    model_uri: str, path: Path, *, horizon: int, out: Path, options: FileOptions, calibrated: bool = False
) -> dict[str, Any]:
    """Forecast the steps that follow a file and write them as the same kind of file; `out` appears whole or not at all.

    Args:
        model_uri: as for `load_model`.
        path: netCDF (.nc), CSV (.csv) or miniSEED (.mseed) file.
        horizon: steps ahead, of the file's own step; for miniSEED of 0.1 s (the working rate).
        out: the file to write, with an ending of the same kind.
        calibrated: stretch the quantiles by the calibration of the model's evaluation; one without is refused.

    Returns:
        What was done: files, horizon, levels, the model's step and fingerprint.

    Raises:
        ConfigError, DataError, CheckpointError: as `LoadedModel.forecast`, and a file that is missing, unreadable or of
            no known kind.
    """
    path, out = Path(path), Path(out)
    kind = kind_of(path)
    if kind_of(out) is not kind:
        raise ConfigError(
            f"{out.name!r}: the forecast of a {kind.name} file is a {kind.name} file; use {kind.endings[0]!r}"
        )
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"no folder {str(out.parent)!r} for the forecast; make it first")
    payload = _bytes(path)
    model = load_calibrated(model_uri) if calibrated else load_model(model_uri)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UnlikeTrainingWarning)
        answer = forecast_payload(model, kind, payload=payload, horizon=horizon, options=options, where=str(path))
    _write_whole(out, answer)
    return {
        "input": str(path),
        "output": str(out),
        "kind": kind.name,
        "horizon": horizon,
        "quantiles": list(options.levels) if options.num_samples is None else None,
        "num_samples": options.num_samples,
        "calibrated": calibrated,
        "model": model_uri,
        "model_step": model.step,
        "model_fingerprint": model.fingerprint,
        "notes": sorted({str(one.message) for one in caught if one.category is UnlikeTrainingWarning}),
    }


def forecast_payload(
    model: LoadedModel, kind: FileKind, *, payload: bytes, horizon: int, options: FileOptions, where: str
) -> bytes:
    """A file's bytes in, its forecast's bytes out; `where` names the file in messages.

    Raises:
        DataError: bytes that are no such file; and as `LoadedModel.forecast`.
    """
    data = _understood(kind, payload, where=where)
    try:
        answer = model.forecast(
            data,
            horizon,
            quantiles=options.levels,
            num_samples=options.num_samples,
            seed=options.seed,
            notes=options.notes,
        )
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    return kind.write(answer)


def read_data(kind: FileKind, path: Path) -> tuple[Any, str]:
    """The object in a file, and the file's sha256.

    Raises:
        DataError: a file that is missing, unreadable or not of this kind.
    """
    payload = _bytes(path)
    return _understood(kind, payload, where=str(path)), hashlib.sha256(payload).hexdigest()


def _understood(kind: FileKind, payload: bytes, *, where: str) -> Any:
    try:
        return kind.read(payload)
    except (OSError, ValueError, RuntimeError, TypeError, pd.errors.ParserError, ObsPyMSEEDError) as error:
        cause = " ".join(str(error).split())[:120]
        raise DataError(f"{where} cannot be read as {kind.name}: {cause}; give a whole {kind.name} file") from error


def kind_of(path: Path) -> FileKind:
    """The kind of a file by its ending.

    Raises:
        ConfigError: an ending of no known kind.
    """
    for kind in KINDS.values():
        if path.suffix.lower() in kind.endings:
            return kind
    endings = ", ".join(ending for kind in KINDS.values() for ending in kind.endings)
    raise ConfigError(f"{str(path)!r}: ending {path.suffix!r} is of no known kind; use one of {endings}")


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"no file {str(path)!r}; check the path") from error
    except OSError as error:
        raise DataError(
            f"{str(path)!r} cannot be read: {error.strerror}; check the path and its permissions"
        ) from error


def _write_whole(out: Path, content: bytes) -> None:
    """Write beside the target and rename, so that a full disk leaves neither half a file nor a lost old one.

    Raises:
        DataError: a full disk, no such folder, or no permission.
    """
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        part.replace(out)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise DataError(
            f"{str(out)!r} cannot be written: {error.strerror}; free some space or choose another output"
        ) from error


def _numbers(text: str, what: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"{what} are numbers with commas between, got {text!r}") from error


def _read_netcdf(payload: bytes) -> xr.Dataset:
    # The netCDF library opens names, not bytes. CF times come as cftime where numpy's calendar would not do.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "input.nc"
        path.write_bytes(payload)
        with xr.open_dataset(path, engine="netcdf4", decode_timedelta=False) as data:
            return data.load()


def _write_netcdf(data: xr.Dataset) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "output.nc"
        data.to_netcdf(path, engine="netcdf4")
        return path.read_bytes()


def _read_csv(payload: bytes) -> pd.DataFrame:
    return pd.read_csv(io.BytesIO(payload))


def _write_csv(data: pd.DataFrame) -> bytes:
    # Seven digits are what float32 holds.
    return data.to_csv(index=False, date_format="%Y-%m-%dT%H:%M:%S%z", float_format="%.7g").encode()


def _read_miniseed(payload: bytes) -> obspy.Stream:
    return obspy.read(io.BytesIO(payload), format="MSEED")


def _write_miniseed(data: obspy.Stream) -> bytes:
    buffer = io.BytesIO()
    data.write(buffer, format="MSEED")
    return buffer.getvalue()


KINDS: dict[str, FileKind] = {
    kind.name: kind
    for kind in (
        FileKind(name="netcdf", endings=(".nc", ".nc4", ".cdf"), read=_read_netcdf, write=_write_netcdf),
        FileKind(name="csv", endings=(".csv",), read=_read_csv, write=_write_csv),
        FileKind(name="miniseed", endings=(".mseed", ".miniseed", ".ms"), read=_read_miniseed, write=_write_miniseed),
    )
}

__all__ = ["KINDS", "FileKind", "FileOptions", "forecast_file", "forecast_payload", "kind_of", "read_data"]
