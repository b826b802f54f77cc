"""The table of physical variables: CF name, unit, valid range, kind and transform; units live here, once."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

import numpy as np

Kind = Literal["ratio", "interval", "circular", "categorical", "accumulated"]
Transform = Literal["none", "log1p", "asinh"]


class UnknownVariableError(ValueError):
    """A variable that is not in the table."""

    def __init__(self, name: str, where: str) -> None:
        super().__init__(
            f"{where}: variable {name!r} is not in the variable table; nearest: {nearest(name, VARIABLES)!r}. "
            "Map the file's name to a table name, or add a line to sci_tokenizers/variables.py"
        )


class UnitError(ValueError):
    """A unit that does not convert to the table's unit."""


def nearest(name: str, known: object) -> str:
    """The known name closest to `name` (for error messages); empty when nothing is close."""
    return next(iter(get_close_matches(name, list(known), n=1, cutoff=0.0)), "")  # type: ignore[call-overload]


@dataclass(frozen=True, kw_only=True)
class Variable:
    """One physical variable.

    Attributes:
        name: CF standard name (or the field's term where CF has none).
        unit: the unit of every value in this system.
        kind: ratio (a true zero) | interval | circular (degrees) | categorical | accumulated.
        transform: applied before the tokenizer and undone after; its argument is in `transform_unit` of `unit`.
        transform_unit: the value that the transform sees as 1.
        minimum, maximum: valid range in `unit`; values outside are missing.
        calibrated: False for digitizer counts, whose scale says nothing physical.
        piles_up: many values equal a bound (dry hours, unlimited visibility). A climatology's cycle is not taken off:
            it would spread the one value over many.
    """

    name: str
    unit: str
    kind: Kind
    transform: Transform = "none"
    transform_unit: float = 1.0
    minimum: float = -np.inf
    maximum: float = np.inf
    calibrated: bool = True
    piles_up: bool = False


def _table(*rows: Variable) -> dict[str, Variable]:
    return {row.name: row for row in rows}


VARIABLES: dict[str, Variable] = _table(
    Variable(name="air_temperature", unit="K", kind="interval", minimum=130.0, maximum=350.0),
    Variable(name="air_temperature_daily_maximum", unit="K", kind="interval", minimum=180.0, maximum=335.0),
    Variable(name="air_temperature_daily_minimum", unit="K", kind="interval", minimum=180.0, maximum=335.0),
    Variable(name="dew_point_temperature", unit="K", kind="interval", minimum=150.0, maximum=320.0),
    Variable(name="sea_surface_temperature", unit="K", kind="interval", minimum=265.0, maximum=315.0),
    Variable(name="relative_humidity", unit="%", kind="ratio", minimum=0.0, maximum=110.0),
    Variable(name="eastward_wind", unit="m s-1", kind="interval", minimum=-150.0, maximum=150.0),
    Variable(name="northward_wind", unit="m s-1", kind="interval", minimum=-150.0, maximum=150.0),
    Variable(name="wind_speed", unit="m s-1", kind="ratio", minimum=0.0, maximum=150.0),
    Variable(name="wind_from_direction", unit="degree", kind="circular", minimum=0.0, maximum=360.0),
    Variable(name="air_pressure_at_mean_sea_level", unit="Pa", kind="interval", minimum=85000.0, maximum=110000.0),
    Variable(name="surface_air_pressure", unit="Pa", kind="interval", minimum=30000.0, maximum=110000.0),
    Variable(name="visibility_in_air", unit="m", kind="ratio", minimum=0.0, maximum=100000.0, piles_up=True),
    Variable(
        name="precipitation_amount",
        unit="kg m-2",
        kind="accumulated",
        transform="log1p",
        transform_unit=1.0,
        minimum=0.0,
        maximum=2000.0,
        piles_up=True,
    ),
    Variable(
        name="precipitation_flux",
        unit="kg m-2 s-1",
        kind="accumulated",
        transform="log1p",
        transform_unit=1e-5,
        minimum=0.0,
        maximum=0.1,
        piles_up=True,
    ),
    Variable(name="mole_fraction_of_carbon_dioxide_in_air", unit="1e-6", kind="ratio", minimum=150.0, maximum=2000.0),
    Variable(
        name="surface_snow_amount",
        unit="kg m-2",
        kind="ratio",
        transform="log1p",
        minimum=0.0,
        maximum=50000.0,
        piles_up=True,
    ),
    Variable(name="geopotential_height", unit="m", kind="interval", minimum=-1000.0, maximum=60000.0),
    Variable(name="specific_humidity", unit="1", kind="ratio", minimum=0.0, maximum=0.1),
    Variable(
        name="water_volume_transport_in_river_channel",
        unit="m3 s-1",
        kind="ratio",
        transform="log1p",
        minimum=0.0,
        maximum=4e5,
    ),
    Variable(name="digitizer_counts_vertical", unit="count", kind="interval", calibrated=False),
    Variable(name="digitizer_counts_north", unit="count", kind="interval", calibrated=False),
    Variable(name="digitizer_counts_east", unit="count", kind="interval", calibrated=False),
    Variable(name="ground_velocity_vertical", unit="m s-1", kind="interval", minimum=-50.0, maximum=50.0),
    Variable(name="ground_velocity_north", unit="m s-1", kind="interval", minimum=-50.0, maximum=50.0),
    Variable(name="ground_velocity_east", unit="m s-1", kind="interval", minimum=-50.0, maximum=50.0),
)
BUILT_IN: tuple[str, ...] = tuple(VARIABLES)  # what every model of this code has a row for, in this order
VARIABLE_NAMES: list[str] = list(VARIABLES)
VARIABLE_INDEX: dict[str, int] = {name: index for index, name in enumerate(VARIABLES)}


