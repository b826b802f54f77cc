"""Exhibits: examples of forecasts beside truth and baseline, picked by a rule that does not look at scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sci_evals.arrivals import first_arrivals
from sci_evals.baseline import Forecast
from sci_evals.baselines import forecast_baselines
from sci_evals.metrics import LEVELS, MEDIAN
from sci_evals.scores import QuantileModel, WindowScores
from sci_evals.tasks import lead_name
from sci_evals.windowset import WindowSet, cut
from sci_gpt.data.store import Store
from sci_tokenizers.variables import inverse_transform

_LOW, _HIGH = LEVELS.index(0.1), LEVELS.index(0.9)
_PANELS = 4
_ROLLS = 40


@dataclass(frozen=True, kw_only=True)
class Band:
    """10 %, 50 % and 90 % quantiles: float64 (3, lead or time) in physical units."""

    name: str
    quantiles: np.ndarray


@dataclass(frozen=True, kw_only=True)
class SeriesPanel:
    """One forecast of a series: what was seen, what came, and two bands; times are seconds since 1970."""

    group: str
    past_time: np.ndarray
    past: np.ndarray
    time: np.ndarray
    truth_time: np.ndarray
    truth: np.ndarray
    model: Band
    baseline: Band


@dataclass(frozen=True, kw_only=True)
class SeriesExhibit:
    """Forecasts of one channel from origins spread over the test split."""

    source: str
    channel: str
    variable: str
    step_seconds: float
    panels: tuple[SeriesPanel, ...]


@dataclass(frozen=True, kw_only=True)
class MapExhibit:
    """One field at one lead: (Y, X) each, NaN where there is no truth; degrees; time in seconds since 1970."""

    source: str
    channel: str
    variable: str
    lead: str
    time: float
    latitude: np.ndarray
    longitude: np.ndarray
    truth: np.ndarray
    model: np.ndarray
    baseline: np.ndarray
    baseline_name: str


@dataclass(frozen=True, kw_only=True)
class WaveExhibit:
    """A record and rolling forecasts of a part of it; times are seconds after its `start` (seconds since 1970)."""

    source: str
    record: str
    channel: str
    variable: str
    lead: str
    start: float
    time: np.ndarray
    values: np.ndarray
    rolled_time: np.ndarray
    model: Band
    baseline: Band
    arrivals: dict[str, float]


Exhibit = SeriesExhibit | MapExhibit | WaveExhibit


def make_exhibits(
    store: Store,
    test: WindowSet,
    *,
    model: QuantileModel,
    forecasts: Mapping[str, Forecast],
    baselines: Mapping[str, WindowScores],
) -> list[Exhibit]:
    """Examples of one source.

    Args:
        store: for whole records of traces.
        test: its test windows.
        model: the trained model.
        forecasts, baselines: of every baseline on these windows; the one of least CRPS is shown.
    """
    best = min(baselines, key=lambda name: _mean(baselines[name]))
    if test.modality == "trace":
        return list(_waves(store, test, model=model, best=best))
    if test.modality == "grid":
        return list(_maps(test, model=model, forecast=forecasts[best], best=best))
    chosen = _spread_over_time(test, _PANELS)
    windows = test.take(chosen)
    quantiles = model.quantiles(
        list(windows.samples()), num_context=test.shape.num_context, leads=test.shape.leads, levels=LEVELS
    )
    return [_series(windows, quantiles, forecast=forecasts[best].take(chosen), best=best)]


def _mean(scores: WindowScores) -> float:
    """Mean over channels of the CRPS relative to nothing: used to rank baselines of one source only."""
    total, weight = scores.total["crps"].sum(axis=(0, 1)), scores.weight.sum(axis=(0, 1))
    seen = weight > 0
    return float(np.log(np.maximum(total[seen] / weight[seen], 1e-300)).mean())


def _spread_over_time(windows: WindowSet, count: int) -> np.ndarray:
    """Windows at even places of the test split's order in time, the middle one where one is asked for."""
    order = np.argsort(windows.origin, kind="stable")
    places = (np.arange(count) + 0.5) / count * len(order)
    return np.asarray(order[places.astype(int)])


def _band(forecast: Forecast, variable: str, *, channel: int) -> np.ndarray:
    """10, 50 and 90 % of a baseline in physical units: (3, N, lead, frame_times, Y, X)."""
    return np.stack([inverse_transform(forecast.quantile(level, channel), variable) for level in (_LOW, MEDIAN, _HIGH)])


def _series(windows: WindowSet, quantiles: Sequence[np.ndarray], *, forecast: Forecast, best: str) -> SeriesExhibit:
    """The channel with the fewest missing values, after three times the longest lead (24 steps at least)."""
    shape = windows.shape
    channel = int(windows.valid.mean(axis=(0, 1, 3, 4)).argmax())
    index = shape.future_index[:, 0]
    seen = slice(max(0, shape.context_times - max(24, 3 * max(shape.leads))), shape.context_times)
    later = slice(shape.context_times, shape.num_times)
    bands = _band(forecast, windows.variables[channel], channel=channel)
    values = np.where(windows.valid, windows.values, np.nan)[:, :, channel, 0, 0]
    panels = [
        SeriesPanel(
            group=windows.groups[i],
            past_time=windows.time[i, seen],
            past=values[i, seen],
            time=windows.time[i, index],
            truth_time=windows.time[i, later],
            truth=values[i, later],
            model=Band(name="model", quantiles=quantiles[i][[_LOW, MEDIAN, _HIGH], :, 0, channel, 0, 0]),
            baseline=Band(name=best, quantiles=bands[:, i, :, 0, 0, 0]),
        )
        for i in range(windows.num_windows)
    ]
    return SeriesExhibit(
        source=windows.source,
        channel=windows.channels[channel],
        variable=windows.variables[channel],
        step_seconds=float(windows.step_seconds[0]),
        panels=tuple(panels),
    )


