"""Toy worlds with known answers: an autoregressive station, a seasonal grid and a trace, as stretches."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from sci_tokenizers.sample import Sample

DAY = 86400.0


def red_noise(num_times: int, *, memory: float, deviation: float = 1.0, seed: int = 0) -> np.ndarray:
    """A stationary AR(1) process x[t] = memory x[t - 1] + e of standard deviation `deviation`: float64 (num_times,)."""
    generator = np.random.default_rng(seed)
    steps = generator.normal(size=num_times) * deviation * np.sqrt(1 - memory**2)
    out = np.empty(num_times)
    out[0] = generator.normal() * deviation
    for t in range(1, num_times):
        out[t] = memory * out[t - 1] + steps[t]
    return out


def daily_station(
    *,
    group: str = "A",
    years: float = 6.0,
    memory: float = 0.8,
    missing: float = 0.0,
    start_day: float = 0.0,
    seed: int = 0,
) -> Sample:
    """Daily temperature at two levels: a seasonal cycle of 10 K about 285 K plus red noise of 3 K (the second level
    0.5 of it).
    """
    num = int(years * 365)
    days = start_day + np.arange(num)
    phase = (days / 365.0) % 1.0
    noise = red_noise(num, memory=memory, deviation=3.0, seed=seed)
    lower = 285.0 - 10.0 * np.cos(2 * np.pi * phase) + noise
    upper = 275.0 - 8.0 * np.cos(2 * np.pi * phase) + 0.5 * noise
    upper += np.random.default_rng(seed + 1).normal(size=num)
    values = np.stack([lower, upper], axis=1)[:, :, None, None].astype(np.float32)
    valid = np.random.default_rng(seed + 2).random(values.shape) >= missing
    return Sample(
        key=f"toy_daily/{group}",
        source="toy_daily",
        modality="series",
        variables=("air_temperature", "air_temperature"),
        levels=(100000.0, 85000.0),
        values=np.where(valid, values, np.float32(0)),
        valid=valid,
        time=days * DAY,
        year_phase=phase.astype(np.float32),
        day_phase=np.zeros(num, np.float32),
        step_seconds=DAY,
        latitude=np.full((1, 1), 45.0, np.float32),
        longitude=np.full((1, 1), 5.0, np.float32),
        elevation=np.full((1, 1), np.nan, np.float32),
    )


def hourly_station(*, group: str = "A", days: int = 120, seed: int = 0) -> Sample:
    """Hourly temperature: a daily cycle of 5 K about 288 K plus red noise, and rain that is mostly nil."""
    num = days * 24
    hours = np.arange(num)
    phase = (hours / 24.0) % 1.0
    temperature = 288.0 - 5.0 * np.cos(2 * np.pi * phase) + red_noise(num, memory=0.95, deviation=2.0, seed=seed)
    rain = np.maximum(red_noise(num, memory=0.8, deviation=1.0, seed=seed + 1) - 1.0, 0.0) * 3.0
    values = np.stack([temperature, rain], axis=1)[:, :, None, None].astype(np.float32)
    return replace(
        daily_station(years=num / 365.0),
        key=f"toy_hourly/{group}",
        source="toy_hourly",
        variables=("air_temperature", "precipitation_amount"),
        levels=(np.nan, np.nan),
        values=values,
        valid=np.ones(values.shape, bool),
        time=hours * 3600.0,
        year_phase=(hours / 8766.0 % 1.0).astype(np.float32),
        day_phase=phase.astype(np.float32),
        step_seconds=3600.0,
    )


def as_series(grid: Sample) -> Sample:
    """A grid of one cell as a series."""
    return replace(grid, key=grid.key.replace("toy_grid", "toy_monthly"), source="toy_monthly", modality="series")


def monthly_grid(*, years: int = 8, rows: int = 6, columns: int = 8, west: float = 0.0, seed: int = 0) -> Sample:
    """Monthly sea surface temperature with a cycle, a trend over latitude, red noise and land (never valid) in one
    corner.
    """
    num = years * 12
    phase = ((np.arange(num) + 0.5) / 12.0) % 1.0
    latitude = np.repeat(np.linspace(50.0, 20.0 if rows > 1 else 50.0, rows)[:, None], columns, axis=1)
    longitude = np.repeat(west + np.linspace(0.0, 2.0 * (columns - 1), columns)[None], rows, axis=0)
    generator = np.random.default_rng(int(west))  # the cycle is the place's, the noise the seed's
    noise = np.stack([red_noise(num, memory=0.7, deviation=0.5, seed=seed + i) for i in range(rows * columns)], axis=1)
    cycle = np.cos(2 * np.pi * phase)[:, None, None] * generator.uniform(2.0, 4.0, (rows, columns))
    values = 300.0 - 0.3 * latitude - cycle + noise.reshape(num, rows, columns)
    valid = np.ones((num, 1, rows, columns), bool)
    if min(rows, columns) > 2:
        valid[:, :, :2, :2] = False
    values = np.where(valid, values[:, None], 0.0).astype(np.float32)
    return Sample(
        key=f"toy_grid/tile{west:g}",
        source="toy_grid",
        modality="grid",
        variables=("sea_surface_temperature",),
        levels=(np.nan,),
        values=values,
        valid=valid,
        time=np.arange(num) * 30.4375 * DAY,
        year_phase=phase.astype(np.float32),
        day_phase=np.zeros(num, np.float32),
        step_seconds=30.4375 * DAY,
        latitude=latitude.astype(np.float32),
        longitude=longitude.astype(np.float32),
        elevation=np.full((rows, columns), np.nan, np.float32),
    )


def trace_record(*, seconds: float = 240.0, rate: float = 10.0, onset: float = 120.0, seed: int = 0) -> Sample:
    """A vertical velocity record: AR(2) noise whose amplitude jumps a hundredfold at `onset` seconds."""
    num = int(seconds * rate)
    steps = np.random.default_rng(seed).normal(size=num)
    out = np.zeros(num)
    for t in range(2, num):
        out[t] = 1.6 * out[t - 1] - 0.8 * out[t - 2] + steps[t]
    out *= np.where(np.arange(num) / rate < onset, 1e-7, 1e-5)
    values = np.stack([out, 0.5 * out[::-1]], axis=1)[:, :, None, None].astype(np.float32)
    return Sample(
        key="toy_trace/event",
        source="toy_trace",
        modality="trace",
        variables=("ground_velocity_vertical", "ground_velocity_north"),
        levels=(np.nan, np.nan),
        values=values,
        valid=np.ones(values.shape, bool),
        time=np.arange(num) / rate,
        year_phase=np.zeros(num, np.float32),
        day_phase=np.zeros(num, np.float32),
        step_seconds=1.0 / rate,
        latitude=np.full((1, 1), 35.0, np.float32),
        longitude=np.full((1, 1), 140.0, np.float32),
        elevation=np.zeros((1, 1), np.float32),
    )
