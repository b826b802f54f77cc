"""The table of bad input: a command line for each, what its one line of error must hold, and what may not change."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import xarray as xr

from desk import STEP, Desk, fill_the_disk_and_save
from test_forecast import table


@dataclass(frozen=True, kw_only=True)
class Case:
    """One kind of bad input.

    Attributes:
        argv: makes the input on a desk and gives the command line.
        holds: offending names and values, as the error must have them.
        remedy: what to do, in the error's words.
        disk_size: of the desk's small file system, as mount takes it; None: it needs none.
        limited: where none can be mounted, the size of files is limited instead.
        kept: the folder that may not change: the whole desk, but where a run has begun its checkpoints.
        meanwhile: what happens while the command runs.
    """

    argv: Callable[[Desk], list[str]]
    holds: tuple[str, ...]
    remedy: str
    disk_size: str | None = None
    limited: bool = False
    kept: str = "."
    meanwhile: Callable[[Desk, subprocess.Popen[str]], None] | None = None


GARBAGE = bytes(range(256)) * 8
# Its test split would begin after the data's end.
LATE = {
    "name": "all",
    "start": "2001-01-01",
    "train_until": "2001-12-01",
    "valid_until": "2001-12-20",
    "end": "2001-12-31",
}


def nans(variable: str) -> bytes:
    """A year of days without a value."""
    days = pd.date_range("2001-01-01", periods=365, freq="D")
    return pd.DataFrame({"date": days, variable: np.full(365, np.nan)}).to_csv(index=False, na_rep="nan").encode()


def small_field() -> bytes:
    """Forty days of a field of three by three cells."""
    days = pd.date_range("2001-01-01", periods=40, freq="D")
    places = {"time": days, "latitude": [32.0, 31.0, 30.0], "longitude": [10.0, 11.0, 12.0]}
    field = xr.DataArray(np.full((40, 3, 3), 280.0), places, tuple(places), attrs={"units": "K"})
    return bytes(field.to_dataset(name="air_temperature").to_netcdf(engine="scipy"))


def many_quantiles() -> str:
    """So many quantiles that their table is longer than the small disk."""
    return ",".join(f"{level / 1000:.3f}" for level in range(1, 999))


def full_in_a_save(processes: int) -> Case:
    """The disk fills up while a run trains on; its next checkpoint does not fit."""
    return Case(
        argv=lambda desk: desk.pretrain(f"output={desk.run_on_disk()}", steps=STEP + 20_000, processes=processes),
        holds=("disk/run/checkpoints/step-", "was not written"),
        remedy=f"make room on the disk: step-{STEP:08d} is intact, and the same command resumes from it",
        disk_size="16m",
        kept="disk/run/checkpoints",
        meanwhile=fill_the_disk_and_save,
    )


def points(*lines: str) -> bytes:
    """A table for a scaling law."""
    return "\n".join(["params,tokens,loss", *lines]).encode()


CASES = {
    "missing file, build": Case(
        argv=lambda desk: desk.build(files=["nowhere.csv"]),
        holds=("source 'co2'", "'nowhere.csv'"),
        remedy="correct `files`",
    ),
    "missing file, forecast": Case(
        argv=lambda desk: desk.forecast("nowhere.nc"), holds=("'nowhere.nc'",), remedy="check the path"
    ),
    "missing file, inspect": Case(
        argv=lambda desk: ["inspect", "nowhere.nc"],
        holds=("'nowhere.nc'",),
        remedy="give a data file, or a store made by `sci-gpt build`",
    ),
    "missing configuration": Case(
        argv=lambda desk: ["pretrain", "nowhere.yaml"], holds=("'nowhere.yaml'",), remedy="the examples are in configs/"
    ),
    "missing store": Case(
        argv=lambda desk: desk.pretrain("data=nowhere/store"),
        holds=("'nowhere/store'",),
        remedy="make it with `sci-gpt build`",
    ),
    "missing model": Case(
        argv=lambda desk: desk.forecast("station.csv", model="nowhere/run"),
        holds=("'nowhere/run'",),
        remedy="give a run folder, a checkpoint or models:/NAME@candidate",
    ),
    "unreadable file, build": Case(
        argv=lambda desk: desk.build(files=[desk.write("garbage.csv", GARBAGE)]),
        holds=("garbage.csv",),
        remedy="give a whole file",
    ),
    "unreadable file, forecast": Case(
        argv=lambda desk: desk.forecast(desk.write("garbage.nc", GARBAGE)),
        holds=("garbage.nc",),
        remedy="give a whole netcdf file",
    ),
    "unreadable file, inspect": Case(
        argv=lambda desk: ["inspect", desk.write("garbage.mseed", GARBAGE)],
        holds=("garbage.mseed",),
        remedy="give a whole file",
    ),
    "variable not in the table, build": Case(
        argv=lambda desk: desk.build(options__columns__co2__variable="mole_fraction_of_carbon_dioxid"),
        holds=("source 'co2', column 'co2'", "'mole_fraction_of_carbon_dioxid'"),
        remedy="nearest: 'mole_fraction_of_carbon_dioxide_in_air'",
    ),
    "variable not in the table, forecast": Case(
        argv=lambda desk: desk.forecast("station.csv", "--columns", "wind_speed=wind_sped"),
        holds=("column 'wind_speed'", "'wind_sped'"),
        remedy="nearest: 'wind_speed'",
    ),
    "unit that does not convert, build": Case(
        argv=lambda desk: desk.build(options__columns__co2__unit="hPa"),
        holds=("source 'co2', column 'co2'", "'hPa' does not convert"),
        remedy="name one of ['1e-6', 'ppm'] as the file's unit",
    ),
    "unit that does not convert, forecast": Case(
        argv=lambda desk: desk.forecast("station.csv", "--columns", "wind_speed=wind_speed:kg"),
        holds=("column 'wind_speed'", "'kg' does not convert"),
        remedy="name one of ['km h-1', 'knot', 'm s-1', 'm/s', 'mph'] as the file's unit",
    ),
    "window longer than the data, pretrain": Case(
        argv=lambda desk: desk.pretrain(
            "phases.0.mixture.station.frames=5000", "phases.0.row_length=20000", "output=out/long"
        ),
        holds=("source 'station', train", "a window of 5000 frames", "the data (400 times)"),
        remedy="lower mixture frames",
    ),
    "grid smaller than a patch, pretrain": Case(
        argv=lambda desk: desk.pretrain("tokenizer.grid_patch=9", "output=out/small"),
        holds=("source 'field'", "a grid of 8 x 12 cells", "a patch of 9 x 9"),
        remedy="train a model with tokenizer.grid_patch of 8 or less",
    ),
    "grid smaller than a patch, forecast": Case(
        argv=lambda desk: desk.forecast(desk.write("small.nc", small_field())),
        holds=("a grid of 3 x 3 cells", "a patch of 4 x 4"),
        remedy="give a larger region",
    ),
    "window longer than the data, forecast": Case(
        argv=lambda desk: desk.forecast(desk.write("short.csv", table(2).to_csv().encode())),
        holds=("short.csv", "2 time steps", "the context of 3"),
        remedy="give a longer record",
    ),
    "empty split": Case(
        argv=lambda desk: desk.build(calendar__eras=[LATE]),
        holds=("source 'co2'", "test is empty"),
        remedy="choose other dates or names, or list it under split.empty: [test]",
    ),
    "NaNs everywhere, build": Case(
        argv=lambda desk: desk.build(files=[desk.write("nans.csv", nans("co2"))]),
        holds=("co2/station", "no value of mole_fraction_of_carbon_dioxide_in_air"),
        remedy="check the file, its fill values and its unit",
    ),
    "NaNs everywhere, forecast": Case(
        argv=lambda desk: desk.forecast(desk.write("nans.csv", nans("wind_speed"))),
        holds=("nans.csv", "none of the last 22 time steps"),
        remedy="give a record that has values there",
    ),
    "Slurm that is not there": Case(
        argv=lambda desk: ["launch", "run.yaml", "--on", "slurm", "--set", "output=out/launched"],
        holds=("no Slurm here",),  # none installed, or no controller that answers
        remedy="train here with --on local",
    ),
    "misspelt key, build": Case(
        argv=lambda desk: desk.build(licens="CC0"),
        holds=("changed.yaml", "'sources.0.licens'"),
        remedy="nearest: 'licence'",
    ),
    "misspelt key, pretrain": Case(
        argv=lambda desk: desk.pretrain("optimizer.lerning_rate=1"),
        holds=("run.yaml", "'optimizer.lerning_rate'"),
        remedy="nearest: 'learning_rate'",
    ),
    "misspelt option of a reader": Case(
        argv=lambda desk: desk.build(options__colums={}),
        holds=("source 'co2'", "reader 'csv_series'", "'colums'"),
        remedy="nearest: 'columns'",
    ),
    "checkpoint of another fingerprint, pretrain": Case(
        argv=lambda desk: desk.pretrain(f"data={desk.other_store()}"),
        holds=("toy/run/checkpoints/step-00000024", "0123456789ab", "fedcba987654"),
        remedy="give this run another output, or restore what it had",
    ),
    "checkpoint of another fingerprint, evaluate": Case(
        argv=lambda desk: desk.evaluate(f"data={desk.other_store()}"),
        holds=("toy/run", "0123456789ab", "'other'", "fedcba987654"),
        remedy="train on this store or evaluate on that one",
    ),
    "full disk, build": Case(
        argv=lambda desk: desk.build("output=disk/store"),
        holds=("'disk/store'",),
        remedy="free some space or mend the path (nothing was changed there)",
        disk_size="16k",
        limited=True,
    ),
    "full disk, pretrain": Case(
        argv=lambda desk: desk.pretrain("checkpoint.keep=1000000000", "output=out/run"),
        holds=("'out/run'", "1000000000 kept"),
        remedy="make room or lower checkpoint.keep",
    ),
    "full disk in a save": full_in_a_save(1),
    "full disk in a save, 2 processes": full_in_a_save(2),
    "full disk, forecast": Case(
        argv=lambda desk: desk.forecast(
            "station.csv", "--quantiles", many_quantiles(), out=desk.write("disk/forecast.csv", b"an earlier forecast")
        ),
        holds=("'disk/forecast.csv'",),
        remedy="free some space or choose another output",
        disk_size="16k",
        limited=True,
    ),
    "missing file, fit": Case(
        argv=lambda desk: ["fit", "nowhere.csv"], holds=("'nowhere.csv'",), remedy="check the path, or make it with"
    ),
    "unreadable file, fit": Case(
        argv=lambda desk: ["fit", desk.write("POINTS.csv", GARBAGE)],
        holds=("'POINTS.csv' is not a CSV of text",),
        remedy="give a table with a header",
    ),
    "missing columns, fit": Case(
        argv=lambda desk: ["fit", desk.write("POINTS.csv", b"params,token,loss\n1e6,1e8,3\n")],
        holds=("no column 'tokens' among ['params', 'token', 'loss']",),
        remedy="rename 'token'",
    ),
    "two points, fit": Case(
        argv=lambda desk: ["fit", desk.write("POINTS.csv", points("1e6,1e8,3", "2e6,1e8,2.9"))],
        holds=("2 points for a law of 5 parameters",),
        remedy="give at least 5, of at least 3 different params and 3 different tokens",
    ),
    "a loss that is no number, fit": Case(
        argv=lambda desk: ["fit", desk.write("POINTS.csv", points("1e6,1e8,3", "2e6,1e8,nan"))],
        holds=("'POINTS.csv', line 3, column 'loss'", "got 'nan'"),
        remedy="mend the value or leave the line out",
    ),
    "a size that is not positive, fit": Case(
        argv=lambda desk: ["fit", desk.write("POINTS.csv", points("0,1e8,3"))],
        holds=("line 2, column 'params'", "expected a positive number, got '0'"),
        remedy="mend the value or leave the line out",
    ),
    "the same loss everywhere, fit": Case(
        argv=lambda desk: ["fit", desk.write("POINTS.csv", points(*(f"{n}e6,{n}e8,3" for n in range(1, 8))))],
        holds=("the loss is 3 in all 7 lines",),
        remedy="give points whose loss varies",
    ),
}