def _maps(test: WindowSet, *, model: QuantileModel, forecast: Forecast, best: str) -> list[MapExhibit]:
    """The first channel at the first lead of the middle origin; tiles side by side are joined to one field."""
    middle = int(_spread_over_time(test, 1)[0])
    latitudes = [place[0] for place in test.places]
    like = [np.array_equal(latitudes[row], latitudes[test.stretch[middle]]) for row in test.stretch]
    same = np.flatnonzero((test.origin == test.origin[middle]) & np.asarray(like))
    west = [float(test.places[test.stretch[i]][1].min()) for i in same]
    tiles = same[np.argsort(west, kind="stable")]
    windows = test.take(tiles)
    quantiles = model.quantiles(
        list(windows.samples()), num_context=test.shape.num_context, leads=test.shape.leads, levels=LEVELS
    )
    truth = np.concatenate(list(windows.truth[:, 0, 0, 0]), axis=1)  # (Y, X of all tiles)
    median = np.concatenate([part[MEDIAN, 0, 0, 0] for part in quantiles], axis=1)
    baseline = np.concatenate(list(_band(forecast.take(tiles), test.variables[0], channel=0)[1, :, 0, 0]), axis=1)
    places = [test.places[row] for row in windows.stretch]
    return [
        MapExhibit(
            source=test.source,
            channel=test.channels[0],
            variable=test.variables[0],
            lead=lead_name(test.shape.leads[:1], float(test.step_seconds[0])),
            time=float(windows.time[0, test.shape.future_index[0, 0]]),
            latitude=np.concatenate([place[0] for place in places], axis=1),
            longitude=np.concatenate([place[1] for place in places], axis=1),
            truth=truth,
            model=np.where(np.isnan(truth), np.nan, median),
            baseline=np.where(np.isnan(truth), np.nan, baseline),
            baseline_name=best,
        )
    ]


def _waves(store: Store, test: WindowSet, *, model: QuantileModel, best: str) -> list[WaveExhibit]:
    """Of each long test record, its first recorded component; forecasts roll over the P arrival, or the middle."""
    options = store.manifest["sources"][test.source].get("options", {})
    exhibits = []
    lengths = store.lengths(test.source, "test").tolist()
    for number, (key, length) in enumerate(zip(store.keys(test.source, "test"), lengths, strict=True)):
        shape = test.shape
        span = shape.num_times + (_ROLLS - 1) * max(shape.leads) * shape.frame_times
        if length < span:
            continue
        sample = store.read(test.source, "test", index=number, start=0, stop=length)
        component = int(np.argmax(sample.valid.any(axis=(0, 2, 3))))
        seconds = sample.time - sample.time[0]
        event = options.get("events", {}).get(key.split("/")[1], {})
        arrivals = {
            name: at - sample.time[0]
            for name, at in first_arrivals(
                event, float(sample.latitude[0, 0]), longitude=float(sample.longitude[0, 0])
            ).items()
            if sample.time[0] <= at <= sample.time[-1]
        }
        centre = np.searchsorted(seconds, min(arrivals.values())) if arrivals else length // 2
        first = int(np.clip(centre - shape.context_times - span // 6, 0, length - span))
        starts = first + np.arange(_ROLLS) * max(shape.leads) * shape.frame_times
        windows = cut([sample], shape, starts=[starts])
        index = shape.future_index.ravel()
        quantiles = model.quantiles(
            list(windows.samples()), num_context=shape.num_context, leads=shape.leads, levels=LEVELS
        )
        rolled = np.stack(
            [part[[_LOW, MEDIAN, _HIGH], :, :, component, 0, 0].reshape(3, -1) for part in quantiles], axis=1
        )
        forecast = forecast_baselines(windows, windows)[best]
        band = _band(forecast, windows.variables[component], channel=component)
        exhibits.append(
            WaveExhibit(
                source=test.source,
                record=key.split("/", 1)[1],
                channel=sample.channels[component],
                variable=sample.variables[component],
                lead=lead_name(shape.leads, sample.step_seconds * shape.frame_times),
                start=float(sample.time[0]),
                time=seconds,
                values=np.where(sample.valid[:, component, 0, 0], sample.values[:, component, 0, 0], np.nan),
                rolled_time=seconds[(starts[:, None] + index).ravel()],
                model=Band(name="model", quantiles=rolled.reshape(3, -1)),
                baseline=Band(name=best, quantiles=band.reshape(3, -1)),
                arrivals=arrivals,
            )
        )
    return exhibits
