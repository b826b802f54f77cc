"""Packing: documents into rows of a fixed length (best fit, decreasing), rows into a Batch that the model reads."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sci_tokenizers.sample import MODALITIES
from sci_tokenizers.tokens import FRAME_FEATURES, SLOT_FEATURES, Tokens
from sci_tokenizers.variables import VARIABLE_NAMES, lower_bound

# What the next frame's question adds to a token: its time, known in advance (never its values).
NEXT_FEATURES = ("next_year_phase", "next_day_phase", "log_next_step")
TOKEN_FEATURES = FRAME_FEATURES + SLOT_FEATURES + NEXT_FEATURES
QUESTION_FEATURES = ("log_ahead", "year_phase", "day_phase")


class PackingError(ValueError):
    """Documents that do not fit; the message names the document, its tokens and the row length."""


def pack_rows(lengths: Sequence[int], rows: int, *, row_length: int) -> list[list[int]] | None:
    """Best-fit-decreasing placement; equal lengths keep their order, so that modalities mix as the sample order does.

    Args:
        lengths: tokens of each document.
        rows, row_length: the space.

    Returns:
        Document positions per row, each row ascending, or None when they do not fit.

    Raises:
        PackingError: a document longer than a row.
    """
    free = [(row_length, row) for row in range(rows)]  # ascending: the best fit is the first with room
    placed: list[list[int]] = [[] for _ in range(rows)]
    for document in np.argsort(-np.asarray(lengths, np.int64), kind="stable"):
        need = lengths[document]
        if need > row_length:
            raise PackingError(
                f"document {document} has {need} tokens, a row holds {row_length}: raise row_length or cut frames"
            )
        best = bisect_left(free, (need, 0))
        if best == rows:
            return None
        room, row = free.pop(best)
        insort(free, (room - need, row))
        placed[row].append(int(document))
    return [sorted(row) for row in placed]


@dataclass(frozen=True, kw_only=True)
class Payload:
    """The tokens of one modality in a batch, N of them, and the units (token, lead) that are asked, U of them.

    Attributes:
        index: int64 (N,), position of each token in the flat batch.
        values: float32 (N, V, K), scaled, 0 where not valid;  valid: bool (N, V, K).
        last: float32 (N, V, K);  memory: float32 (N, V, K, J);  volatility: float32 (N, V, H);  weight: float32 (N,
            V, K).
        ids: int64 (N,), series only (0 elsewhere).
        variable: int64 (N, V), -1 where a token has fewer variables.
        log_scale: float32 (N, V), NaN for uncalibrated counts.
        log_level: float32 (N, V), NaN where a variable has no level of its own.
        pile: float32 (N, V), where the variable piles up; NaN where it does not.
        unit_token: int64 (U,), which of the N asks;  unit_target: int64 (U,), which of the N holds the answer.
        unit_anchor, unit_spread: float32 (U, V, K), what the head corrects: a location and the logarithm of a spread.
        unit_lower: float32 (U, V, K), scaled bound below which an asked value cannot lie, -inf where there is none;
            (U, V, 0) where no document of the batch has a bounded variable, and for series (they have the pile).
        unit_lead: int64 (U,), frames ahead.
        unit_weight: float32 (U,), importance of the document / its leads x the mean weight of its valid values.
        question: float32 (U, len(QUESTION_FEATURES)).
        hidden_values, hidden_valid, hidden_weight: (H, V, K), what masked documents hide; `unit_target` counts them
            after the N tokens, and their units have lead 0. H = 0 without masked documents.
    """

    index: np.ndarray
    values: np.ndarray
    valid: np.ndarray
    last: np.ndarray
    memory: np.ndarray
    volatility: np.ndarray
    weight: np.ndarray
    ids: np.ndarray
    variable: np.ndarray
    log_scale: np.ndarray
    log_level: np.ndarray
    pile: np.ndarray
    unit_token: np.ndarray
    unit_target: np.ndarray
    unit_anchor: np.ndarray
    unit_spread: np.ndarray
    unit_lower: np.ndarray
    unit_lead: np.ndarray
    unit_weight: np.ndarray
    question: np.ndarray
    hidden_values: np.ndarray
    hidden_valid: np.ndarray
    hidden_weight: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows of packed documents, flat: T = rows * row_length token positions.

    Attributes:
        rows, row_length: the shape that T stands for.
        document: int64 (T,), number of the document in this batch, -1 where empty.
        frame, row, column: int64 (T,), rotary positions.
        period: int64 (T,), columns once around the globe, 0 where a document does not go around.
        features: float32 (T, len(TOKEN_FEATURES)), NaN where unknown.
        payloads: {modality: Payload}, only modalities that are present.
        spans: per document (start, frames, slots) in the flat batch.
        causal: per document whether a token sees no later frame; masked documents see all of theirs.
        keys: per document its sample key.
        numbers: per document its sample number in the run (-1 outside a run).
    """

    rows: int
    row_length: int
    document: np.ndarray
    frame: np.ndarray
    row: np.ndarray
    column: np.ndarray
    period: np.ndarray
    features: np.ndarray
    payloads: dict[str, Payload]
    spans: tuple[tuple[int, int, int], ...]
    causal: tuple[bool, ...]
    keys: tuple[str, ...]
    numbers: tuple[int, ...]

    @property
    def fill(self) -> float:
        """Share of token positions that hold a token."""
        return float((self.document >= 0).mean())


