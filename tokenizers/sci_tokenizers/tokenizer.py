"""The tokenizer contract: Sample -> Tokens and back, with a round-trip report in physical units."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from sci_tokenizers.ongoing import OwnSettings
from sci_tokenizers.sample import Modality, Sample
from sci_tokenizers.statistics import ChannelStatistics
from sci_tokenizers.tokens import FRAME_FEATURES, Tokens
from sci_tokenizers.variables import VARIABLE_INDEX, VARIABLES


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

    def check_size(self, shape: tuple[int, ...], *, where: str) -> None:  # noqa: B027  # most take any size
        """Refuse samples whose (variables, rows, columns) this tokenizer cannot cut.

        Raises:
            TokenizerError: with `where`, the size that came and what to do.
        """

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
            leads: frames ahead that each token is asked for, ascending, from 1 on.
            statistics: the training split's, by channel; None (a source never seen): the context's own median is the
                offset.

        Raises:
            TokenizerError: another modality, a window that is not whole frames or no longer than the context, or leads
                that are none.
        """

    @abstractmethod
    def cells(self, tokens: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Which values of a sample of this shape lie in tokens (F, S) that are True: bool, of that shape."""

    @abstractmethod
    def rescaled(self, tokens: Tokens, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
        """Payload and valid (F, S, V, K) of the same window with other values, by the scales that `tokens` have."""

    @abstractmethod
    def decode(self, tokens: Tokens, payload: np.ndarray) -> np.ndarray:
        """Scaled payloads (..., F, S, V, K) of a document's frames to physical values (..., time, variable, row,
        column).
        """

    @abstractmethod
    def arrange(self, values: np.ndarray) -> np.ndarray:
        """Values of one frame as a sample has them, (B, frame_times, V, Y, X), as tokens have them, (B, S, V, K)."""

    def snapped(self, payload: np.ndarray) -> np.ndarray:
        """Scaled values as an observation of them would be held, (.., S, V, K): the same where nothing is quantized."""
        return payload

    def ids_of(self, payload: np.ndarray, valid: np.ndarray) -> np.ndarray | None:
        """Ids (.., S) of snapped values (.., S, V, K); None where nothing is quantized."""
        return None

    def own_settings(self) -> OwnSettings:
        """How a record is forecast from its own past where no prior is known.

        Raises:
            TokenizerError: a modality that does not.
        """
        raise TokenizerError(f"the {self.modality} tokenizer forecasts no record from its own past")

    def report(
        self, sample: Sample, *, num_context: int, statistics: Mapping[str, ChannelStatistics] | None
    ) -> list[RoundTrip]:
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

    def _check(self, sample: Sample, num_context: int, *, leads: tuple[int, ...] = (1,)) -> int:
        """Number of frames of the window; raises when the window does not fit this tokenizer, or leads are none."""
        if sample.modality != self.modality:
            raise TokenizerError(
                f"the {self.modality} tokenizer got sample {sample.key!r} of modality {sample.modality!r}"
            )
        frames, rest = divmod(sample.num_times, self.frame_times)
        if rest or frames < 1:
            raise TokenizerError(
                f"sample {sample.key!r}: a window is whole frames of {self.frame_times} times, got {sample.num_times} "
                f"times"
            )
        if not 1 <= num_context <= frames:
            raise TokenizerError(f"sample {sample.key!r}: context of {num_context} frames in a window of {frames}")
        if not leads or leads[0] < 1 or list(leads) != sorted(set(leads)):
            raise TokenizerError(
                f"sample {sample.key!r}: leads are frames ahead, ascending and from 1 on, as in (1, 2), got {leads}"
            )
        return frames


def frame_features(
    sample: Sample, frame_times: int, *, statistics: Mapping[str, ChannelStatistics] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Features (F, 3) and end times (F,) of frames: a frame is known at the end of its last time.

    A phase of a cycle that the source's training split does not cover is NaN: a model that learned from January to July
    has nothing to say of October but what it makes up.
    """
    last = slice(frame_times - 1, None, frame_times)
    step = np.full(len(sample.time[last]), np.log(sample.step_seconds * frame_times))
    features = np.stack([sample.year_phase[last], sample.day_phase[last], step], axis=1).astype(np.float32)
    assert features.shape[1] == len(FRAME_FEATURES)
    rows = [statistics[channel] for channel in sample.channels if channel in statistics] if statistics else []
    if rows:
        uncovered = [not any(row.num_year for row in rows), not any(row.num_day for row in rows), False]
        features[:, uncovered] = np.nan
    return features, sample.time[last]


def variable_rows(sample: Sample) -> np.ndarray:
    """Rows of the variable table, int16 (V,)."""
    return np.array([VARIABLE_INDEX[name] for name in sample.variables], np.int16)


def log_scales(scale: np.ndarray, sample: Sample) -> np.ndarray:
    """Logarithm of scales (..., V); NaN for uncalibrated counts, whose size says nothing physical."""
    calibrated = np.array([VARIABLES[name].calibrated for name in sample.variables])
    return np.where(calibrated, np.log(np.maximum(scale, 1e-30)), np.nan).astype(np.float32)
