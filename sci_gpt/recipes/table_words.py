"""What a table's own words say: common names of variables, spellings of units, codes for a missing value."""

from __future__ import annotations

import re

import numpy as np

from sci_tokenizers.variables import VARIABLES, convert, units_of

# Names that people give to a variable; spelt without case, blanks, dots, dashes and underscores.
_NAMES: dict[str, tuple[str, ...]] = {
    "air_temperature": (
        "temp",
        "temperature",
        "airtemp",
        "tair",
        "ta",
        "tas",
        "t2m",
        "tavg",
        "tmean",
        "temperatureavg",
    ),
    "air_temperature_daily_maximum": ("tmax", "tempmax", "tasmax", "maxtemp"),
    "air_temperature_daily_minimum": ("tmin", "tempmin", "tasmin", "mintemp"),
    "dew_point_temperature": ("dewp", "dewpoint", "tdew", "td", "d2m"),
    "sea_surface_temperature": ("sst", "watertemp", "watertemperature"),
    "relative_humidity": ("rh", "humid", "humidity", "hurs"),
    "eastward_wind": ("u", "u10", "uas", "uwind"),
    "northward_wind": ("v", "v10", "vas", "vwind"),
    "wind_speed": ("wind", "windspeed", "ws", "wspd", "sfcwind"),
    "air_pressure_at_mean_sea_level": ("pressure", "slp", "mslp", "msl", "psl"),
    "surface_air_pressure": ("ps", "sp", "stationpressure"),
    "visibility_in_air": ("visib", "visibility", "vis"),
    "precipitation_amount": ("precip", "precipitation", "prcp", "rain", "rainfall"),
    "mole_fraction_of_carbon_dioxide_in_air": ("co2", "carbondioxide"),
    "surface_snow_amount": ("swe", "snowwaterequivalent"),
    "water_volume_transport_in_river_channel": ("discharge", "streamflow", "flow", "runoff", "q"),
}
_UNITS = {
    "c": "degC",
    "°c": "degC",
    "℃": "degC",
    "deg c": "degC",
    "f": "degF",
    "°f": "degF",
    "℉": "degF",
    "deg f": "degF",
    "k": "K",
    "hpa": "hPa",
    "pa": "Pa",
    "kpa": "kPa",
    "mb": "mbar",
    "m s^-1": "m s-1",
    "m*s-1": "m s-1",
    "km/h": "km h-1",
    "kt": "knot",
    "kn": "knot",
    "in": "inch",
    "kg/m2": "kg m-2",
    "mm/day": "mm day-1",
    "m3/s": "m3 s-1",
    "m^3/s": "m3 s-1",
    "umol/mol": "ppm",
    "°": "degree",
}
# Numbers that stand for "nothing measured" in archives.
_CODES: tuple[float, ...] = (
    -9999.0,
    -99999.0,
    -999.0,
    -99.0,
    -99.9,
    -99.99,
    -999.9,
    -999.99,
    -9999.9,
    999.0,
    999.9,
    9999.0,
    9999.9,
    99999.0,
)
_CODES += (-32768.0, 32767.0)
_HUGE = 1e19  # fill values of models and of netCDF (1e20, 9.97e36)
_FAR = 3.0  # ranges of the other values between them and a code
_FITS = 0.99  # share of a column's values inside a variable's range where its unit fits


def known_variable(name: str) -> str | None:
    """The variable that a column's name means: the table's own name, or a common one; None where neither."""
    if name in VARIABLES:
        return name
    plain = re.sub(r"[\s._-]", "", name).lower()
    return next((variable for variable, names in _NAMES.items() if plain in names), None)


def unit_spelt(unit: str) -> str:
    """A unit as the table spells it, where the spelling is a common one."""
    return _UNITS.get(unit.strip().lower(), unit.strip())


def fitting_units(variable: str, values: np.ndarray) -> list[str]:
    """Units in which the values (finite, float64) lie within the variable's range, one name for each conversion."""
    row = VARIABLES[variable]
    found: dict[tuple[float, ...], str] = {}
    for unit in [row.unit, *units_of(variable)]:
        physical = convert(values, unit, variable=variable, where=variable)
        inside = (physical >= row.minimum) & (physical <= row.maximum)
        conversion = tuple(np.round(convert(np.array([0.0, 1.0]), unit, variable=variable, where=variable), 9))
        if inside.mean() >= _FITS:
            found.setdefault(conversion, unit)
    return list(found.values())


def missing_codes(values: np.ndarray) -> list[float]:
    """Codes for a missing value among finite numbers: from the list of usual ones, and far from all other values."""
    finite = values[np.isfinite(values)]
    codes = sorted({float(value) for value in finite[np.abs(finite) >= _HUGE]})
    finite = finite[np.abs(finite) < _HUGE]
    for code in _CODES:
        others = finite[~np.isin(finite, (code, *codes, *_CODES))]
        if not (finite == code).any() or not len(others):
            continue
        extent = max(float(np.ptp(others)), 1e-9)
        if min(abs(code - others.min()), abs(code - others.max())) > _FAR * extent:
            codes.append(code)
    return codes
