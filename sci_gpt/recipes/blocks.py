"""A blocked split in time: train | gap | valid | gap | test, where a gap is the context of the forecasts after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sci_gpt.data.windows import WindowSpec
from sci_gpt.errors import ConfigError, DataError
from sci_tokenizers.sample import Sample

_TRAIN, _VALID = 0.6, 0.15  # shares of the frames that are not in a gap; the rest is the test
_PER_CONTEXT = 12  # frames of the record for each frame of context
_LEAST_CONTEXT = 4
_LEAST = {"train": 16, "valid": 4, "test": 8}  # forecasts that each part must hold
_DAY, _YEAR = 86400.0, 365.2425 * 86400.0


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Stretches of each part and the windows cut from them.

    Attributes:
        spec: windows: `context_frames[1]` frames of context, then as many as the longest lead.
        train: forecasts lie in the training part whole.
        valid, test: begin with one context's length, the gap: seen as context of the first forecasts there, never a
            target of any part; so no value that training or stopping saw is forecast in the test, nor the other way.
        until: the last time of the training and of the validation part, seconds since 1970.
    """

    spec: WindowSpec
    train: tuple[Sample, ...]
    valid: tuple[Sample, ...]
    test: tuple[Sample, ...]
    until: tuple[float, float]


def window_spec(
    source: str, *, frames: int, like: WindowSpec, season: int, horizon: int | None, context: int | None
) -> WindowSpec:
    """Windows for a record of so many frames: contexts no longer than a twelfth of it, or a season where that is short.

    Args:
        source: its name.
        frames: of the longest stretch.
        like: windows of the nearest source of the pretraining: no longer context, the same leads where they fit.
        season: frames in a day (sub-daily data) or a year (daily to monthly), 0 without one.
        horizon: leads 1..horizon are asked; None: those of `like` up to a quarter of the context.
        context: frames of it; None: chosen.

    Raises:
        ConfigError: a horizon or context that the record cannot hold.
    """
    longest = like.frames - max(like.leads)
    chosen = context or min(longest, max(frames // _PER_CONTEXT, season if season <= frames // 8 else 0))
    chosen = max(chosen, _LEAST_CONTEXT)
    if context is not None and not _LEAST_CONTEXT <= context <= frames // 4:
        raise ConfigError(
            f"context is {_LEAST_CONTEXT} to {frames // 4} frames (a quarter of the record), got {context}"
        )
    if horizon is not None and not 1 <= horizon <= chosen:
        raise ConfigError(f"horizon is 1 to {chosen} frames (the context that this record allows), got {horizon}")
    leads = tuple(range(1, horizon + 1)) if horizon else tuple(n for n in like.leads if n <= chosen // 4) or (1,)
    return WindowSpec(
        source=source,
        frames=chosen + max(leads),
        stride=1,
        context_frames=(max(1, chosen // 2), chosen),
        leads=leads,
    )


def season_frames(step_seconds: float) -> int:
    """Frames in a season: a day for sub-daily data (a minute at least), a year for daily to monthly, else 0."""
    if 60.0 <= step_seconds < _DAY:
        return round(_DAY / step_seconds)
    return round(_YEAR / step_seconds) if _DAY <= step_seconds < _YEAR / 6 else 0


def split(stretches: Sequence[Sample], spec: WindowSpec, *, frame_times: int, what: str) -> Blocks:
    """Cut every stretch at the same two times.

    Args:
        stretches: of one source, any lengths.
        spec: of the windows.
        frame_times: times in a frame.
        what: the file, for messages.

    Raises:
        DataError: a part would hold too few forecasts.
    """
    clock = np.unique(np.concatenate([sample.time for sample in stretches]))
    gap = spec.context_frames[1] * frame_times
    free = len(clock) - 2 * gap
    first = int(_TRAIN * free)
    second = first + gap + int(_VALID * free)
    if free > 0:
        at = (float(clock[first]), float(clock[min(second, len(clock) - 1)]))
        parts: dict[str, list[Sample]] = {"train": [], "valid": [], "test": []}
        for sample in stretches:
            cuts = [0, *np.searchsorted(sample.time, at).tolist(), sample.num_times]
            for name, start, stop in zip(parts, cuts[:-1], cuts[1:], strict=True):
                if stop - start >= spec.frames * frame_times:
                    parts[name].append(sample.window(start, stop))
        counts = {name: _forecasts(part, spec, frame_times=frame_times) for name, part in parts.items()}
    if free <= 0 or any(counts[name] < least for name, least in _LEAST.items()):
        held = ", ".join(f"{name} {number}" for name, number in counts.items()) if free > 0 else "none"
        raise DataError(
            f"{what}: {len(clock)} times are too few (forecasts by part: {held}; at least "
            f"{', '.join(f'{name} {least}' for name, least in _LEAST.items())} are needed with a context of {gap} and "
            f"{max(spec.leads) * frame_times} ahead); give a longer record, or a shorter --context and --horizon"
        )
    return Blocks(
        spec=spec,
        train=tuple(parts["train"]),
        valid=tuple(parts["valid"]),
        test=tuple(parts["test"]),
        until=(float(clock[first - 1]), float(clock[second - 1])),
    )


def _forecasts(part: Sequence[Sample], spec: WindowSpec, *, frame_times: int) -> int:
    """Windows of a part whose first target holds a value."""
    need, first, count = spec.frames * frame_times, (spec.context_frames[1] - 1 + spec.leads[0]) * frame_times, 0
    for sample in part:
        windows = (sample.num_times - need) // frame_times + 1
        targets = sample.valid[first : first + windows * frame_times]
        count += int(targets.reshape(windows, -1).any(axis=1).sum())
    return count
