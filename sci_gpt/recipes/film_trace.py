"""Waveforms as films: an obspy Stream in, a Stream at the working rate out with one trace per channel and quantile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import obspy

from sci_gpt.data.calendars import posix_clock
from sci_gpt.data.source import SourceSettings
from sci_gpt.data.source_trace import COMPONENTS, stream_samples
from sci_gpt.errors import ConfigError, DataError
from sci_gpt.recipes.film import Film, Label, Notes, extend_values
from sci_tokenizers.sample import Modality, Sample

# What the reader of records and this film share; a model carries its own source's settings of these.
_OPTIONS = ("quantity", "unit", "target_hz", "high_pass_hz")
_MOST_SAMPLES = 100


@dataclass(frozen=True, kw_only=True)
class Receiver:
    """One seismometer of the stream: codes of its network and station, and its channel code per component."""

    network: str
    station: str
    channels: Mapping[int, str]


class TraceFilm(Film):
    """Records of one or more seismometers, components Z, N, E (or 1, 2); others are refused.

    Each record is filtered causally and decimated to the working rate (10 Hz where the record's rate is a multiple of
    it), exactly as in training; what lies before a gap, or a value that is not finite, is not used. The horizon counts
    samples at that rate, and the forecast is of the filtered record, in the record's own counts. The location code of a
    forecast trace is its quantile in per cent (`10`, `50`, `90`) or the number of its sample (`00`, `01`, ..), because
    miniSEED has no other place for it.
    """

    modality: ClassVar[Modality] = "trace"

    def __init__(self, data: obspy.Stream, *, notes: Notes, options: Mapping[str, Any]) -> None:
        self.contexts, self._receivers = [], []
        settings = SourceSettings(
            name=notes.source or "record",
            reader="event_records",
            modality="trace",
            options={**{name: options[name] for name in _OPTIONS if name in options}, "min_seconds": 0.0},
        )
        places = dict(zip(("latitude", "longitude", "elevation"), notes.place, strict=True))
        for codes, traces in _receivers(data).items():
            station = {codes[1]: places} if np.isfinite(notes.place[:2]).all() else {}
            pieces = list(stream_samples(obspy.Stream(traces), settings, event="input", places=station))
            if not pieces:
                raise DataError(f"{'.'.join(codes)}: its components share no time; give records of the same minutes")
            self.contexts.append(pieces[-1])
            present = [v for v in range(len(COMPONENTS)) if pieces[-1].valid[:, v].any()]
            channels = {v: next(t.stats.channel for t in traces if _component(t) == v) for v in present}
            self._receivers.append(Receiver(network=codes[0], station=codes[1], channels=channels))

    def extend(self, context: Sample, num_times: int) -> Sample:
        """See Film."""
        times = posix_clock(context.time[-1] + context.step_seconds * np.arange(1, num_times + 1))
        return extend_values(context, time=times.time, year_phase=times.year_phase, day_phase=times.day_phase)

    def answer(
        self, answers: Sequence[np.ndarray], labels: tuple[float, ...], *, kind: Label = "quantile"
    ) -> obspy.Stream:
        """float32 traces that begin one working step after the record's end."""
        codes = _location_codes(labels, kind)
        stream = obspy.Stream()
        for receiver, context, steps in zip(self._receivers, self.contexts, answers, strict=True):
            for component, channel in receiver.channels.items():
                for code, values in zip(codes, steps[:, :, component, 0, 0], strict=True):
                    header = {
                        "network": receiver.network,
                        "station": receiver.station,
                        "location": code,
                        "channel": channel,
                        "starttime": obspy.UTCDateTime(float(context.time[-1]) + context.step_seconds),
                        "sampling_rate": 1.0 / context.step_seconds,
                    }
                    stream.append(obspy.Trace(np.ascontiguousarray(values, np.float32), header=header))
        return stream


def _location_codes(labels: tuple[float, ...], kind: Label) -> list[str]:
    """Two digits a trace: quantiles in per cent, or numbers of samples.

    Raises:
        ConfigError: labels that two digits do not hold.
    """
    if kind == "sample":
        if len(labels) > _MOST_SAMPLES:
            raise ConfigError(
                f"{len(labels)} samples of a Stream: a trace's location code holds their two-digit number, so ask for "
                f"at most {_MOST_SAMPLES} at a time, with another seed for more"
            )
        return [f"{int(label):02d}" for label in labels]
    codes = [f"{round(100 * label):02d}" for label in labels]
    for level, code in zip(labels, codes, strict=True):
        if abs(level - int(code) / 100) > 1e-9:
            raise ConfigError(f"quantile {level} has no two-digit location code; ask for whole per cents")
    return codes


def _receivers(data: obspy.Stream) -> dict[tuple[str, ...], list[Any]]:
    """Traces by seismometer (network, station, location, band), gaps as separate traces.

    Raises:
        DataError: no trace; or two seismometers that differ only in the location code, which carries the quantile.
    """
    groups: dict[tuple[str, ...], list[Any]] = {}
    for trace in data.copy().split():  # a merged stream marks its gaps with masks; split writes into headers
        stats = trace.stats
        groups.setdefault((stats.network, stats.station, stats.location, stats.channel[:-1]), []).append(trace)
    if not groups:
        raise DataError("the stream holds no trace; give at least one record")
    seen: dict[tuple[str, ...], str] = {}
    for codes in groups:
        other = seen.setdefault((codes[0], codes[1], codes[3]), codes[2])
        if other != codes[2]:
            raise DataError(
                f"{codes[0]}.{codes[1]}: locations {other!r} and {codes[2]!r} would collide, as a forecast's location "
                "code is the quantile; give them one by one"
            )
    return groups


def _component(trace: Any) -> int:
    return {"Z": 0, "N": 1, "1": 1, "E": 2, "2": 2}.get(trace.stats.channel[-1:].upper(), -1)
