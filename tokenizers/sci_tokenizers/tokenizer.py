"""The tokenizer contract: Sample -> Tokens and back, with a round-trip report in physical units."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from sci_tokenizers.sample import Modality, Sample
from sci_tokenizers.statistics import ChannelStatistics
from sci_tokenizers.tokens import FRAME_FEATURES, Tokens
from sci_tokenizers.variables import VARIABLE_INDEX, VARIABLES


_MEMORY_LAGS = (1, 2, 3)
_MEMORY_HALF_LIVES = (2.0, 8.0, 32.0, float("inf"))
MEMORIES = tuple(f"lag_{lag}" for lag in _MEMORY_LAGS) + tuple(f"mean_{h:g}" for h in _MEMORY_HALF_LIVES) + ("home",)


class TokenizerError(ValueError):
    """A sample that this tokenizer cannot take; the message says what was expected and what came."""


@dataclass(frozen=True, kw_only=True)
class TokenizerSettings:
    """Sizes of tokens.

    Attributes:
        grid_patch: side of a square patch in grid cells.
        trace_samples: waveform samples in a frame.
        series_ids: size of the id vocabulary of series (Chronos: 4096).
        series_limit: largest scaled value that the ids cover (Chronos: 15).
    """

    grid_patch: int = 8
    trace_samples: int = 5
    series_ids: int = 4096
    series_limit: float = 15.0

    @property
    def series_bin_width(self) -> float:
        """Distance between the centres of neighbouring ids, in scaled units (`quantizer.Quantizer`)."""
        return 2.0 * self.series_limit / (self.series_ids - 4)


@dataclass(frozen=True, kw_only=True)
class RoundTrip:
    """What encoding and decoding did to one channel: errors in physical units, share clipped, tokens made."""

    channel: str
    unit: str
    max_error: float
    mean_error: float
    clipped_share: float
    num_values: int


class Tokenizer(ABC):
    """One modality's translation between physical values and scaled payloads.

    Scales come from the first `num_context` frames of the window and from training statistics alone, so no input token
    at or after the context's end changes when later data change.
    """

    modality: ClassVar[Modality]

    def __init__(self, settings: TokenizerSettings) -> None:
        self.settings = settings

    @property
    @abstractmethod
    def frame_times(self) -> int:
        """Entries of the sample's time axis in one frame."""

    @abstractmethod
    def num_slots(self, shape: tuple[int, int, int]) -> int:
        """Slots of a document whose samples have this (variables, rows, columns)."""

    @abstractmethod
    def encode(
        self,
        sample: Sample,
        *,
        num_context: int,
        leads: tuple[int, ...],
        statistics: Mapping[str, ChannelStatistics] | None = None,
    ) -> Tokens:
        """Tokens of a window.

        Args:
            sample: a window of num_frames * frame_times times.
            num_context: C, in frames.
            leads: frames ahead that each token is asked for.
            statistics: the training split's, by channel; None (a source never seen): the context's own median is the offset.

        Raises:
            TokenizerError: another modality, or a window that is not whole frames or no longer than the context.
        """

    @abstractmethod
    def decode(self, tokens: Tokens, payload: np.ndarray) -> np.ndarray:
        """Scaled payloads (..., F, S, V, K) of a document's frames to physical values (..., time, variable, row, column)."""

    def report(self, sample: Sample, *, num_context: int, statistics: Mapping[str, ChannelStatistics] | None) -> list[RoundTrip]:
        """Encode, decode and compare, per channel, over the valid values."""
        tokens = self.encode(sample, num_context=num_context, leads=(1,), statistics=statistics)
        back = self.decode(tokens, tokens.payload)
        rows = []
        for v, channel in enumerate(sample.channels):
            valid = sample.valid[: back.shape[0], v]
            error = np.abs(back[:, v] - sample.values[: back.shape[0], v])[valid]
            rows.append(
                RoundTrip(
                    channel=channel,
                    unit=VARIABLES[sample.variables[v]].unit,
                    max_error=float(error.max(initial=0.0)),
                    mean_error=float(error.mean()) if error.size else 0.0,
                    clipped_share=self._clipped_share(tokens, v),
                    num_values=int(error.size),
                )
            )
        return rows

    def _clipped_share(self, tokens: Tokens, variable: int) -> float:
        return 0.0

    def _check(self, sample: Sample, num_context: int) -> int:
        """Number of frames of the window; raises when the window does not fit this tokenizer."""
        if sample.modality != self.modality:
            raise TokenizerError(f"the {self.modality} tokenizer got sample {sample.key!r} of modality {sample.modality!r}")
        frames, rest = divmod(sample.num_times, self.frame_times)
        if rest or frames < 1:
            raise TokenizerError(
                f"sample {sample.key!r}: a window is whole frames of {self.frame_times} times, got {sample.num_times} times"
            )
        if not 1 <= num_context <= frames:
            raise TokenizerError(f"sample {sample.key!r}: context of {num_context} frames in a window of {frames}")
        return frames


