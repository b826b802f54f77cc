"""Tokens: a document as a film of frames x slots, one token per (frame, slot), with what it knows and is asked."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sci_tokenizers.sample import Modality

FRAME_FEATURES = ("year_phase", "day_phase", "log_step")
SLOT_FEATURES = ("latitude", "longitude", "elevation", "log_level", "log_extent")


class TokensError(ValueError):
    """A document breaks a rule of frames x slots; the message names the rule and the offending shape or value."""


@dataclass(frozen=True, kw_only=True)
class Masked:
    """What a masked document hides and asks for.

    Attributes:
        hidden: bool (F, S), tokens whose values the document does not hold.
        truth: float32 (F, S, V, K), what they hold, scaled as the document is; 0 where not valid.
        valid: bool, same shape: True only in hidden tokens.
    """

    hidden: np.ndarray
    truth: np.ndarray
    valid: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """One document: F frames in order, S slots in each; V variables of K values in a token.

    Payload values are scaled: `physical = inverse_transform(payload * scale + offset)` (see the modality's tokenizer).

    Attributes:
        key, source, modality: of the sample.
        payload: float32 (F, S, V, K), scaled values; 0 where not valid.
        valid: bool (F, S, V, K).
        ids: int32 (F, S) quantized ids for series, else None.
        last: float32 (F, S, V, K), the last valid value at or before the frame; 0 for traces (a waveform's mean).
        anchor: float32 (F, S, V, K, A), what the head corrects, A = 1 for all leads alike or one per lead: the last
            value
            (grid); the forecast of an autoregression fitted to the past (series, trace).
        anchor_spread: float32, same shape: logarithm of the anchor's own errors so far, 0 where nothing is known of
            them.
        memory: float32 (F, S, V, K, J), what else the head may lean on, as differences from `last` (J = 0 for traces).
        volatility: float32 (F, S, V, len(HORIZONS)), logarithm of recent errors of the autoregression over all of them.
        weight: float32 (S, V, K), area and variable weight of a value, mean 1 over a document.
        variable: int16 (S, V), rows of the variable table.
        row, column: int16 (S,), place of the slot on the patch grid (0 for unordered slots).
        period: columns of patches once around the globe; 0 where the last column's neighbour is not the first.
        frame_features: float32 (F, len(FRAME_FEATURES)); NaN where unknown.
        slot_features: float32 (S, len(SLOT_FEATURES)); NaN where unknown.
        log_scale: float32 (S, V), natural logarithm of the scale in physical units; NaN for uncalibrated counts.
        log_level: float32 (S, V), logarithm of each variable's level, NaN where it has none; None: one level for all of
            a slot's variables, which `slot_features` tells.
        masked: what the document hides: its hidden tokens are asked for themselves, and attention sees all frames;
            None: the next frames are asked for.
        pile: float32 (S, V), the scaled value at which a variable piles up (dry hours); NaN where it does not.
        offset: float32 (F, S, V, K), scale: float32 (S, V): how to decode.
        time: float64 (F,), end of each frame, seconds since 1970 on the corpus calendar.
        num_context: C; scales come from the first C frames, and only frames from C on are targets.
        leads: frames ahead that each token is asked for, ascending, the first is usually 1.
        importance: weight of the whole document in the loss, in (0, 1].
        size: rows and columns of the sample's grid (1, 1 where there is none).
    """

    key: str
    source: str
    modality: Modality
    payload: np.ndarray
    valid: np.ndarray
    ids: np.ndarray | None
    last: np.ndarray
    anchor: np.ndarray
    anchor_spread: np.ndarray
    memory: np.ndarray
    volatility: np.ndarray
    weight: np.ndarray
    variable: np.ndarray
    row: np.ndarray
    column: np.ndarray
    frame_features: np.ndarray
    slot_features: np.ndarray
    log_scale: np.ndarray
    pile: np.ndarray
    offset: np.ndarray
    scale: np.ndarray
    time: np.ndarray
    num_context: int
    leads: tuple[int, ...]
    importance: float = 1.0
    size: tuple[int, int] = (1, 1)
    period: int = 0
    log_level: np.ndarray | None = None
    masked: Masked | None = None

    def __post_init__(self) -> None:
        if self.payload.ndim != 4:
            raise TokensError(
                f"document {self.key!r}: payload is (frame, slot, variable, value), got {self.payload.shape}"
            )
        frames, slots, variables, values = self.payload.shape
        expected = {
            "valid": (frames, slots, variables, values),
            "last": (frames, slots, variables, values),
            "anchor": (frames, slots, variables, values, self.anchor.shape[-1]),
            "anchor_spread": self.anchor.shape,
            "memory": (frames, slots, variables, values, self.memory.shape[-1]),
            "volatility": (frames, slots, variables, self.volatility.shape[-1]),
            "weight": (slots, variables, values),
            "variable": (slots, variables),
            "row": (slots,),
            "column": (slots,),
            "frame_features": (frames, len(FRAME_FEATURES)),
            "slot_features": (slots, len(SLOT_FEATURES)),
            "log_scale": (slots, variables),
            "pile": (slots, variables),
            "offset": (frames, slots, variables, values),
            "scale": (slots, variables),
            "time": (frames,),
        }
        if self.log_level is not None:
            expected["log_level"] = (slots, variables)
        for name, shape in expected.items():
            if getattr(self, name).shape != shape:
                raise TokensError(f"document {self.key!r}: {name} has shape {shape}, got {getattr(self, name).shape}")
        if not 1 <= self.num_context <= frames:
            raise TokensError(
                f"document {self.key!r}: num_context is within 1..{frames} frames, got {self.num_context}"
            )
        if self.anchor.shape[-1] not in (1, len(self.leads)):
            raise TokensError(
                f"document {self.key!r}: 1 or {len(self.leads)} anchors per value, got {self.anchor.shape[-1]}"
            )
        if not self.leads or min(self.leads) < 1 or list(self.leads) != sorted(set(self.leads)):
            raise TokensError(f"document {self.key!r}: leads are ascending and positive, got {self.leads}")

        if self.period and not 0 <= int(self.column.min()) <= int(self.column.max()) < self.period:
            raise TokensError(
                f"document {self.key!r}: columns are within 0..{self.period - 1} of a period of {self.period}, got "
                f"{int(self.column.min())}..{int(self.column.max())}"
            )

    @property
    def num_frames(self) -> int:
        """F."""
        return int(self.payload.shape[0])

    @property
    def num_slots(self) -> int:
        """S."""
        return int(self.payload.shape[1])

    @property
    def num_tokens(self) -> int:
        """F x S."""
        return self.num_frames * self.num_slots
