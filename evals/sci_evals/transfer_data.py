"""Data of a transfer: examples from a source's training split, its test windows, and what the pretraining saw of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from sci_evals.windowset import WindowSet, WindowShape, keep_good, read_windows
from sci_gpt.config import PretrainConfig
from sci_gpt.data.store import SPLITS, Store
from sci_gpt.data.windows import WindowSpec
from sci_gpt.errors import ConfigError, DataError
from sci_gpt.recipes.adapt import Examples
from sci_gpt.recipes.studies import TransferTask
from sci_tokenizers.sample import Sample

_NEAR_DEGREES = 0.25
SIMULATION = "simulation"
Extent = tuple[tuple[float, float], tuple[float, float], tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Windows of a task, each `frames` frames long.

    Attributes:
        train, valid: from the earlier and the later part of the training split's stretches: they share no time.
        test: of the test split, for the scores alone.
        left_out: {rule of quality: windows} of the training split that it cost.
    """

    train: tuple[Sample, ...]
    valid: tuple[Sample, ...]
    test: WindowSet
    left_out: Mapping[str, int]

    def examples(self, task: TransferTask) -> Examples:
        """What both arms learn from, and choose their learning rate on."""
        spec = WindowSpec(
            source=task.source, frames=task.frames, stride=1, context_frames=task.context_frames, leads=task.leads
        )
        return Examples(source=task.source, spec=spec, train=self.train, valid=self.valid)


def draw(store: Store, task: TransferTask, *, count: int, valid_share: float, frame_times: int, most: int) -> Draw:
    """At most `count` examples, evenly spread, of which a share validates, and at most `most` test windows.

    Raises:
        DataError: no window fits a part of the training split, or the test split.
    """
    length = task.frames * frame_times
    early, late = [], []
    times = store.lengths(task.source, "train").tolist()
    every = [np.arange(max(number - length + 1, 0)) for number in times]
    good, left_out = keep_good(store, task.source, split="train", starts=every, need=length)
    for index, (number, starts) in enumerate(zip(times, good, strict=True)):
        cut = round(number * (1 - valid_share))
        early += [(index, start) for start in starts[starts + length <= cut].tolist()]
        late += [(index, start) for start in starts[starts >= cut].tolist()]
    num_valid = max(1, round(count * valid_share))
    if not early or not late:
        raise DataError(
            f"source {task.source!r}: no window of {task.frames} frames fits "
            f"{'its training' if not early else 'the validation'} part of the training split (the validation part is "
            f"the last {100 * valid_share:g} %; rules of quality leave out {sum(left_out.values())} windows); lower "
            "frames, or change valid_share"
        )

    def read(windows: list[tuple[int, int]], number: int) -> tuple[Sample, ...]:
        chosen = np.unique(np.linspace(0, len(windows) - 1, min(number, len(windows))).round().astype(int))
        pairs = [windows[one] for one in chosen]
        return tuple(store.read(task.source, "train", index=i, start=s, stop=s + length) for i, s in pairs)

    shape = WindowShape(num_context=task.frames - max(task.leads), leads=task.leads, frame_times=frame_times)
    test = read_windows(store, task.source, split="test", shape=shape, count=most)
    if test is None:
        raise DataError(
            f"source {task.source!r}: no good window of {task.frames} frames in its test split; lower frames"
        )
    return Draw(train=read(early, count - num_valid), valid=read(late, num_valid), test=test, left_out=left_out)


def refuse_seen(config: PretrainConfig, seen: Store, *, store: Store, source: str) -> None:
    """Refuse a source that the pretraining saw: by its name, its files, or the same place in the same period.

    Args:
        config: of the pretraining, as its checkpoint has it.
        seen: the store that it was trained on.
        store: the store of the task.
        source: the task's.

    Raises:
        ConfigError: it was seen; the message says by which source and how.
    """
    names = [entry.source for entry in config.mixture]
    if source in names:
        raise ConfigError(
            f"task {source!r}: the pretraining {config.name!r} saw this source; leave it out of that run's mixture, or "
            "choose a source that is not among " + ", ".join(names)
        )
    own = store.manifest["sources"][source]
    for name in names:
        other = seen.manifest["sources"][name]
        shared = set(own.get("files", {}).values()) & set(other.get("files", {}).values())
        if shared:
            raise ConfigError(
                f"task {source!r}: {len(shared)} of its files are those of {name!r}, which the pretraining "
                f"{config.name!r} saw; choose another source, or leave {name!r} out of that run's mixture"
            )
        if SIMULATION in (own.get("nature"), other.get("nature")) or not (
            set(store.variables(source)[0]) & set(seen.variables(name)[0])
        ):
            continue  # a simulation's weather never happened
        met = _meeting(_extents(seen, name, splits=("train",)), _extents(store, source, splits=SPLITS))
        if met is not None:
            raise ConfigError(
                f"task {source!r}: the pretraining {config.name!r} saw {name!r} at the same place from {met[0]} to "
                f"{met[1]}; choose another source or period, or leave {name!r} out of that run's mixture"
            )


def _meeting(seen: list[Extent], task: list[Extent]) -> tuple[str, str] | None:
    """The first period in which a stretch of either lies at one place."""
    for left in seen:
        for right in task:
            apart = [
                left[axis][0] - _NEAR_DEGREES > right[axis][1] or right[axis][0] - _NEAR_DEGREES > left[axis][1]
                for axis in (1, 2)
            ]
            start, stop = max(left[0][0], right[0][0]), min(left[0][1], right[0][1])
            if start <= stop and not any(apart):
                return _date(start), _date(stop)
    return None


def _extents(store: Store, source: str, *, splits: tuple[str, ...]) -> list[Extent]:
    """(time, latitude, longitude), each (least, largest), of every stretch; longitudes in [0, 360)."""
    found = []
    for split in splits:
        for index, times in enumerate(store.lengths(source, split).tolist()):
            first = store.read(source, split, index=index, start=0, stop=1)
            last = store.read(source, split, index=index, start=times - 1, stop=times)
            east = np.mod(first.longitude, 360.0)
            found.append(
                (
                    (float(first.time[0]), float(last.time[-1])),
                    (float(np.nanmin(first.latitude)), float(np.nanmax(first.latitude))),
                    (float(np.nanmin(east)), float(np.nanmax(east))),
                )
            )
    return found


def _date(seconds: float) -> str:
    return str(np.datetime64(int(seconds), "s"))[:10]
