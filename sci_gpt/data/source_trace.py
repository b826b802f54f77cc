"""Reads event records (miniSEED, SAC and whatever else obspy reads, with StationXML and QuakeML) into traces."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import obspy

from sci_gpt.data.calendars import posix_clock
from sci_gpt.data.cf_grid import slug
from sci_gpt.data.quality import at_limit
from sci_gpt.data.series_sample import converted
from sci_gpt.data.source import Part, SourceSettings, locate
from sci_gpt.data.waveforms import flags_at_working_rate, working_rate
from sci_gpt.errors import DataError
from sci_tokenizers.sample import Modality, Sample

COMPONENTS = ("vertical", "north", "east")
# Last letter of a channel code (SEED manual, appendix A); 1 and 2 are horizontals near north and east.
COMPONENT = {"Z": 0, "N": 1, "1": 1, "E": 2, "2": 2}


class EventRecords:
    """Event records -> traces of one receiver and three components, at the working rate, filtered causally.

    A receiver's components are cut to the time that all of them cover; a gap, or a value that is not finite, ends a
    stretch and the filter starts anew.
    A component that was not recorded is missing throughout.
    """

    modality: ClassVar[Modality] = "trace"
    options: ClassVar[Mapping[str, str]] = {
        "events": "{event: {files: [globs], origin, latitude, longitude, magnitude, channels: [globs to keep]}}",
        "stations": "{STATION: {latitude, longitude, elevation}} where the files do not say",
        "quantity": "digitizer_counts (default) or ground_velocity",
        "unit": "unit of the files' values (default count)",
        "target_hz": "working rate (default 10)",
        "high_pass_hz": "corner of the causal high-pass (default none)",
        "min_seconds": "shorter stretches are left out (default 60)",
    }
    required: ClassVar[tuple[str, ...]] = ("events",)

    def parts(self, settings: SourceSettings) -> list[Part]:
        """See `Source.parts`: an event with all its records each."""
        paths = locate(settings)
        records = [path for path in paths if path.suffix.lower() != ".xml"]
        places = station_places([path for path in paths if path.suffix.lower() == ".xml"])
        parts, used = [], set[Path]()
        for event, row in settings.options["events"].items():
            names = [str(name) for name in row["files"]]
            chosen = [path for path in records if any(fnmatch.fnmatch(path.name, name) for name in names)]
            lost = [name for name in names if not any(fnmatch.fnmatch(path.name, name) for path in records)]
            if lost:
                raise DataError(
                    f"{settings.where}: event {event!r} names record {lost[0]!r}, which is not among `files`"
                )
            used.update(chosen)
            # Packed samples take about one byte (Steim); a receiver that lacks components has them as missing.
            size = 4 * sum(path.stat().st_size for path in chosen)
            parts.append(Part(name=str(event), select={"event": event, "paths": chosen, "places": places}, bytes=size))
        idle = [path.name for path in records if path not in used]
        if idle:
            raise DataError(f"{settings.where}: record {idle[0]!r} belongs to no event in option events")
        return parts

    def read(self, settings: SourceSettings, part: Part) -> Iterator[Sample]:
        """See `Source.read`."""
        places = dict(part.select["places"]) | dict(settings.options.get("stations", {}))
        stream = obspy.Stream()
        for path in part.select["paths"]:
            stream += read_waveforms(path)
        row = settings.options["events"][part.select["event"]]
        keep = [str(pattern) for pattern in row.get("channels", ("*",))]
        stream.traces = [t for t in stream if any(fnmatch.fnmatch(t.stats.channel, pattern) for pattern in keep)]
        yield from stream_samples(stream, settings, event=part.name, places=places)


def read_waveforms(path: Path) -> obspy.Stream:
    """The records of one file, in any format that obspy reads.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # obspy warns of odd headers in files that it reads well
            return obspy.read(str(path), check_compression=path.suffix in (".gz", ".bz2", ".zip"))
    except Exception as error:
        raise DataError(
            f"{path} cannot be read as waveforms: {' '.join(str(error).split())[:120]}; give a whole file"
        ) from error


def station_places(paths: list[Path]) -> dict[str, dict[str, float]]:
    """{STATION: {latitude, longitude, elevation}} of StationXML files; QuakeML files are passed over."""
    places: dict[str, dict[str, float]] = {}
    for path in paths:
        if b"StationXML" not in path.read_bytes()[:2000]:
            continue
        for network in obspy.read_inventory(str(path)):
            for station in network:
                places[station.code] = {
                    "latitude": float(station.latitude),
                    "longitude": float(station.longitude),
                    "elevation": float(station.elevation),
                }
    return places