def declare(variable: Variable) -> None:
    """Add a variable to the table of this process; saying the same thing twice is no error.

    Raises:
        UnitError: the name is in the table with another unit, kind or transform.
    """
    known = VARIABLES.get(variable.name)
    if known is not None and known != variable:
        raise UnitError(
            f"variable {variable.name!r} is in the table already, in {known.unit!r} and of kind {known.kind}, and is "
            f"declared in {variable.unit!r} and of kind {variable.kind}; give the new one another name"
        )
    if known is None:
        VARIABLES[variable.name] = variable
        VARIABLE_INDEX[variable.name] = len(VARIABLE_NAMES)
        VARIABLE_NAMES.append(variable.name)


# unit -> (dimension, factor, offset): value_in_base = value * factor + offset
_UNITS: dict[str, tuple[str, float, float]] = {
    "K": ("temperature", 1.0, 0.0),
    "kelvin": ("temperature", 1.0, 0.0),
    "degC": ("temperature", 1.0, 273.15),
    "celsius": ("temperature", 1.0, 273.15),
    "degrees_celsius": ("temperature", 1.0, 273.15),
    "degF": ("temperature", 5.0 / 9.0, 459.67 * 5.0 / 9.0),
    "Pa": ("pressure", 1.0, 0.0),
    "hPa": ("pressure", 100.0, 0.0),
    "mbar": ("pressure", 100.0, 0.0),
    "kPa": ("pressure", 1000.0, 0.0),
    "m s-1": ("speed", 1.0, 0.0),
    "m/s": ("speed", 1.0, 0.0),
    "km h-1": ("speed", 1.0 / 3.6, 0.0),
    "mph": ("speed", 0.44704, 0.0),
    "knot": ("speed", 1852.0 / 3600.0, 0.0),
    "m": ("length", 1.0, 0.0),
    "km": ("length", 1000.0, 0.0),
    "mile": ("length", 1609.344, 0.0),
    "foot": ("length", 0.3048, 0.0),
    "kg m-2": ("areal mass", 1.0, 0.0),
    "mm": ("areal mass", 1.0, 0.0),
    "inch": ("areal mass", 25.4, 0.0),
    "kg m-2 s-1": ("areal mass flux", 1.0, 0.0),
    "mm day-1": ("areal mass flux", 1.0 / 86400.0, 0.0),
    "%": ("fraction of 100", 1.0, 0.0),
    "percent": ("fraction of 100", 1.0, 0.0),
    "degree": ("angle", 1.0, 0.0),
    "degrees": ("angle", 1.0, 0.0),
    "1e-6": ("mole fraction", 1.0, 0.0),
    "ppm": ("mole fraction", 1.0, 0.0),
    "1": ("number", 1.0, 0.0),
    "count": ("count", 1.0, 0.0),
    "counts": ("count", 1.0, 0.0),
    "m3 s-1": ("volume flux", 1.0, 0.0),
}


def convert(values: np.ndarray, unit: str, *, variable: str, where: str) -> np.ndarray:
    """Convert from `unit` to the variable's own unit; float64 in, float64 out.

    Raises:
        UnitError: `unit` is unknown or of another dimension than the variable's.
        UnknownVariableError: the variable is not in the table.
    """
    if variable not in VARIABLES:
        raise UnknownVariableError(variable, where)
    own = VARIABLES[variable].unit
    if unit == own:
        return np.asarray(values, np.float64)
    known = _UNITS.get(unit)
    if known is None or own not in _UNITS or known[0] != _UNITS[own][0]:
        options = sorted(units_of(variable))
        raise UnitError(
            f"{where}: {variable} is held in {own!r}, and {unit!r} does not convert to it; "
            f"name one of {options} as the file's unit"
        )
    base = np.asarray(values, np.float64) * known[1] + known[2]
    return (base - _UNITS[own][2]) / _UNITS[own][1]


def units_of(variable: str) -> list[str]:
    """Units that convert to the variable's own; a declared variable in a unit of its own has that alone."""
    own = VARIABLES[variable].unit
    if own not in _UNITS:
        return [own]
    return [name for name, row in _UNITS.items() if row[0] == _UNITS[own][0]]


def forward_transform(values: np.ndarray, variable: str) -> np.ndarray:
    """Physical values to the transformed unit in which tokens and statistics are made."""
    row = VARIABLES[variable]
    if row.transform == "none":
        return values
    function = np.log1p if row.transform == "log1p" else np.arcsinh
    return function(values / row.transform_unit)


def lower_bound(variable: str) -> float:
    """The transformed value below which nothing lies and at which many values do: of what accumulates or piles up
    (precipitation, snow); -inf for all others. A range's other ends are there to find errors, and nothing lies on them.
    """
    row = VARIABLES[variable]
    if not (row.piles_up or row.kind == "accumulated") or row.minimum == -np.inf:
        return -np.inf
    return float(forward_transform(np.array(row.minimum), variable))


def inverse_transform(values: np.ndarray, variable: str) -> np.ndarray:
    """The inverse of `forward_transform`; log1p values below 0 come back as 0 (nothing is less than none)."""
    row = VARIABLES[variable]
    if row.transform == "none":
        return values
    if row.transform == "log1p":
        return np.expm1(np.maximum(values, 0.0)) * row.transform_unit
    return np.sinh(values) * row.transform_unit