def collate(
    rows: Sequence[Sequence[Tokens]],
    row_length: int,
    *,
    numbers: Sequence[Sequence[int]] | None = None,
    context_only: bool = False,
) -> Batch:
    """Lay documents into rows.

    Args:
        rows: the documents of each row, in order.
        row_length: tokens in a row.
        numbers: their sample numbers in the run.
        context_only: forecasting: keep each document's first `num_context` frames and ask only the last of them; the
            frames after it give nothing but the times of the questions.

    Raises:
        PackingError: a row's documents hold more tokens than the row, or a masked document with `context_only`.
    """
    total = len(rows) * row_length
    columns = {name: np.zeros(total, np.int64) for name in ("frame", "row", "column", "period")}
    document = np.full(total, -1, np.int64)
    features = np.full((total, len(TOKEN_FEATURES)), np.nan, np.float32)
    spans: list[tuple[int, int, int]] = []
    keys: list[str] = []
    flat_numbers: list[int] = []
    parts: dict[str, list[tuple[int, Tokens]]] = {}
    for r, documents in enumerate(rows):
        at, end = r * row_length, (r + 1) * row_length
        for d, tokens in enumerate(documents):
            frames = tokens.num_context if context_only else tokens.num_frames
            count = frames * tokens.num_slots
            if at + count > end:
                raise PackingError(f"document {tokens.key!r} with {count} tokens overruns its row of {row_length}")
            here = slice(at, at + count)
            document[here] = len(spans)
            columns["frame"][here] = np.repeat(np.arange(frames), tokens.num_slots)
            columns["row"][here] = np.tile(tokens.row, frames)
            columns["column"][here] = np.tile(tokens.column, frames)
            columns["period"][here] = tokens.period
            features[here] = _token_features(tokens, frames)
            parts.setdefault(tokens.modality, []).append((at, tokens))
            spans.append((at, frames, tokens.num_slots))
            keys.append(tokens.key)
            flat_numbers.append(numbers[r][d] if numbers is not None else -1)
            at += count
    payloads = {m: _payload(parts[m], context_only=context_only) for m in MODALITIES if m in parts}
    return Batch(
        rows=len(rows),
        row_length=row_length,
        document=document,
        features=features,
        payloads=payloads,
        spans=tuple(spans),
        causal=tuple(tokens.masked is None for documents in rows for tokens in documents),
        keys=tuple(keys),
        numbers=tuple(flat_numbers),
        **columns,
    )


def _token_features(tokens: Tokens, frames: int) -> np.ndarray:
    """(frames * S, features): frame, slot, and the next frame's time and step (NaN after the last frame)."""
    upcoming = np.full((tokens.num_frames, len(NEXT_FEATURES)), np.nan, np.float32)
    upcoming[:-1, :2] = tokens.frame_features[1:, :2]
    upcoming[:-1, 2] = np.log(np.diff(tokens.time))
    per_frame = np.concatenate([tokens.frame_features, upcoming], axis=1)[:frames]
    slots = tokens.num_slots
    repeated = np.repeat(per_frame, slots, axis=0)
    tiled = np.tile(tokens.slot_features, (frames, 1))
    known = len(FRAME_FEATURES)
    return np.concatenate([repeated[:, :known], tiled, repeated[:, known:]], axis=1)


