"""ChronosQuantizer: mean scaling and uniform bins, value to id by arithmetic (Ansari et al. 2024, arXiv:2403.07815)."""

from __future__ import annotations

import numpy as np

PAD, EOS = 0, 1
_NUM_SPECIAL = 2
_BEYOND = np.float32(1e20)  # Chronos' outermost boundaries: what lies below has the last of the special ids
_BLOCK = 2**17  # values at a time: they and their scratch stay in the cache, and calls of numpy cost little beside them
_LANES, _UNROLLED, _LEVELS = 8, 4, 4  # how torch sums a row of float32 (see `row_sums`)
_MOST_IDS, _LIMITS = 2**18, (1e-30, 1e19)


class QuantizerError(ValueError):
    """Values, ids or scales that a quantizer cannot take; the message says what was expected and what came."""


class _Room:
    """Scratch for a block of values of one shape."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.scaled, self.place, self.floor = (np.empty(shape, np.float32) for _ in range(3))
        self.near = np.empty(shape, bool)


class Quantizer:
    """Uniform bins on [-limit, limit]: ids PAD = 0, EOS = 1, then 2 kept free below the first bin as Chronos does.

    `num_ids - 3` centres are spaced evenly from -limit to limit. Centres and the boundaries half-way between them are
    the float32 numbers of Chronos' package; a value on a boundary belongs to the bin above it, the outer bins are open,
    and below -1e20 the id is 2.

    Args:
        num_ids: all ids, at most 2**18, so that float32 arithmetic misses a place by at most an eighth.
        limit: centre of the last bin, within 1e-30 and 1e19.

    Raises:
        QuantizerError: too few or too many ids, or a limit out of range.
    """

    def __init__(self, num_ids: int = 4096, limit: float = 15.0) -> None:
        if not 8 <= num_ids <= _MOST_IDS or not _LIMITS[0] <= limit <= _LIMITS[1]:
            raise QuantizerError(
                f"a quantizer has 8 to {_MOST_IDS} ids and a limit within {_LIMITS[0]:g} and {_LIMITS[1]:g}, got "
                f"{num_ids} ids and limit {limit:g}"
            )
        self.num_ids, self.limit = num_ids, limit
        self.num_bins = num_ids - _NUM_SPECIAL - 1
        self.width = 2.0 * limit / (self.num_bins - 1)
        centres = _evenly_spaced(limit, self.num_bins)
        between = (centres[1:] + centres[:-1]) / np.float32(2.0)
        # The boundary above each id; nothing lies above the last (no comparison with NaN holds).
        nothing = np.full(_NUM_SPECIAL, np.nan, np.float32)
        self._upper = np.concatenate([nothing, [-_BEYOND], between, nothing[:1]])
        self._centre = np.concatenate([np.full(_NUM_SPECIAL + 1, centres[0]), centres])
        self._per_unit = np.float32(1.0 / self.width)
        # Places are counted in ids, and the boundary below id k is `error` above k: eight roundings, each at most half
        # of a last digit of num_ids, are more than there are between a value and its place.
        error = 8 * num_ids * 2.0**-24
        self._first, self._near = np.float32(limit / self.width + _NUM_SPECIAL + 1.5 + error), np.float32(2.0 * error)

    def ids(self, scaled: np.ndarray, valid: np.ndarray) -> np.ndarray:
        """Ids int32 of scaled values (counted as float32); PAD where not valid."""
        with np.errstate(over="ignore"):
            values = np.asarray(scaled).astype(np.float32)
        found = np.empty(values.shape, np.int32)
        self._arithmetic(values, _Room(values.shape), out=found)
        return np.where(valid, found, np.int32(PAD))

    def _arithmetic(self, scaled: np.ndarray, room: _Room, *, out: np.ndarray) -> None:
        """Ids of float32 values into `out`: the bin is known by its width, but for a few values near a boundary, whose
        side of it is looked up.

        NaN has some id: the caller sets another.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            place = np.multiply(scaled, self._per_unit, out=room.place)
            place += self._first
            # What lies below the first bin is near the boundary -1e20; what lies above the last is near none.
            np.clip(place, np.float32(_NUM_SPECIAL + 1), np.float32(self.num_ids - 0.5), out=place)
            np.copyto(out, place, casting="unsafe")
            place -= np.floor(place, out=room.floor)
            near = np.less(place, self._near, out=room.near)
            below = out[near] - 1
            out[near] = below + (scaled[near] >= self._upper[below])

    def centres(self, ids: np.ndarray) -> np.ndarray:
        """The centre of each id's bin, float32; special ids give the first centre (mask them)."""
        centre: np.ndarray = np.take(self._centre, ids, mode="clip")
        return centre

    def _refuse_unknown(self, ids: np.ndarray) -> None:
        # All bits together are negative where an id is, and no less than the largest: mostly one fast pass is enough.
        if 0 <= np.bitwise_or.reduce(ids, axis=None) < self.num_ids:
            return
        wrong = ids[(ids < 0) | (ids >= self.num_ids)]
        if wrong.size:
            raise QuantizerError(
                f"ids are 0 to {self.num_ids - 1}, got {wrong[0]} (and {len(wrong) - 1} more near it); were they made "
                "by a quantizer with more ids?"
            )

    def clipped(self, scaled: np.ndarray) -> np.ndarray:
        """True where a scaled value lies beyond the outer centres by more than half a bin."""
        return np.abs(scaled) > self.limit + self.width / 2


