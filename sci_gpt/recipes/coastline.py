"""Coastlines for maps: Natural Earth's land at 1:110 million, kept beside this file as TopoJSON (public domain)."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import numpy as np

SOURCE = "Natural Earth 1:110m land (public domain), as TopoJSON of the package world-atlas 2.0.2 (ISC, M. Bostock)"
_FILE = Path(__file__).with_name("land-110m.json")


@lru_cache(maxsize=1)
def coastlines() -> tuple[np.ndarray, ...]:
    """Lines of (longitude, latitude) in degrees, longitude within -180..180: float64 (point, 2) each.

    TopoJSON keeps arcs as differences of integers: position = cumulative sum x scale + translate. What crosses the date
    line is two lines.
    """
    topology = json.loads(_FILE.read_text(encoding="utf-8"))
    scale, translate = (np.asarray(topology["transform"][name], np.float64) for name in ("scale", "translate"))
    lines: list[np.ndarray] = []
    for arc in topology["arcs"]:
        line = np.cumsum(np.asarray(arc), axis=0) * scale + translate
        lines += np.split(line, np.flatnonzero(np.abs(np.diff(line[:, 0])) > 180.0) + 1)
    return tuple(lines)


def coastlines_between(west: float, east: float) -> list[np.ndarray]:
    """The lines, each wherever it falls inside the longitudes west..east (any range, as 0..360 or 150..210)."""
    lines = []
    for line in coastlines():
        for turn in (-360.0, 0.0, 360.0):
            shifted = line + np.array([turn, 0.0])
            if shifted[:, 0].max() >= west and shifted[:, 0].min() <= east:
                lines.append(shifted)
    return lines