def stream_samples(
    stream: obspy.Stream,
    settings: SourceSettings,
    *,
    event: str,
    places: Mapping[str, Mapping[str, float]],
) -> Iterator[Sample]:
    """Samples of a stream in memory: one per receiver (station, location, band) and continuous piece.

    Args:
        stream: the records; not changed.
        settings: options as in `EventRecords.options`; `files` and `events` are not used.
        event: the group in the samples' keys.
        places: of stations, where the records' own headers do not say.

    Raises:
        DataError: no record of a known component, or a unit that does not convert.
    """
    receivers: dict[tuple[str, str, str, str, str], dict[int, list[Any]]] = {}
    for trace in stream:
        stats = trace.stats
        component = COMPONENT.get(stats.channel[-1:].upper())
        if component is None:
            raise DataError(
                f"{settings.where}: channel {trace.id!r} ends in none of {''.join(COMPONENT)}; leave it out"
            )
        band = (
            stats.network,
            stats.station,
            stats.location.strip(),
            stats.channel[:-1].strip(),
            f"{stats.sampling_rate:.4f}",
        )
        receivers.setdefault(band, {}).setdefault(component, []).extend(_finite_pieces(trace, settings.where))
    if not receivers:
        raise DataError(f"{settings.where}: event {event!r} has no record")
    for band, components in sorted(receivers.items()):
        name = slug("_".join(part for part in band[:4] if part))
        for part, pieces in enumerate(_continuous(components)):
            rate = float(next(iter(pieces.values())).stats.sampling_rate)
            length = max(len(trace.data) for trace in pieces.values()) / rate
            if length >= float(settings.options.get("min_seconds", 60.0)):
                key = f"{settings.name}/{slug(event)}/{name}" + (f"/{part}" if part else "")
                yield _sample(pieces, settings, key=key, place=_place(pieces, places))


def _finite_pieces(trace: Any, where: str) -> list[Any]:
    """The trace, cut where it has no finite value: that is a gap like any other.

    Raises:
        DataError: it has none at all.
    """
    present = np.isfinite(trace.data) & ~np.ma.getmaskarray(trace.data)
    if present.all():
        return [trace]
    if not present.any():
        raise DataError(f"{where}: no value of {trace.id} from {trace.stats.starttime} on is finite; leave it out")
    masked = trace.copy()
    masked.data = np.ma.masked_array(np.ma.getdata(trace.data), mask=~present)
    return list(masked.split())


def _continuous(components: Mapping[int, list[Any]]) -> Iterator[dict[int, Any]]:
    """Pieces without a gap in any component: the overlaps of the components' continuous records."""
    joined = {}
    for component, traces in components.items():
        stream = obspy.Stream([trace.copy() for trace in traces])
        stream.merge(method=-1)  # joins records that follow one another; gaps stay gaps
        joined[component] = sorted(stream, key=lambda trace: trace.stats.starttime)
    pieces: list[dict[int, Any]] = [{}]
    for component, traces in joined.items():
        pieces = [
            cut for piece in pieces for trace in traces if (cut := _overlap({**piece, component: trace})) is not None
        ]
    yield from sorted(pieces, key=lambda piece: next(iter(piece.values())).stats.starttime)


def _overlap(piece: dict[int, Any]) -> dict[int, Any] | None:
    start = max(trace.stats.starttime for trace in piece.values())
    end = min(trace.stats.endtime for trace in piece.values())
    if end <= start:
        return None
    cut = {component: trace.slice(start, end, nearest_sample=True) for component, trace in piece.items()}
    length = min(len(trace.data) for trace in cut.values())
    for trace in cut.values():
        trace.data = trace.data[:length]
    return cut


def _sample(pieces: dict[int, Any], settings: SourceSettings, *, key: str, place: Mapping[str, float]) -> Sample:
    options = settings.options
    quantity = str(options.get("quantity", "digitizer_counts"))
    names = tuple(f"{quantity}_{component}" for component in COMPONENTS)
    first = next(iter(pieces.values())).stats
    high_pass = options.get("high_pass_hz")
    target = float(options.get("target_hz", 10.0))
    columns, rate = {}, 1.0
    for component, trace in pieces.items():
        raw = converted(
            trace.data, str(options.get("unit", "count")), variable=names[component], where=f"{key}, {trace.id}"
        )
        columns[component], rate = working_rate(
            raw,
            float(trace.stats.sampling_rate),
            target_hz=target,
            high_pass_hz=None if high_pass is None else float(high_pass),
        )
    times = len(next(iter(columns.values())))
    raw_rate = float(first.sampling_rate)
    clipped = np.zeros(len(next(iter(pieces.values())).data), bool)
    for trace in pieces.values():
        clipped |= at_limit(trace.data, np.ones(len(trace.data), bool))  # before any filter
    values, valid = np.zeros((times, 3, 1, 1), np.float32), np.zeros((times, 3, 1, 1), bool)
    for component, column in columns.items():
        values[:, component, 0, 0] = column
        valid[:, component] = True
    clock = posix_clock(float(first.starttime.timestamp) + np.arange(times) / rate)
    return Sample(
        key=key,
        source=settings.name,
        modality="trace",
        variables=names,
        levels=(float("nan"),) * 3,
        values=values,
        valid=valid,
        time=clock.time,
        year_phase=clock.year_phase,
        day_phase=clock.day_phase,
        step_seconds=1.0 / rate,
        clipped=flags_at_working_rate(clipped, raw_rate, target_hz=target),
        **{
            name: np.full((1, 1), place.get(name, np.nan), np.float32)
            for name in ("latitude", "longitude", "elevation")
        },
    )


def _place(pieces: dict[int, Any], places: Mapping[str, Mapping[str, float]]) -> Mapping[str, float]:
    """Place of a receiver: option stations or StationXML, else the header of a SAC or AH file."""
    stats = next(iter(pieces.values())).stats
    if stats.station in places:
        return places[stats.station]
    if "sac" in stats and "stla" in stats.sac:
        return {
            "latitude": stats.sac.stla,
            "longitude": stats.sac.stlo,
            "elevation": stats.sac.get("stel", float("nan")),
        }
    if "ah" in stats:
        station = stats.ah.station
        return {"latitude": station.latitude, "longitude": station.longitude, "elevation": station.elevation}
    return {}