class ChronosQuantizer:
    """The tokenizer of Chronos' package (`MeanScaleUniformBins`), in numpy: the same ids, masks, scales and values.

    A row's scale is the mean |x| of its valid values; an id is the bin of x / scale. Missing (NaN) is PAD.

    Args:
        num_tokens, limit: of the bins (see `Quantizer`).
        context_length: a longer context is cut to its last values.
        prediction_length: of labels.
        use_eos: end rows of ids with EOS, whose mask is True.

    Raises:
        QuantizerError: sizes that make no quantizer.
    """

    def __init__(
        self,
        num_tokens: int = 4096,
        limit: float = 15.0,
        *,
        context_length: int = 512,
        prediction_length: int = 64,
        use_eos: bool = True,
    ) -> None:
        if context_length < 1 or prediction_length < 1:
            raise QuantizerError(
                f"context_length and prediction_length are at least 1, got {context_length} and {prediction_length}"
            )
        self.bins = Quantizer(num_tokens, limit)
        self.context_length, self.prediction_length, self.use_eos = context_length, prediction_length, use_eos

    def encode_context(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids, mask and scale of contexts.

        Args:
            values: (batch, time), counted as float32; NaN, or masked in a masked array, where missing.

        Returns:
            ids int32 and mask bool (batch, min(time, context_length) + 1 with `use_eos`), scale float32 (batch,), 1
            where no value is valid or all are 0.

        Raises:
            QuantizerError: not (batch, time) of real numbers.
        """
        return self._encode(_rows(values, "a context")[:, -self.context_length :], None)

    def encode_labels(self, values: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids and mask of labels on the scale of their contexts.

        Args:
            values: (batch, prediction_length), NaN or masked where missing.
            scale: (batch,), of `encode_context`.

        Returns:
            ids int32 and mask bool (batch, prediction_length + 1 with `use_eos`).

        Raises:
            QuantizerError: another shape of values or scale.
        """
        rows = _rows(values, "labels")
        if rows.shape[1] != self.prediction_length:
            raise QuantizerError(
                f"labels are (batch, prediction_length {self.prediction_length}), got shape {rows.shape}; cut them or "
                "make a quantizer with another prediction_length"
            )
        ids, mask, _ = self._encode(rows, _scales(scale, rows.shape))
        return ids, mask

    def decode(self, ids: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """Values float32 of ids, same shape: the bin's centre times the row's scale; special ids the first centre's.

        Args:
            ids: integers (batch, time) or (batch, sample, time).
            scale: (batch,).

        Raises:
            QuantizerError: ids that are no integers, or not from 0 to num_tokens - 1; another shape of ids or scale.
        """
        ids = np.asarray(ids)
        if ids.ndim not in (2, 3) or ids.dtype.kind not in "iu":
            raise QuantizerError(
                f"ids are integers (batch, time) or (batch, sample, time), got {ids.dtype} of shape {ids.shape}"
            )
        scale = _scales(scale, ids.shape)
        flat = np.ascontiguousarray(ids).reshape(len(ids), -1)
        values = np.empty(flat.shape, np.float32)
        many = max(1, _BLOCK // max(flat.shape[1], 1))
        for start in range(0, len(flat), many):
            part = slice(start, start + many)
            self.bins._refuse_unknown(flat[part])
            np.take(self.bins._centre, flat[part], mode="wrap", out=values[part])  # the fastest; none is out of range
            with np.errstate(over="ignore", invalid="ignore"):
                values[part] *= scale[part, None]
        return values.reshape(ids.shape)

    def _encode(self, rows: np.ndarray, given: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        batch, length = rows.shape
        ids = np.empty((batch, length + self.use_eos), np.int32)
        mask = np.empty(ids.shape, bool)
        mask[:, length:] = True
        np.equal(rows, rows, out=mask[:, :length])  # False for NaN alone
        missing = np.flatnonzero(~mask)
        scale = self._scale(rows, missing, room=ids) if given is None else given
        many = max(1, _BLOCK // max(length, 1))
        room = _Room((min(many, batch), length))
        for start in range(0, batch, many):
            part = slice(start, start + many)
            room = room if start + many <= batch else _Room((batch - start, length))
            with np.errstate(over="ignore", invalid="ignore", divide="ignore", under="ignore"):
                scaled = np.divide(rows[part], scale[part, None], out=room.scaled)
            self.bins._arithmetic(scaled, room, out=ids[part, :length])
            if not (np.isfinite(scale[part]) & (scale[part] != 0)).all():
                # Infinity by infinity, 0 by 0: above all boundaries.
                ids[part, :length][np.isnan(scaled)] = self.bins.num_ids - 1
        ids.ravel()[missing] = PAD
        ids[:, length:] = EOS
        return ids, mask, scale

    def _scale(self, rows: np.ndarray, missing: np.ndarray, *, room: np.ndarray) -> np.ndarray:
        """Chronos' scale of each row, float32; `missing` are flat places of NaN in the shape of `room`.

        `room`, whose memory the ids will have, holds |x| meanwhile: memory that is new is slower than any arithmetic.
        """
        batch, length = rows.shape
        held = room.view(np.float32)
        np.abs(rows, out=held[:, :length])
        held.ravel()[missing] = 0.0
        count = length - np.bincount(missing // max(room.shape[1], 1), minlength=batch)
        with np.errstate(over="ignore", invalid="ignore", divide="ignore", under="ignore"):
            scale: np.ndarray = row_sums(held[:, :length]) / count.astype(np.float32)
        scale[~(scale > 0)] = 1.0
        return scale


def mean_scale(values: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Chronos' scale: mean |x| over the valid values of the first axis; 1 where there is none or it is 0."""
    count = valid.sum(axis=0)
    total = np.where(valid, np.abs(values), 0.0).sum(axis=0)
    scale = total / np.maximum(count, 1)
    return np.where((count > 0) & (scale > 0), scale, 1.0)


def row_sums(values: np.ndarray) -> np.ndarray:
    """Sums of the rows of float32 (row, time), added as torch's `nansum` adds on x86: equal to the last digit.

    Eight lanes by four are summed side by side, in pieces whose sums are carried up through levels; what is left over
    of a row comes first when the lanes are added (`cascade_sum` of ATen/native/cpu/SumKernel.cpp, torch 2.13).
    """
    rows, length = values.shape
    lanes = _LANES if length >= _LANES else 1
    vectors = length // lanes
    quads = vectors // _UNROLLED
    body = values[:, : quads * _UNROLLED * lanes].reshape(rows, quads, _UNROLLED * lanes)
    parts = _cascade(body).reshape(rows, _UNROLLED, lanes)
    with np.errstate(over="ignore"):
        lane = parts[:, 0]
        for k in range(quads * _UNROLLED, vectors):
            lane += values[:, k * lanes : (k + 1) * lanes]
        for k in range(1, _UNROLLED):
            lane += parts[:, k]
        total = np.zeros(rows, np.float32)
        for k in range(vectors * lanes, length):
            total += values[:, k]
        for k in range(lanes):
            total += lane[:, k]
    return total


def _cascade(body: np.ndarray) -> np.ndarray:
    """Sums over the middle axis of (row, quad, lane), one after the other within a piece, pieces by levels."""
    rows, quads, lanes = body.shape
    power = max(4, (max(quads, 1) - 1).bit_length() // _LEVELS)
    step = 1 << power
    level = np.zeros((_LEVELS, rows, lanes), np.float32)
    done = 0
    with np.errstate(over="ignore"):
        while done + step <= quads:
            level[0] = np.einsum("rqw->rw", body[:, done : done + step])
            done += step
            for j in range(1, _LEVELS):
                level[j] += level[j - 1]
                level[j - 1] = 0.0
                if done & ((step - 1) << (j * power)):
                    break
        if done < quads:
            level[0] = np.einsum("rqw->rw", body[:, done:])
        for j in range(1, _LEVELS):
            level[0] += level[j]
    return level[0]


def _evenly_spaced(limit: float, count: int) -> np.ndarray:
    """torch's `linspace(-limit, limit, count)` in float32: steps from the nearer end, each rounded once."""
    end = np.float32(limit)
    step = np.float64(np.float32((end + end) / np.float32(count - 1)))
    at = np.arange(count)
    from_below = -np.float64(end) + step * at
    from_above = np.float64(end) - step * (count - 1 - at)
    return np.where(at < count // 2, from_below, from_above).astype(np.float32)


def _rows(values: np.ndarray, what: str) -> np.ndarray:
    """`values` as float32 (batch, time), NaN where a masked array is masked."""
    array = np.asarray(values)
    if array.ndim != 2 or array.dtype.kind not in "fiub":
        raise QuantizerError(f"{what}: real numbers (batch, time), got {array.dtype} of shape {array.shape}")
    with np.errstate(over="ignore"):
        array = array.astype(np.float32, copy=False)
    return np.where(np.ma.getmaskarray(values), np.float32(np.nan), array) if np.ma.is_masked(values) else array


def _scales(scale: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """`scale` as float32 (batch,), one for each row of `shape`."""
    array = np.asarray(scale)
    if array.shape != shape[:1] or array.dtype.kind not in "fiu":
        raise QuantizerError(
            f"scale: one real number per row, ({shape[0]},), got {array.dtype} of shape {array.shape}; it comes from "
            "encode_context of the same rows"
        )
    with np.errstate(over="ignore"):
        return array.astype(np.float32, copy=False)