def frame_features(sample: Sample, frame_times: int) -> tuple[np.ndarray, np.ndarray]:
    """Features (F, 3) and end times (F,) of frames: a frame is known at the end of its last time."""
    last = slice(frame_times - 1, None, frame_times)
    step = np.full(len(sample.time[last]), np.log(sample.step_seconds * frame_times))
    features = np.stack([sample.year_phase[last], sample.day_phase[last], step], axis=1).astype(np.float32)
    assert features.shape[1] == len(FRAME_FEATURES)
    return features, sample.time[last]


def last_valid(payload: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """The newest valid payload at or before each frame, 0 before the first: the anchor of grids and series."""
    frames = np.arange(len(payload)).reshape(-1, *([1] * (payload.ndim - 1)))
    newest = np.maximum.accumulate(np.where(valid, frames, -1), axis=0)
    picked = np.take_along_axis(payload, np.maximum(newest, 0), axis=0)
    return np.where(newest >= 0, picked, 0.0).astype(np.float32)


def memories(payload: np.ndarray, valid: np.ndarray, *, anchor: np.ndarray, home: np.ndarray) -> np.ndarray:
    """What a head may lean on beside the anchor, as differences from it, float32 (F, S, V, K, len(MEMORIES)).

    The last valid value some frames ago, running means over the past with different half-lives, the plain mean of all frames
    so far, and `home` (S,): where the climatology lies in scaled units. Only frames up to the token's own enter.
    """
    frames = len(payload)
    out = np.zeros((*payload.shape, len(MEMORIES)), np.float32)
    for j, lag in enumerate(_MEMORY_LAGS):
        out[lag:, ..., j] = anchor[: frames - lag]
        out[:lag, ..., j] = anchor[:1]
    first, last = len(_MEMORY_LAGS), len(_MEMORY_LAGS) + len(_MEMORY_HALF_LIVES)
    keep = 0.5 ** (1.0 / np.array(_MEMORY_HALF_LIVES))
    total, weight = np.zeros((*payload.shape[1:], len(keep))), np.zeros((*payload.shape[1:], len(keep)))
    for f in range(frames):
        total = keep * total + (payload[f] * valid[f])[..., None]
        weight = keep * weight + valid[f][..., None]
        out[f, ..., first:last] = total / np.maximum(weight, 1e-9)
    out[..., last] = home[:, None, None]
    return out - anchor[..., None]


def variable_rows(sample: Sample) -> np.ndarray:
    """Rows of the variable table, int16 (V,)."""
    return np.array([VARIABLE_INDEX[name] for name in sample.variables], np.int16)


def log_scales(scale: np.ndarray, sample: Sample) -> np.ndarray:
    """Logarithm of scales (..., V); NaN for uncalibrated counts, whose size says nothing physical."""
    calibrated = np.array([VARIABLES[name].calibrated for name in sample.variables])
    return np.where(calibrated, np.log(np.maximum(scale, 1e-30)), np.nan).astype(np.float32)