def _payload(parts: Sequence[tuple[int, Tokens]], *, context_only: bool) -> Payload:
    """Concatenate the documents of one modality; variables are padded to the widest document."""
    width = max(tokens.payload.shape[2] for _, tokens in parts)
    bounded = any(np.isfinite(_lower_bounds(tokens)).any() for _, tokens in parts)
    fields: dict[str, list[np.ndarray]] = {}
    first, found = 0, sum(tokens.num_tokens for _, tokens in parts)  # of hidden tokens: after all the others
    for start, tokens in parts:
        frames = tokens.num_context if context_only else tokens.num_frames
        count = frames * tokens.num_slots
        flat = _flatten(tokens, frames, width=width)
        origin, target, lead, slot = _units(tokens, context_only=context_only)
        which = np.searchsorted(tokens.leads, lead) if tokens.anchor.shape[-1] > 1 else np.zeros(len(lead), np.int64)
        flat |= {
            "unit_anchor": _wide(tokens.anchor[origin, slot, :, :, which], width, fill=0.0),
            "unit_spread": _wide(tokens.anchor_spread[origin, slot, :, :, which], width, fill=0.0),
            "unit_lower": _wide(_unit_lower(tokens, target, slot=slot, bounded=bounded), width, fill=-np.inf),
            "index": start + np.arange(count),
            "unit_token": first + origin * tokens.num_slots + slot,
            "unit_target": first + target * tokens.num_slots + slot
            if not context_only
            else np.zeros(len(lead), np.int64),
            "unit_lead": lead,
            "unit_weight": _unit_weight(tokens, target, slot=slot),
            **_hidden(tokens, width),
            "question": np.stack(
                [
                    _log_ahead(tokens, origin, target=target),
                    tokens.frame_features[target, 0],
                    tokens.frame_features[target, 1],
                ],
                axis=1,
            ).astype(np.float32),
        }
        if tokens.masked is not None:
            flat["unit_target"] = found + np.arange(len(origin))
            found += len(origin)
        for name, array in flat.items():
            fields.setdefault(name, []).append(array)
        first += count
    return Payload(**{name: np.concatenate(arrays) for name, arrays in fields.items()})


def _wide(array: np.ndarray, width: int, *, fill: float | bool | int) -> np.ndarray:
    """Pad axis 1 (variables) to `width`."""
    if array.shape[1] == width:
        return array
    shape = (array.shape[0], width - array.shape[1], *array.shape[2:])
    return np.concatenate([array, np.full(shape, fill, array.dtype)], axis=1)


def _flatten(tokens: Tokens, frames: int, *, width: int) -> dict[str, np.ndarray]:
    """Per-token arrays of one document, its variable axis padded to `width`."""
    count = frames * tokens.num_slots

    def per_token(array: np.ndarray) -> np.ndarray:
        return array[:frames].reshape(count, *array.shape[2:])

    def per_slot(array: np.ndarray) -> np.ndarray:
        return np.tile(array, (frames, *([1] * (array.ndim - 1))))

    return {
        "values": _wide(per_token(tokens.payload), width, fill=0.0),
        "valid": _wide(per_token(tokens.valid), width, fill=False),
        "last": _wide(per_token(tokens.last), width, fill=0.0),
        "volatility": _wide(per_token(tokens.volatility), width, fill=0.0),
        "memory": _wide(per_token(tokens.memory), width, fill=0.0),
        "weight": _wide(per_slot(tokens.weight), width, fill=0.0),
        "ids": (tokens.ids[:frames].reshape(count) if tokens.ids is not None else np.zeros(count)).astype(np.int64),
        "variable": _wide(per_slot(tokens.variable).astype(np.int64), width, fill=-1),
        "log_scale": _wide(per_slot(tokens.log_scale), width, fill=np.nan),
        "log_level": _wide(per_slot(_log_level(tokens)), width, fill=np.nan),
        "pile": _wide(per_slot(tokens.pile), width, fill=np.nan),
    }


