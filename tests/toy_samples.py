"""One made-up sample of each modality, with gaps, several variables and slots, for tests of tokenizers and model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from sci_tokenizers.sample import Sample
from sci_tokenizers.statistics import ChannelStatistics

# modality -> (variables, levels, rows, columns, step in seconds)
_FACTS = {
    "grid": (("air_temperature", "precipitation_amount"), (85000.0, np.nan), 6, 9, 86400.0),
    "series": (("air_temperature", "precipitation_amount", "wind_speed"), (np.nan,) * 3, 1, 1, 3600.0),
    "trace": (("digitizer_counts_vertical", "digitizer_counts_north"), (np.nan, np.nan), 3, 1, 0.1),
}
_LEVELS = {"air_temperature": (280.0, 6.0), "precipitation_amount": (2.0, 1.5), "wind_speed": (6.0, 3.0)}


def toy_sample(modality: str, num_times: int, *, seed: int = 0, missing: float = 0.15) -> Sample:
    """Waves and noise; a share `missing` of the values is missing."""
    variables, levels, rows, columns, step = _FACTS[modality]
    random = np.random.default_rng(seed)
    shape = (num_times, len(variables), rows, columns)
    wave = np.sin(np.arange(num_times) / 3.0 + seed)[:, None, None, None]
    values = wave + 0.4 * random.standard_normal(shape)
    for v, name in enumerate(variables):
        level, spread = _LEVELS.get(name, (40.0, 300.0))
        values[:, v] = level + spread * values[:, v]
        if name in ("precipitation_amount", "wind_speed"):
            values[:, v] = np.maximum(values[:, v], 0.0)
    valid = random.random(shape) >= missing
    seconds = 1.0e9 + seed * 1.0e7 + np.arange(num_times) * step
    return Sample(
        key=f"toy/{modality}-{seed}",
        source=f"toy_{modality}",
        modality=modality,  # type: ignore[arg-type]
        variables=variables,
        levels=levels,
        values=np.where(valid, values, 0.0).astype(np.float32),
        valid=valid,
        time=seconds,
        year_phase=((seconds / 31556952.0) % 1.0).astype(np.float32),
        day_phase=((seconds / 86400.0) % 1.0).astype(np.float32),
        step_seconds=step,
        latitude=np.linspace(60.0, 10.0, rows, dtype=np.float32)[:, None].repeat(columns, axis=1),
        longitude=np.linspace(0.0, 40.0, columns, dtype=np.float32)[None, :].repeat(rows, axis=0),
        elevation=np.full((rows, columns), 100.0, np.float32),
    )


def toy_statistics(sample: Sample) -> dict[str, ChannelStatistics]:
    """Statistics that fit `toy_sample`, in transformed units."""
    facts = {"air_temperature": (280.0, 6.0), "precipitation_amount": (0.9, 0.6), "wind_speed": (6.0, 3.0)}
    found = {}
    for name, channel in zip(sample.variables, sample.channels, strict=True):
        mean, std = facts.get(name, (40.0, 300.0))
        found[channel] = ChannelStatistics(
            count=1000,
            mean=mean,
            std=std,
            step_std=0.3 * std,
            num_year=1,
            num_day=1,
            climatology=(mean, 0.5 * std, 0.0, 0.0, 0.2 * std),
            minimum=mean - 10 * std,
            maximum=mean + 10 * std,
        )
    return found


def altered_from(sample: Sample, start: int) -> Sample:
    """The same sample with every value from time `start` on changed, and missing and present values swapped."""
    values, valid = sample.values.copy(), sample.valid.copy()
    valid[start:] = ~valid[start:]
    values[start:] = np.where(valid[start:], values[start:] * 0.5 + 17.0, 0.0)
    return replace(sample, values=values, valid=valid)
