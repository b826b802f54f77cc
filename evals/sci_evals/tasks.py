"""Evaluation tasks: how windows of one kind of source are cut, which depend on each other, and what is pooled."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from sci_evals.climatology import DAY_SECONDS, YEAR_SECONDS
from sci_evals.scores import ALL, Bootstrap, LeadGroup
from sci_evals.toy import as_series, daily_station, hourly_station, monthly_grid, trace_record
from sci_evals.windowset import WindowSet, WindowShape
from sci_gpt.config import EvaluateConfig
from sci_gpt.errors import DataError
from sci_tokenizers.sample import Sample


class EvalTask(ABC):
    """The contract: a table entry that knows its sources, its blocks of dependent windows and its groups of leads.

    Attributes:
        train_windows: windows of the training split that baselines are fitted on.
        block_seconds: windows of one group whose contexts end in the same stretch of time form a block; its usual
            length.
        pooled_leads: leads up to this many frames are averaged into one row; 0 pools all.
    """

    train_windows: ClassVar[int]
    block_seconds: ClassVar[float]
    pooled_leads: ClassVar[int] = 3

    @classmethod
    @abstractmethod
    def accepts(cls, modality: str, step_seconds: float) -> bool:
        """Is this the task of such a source? The first in the table that says yes is."""

    @classmethod
    @abstractmethod
    def toy(cls) -> tuple[list[Sample], list[Sample], WindowShape]:
        """Training and test stretches of a world small enough for a test, and the shape of its windows."""

    def lead_groups(self, windows: WindowSet) -> list[LeadGroup]:
        """Short leads pooled, longer ones on their own."""
        seconds = float(np.median(windows.step_seconds)) * windows.shape.frame_times
        leads = windows.shape.leads
        if np.ptp(windows.step_seconds) > 0:
            seconds = 0.0  # records of several rates have no lead in seconds
        short = tuple(lead for lead in leads if self.pooled_leads == 0 or lead <= self.pooled_leads)
        groups = [LeadGroup(name=lead_name(short, seconds), leads=short)] if short else []
        return groups + [
            LeadGroup(name=lead_name((lead,), seconds), leads=(lead,)) for lead in leads if lead not in short
        ]

    def regions(self, windows: WindowSet) -> np.ndarray:
        """Windows whose scores are averaged have one region, str (N,)."""
        return np.full(windows.num_windows, ALL, dtype=object)

    def dependent(self, windows: WindowSet) -> np.ndarray:
        """Windows of different numbers are independent: that of the group (run, station, event), int (N,)."""
        return np.unique(np.asarray(windows.groups), return_inverse=True)[1]

    def block_length(self, windows: WindowSet) -> np.ndarray:
        """Length of a block in s, for each window (N,)."""
        return np.full(windows.num_windows, self.block_seconds)

    def bootstrap(self, windows: WindowSet, settings: EvaluateConfig) -> Bootstrap:
        """Blocks of group x time, and the configured resamples and interval."""
        stretch = np.floor(windows.origin / self.block_length(windows)).astype(np.int64)
        _, blocks = np.unique(np.stack([self.dependent(windows), stretch], axis=1), axis=0, return_inverse=True)
        return Bootstrap(
            blocks=blocks.ravel(),
            regions=self.regions(windows),
            resamples=settings.bootstrap,
            interval=settings.interval,
        )


class DailySeries(EvalTask):
    """Daily to weekly series of stations, boxes and model runs: blocks of 90 days."""

    train_windows = 60_000
    block_seconds = 90 * DAY_SECONDS

    @classmethod
    def accepts(cls, modality: str, step_seconds: float) -> bool:
        """Daily to weekly series."""
        return modality == "series" and DAY_SECONDS <= step_seconds < 27 * DAY_SECONDS

    @classmethod
    def toy(cls) -> tuple[list[Sample], list[Sample], WindowShape]:
        """Six stations to train, one held out."""
        train = [daily_station(group=f"S{i}", years=4, seed=10 * i) for i in range(6)]
        return train, [daily_station(group="T", years=3, seed=99)], WindowShape(num_context=32, leads=(1, 2, 3, 5))


class MonthlySeries(EvalTask):
    """Monthly to annual series: blocks of three years."""

    train_windows = 8_000
    block_seconds = 3 * YEAR_SECONDS

    @classmethod
    def accepts(cls, modality: str, step_seconds: float) -> bool:
        """Monthly and slower series."""
        return modality == "series" and step_seconds >= 27 * DAY_SECONDS

    @classmethod
    def toy(cls) -> tuple[list[Sample], list[Sample], WindowShape]:
        """Monthly means of a cell."""
        train = [monthly_grid(years=20, rows=1, columns=1, west=3.0, seed=i) for i in range(3)]
        return [as_series(s) for s in train[:2]], [as_series(train[2])], WindowShape(num_context=24, leads=(1, 2, 3, 6))


class HourlySeries(EvalTask):
    """Sub-daily series: blocks of seven days, as long as weather takes to forget."""

    train_windows = 8_000
    block_seconds = 7 * DAY_SECONDS

    @classmethod
    def accepts(cls, modality: str, step_seconds: float) -> bool:
        """Series faster than daily."""
        return modality == "series" and step_seconds < DAY_SECONDS

    @classmethod
    def toy(cls) -> tuple[list[Sample], list[Sample], WindowShape]:
        """Two stations to train, one held out."""
        train = [hourly_station(group=f"S{i}", days=120, seed=10 * i) for i in range(2)]
        return train, [hourly_station(group="T", days=60, seed=99)], WindowShape(num_context=48, leads=(1, 2, 3, 6))


class Fields(EvalTask):
    """Gridded fields: area-weighted over the cells with a truth; blocks of one year, ten for annual data."""

    train_windows = 400
    block_seconds = YEAR_SECONDS
    pooled_leads = 1

    @classmethod
    def accepts(cls, modality: str, step_seconds: float) -> bool:
        """Every grid."""
        return modality == "grid"

    @classmethod
    def toy(cls) -> tuple[list[Sample], list[Sample], WindowShape]:
        """Two tiles, trained on earlier noise."""
        shape = WindowShape(num_context=12, leads=(1, 2, 3))
        return [monthly_grid(west=w, seed=1) for w in (0, 40)], [monthly_grid(west=w, seed=2) for w in (0, 40)], shape

    def block_length(self, windows: WindowSet) -> np.ndarray:
        """At least ten steps."""
        return np.maximum(self.block_seconds, 10 * windows.step_seconds)

    def dependent(self, windows: WindowSet) -> np.ndarray:
        """All tiles of one field at one time share their weather."""
        return np.zeros(windows.num_windows, int)


class Waveforms(EvalTask):
    """Records of held-out events: each record on its own (amplitudes do not mix), blocks of 300 samples, all leads
    pooled.
    """

    train_windows = 64
    block_seconds = 30.0
    block_samples = 300
    pooled_leads = 0

    @classmethod
    def accepts(cls, modality: str, step_seconds: float) -> bool:
        """Every trace."""
        return modality == "trace"

    @classmethod
    def toy(cls) -> tuple[list[Sample], list[Sample], WindowShape]:
        """One record each."""
        return [trace_record(seed=1)], [trace_record(seed=2)], WindowShape(num_context=48, leads=(1, 2), frame_times=5)

    def block_length(self, windows: WindowSet) -> np.ndarray:
        """As many samples at every rate."""
        return self.block_samples * windows.step_seconds

    def dependent(self, windows: WindowSet) -> np.ndarray:
        """Records of one event are windows on different times or places."""
        return windows.stretch

    def regions(self, windows: WindowSet) -> np.ndarray:
        """The event and station of each window."""
        return np.asarray([windows.records[i] for i in windows.stretch], dtype=object)


EVAL_TASKS: dict[str, type[EvalTask]] = {
    "waveforms": Waveforms,
    "fields": Fields,
    "hourly series": HourlySeries,
    "daily series": DailySeries,
    "monthly series": MonthlySeries,
}


def task_for(modality: str, step_seconds: float) -> EvalTask:
    """The task of a source.

    Raises:
        DataError: no task accepts it.
    """
    for kind in EVAL_TASKS.values():
        if kind.accepts(modality, step_seconds):
            return kind()
    raise DataError(
        f"no evaluation task takes {modality!r} data with a step of {step_seconds:g} s; add one to EVAL_TASKS"
    )


_UNITS = (
    (YEAR_SECONDS * 0.9, YEAR_SECONDS, "y"),
    (27 * DAY_SECONDS, YEAR_SECONDS / 12, "mo"),
    (DAY_SECONDS, DAY_SECONDS, "d"),
    (3600.0, 3600.0, "h"),
    (120.0, 60.0, "min"),
)


def lead_name(leads: Sequence[int], frame_seconds: float) -> str:
    """Leads in a unit that people use: "1-3 d", "6 h", "0.5-2 s"; in frames where a frame has no one length (0)."""
    unit, name = (
        (1.0, "frames")
        if frame_seconds == 0
        else next(((unit, name) for least, unit, name in _UNITS if frame_seconds >= least), (1.0, "s"))
    )
    low, high = (round(lead * (frame_seconds or 1.0) / unit, 2) for lead in (min(leads), max(leads)))
    return f"{low:g} {name}" if low == high else f"{low:g}-{high:g} {name}"