def _lower_bounds(tokens: Tokens) -> np.ndarray:
    """Transformed bounds, float64 (S, V); -inf where a variable has none, and for series."""
    if tokens.ids is not None:
        return np.full(tokens.variable.shape, -np.inf)
    rows, place = np.unique(tokens.variable, return_inverse=True)
    return np.array([lower_bound(VARIABLE_NAMES[row]) for row in rows])[place].reshape(tokens.variable.shape)


def _unit_lower(tokens: Tokens, target: np.ndarray, *, slot: np.ndarray, bounded: bool) -> np.ndarray:
    """Scaled bounds of the values of these frames and slots, float32 (U, V, K), or (U, V, 0) where none is bounded; a
    value that lies on its bound has the bound's very payload.
    """
    if not bounded:
        return np.zeros((len(target), tokens.variable.shape[1], 0), np.float32)
    away = _lower_bounds(tokens)[slot, :, None] - tokens.offset[target, slot]  # u v k
    return (away / tokens.scale[slot, :, None]).astype(np.float32)


def _log_level(tokens: Tokens) -> np.ndarray:
    """(S, V), NaN where a variable has no level of its own."""
    return tokens.log_level if tokens.log_level is not None else np.full(tokens.variable.shape, np.nan, np.float32)


def _units(tokens: Tokens, *, context_only: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(origin frame, target frame, lead, slot) of every question of a document.

    Origins start at the last context frame, since the scales know all frames before it.
    """
    if tokens.masked is not None:
        if context_only:
            raise PackingError(
                f"document {tokens.key!r} is masked and asks for what it hides, a forecast asks for the frames after "
                "the context; encode the sample with its tokenizer instead of masked_tokens"
            )
        origin, slot = np.nonzero(tokens.masked.hidden)
        return origin, origin, np.zeros_like(origin), slot
    last = tokens.num_context - 1
    origins = np.array([last]) if context_only else np.arange(last, tokens.num_frames)
    origin, lead = np.meshgrid(origins, np.array(tokens.leads), indexing="ij")
    origin, lead = origin.ravel(), lead.ravel()
    inside = origin + lead < tokens.num_frames
    origin, lead = origin[inside], lead[inside]
    origin, lead = np.repeat(origin, tokens.num_slots), np.repeat(lead, tokens.num_slots)
    slot = np.tile(np.arange(tokens.num_slots), inside.sum())
    return origin, origin + lead, lead, slot


def _unit_weight(tokens: Tokens, target: np.ndarray, *, slot: np.ndarray) -> np.ndarray:
    """Mean weight of the values that are there, float32 (U,), so that a value counts by its area wherever it lies.

    A patch at a pole or on a coast counts less than one that is full, which counts 1 on average.
    """
    valid, leads = (tokens.valid, len(tokens.leads)) if tokens.masked is None else (tokens.masked.valid, 1)
    worth = (tokens.weight[slot] * valid[target, slot]).mean(axis=(1, 2))
    return np.asarray(tokens.importance * worth / leads, np.float32)


def _log_ahead(tokens: Tokens, origin: np.ndarray, *, target: np.ndarray) -> np.ndarray:
    """Logarithm of the seconds ahead of each unit; NaN, unknown, where a hidden token is asked for itself."""
    if tokens.masked is not None:
        return np.full(len(origin), np.nan)
    return np.asarray(np.log(tokens.time[target] - tokens.time[origin]))


def _hidden(tokens: Tokens, width: int) -> dict[str, np.ndarray]:
    """What a document hides, (H, V, K) each, frame by frame; H = 0 for a document that hides nothing."""
    if tokens.masked is None:
        none = np.zeros((0, width, tokens.payload.shape[3]), np.float32)
        return {"hidden_values": none, "hidden_valid": none.astype(bool), "hidden_weight": none}
    frame, slot = np.nonzero(tokens.masked.hidden)
    return {
        "hidden_values": _wide(tokens.masked.truth[frame, slot], width, fill=0.0),
        "hidden_valid": _wide(tokens.masked.valid[frame, slot], width, fill=False),
        "hidden_weight": _wide(tokens.weight[slot], width, fill=0.0),
    }
