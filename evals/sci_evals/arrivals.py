"""First P and S arrivals of an event at a station, by travel times through the Earth model iasp91."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

import numpy as np

_PHASES = {"P": ("P", "p", "Pdiff", "Pn"), "S": ("S", "s", "Sdiff", "Sn")}
_SURFACE_KM = 10.0


def first_arrivals(event: Mapping[str, Any], latitude: float, *, longitude: float) -> dict[str, float]:
    """{"P": seconds since 1970, "S": ..} of the earliest phase of each kind; empty where origin or place is unknown.

    Args:
        event: origin (ISO time, UTC), latitude, longitude in degrees, depth_km (10 km where it is not given).
        latitude, longitude: of the station, degrees.
    """
    if not {"origin", "latitude", "longitude"} <= set(event) or not np.isfinite([latitude, longitude]).all():
        return {}
    # Imported here: obspy's travel-time tables take a second to load, and only records of known events need them.
    from obspy.geodetics import locations2degrees

    degrees = float(locations2degrees(float(event["latitude"]), float(event["longitude"]), latitude, longitude))
    origin = event["origin"]
    when = origin if isinstance(origin, datetime) else datetime.fromisoformat(str(origin))
    start = when.replace(tzinfo=when.tzinfo or UTC).timestamp()
    table = _travel_times(round(degrees, 3), float(event.get("depth_km", _SURFACE_KM)))
    return {name: start + seconds for name, seconds in table.items()}


@lru_cache(maxsize=64)
def _travel_times(degrees: float, depth_km: float) -> dict[str, float]:
    # Imported here, as in first_arrivals.
    from obspy.taup import TauPyModel

    found = {}
    for name, phases in _PHASES.items():
        arrivals = TauPyModel("iasp91").get_travel_times(
            source_depth_in_km=depth_km, distance_in_degree=degrees, phase_list=phases
        )
        if arrivals:
            found[name] = float(min(arrival.time for arrival in arrivals))
    return found
