"""Growth: a document that goes on frame by frame in several ways, and no frame of it is encoded twice."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import numpy as np

from sci_tokenizers.autoregression import HORIZONS, recent_of_sums
from sci_tokenizers.memory import GrowingMemory, kin_weights
from sci_tokenizers.ongoing import OngoingForecast
from sci_tokenizers.prior import PRIOR_COUNT, LinearPrior, Past
from sci_tokenizers.tokenizer import Tokenizer, TokenizerError
from sci_tokenizers.tokens import Tokens
from sci_tokenizers.variables import VARIABLE_NAMES, forward_transform

_PER_FRAME = ("payload", "valid", "last", "anchor", "anchor_spread", "memory", "volatility", "offset")


class _Forecast(Protocol):
    """What the past says of the next frame."""

    def extend(
        self, payload: np.ndarray, valid: np.ndarray, *, last: np.ndarray, memory: np.ndarray
    ) -> dict[str, np.ndarray]:
        """After one more frame (B, S, V, K): anchor, anchor_spread (B, S, V, K, 1) and volatility (B, S, V, H)."""


class Growth:
    """B ways in which a document goes on after its context, the scales fixed by that context.

    Frame by frame it is what encoding the whole document again would give, to float rounding: values pass through
    physical units and the tokenizer as if they had been observed, memories are running sums, and the next frame's
    anchor is made for the newest frame alone.

    Args:
        tokens: context and future, encoded with `num_context` frames of context and leads (1,), the future not valid
            (only its clock and offset are used).
        batch: B.
        tokenizer: that encoded it.
        priors: of its source, None where there are none (`statistics.known_priors`).

    Raises:
        TokenizerError: a document that asks for other leads.
    """

    def __init__(self, tokens: Tokens, *, batch: int, tokenizer: Tokenizer, priors: list[LinearPrior] | None) -> None:
        if tokens.leads != (1,):
            raise TokenizerError(f"document {tokens.key!r}: only documents of lead 1 can grow, got {tokens.leads}")
        self.tokens, self.batch, self._tokenizer = tokens, batch, tokenizer
        self.frame = tokens.num_context - 1  # the newest one
        context = tokens.valid[: tokens.num_context]
        seen = context.any(axis=0)
        self.seen = np.broadcast_to(seen.any(axis=-1, keepdims=True), seen.shape) if _is_trace(tokens) else seen
        self._memory = None if _is_trace(tokens) else _memory(tokens, batch)
        self._forecast = _forecast(tokens, batch, tokenizer=tokenizer, priors=priors)

    def physical(self, payload: np.ndarray) -> np.ndarray:
        """Scaled values of the frame after the newest, (B, S, V, K), in physical units: (B, frame_times, V, Y, X)."""
        ahead = frames_of(self.tokens, [self.frame + 1])
        return self._tokenizer.decode(ahead, self._tokenizer.snapped(payload)[:, None])

    def extend(self, values: np.ndarray) -> list[Tokens]:
        """Observe one more frame.

        Args:
            values: (B, frame_times, V, Y, X), physical; what the context never saw stays missing.

        Returns:
            Per way a document of two frames, the new one and the next, of which only the clock is known; it asks the
            new one for the next.

        Raises:
            TokenizerError: the document's clock goes no further.
        """
        self.frame += 1
        if self.frame + 1 >= self.tokens.num_frames:
            raise TokenizerError(
                f"document {self.tokens.key!r}: its clock ends with frame {self.tokens.num_frames - 1}, which nothing "
                "can be asked after; encode it with more frames"
            )
        payload = self._tokenizer.snapped(self._scaled(values))
        valid = np.broadcast_to(self.seen, payload.shape)
        payload = np.where(valid, payload, 0.0).astype(np.float32)
        if self._memory is None:
            last, memory = np.zeros_like(payload), np.zeros((*payload.shape, 0), np.float32)
        else:
            last, memory = self._memory.extend(payload, valid)
        new = {"payload": payload, "valid": valid, "last": last, "memory": memory}
        new |= self._forecast.extend(payload, valid, last=last, memory=memory)
        blank = frames_of(self.tokens, [self.frame, self.frame + 1])
        ids = self._tokenizer.ids_of(payload, valid)
        out = []
        for way in range(self.batch):
            arrays = {name: getattr(blank, name).copy() for name in new}
            for name, array in new.items():
                arrays[name][0] = array[way]
            own = None if ids is None else np.stack([ids[way], np.zeros_like(ids[way])])
            out.append(replace(blank, **arrays, ids=own, num_context=1))
        return out

    def _scaled(self, values: np.ndarray) -> np.ndarray:
        tokens = self.tokens
        names = [VARIABLE_NAMES[row] for row in (tokens.variable[:, 0] if _is_series(tokens) else tokens.variable[0])]
        transformed = np.stack(
            [forward_transform(values[:, :, v].astype(np.float64), name) for v, name in enumerate(names)], axis=2
        )
        return (self._tokenizer.arrange(transformed) - tokens.offset[self.frame]) / tokens.scale[:, :, None]


def frames_of(tokens: Tokens, frames: slice | list[int]) -> Tokens:
    """Some frames of a document, in order, as a document with one frame of context."""
    names = (*_PER_FRAME, "time", "frame_features")
    return replace(tokens, **{name: getattr(tokens, name)[frames] for name in names}, ids=None, num_context=1)


def _is_trace(tokens: Tokens) -> bool:
    return tokens.modality == "trace"


def _is_series(tokens: Tokens) -> bool:
    return tokens.modality == "series"


def _memory(tokens: Tokens, batch: int) -> GrowingMemory:
    context = slice(tokens.num_context)
    kin = np.zeros((tokens.num_slots, tokens.num_slots))
    return GrowingMemory(
        tokens.payload[context],
        tokens.valid[context],
        last=tokens.last[context],
        home=tokens.memory[0, ..., -1] + tokens.last[0],
        kin=kin_weights(list(tokens.variable[:, 0])) if _is_series(tokens) else kin,
        batch=batch,
    )


def _forecast(tokens: Tokens, batch: int, *, tokenizer: Tokenizer, priors: list[LinearPrior] | None) -> _Forecast:
    if not _is_trace(tokens) and priors is not None:
        return _PriorForecast(tokens, batch, priors=priors)
    if tokens.modality == "grid":
        return _LastValue()
    return _OwnForecast(tokens, batch, tokenizer=tokenizer)


class _LastValue:
    """A grid without a prior: the cell's last value."""

    def extend(
        self, payload: np.ndarray, valid: np.ndarray, *, last: np.ndarray, memory: np.ndarray
    ) -> dict[str, np.ndarray]:
        """See `_Forecast`."""
        return {
            "anchor": last[..., None],
            "anchor_spread": np.zeros((*last.shape, 1), np.float32),
            "volatility": np.zeros((*last.shape[:3], len(HORIZONS)), np.float32),
        }


