"""The table of baselines, and the one call that fits all that apply and forecasts with them."""

from __future__ import annotations

import numpy as np

from sci_evals.autoregressive import AutoRegression, ContextMedian, TracePersistence, Zero
from sci_evals.baseline import Baseline, Forecast
from sci_evals.climatology import context_anomalies, fit_climatology
from sci_evals.naive import (
    AnomalyPersistence,
    DampedPersistence,
    Persistence,
    RecentMean,
    RecentSpread,
    SeasonAgo,
    SeasonalClimatology,
)
from sci_evals.ridge import Ridge, SeasonalRidge
from sci_evals.windowset import WindowSet
from sci_gpt.errors import DataError

_FEW_WINDOWS = 20_000

BASELINES: dict[str, type[Baseline]] = {
    "persistence": Persistence,
    "climatology": SeasonalClimatology,
    "anomaly persistence": AnomalyPersistence,
    "damped persistence": DampedPersistence,
    "recent mean": RecentMean,
    "recent mean and spread": RecentSpread,
    "season ago": SeasonAgo,
    "ridge": Ridge,
    "seasonal ridge": SeasonalRidge,
    "zero": Zero,
    "context median": ContextMedian,
    "trace persistence": TracePersistence,
    "AR(32)": AutoRegression,
}


def forecast_baselines(train: WindowSet, test: WindowSet) -> dict[str, Forecast]:
    """Fit every baseline that applies on `train` and forecast `test`.

    Raises:
        DataError: the two differ in shape or channels.
    """
    if train.shape != test.shape or train.channels != test.channels:
        raise DataError(
            f"source {test.source!r}: training windows are {train.shape} of {train.channels}, "
            f"test windows {test.shape} of {test.channels}; cut both alike"
        )
    # Stations and runs held out whole have no climatology of their own; then all places share one, in training too.
    by_place = set(test.place_names) <= set(train.place_names)
    climatology = fit_climatology(train, by_place=by_place)
    few = train.take(np.arange(0, train.num_windows, -(-train.num_windows // _FEW_WINDOWS)))
    forecasts = {}
    for name, kind in BASELINES.items():
        if kind.applies(test):
            baseline = kind()
            baseline.fit(few if kind.few_parameters else train, climatology)
            forecasts[name] = baseline.predict(test)
    context_anomalies.cache_clear()
    return forecasts
