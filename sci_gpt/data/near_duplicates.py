"""Near-identical pieces in two splits: one record rescaled, shifted by an offset, rounded, flipped, or cut at its ends.

Candidates: around every local maximum and minimum of a channel a short window is brought to mean 0 and deviation 1. The
nearest windows of another split are looked up in a tree; two pairs that lie apart by the same number of times name a
candidate. Judgement: on their common stretch one is fitted to the other by scale and offset. They are one record if
what is left is less than half of what neither can predict of itself, the error of an autoregression on its own past.
Two records that merely share a season, a tide or a day differ by more than that: each has surprises of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from scipy.fft import dct
from scipy.ndimage import maximum_filter1d, uniform_filter1d
from scipy.spatial import cKDTree

from sci_gpt.errors import DataError
from sci_tokenizers.sample import Sample

CELLS = 16  # of each channel of a grid
HALF, REACH, SCALES = 16, 8, (1, 4)  # a window is its extreme +- HALF values, SCALE apart; one extreme per +- REACH
COEFFICIENTS, NEIGHBOURS, RADIUS = 12, 4, 0.2  # of a window's cosine transform; looked up; their largest distance
LEAST_VALUES, LEAST_TIMES, CHUNK_TIMES = 64, 24, 256  # judged together
LARGEST_GAP = 8 * HALF  # values between neighbouring windows that are judged together
LEAST_LIKE = 0.8  # share of the variance that the fit explains
MOST_LEFT = 0.5  # of the autoregression's error; among 45,000 windows of the quickstart's data none came below 0.9
LEAST_SURPRISES = 32.0  # values that the error is spread over: one spike fits every other spike
LEAST_SURPRISE = 1e-3  # of the deviation: a channel that is predicted entirely (a tide, the sun) says nothing
MOST_ORDER, MOST_FITTED = 32, 4096  # of the autoregression, where there are enough times; times it is fitted to
MOST_LOOKED_UP = (
    20_000  # held-out windows per split and scale, evenly spread over it: a lookup among a million takes 1 ms
)
MOST_LAGS = 32  # judged for two tracks, those with most windows alike first: whatever repeats itself is alike at many
_BASIS = dct(np.eye(2 * HALF + 1), norm="ortho", axis=0)[1 : COEFFICIENTS + 1].T


@dataclass(frozen=True, kw_only=True)
class _Track:
    """One channel of a piece: (times, cells), NaN where missing."""

    piece: int
    channel: str
    values: np.ndarray

    @cached_property
    def weights(self) -> np.ndarray:
        """Of an autoregression fitted to the whole track (to its first MOST_FITTED times)."""
        values = self.values[:MOST_FITTED]
        known = np.isfinite(values)
        return _autoregression(*_pasts(_centred(values, known), known))


@dataclass(frozen=True, kw_only=True)
class _Marks:
    """Windows of one track at one scale: (M, COEFFICIENTS), and where their extremes are in the flattened track."""

    track: int
    windows: np.ndarray
    places: np.ndarray


@dataclass(frozen=True, kw_only=True)
class NearDuplicates:
    """Takes pieces in and refuses what stands nearly identical in two splits.

    Time and memory grow with the data: of each time up to CELLS values per channel are kept. A common stretch of about
    100 times is found (fewer in a grid, where cells stand for times; longer ones where a split has more windows than
    MOST_LOOKED_UP, of which only so many are looked up), one of fewer than LEAST_VALUES values or half of LEAST_TIMES
    never. Two pieces with several channels in common are one record only if most of those that can be
    judged agree: climate models with the same carbon dioxide are not.
    """

    _pieces: list[tuple[str, str]] = field(default_factory=list, repr=False)
    _tracks: list[_Track] = field(default_factory=list, repr=False)
    _marks: dict[tuple[str, int], list[_Marks]] = field(default_factory=dict, repr=False)

    def add(self, sample: Sample, split: str) -> None:
        """Take one piece in."""
        for channel, values in _channels(sample):
            number = len(self._tracks)
            self._tracks.append(_Track(piece=len(self._pieces), channel=channel, values=values))
            for scale in SCALES:
                # A grid's frames are alike (mountains, coasts): their changes are not.
                series = values.reshape(-1) if values.shape[1] == 1 else np.diff(values, axis=0).reshape(-1)
                windows, places = _windows(series, scale)
                if len(places):
                    marks = _Marks(track=number, windows=windows, places=places)
                    self._marks.setdefault((split, scale), []).append(marks)
        self._pieces.append((sample.key, split))

    def merge(self, other: NearDuplicates) -> None:
        """Take in what another process has seen."""
        pieces, tracks = len(self._pieces), len(self._tracks)
        self._pieces.extend(other._pieces)
        self._tracks.extend(replace(track, piece=track.piece + pieces) for track in other._tracks)
        for key, rows in other._marks.items():
            self._marks.setdefault(key, []).extend(replace(row, track=row.track + tracks) for row in rows)

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything but the pieces' names as arrays, for `of_arrays`."""
        tracks, marks = self._tracks, [(key, row) for key, rows in self._marks.items() for row in rows]
        said = {
            "channels": [track.channel for track in tracks],
            "marks": [[split, scale, row.track, len(row.places)] for (split, scale), row in marks],
        }
        windows = [row.windows for _, row in marks]
        return {
            "near": np.frombuffer(json.dumps(said).encode(), np.uint8),
            "track_pieces": np.array([track.piece for track in tracks], np.int64),
            "track_shapes": np.array([track.values.shape for track in tracks], np.int64).reshape(-1, 2),
            "track_values": np.concatenate([*(track.values.ravel() for track in tracks), np.zeros(0, np.float32)]),
            "windows": np.concatenate([*windows, np.zeros((0, COEFFICIENTS))]),
            "places": np.concatenate([*(row.places for _, row in marks), np.zeros(0, np.int64)]),
        }

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, np.ndarray], pieces: Sequence[tuple[str, str]]) -> NearDuplicates:
        """What `arrays` gave, with the (key, split) of its pieces."""
        said, shapes = json.loads(arrays["near"].tobytes()), arrays["track_shapes"]
        values = np.split(arrays["track_values"], np.cumsum(shapes.prod(axis=1)))[: len(shapes)]
        tracks = [
            _Track(piece=int(piece), channel=channel, values=flat.reshape(shape))
            for piece, channel, flat, shape in zip(
                arrays["track_pieces"], said["channels"], values, shapes.tolist(), strict=True
            )
        ]
        found = cls(_pieces=list(pieces), _tracks=tracks)
        ends = np.cumsum([0, *(count for *_, count in said["marks"])]).tolist()
        windows, places = arrays["windows"], arrays["places"]
        for (split, scale, track, _), start, stop in zip(said["marks"], ends[:-1], ends[1:], strict=True):
            marks = _Marks(track=track, windows=windows[start:stop], places=places[start:stop])
            found._marks.setdefault((split, scale), []).append(marks)
        return found

    def check(self) -> None:
        """Compare test with training and validation, and validation with training.

        Raises:
            DataError: two pieces that are one record; both keys, the channel and the times are named.
        """
        for split, others in (("test", ("train", "valid")), ("valid", ("train",))):
            votes: dict[tuple[int, int, int], set[tuple[int, int]]] = {}
            lags: dict[tuple[int, int], list[tuple[int, int]]] = {}
            for scale in SCALES:
                other = [marks for name in others for marks in self._marks.get((name, scale), [])]
                for key, place in self._candidates(self._marks.get((split, scale), []), other):
                    votes.setdefault(key, set()).add((place, scale))
            for (here, there, lag), places in votes.items():
                if len(places) > 1:
                    lags.setdefault((here, there), []).append((len(places), lag))
            for (here, there), ranked in lags.items():
                for _, lag in sorted(ranked, reverse=True)[:MOST_LAGS]:
                    self._judge(here, there, lag=lag, places=sorted(votes[here, there, lag]))

    def _candidates(self, here: list[_Marks], there: list[_Marks]) -> Iterator[tuple[tuple[int, int, int], int]]:
        """((track, other track, lag in times), place in the track) of windows that are alike."""
        if not here or not there:
            return
        tree = cKDTree(np.concatenate([marks.windows for marks in there]))
        places = np.concatenate([marks.places for marks in there])
        tracks = np.repeat([marks.track for marks in there], [len(marks.places) for marks in there])
        step, first = -(-sum(len(marks.places) for marks in here) // MOST_LOOKED_UP), 0
        for marks in here:
            cells = self._tracks[marks.track].values.shape[1]
            mine, first = slice(first, None, step), (first - len(marks.places)) % step
            distance, found = tree.query(marks.windows[mine], k=NEIGHBOURS, distance_upper_bound=RADIUS)
            for row, column in zip(*np.nonzero(np.isfinite(distance)), strict=True):
                other, place = found[row, column], int(marks.places[mine][row])
                lag, rest = divmod(int(places[other]) - place, cells)
                if rest == 0 and self._tracks[tracks[other]].values.shape[1] == cells:
                    yield (marks.track, int(tracks[other]), lag), place

    def _judge(self, here: int, there: int, *, lag: int, places: list[tuple[int, int]]) -> None:
        """Refuse two tracks that are one record where windows are alike: time t of the one is t + lag of the other."""
        one, two = self._tracks[here], self._tracks[there]
        earliest, latest = max(0, -lag), min(len(one.values), len(two.values) - lag)
        for first, last in _stretches(places, cells=one.values.shape[1]):
            first, last = max(first, earliest), min(last, latest)
            if _is_one_record(one, two, lag=lag, span=(first, last)) and self._most_agree(
                one, two, lag=lag, span=(first, last)
            ):
                (key, split), (other, other_split) = self._pieces[one.piece], self._pieces[two.piece]
                raise DataError(
                    f"{other!r} ({other_split}) and {key!r} ({split}) are nearly the same: {two.channel} at times "
                    f"{first + lag}..{last + lag - 1} of the one is {one.channel} at {first}..{last - 1} of the other "
                    "up to scale, offset and rounding; leave one of the two out"
                )

    def _most_agree(self, one: _Track, two: _Track, *, lag: int, span: tuple[int, int]) -> bool:
        """Whether most channels that both pieces have agree there (those of which nothing can be said do not count)."""
        theirs = {track.channel: track for track in self._tracks if track.piece == two.piece}
        said = [
            _is_one_record(track, theirs[track.channel], lag=lag, span=span)
            for track in self._tracks
            if track.piece == one.piece
            and track.channel in theirs
            and track.values.shape[1] == theirs[track.channel].values.shape[1]
        ]
        known = [answer for answer in said if answer is not None]
        return one.channel != two.channel or 2 * sum(known) > len(known)


def _is_one_record(one: _Track, two: _Track, *, lag: int, span: tuple[int, int]) -> bool | None:
    """Whether times `span` of one track are times span + lag of the other, up to scale, offset and rounding.

    Returns:
        None where nothing can be said: too few values, or nothing in them that could not be predicted.
    """
    first, last = span
    here, there = one.values[first:last], two.values[first + lag : last + lag]
    both = np.isfinite(here) & np.isfinite(there)
    alive = both.sum(axis=0) >= min(LEAST_TIMES, len(here)) // 2
    both = both[:, alive]
    if both.sum() < LEAST_VALUES or len(here) < LEAST_TIMES // 2:
        return None
    x, y = _centred(here[:, alive], both), _centred(there[:, alive], both)
    if not x.any() or not y.any():
        return None
    slope = (x[both] @ y[both]) / (x[both] @ x[both])
    left = float(np.sqrt(np.mean((y - slope * x)[both] ** 2)))
    if left**2 > (1.0 - LEAST_LIKE) * np.mean(y[both] ** 2):
        return False
    surprises = [_surprise(x, both, weights=one.weights), _surprise(y, both, weights=two.weights)]
    if None in surprises:
        return None
    # The coarser of two roundings counts: it is a part of its own record's surprises.
    return left <= MOST_LEFT * max(abs(slope) * (surprises[0] or 0.0), surprises[1] or 0.0)


def _channels(sample: Sample) -> Iterator[tuple[str, np.ndarray]]:
    """(channel, (times, cells)) of what has values at all; up to CELLS cells, evenly spread."""
    values = sample.values.reshape(sample.num_times, len(sample.channels), -1)
    known = sample.valid.reshape(values.shape)
    for number, channel in enumerate(sample.channels):
        cells = np.flatnonzero(known[:, number].any(axis=0))
        if len(cells):
            cells = cells[np.unique(np.linspace(0, len(cells) - 1, CELLS).astype(int))]
            yield channel, np.where(known[:, number, cells], values[:, number, cells], np.nan).astype(np.float32)


def _windows(values: np.ndarray, scale: int) -> tuple[np.ndarray, np.ndarray]:
    """Normalized windows around the extremes of a series, (M, COEFFICIENTS), and their places, (M,).

    Those around minima are turned over, so that a flipped copy has the same ones. Those with few changes are left out.
    """
    need, known = HALF * scale, np.isfinite(values)
    if len(values) <= 2 * need or known.sum() < need:
        return np.empty((0, COEFFICIENTS)), np.empty(0, int)
    whole = _filled(values)
    smooth = uniform_filter1d(whole - whole.mean(), 2 * scale + 1, mode="nearest")
    found = []
    for sign in (1.0, -1.0):
        top = sign * smooth == maximum_filter1d(sign * smooth, 2 * REACH * scale + 1, mode="nearest")
        top[1:] &= np.diff(sign * smooth) > 0  # the first of a plateau
        places = np.flatnonzero(top[: len(values) - need])
        found += [(place, sign) for place in places[places >= need].tolist()]
    places, signs = np.array([place for place, _ in found], int), np.array([sign for _, sign in found])
    inside = places[:, None] + scale * np.arange(-HALF, HALF + 1)
    rows = (whole if scale == 1 else smooth)[inside] * signs[:, None]
    rows = rows - rows.mean(axis=1, keepdims=True)
    power, spread = np.diff(rows, axis=1) ** 2, rows.std(axis=1)
    changes = power.sum(axis=1) ** 2 / np.maximum((power**2).sum(axis=1), 1e-300)
    kept = (known[inside].mean(axis=1) >= 0.9) & (spread > 1e-5 * whole.std()) & (changes >= HALF / 2)
    return rows[kept] / (spread[kept, None] * np.sqrt(2 * HALF + 1)) @ _BASIS, places[kept]


def _stretches(places: list[tuple[int, int]], *, cells: int) -> Iterator[tuple[int, int]]:
    """(first, last) times that neighbouring alike windows span: about CHUNK_TIMES at most, enough to be judged."""
    least = max(-(-LEAST_VALUES // cells), LEAST_TIMES)
    while places:
        begin, size = places[0][0], 1
        while (
            size < len(places)
            and places[size][0] - begin <= CHUNK_TIMES * cells
            and places[size][0] - places[size - 1][0] <= LARGEST_GAP
        ):
            size += 1
        first = min(place - HALF * scale for place, scale in places[:size]) // cells
        last = -(-max(place + HALF * scale + 1 for place, scale in places[:size]) // cells)
        more = max(0, least - (last - first) + 1) // 2
        yield first - more, last + more
        places = places[size:]


def _centred(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Every cell less its mean over what is known, 0 elsewhere."""
    values = np.where(known, values, 0.0).astype(np.float64)
    return np.where(known, values - values.sum(axis=0) / np.maximum(known.sum(axis=0), 1), 0.0)


def _surprise(values: np.ndarray, known: np.ndarray, *, weights: np.ndarray) -> float | None:
    """Root mean square of what a stretch's own past does not predict: by an autoregression fitted to the stretch, or by
    the whole track's (`weights`), whichever is better; None where that is nearly nothing, or a few spikes."""
    past, now = _pasts(values, known)
    errors = now - past @ _autoregression(past, now)
    power = errors**2
    size = np.sqrt(power.sum() / max(len(now) - past.shape[1], 1))
    past, now = _pasts(values, known, order=len(weights))
    if len(now) >= LEAST_TIMES:
        size = min(size, (now - past @ weights).std())  # of its deviation: the whole track has another mean
    count = 3.0 * power.sum() ** 2 / max((power**2).sum(), 1e-300)  # as many as there are, if they are Gaussian
    return None if count < LEAST_SURPRISES or size < LEAST_SURPRISE * values[known].std() else float(size)


def _pasts(values: np.ndarray, known: np.ndarray, *, order: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """For every known value the `order` values before it in its cell (missing ones interpolated), and the value."""
    times, cells = values.shape
    if order is None:
        order = min(MOST_ORDER, times // (8 if cells == 1 else 3))
    if times <= order:
        return np.empty((0, order)), np.empty(0)
    filled = np.stack([_filled(np.where(known[:, c], values[:, c], np.nan)) for c in range(cells)], axis=1)
    rows = np.lib.stride_tricks.sliding_window_view(filled, order + 1, axis=0)[known[order:]]
    return rows[:, :-1], rows[:, -1]


def _autoregression(past: np.ndarray, now: np.ndarray) -> np.ndarray:
    """Least-squares weights, one set for all cells."""
    weights: np.ndarray = np.linalg.lstsq(past.T @ past, past.T @ now, rcond=1e-10)[0]
    return weights


def _filled(values: np.ndarray) -> np.ndarray:
    """A series with its missing values interpolated (0 where all are missing), in float64."""
    known = np.isfinite(values)
    if not known.any():
        return np.zeros(len(values))
    places = np.arange(len(values))
    return np.interp(places, places[known], values[known].astype(np.float64))