class _PriorForecast:
    """The linear prior, as `Past.forecast`: the errors that have come due are running sums."""

    def __init__(self, tokens: Tokens, batch: int, *, priors: list[LinearPrior]) -> None:
        self._priors, self._scale, self._series = priors, tokens.scale, _is_series(tokens)
        count = tokens.num_context
        past = self._past(
            tokens.payload[:count], tokens.valid[:count], last=tokens.last[:count], memory=tokens.memory[:count]
        )
        payload, valid = past.by_channel(past.payload), past.by_channel(past.valid)
        mean = past.by_channel(tokens.anchor[:count])[..., 0]
        self._ever = np.broadcast_to(past.valid.any(axis=0), (batch, *past.valid.shape[1:]))
        shape = (batch, tokens.num_frames + 1, *payload.shape[1:])
        self._total, self._count = np.zeros(shape), np.zeros(shape)
        known = valid[1:]
        squares = np.where(known, (payload[1:] - mean[:-1]) ** 2, 0.0)
        self._total[:, 2 : count + 1], self._count[:, 2 : count + 1] = squares.cumsum(axis=0), known.cumsum(axis=0)
        self._mean = np.broadcast_to(mean[-1], (batch, *mean.shape[1:]))
        self._end = count

    def _past(self, payload: np.ndarray, valid: np.ndarray, *, last: np.ndarray, memory: np.ndarray) -> Past:
        return Past(
            payload=payload,
            valid=valid,
            last=last,
            memory=memory,
            scale=self._scale,
            slots_are_channels=self._series,
        )

    def extend(
        self, payload: np.ndarray, valid: np.ndarray, *, last: np.ndarray, memory: np.ndarray
    ) -> dict[str, np.ndarray]:
        """See `_Forecast`."""
        past, end = self._past(payload, valid, last=last, memory=memory), self._end  # the ways stand where frames do
        known = past.by_channel(valid)
        squares = np.where(known, (past.by_channel(payload) - self._mean) ** 2, 0.0)
        self._total[:, end + 1] = self._total[:, end] + squares
        self._count[:, end + 1] = self._count[:, end] + known
        mean, spread = past.means(self._priors, (1,))
        trained = PRIOR_COUNT * spread[..., 0] ** 2
        variance = (trained + self._total[:, end + 1]) / (PRIOR_COUNT + self._count[:, end + 1])
        total, count = (np.moveaxis(part, 1, -1).reshape(-1, part.shape[1]) for part in (self._total, self._count))
        recent = recent_of_sums(total, count, origins=np.array([end]))[:, 0].reshape(*known.shape, len(HORIZONS))
        self._mean, self._end, self._ever = mean[..., 0], end + 1, self._ever | valid
        return past.anchored(mean, variance=variance[..., None], recent=recent, ever=self._ever)


