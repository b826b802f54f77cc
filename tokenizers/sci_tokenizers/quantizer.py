"""ChronosQuantizer: mean scaling and uniform bins, value to id by arithmetic (Ansari et al. 2024, arXiv:2403.07815)."""

from __future__ import annotations

import numpy as np

PAD, EOS = 0, 1
_NUM_SPECIAL = 2
_BEYOND = np.float32(1e20)  # Chronos' outermost boundaries: what lies below has the last of the special ids
_BLOCK = 65536  # values at a time: they and their scratch stay in a core's cache
_LANES, _UNROLLED, _LEVELS = 8, 4, 4  # how torch sums a row of float32 (see `row_sums`)
_MOST_IDS, _LIMITS = 2**18, (1e-30, 1e19)


class QuantizerError(ValueError):
    """Values, ids or scales that a quantizer cannot take; the message says what was expected and what came."""


class Quantizer:
    """Uniform bins on [-limit, limit]: ids PAD = 0, EOS = 1, then 2 kept free below the first bin as Chronos does.

    `num_ids - 3` centres are spaced evenly from -limit to limit. Centres and the boundaries half-way between them are
    the float32 numbers of Chronos' package; a value on a boundary belongs to the bin above it, the outer bins are open,
    and below -1e20 the id is 2.

    Args:
        num_ids: all ids, at most 2**18, so that float32 arithmetic misses a bin by no more than one.
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
        # The boundary below id k is at k here; a quarter less, and rounding never guesses too high an id.
        self._first = np.float32(limit / self.width + _NUM_SPECIAL + 1 + 0.5 - 0.25)

    def ids(self, scaled: np.ndarray, valid: np.ndarray) -> np.ndarray:
        """Ids int32 of scaled values (counted as float32); PAD where not valid."""
        with np.errstate(over="ignore"):
            values = np.asarray(scaled).astype(np.float32)
        return np.where(valid, self._arithmetic(values), np.int32(PAD))

    def _arithmetic(self, scaled: np.ndarray) -> np.ndarray:
        """Ids int32 of float32 values: where the bin must be by its width, then one look at its upper boundary.

        NaN has some id: the caller sets another.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            place = scaled * self._per_unit
            place += self._first
            np.clip(place, np.float32(_NUM_SPECIAL), np.float32(self.num_ids - 1), out=place)
            found: np.ndarray = place.astype(np.int32)
            np.take(self._upper, found, mode="clip", out=place)
            found += scaled >= place
        return found

    def centres(self, ids: np.ndarray) -> np.ndarray:
        """The centre of each id's bin, float32; special ids give the first centre (mask them)."""
        centre: np.ndarray = np.take(self._centre, ids, mode="clip")
        return centre

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
            values: (batch, time), counted as float32; NaN where missing.

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
            values: (batch, prediction_length), NaN where missing.
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
        ids = np.ascontiguousarray(ids)
        # As unsigned numbers negative ids are the largest: one pass finds both.
        if ids.size and ids.view(f"u{ids.itemsize}").max() >= self.bins.num_ids:
            wrong = ids[(ids < 0) | (ids >= self.bins.num_ids)]
            raise QuantizerError(
                f"ids are 0 to {self.bins.num_ids - 1}, got {wrong[0]} and {len(wrong) - 1} more out of range; were "
                "they made by a quantizer with more ids?"
            )
        values = self.bins.centres(ids)
        with np.errstate(over="ignore", invalid="ignore"):
            values *= scale.reshape(-1, *[1] * (ids.ndim - 1))
        return values

    def _encode(self, rows: np.ndarray, given: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        batch, length = rows.shape
        ids = np.full((batch, length + self.use_eos), EOS, np.int32)
        mask = np.ones(ids.shape, bool)
        scale = np.empty(batch, np.float32) if given is None else given
        many = max(1, _BLOCK // max(length, 1))
        for start in range(0, batch, many):
            part = slice(start, start + many)
            values = np.ascontiguousarray(rows[part])
            known = values == values  # not NaN
            missing = np.flatnonzero(~known)
            if given is None:
                scale[part] = _mean_magnitude(values, missing)
            ids[part, :length] = self._block(values, missing, scale=scale[part])
            mask[part, :length] = known
        return ids, mask, scale

    def _block(self, values: np.ndarray, missing: np.ndarray, *, scale: np.ndarray) -> np.ndarray:
        """Ids of a contiguous block of rows."""
        with np.errstate(over="ignore", invalid="ignore", divide="ignore", under="ignore"):
            scaled = values / scale[:, None]
        ids = self.bins._arithmetic(scaled)
        if not (np.isfinite(scale) & (scale != 0)).all():  # infinity by infinity, 0 by 0: above all boundaries
            ids[np.isnan(scaled)] = self.bins.num_ids - 1
        ids.ravel()[missing] = PAD
        return ids


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


def _mean_magnitude(values: np.ndarray, missing: np.ndarray) -> np.ndarray:
    """Chronos' scale of rows (row, time), float32; `missing` are flat places of NaN."""
    rows, length = values.shape
    magnitude = np.abs(values)
    magnitude.ravel()[missing] = 0.0
    count = length - np.bincount(missing // max(length, 1), minlength=rows)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore", under="ignore"):
        scale: np.ndarray = row_sums(magnitude) / count.astype(np.float32)
    scale[~(scale > 0)] = 1.0
    return scale


def _evenly_spaced(limit: float, count: int) -> np.ndarray:
    """torch's `linspace(-limit, limit, count)` in float32: steps from the nearer end, each rounded once."""
    end = np.float32(limit)
    step = np.float64(np.float32((end + end) / np.float32(count - 1)))
    at = np.arange(count)
    from_below = -np.float64(end) + step * at
    from_above = np.float64(end) - step * (count - 1 - at)
    return np.where(at < count // 2, from_below, from_above).astype(np.float32)


def _rows(values: np.ndarray, what: str) -> np.ndarray:
    """`values` as float32 (batch, time)."""
    array = np.asarray(values)
    if array.ndim != 2 or array.dtype.kind not in "fiub":
        raise QuantizerError(f"{what}: real numbers (batch, time), got {array.dtype} of shape {array.shape}")
    with np.errstate(over="ignore"):
        return array.astype(np.float32, copy=False)


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
