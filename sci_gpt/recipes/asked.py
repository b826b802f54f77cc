"""What is asked of a model for one context: how much of it is taken, its tiles, and the answers put together again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral

import numpy as np

from sci_gpt.config import MixtureEntry
from sci_gpt.errors import CheckpointError, ConfigError, DataError
from sci_gpt.recipes.film import Film
from sci_gpt.recipes.film_grid import tiles
from sci_tokenizers.sample import Sample
from sci_tokenizers.variables import VARIABLES


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How trajectories are drawn: how many, and the seed that decides them."""

    num_samples: int
    seed: int

    @classmethod
    def of(cls, num_samples: int | None, seed: int | None, *, noise_width: int) -> Sampling | None:
        """From what a user gives; None where quantiles are asked. A seed that is not given is 0.

        Raises:
            ConfigError: no or too few samples, a seed that is no whole number, or a model that predicts marginals only
                (`noise_width` 0).
        """
        if num_samples is None:
            if seed is not None:
                raise ConfigError(f"seed={seed} without num_samples: quantiles are not drawn; leave it out")
            return None
        num_samples = _whole(num_samples, "num_samples")
        if not noise_width:
            raise ConfigError(
                f"num_samples={num_samples}, seed={seed}: this model gives marginal quantiles, no trajectories; "
                "ask for quantiles, or train a model with model.noise.width above 0 (docs/model.md, Samples)"
            )
        if seed is not None and not isinstance(seed, Integral):
            raise ConfigError(f"seed is a whole number, got {seed!r}")
        return cls(num_samples=num_samples, seed=0 if seed is None else int(seed))


def check_horizon(horizon: object) -> int:
    """Steps ahead, checked.

    Raises:
        ConfigError: not a whole number from 1 on.
    """
    return _whole(horizon, "horizon", unit=" step")


def check_levels(quantiles: Sequence[float]) -> tuple[float, ...]:
    """Quantile levels, checked.

    Raises:
        ConfigError: none, not ascending, outside 0..1, or no sequence of numbers.
    """
    try:
        levels = tuple(float(level) for level in quantiles)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"quantiles are ascending levels between 0 and 1, as in (0.1, 0.5, 0.9), got {quantiles!r}"
        ) from error
    if not levels or list(levels) != sorted(set(levels)) or not 0 < levels[0] <= levels[-1] < 1:
        raise ConfigError(f"quantiles are ascending levels between 0 and 1, got {list(levels)}")
    return levels


def _whole(number: object, name: str, *, unit: str = "") -> int:
    if not isinstance(number, Integral) or isinstance(number, bool):
        raise ConfigError(f"{name} is a whole number, got {number!r} of type {type(number).__name__}")
    if number < 1:
        raise ConfigError(f"{name} is at least 1{unit}, got {number}")
    return int(number)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A context as a model takes it.

    Attributes:
        sample: the whole context.
        windows: its end and the future's clock, tile by tile as in training.
        boxes: where the tiles lie.
        seen: bool (variable, row, column): has a value in what is taken.
        num_context, num_leads: frames taken, and asked ahead.
    """

    sample: Sample
    windows: list[Sample]
    boxes: list[tuple[slice, slice]]
    seen: np.ndarray
    num_context: int
    num_leads: int

    def joined(self, arrays: Sequence[np.ndarray], horizon: int) -> np.ndarray:
        """(N, horizon, variable, row, column) from each tile's (N, leads, frame_times, variable, rows, columns); NaN
        where the context has no value.

        Raises:
            CheckpointError: numbers that are not finite.
        """
        sample, count = self.sample, len(arrays[0])
        times = arrays[0].shape[1] * arrays[0].shape[2]
        steps = np.empty((count, times, *sample.values.shape[1:]), np.float32)
        for (rows, columns), array in zip(self.boxes, arrays, strict=True):
            steps[..., rows, columns] = array.reshape(count, -1, *array.shape[3:])
        if not np.isfinite(steps).all():
            raise CheckpointError(
                f"{sample.key}: the model gives numbers that are not finite; its training has diverged"
            )
        for v, name in enumerate(sample.variables):  # no negative wind speed, whatever the tail of a distribution
            steps[:, :, v] = np.clip(steps[:, :, v], VARIABLES[name].minimum, VARIABLES[name].maximum)
        # A sensor that is silent, or land under a sea surface, has no forecast.
        return np.where(self.seen, steps, np.nan)[:, :horizon]


def ask(
    film: Film,
    index: int,
    *,
    entry: MixtureEntry,
    tile: tuple[int, int],
    frame_times: int,
    horizon: int,
    trajectories: bool = False,
) -> Asked:
    """Cut a context of a film as the source that it is treated like was in training.

    Args:
        film: the user's object.
        index: of the context.
        entry: the source's windows.
        tile: rows and columns of its samples.
        frame_times: times in a frame.
        horizon: times ahead.
        trajectories: frames are fed back, so that the horizon may pass the largest lead, within a document's frames.

    Raises:
        ConfigError: a horizon that the model cannot serve.
        DataError: a context that is too short or holds no value.
    """
    sample, low = film.contexts[index], entry.context_frames[0]
    _refuse_far(sample, entry, horizon=horizon, frame_times=frame_times, trajectories=trajectories)
    ahead = -(-horizon // frame_times)
    longest = entry.frames - (ahead if trajectories else max(entry.leads))  # documents of the trained length
    num_context = min(longest, sample.num_times // frame_times)
    if num_context < low:
        raise DataError(
            f"{sample.key}: {sample.num_times} time steps are shorter than the context of {low * frame_times} that "
            f"the model needs (as trained on {entry.source!r}); give a longer record"
        )
    context = sample.window(sample.num_times - num_context * frame_times, sample.num_times)
    if not context.valid.any():
        raise DataError(
            f"{sample.key}: none of the last {context.num_times} time steps holds a valid value; give a "
            "record that has values there"
        )
    window = film.extend(context, ahead * frame_times)
    boxes = tiles(*sample.values.shape[2:], tile=tile)
    return Asked(
        sample=sample,
        windows=[_crop(window, box) for box in boxes],
        boxes=boxes,
        seen=np.asarray(context.valid.any(axis=0)),
        num_context=num_context,
        num_leads=ahead,
    )


def _refuse_far(sample: Sample, entry: MixtureEntry, *, horizon: int, frame_times: int, trajectories: bool) -> None:
    if trajectories and entry.leads[0] != 1:
        raise ConfigError(
            f"{entry.source!r} (the nearest source) was trained for leads {list(entry.leads)}: samples go frame by "
            "frame and need lead 1 among them; ask for quantiles"
        )
    limit, why = max(entry.leads) * frame_times, "the largest lead trained"
    if trajectories:
        limit, why = (
            (entry.frames - entry.context_frames[0]) * frame_times,
            "what its documents hold beside the smallest context",
        )
    if horizon > limit:
        raise ConfigError(
            f"horizon {horizon} is beyond {limit} steps of {sample.step_seconds:g} s, {why} for "
            f"{entry.source!r} (the nearest source); ask for at most {limit}"
        )


def _crop(sample: Sample, box: tuple[slice, slice]) -> Sample:
    """A tile of a grid (the whole of anything that is one tile)."""
    rows, columns = box
    return replace(
        sample,
        values=sample.values[:, :, rows, columns],
        valid=sample.valid[:, :, rows, columns],
        latitude=sample.latitude[box],
        longitude=sample.longitude[box],
        elevation=sample.elevation[box],
    )