class _OwnForecast:
    """Series and traces without a prior: autoregressions of the slot's own past."""

    def __init__(self, tokens: Tokens, batch: int, *, tokenizer: Tokenizer) -> None:
        self._trace, count = _is_trace(tokens), tokens.num_context
        carried = tokens.payload if self._trace else tokens.last
        series, known = (self._flat(part[:count][None]) for part in (carried, tokens.valid))  # rows of one way
        self._shape = (batch, *tokens.payload.shape[1:])
        live = known.any(axis=1) if self._trace else np.ones(len(series), bool)
        self._live = np.tile(live, batch)
        self._own = OngoingForecast(
            np.tile(series[live], (batch, 1)),
            np.tile(known[live], (batch, 1)),
            capacity=tokens.num_frames * tokenizer.frame_times,
            settings=tokenizer.own_settings(),
            sources=np.tile(np.arange(int(live.sum())), batch),
        )

    def _flat(self, part: np.ndarray) -> np.ndarray:
        """(B, frames, S, V, K) to (B * S * V, times)."""
        ways, _, slots, variables, _ = part.shape
        return np.moveaxis(part, 1, 3).reshape(ways * slots * variables, -1)

    def extend(
        self, payload: np.ndarray, valid: np.ndarray, *, last: np.ndarray, memory: np.ndarray
    ) -> dict[str, np.ndarray]:
        """See `_Forecast`."""
        new, known = (self._flat(part[:, None])[self._live] for part in (payload if self._trace else last, valid))
        mean, spread, volatility = self._own.extend(new, known)
        whole = {
            "anchor": np.zeros((len(self._live), self._shape[-1]), np.float32),
            "anchor_spread": np.zeros((len(self._live), self._shape[-1]), np.float32),
        }
        whole["anchor"][self._live], whole["anchor_spread"][self._live] = mean, spread
        recent = np.zeros((len(self._live), len(HORIZONS)), np.float32)
        recent[self._live] = volatility
        out = {name: array.reshape(*self._shape, 1) for name, array in whole.items()}
        return out | {"volatility": recent.reshape(*self._shape[:-1], len(HORIZONS))}
