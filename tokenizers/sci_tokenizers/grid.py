"""Grid tokenizer: a frame is a time, a slot is a patch of p x p cells, a token holds the patch of every variable."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from sci_tokenizers.autoregression import HORIZONS
from sci_tokenizers.memory import last_valid, memories
from sci_tokenizers.prior import LinearPrior, Past
from sci_tokenizers.sample import Sample
from sci_tokenizers.sphere import EARTH_RADIUS_M, cell_areas, cell_weights, goes_around, is_lat_lon
from sci_tokenizers.statistics import ChannelStatistics, known_priors
from sci_tokenizers.tokenizer import Tokenizer, TokenizerError, frame_features, log_scales, variable_rows
from sci_tokenizers.tokens import SLOT_FEATURES, Tokens
from sci_tokenizers.variables import VARIABLE_NAMES, forward_transform, inverse_transform, lower_bound

_LEAST_SCALE = 1e-30  # what float32 can divide by without running over
_TOLD = float(np.finfo(np.float32).eps)  # of a level: float32, in which samples come, does not tell less apart


class GridTokenizer(Tokenizer):
    """transform -> minus the cell's climatology, where training knows it, and its mean over the context -> divided by
    the spread of those anomalies.

    Cells that the context never saw take the climatology alone, or the training mean of the channel (or the context's
    overall mean).
    Ragged edges are padded with missing cells.

    A value x that is not transformed comes back within (|x| + |x - offset|) / 2^24, float32's own rounding; one of
    log1p(x / u) within (|x| + (x + u) |payload| scale) / 2^24.
    """

    modality = "grid"

    @property
    def frame_times(self) -> int:
        """One time."""
        return 1

    def num_slots(self, shape: tuple[int, int, int]) -> int:
        """Patches, ragged edges included."""
        patch = self.settings.grid_patch
        return -(-shape[1] // patch) * -(-shape[2] // patch)

    def check_size(self, shape: tuple[int, ...], *, where: str) -> None:
        """See `Tokenizer.check_size`: a grid is a patch high and a patch wide at least."""
        patch = self.settings.grid_patch
        if min(shape[1:]) < patch:
            raise TokenizerError(
                f"{where}: a grid of {shape[1]} x {shape[2]} cells is smaller than a patch of {patch} x {patch}; give "
                f"a larger region, or train a model with tokenizer.grid_patch of {min(shape[1:])} or less"
            )

    def encode(
        self,
        sample: Sample,
        *,
        num_context: int,
        leads: tuple[int, ...],
        statistics: Mapping[str, ChannelStatistics] | None = None,
    ) -> Tokens:
        """See `Tokenizer.encode`; payload (F, S, V, p * p), slots in row-major order of patches."""
        self._check(sample, num_context, leads=leads)
        self.check_size(sample.values.shape[1:], where=f"sample {sample.key!r}")
        transformed = np.stack(
            [
                forward_transform(sample.values[:, v].astype(np.float64), name)
                for v, name in enumerate(sample.variables)
            ],
            axis=1,
        )
        offset, scale, home = _normalisation(sample, transformed, num_context=num_context, statistics=statistics)
        scaled = np.where(sample.valid, (transformed - offset) / scale[:, None, None], 0.0).astype(np.float32)
        payload, valid = self._patches(scaled), self._patches(sample.valid)
        slots = payload.shape[1]
        rows, columns = self._patch_grid(sample.values.shape[2:])
        past = self._past(payload, valid, scale=scale, home=home)
        own = _own_forecast(past, known_priors(statistics, sample.channels, leads=leads), leads=leads)
        features, time = frame_features(sample, 1, statistics=statistics)
        return Tokens(
            key=sample.key,
            source=sample.source,
            modality="grid",
            payload=payload,
            valid=valid,
            ids=None,
            last=past.last,
            anchor=own["anchor"],
            anchor_spread=own["anchor_spread"],
            memory=past.memory,
            volatility=own["volatility"],
            weight=self._area_weights(sample),
            variable=np.tile(variable_rows(sample), (slots, 1)),
            row=np.repeat(np.arange(rows, dtype=np.int16), columns),
            column=np.tile(np.arange(columns, dtype=np.int16), rows),
            frame_features=features,
            slot_features=self._slot_features(sample),
            log_scale=np.tile(log_scales(scale, sample), (slots, 1)),
            log_level=np.tile(_log_levels(sample), (slots, 1)),
            pile=np.full((slots, len(scale)), np.nan, np.float32),
            offset=self._patches(offset.astype(np.float32)),
            scale=np.tile(scale.astype(np.float32), (slots, 1)),
            time=time,
            num_context=num_context,
            leads=leads,
            size=(sample.values.shape[2], sample.values.shape[3]),
            period=self._period(sample),
        )

    def _past(self, payload: np.ndarray, valid: np.ndarray, *, scale: np.ndarray, home: np.ndarray) -> Past:
        """Last values and memories of every cell; `home` (V, Y, X) unscaled."""
        slots = payload.shape[1]
        last = last_valid(payload, valid)
        at_home = self._patches((home / scale[:, None, None])[None])[0].astype(np.float64)
        return Past(
            payload=payload,
            valid=valid,
            last=last,
            memory=memories(payload, valid, last=last, home=at_home, kin=np.zeros((slots, slots))),
            scale=np.tile(scale, (slots, 1)),
            slots_are_channels=False,
        )

    def _area_weights(self, sample: Sample) -> np.ndarray:
        """(S, V, K): area of each cell that is ever seen, mean 1 over them."""
        area = cell_weights(sample.latitude, sample.longitude)
        seen = np.asarray(sample.valid.any(axis=0))
        weight = self._patches(np.where(seen, area, 0.0)[None])[0]
        return (weight / max(weight.sum() / max(self._patches(seen[None]).sum(), 1), 1e-12)).astype(np.float32)

    def cells(self, tokens: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """See `Tokenizer.cells`."""
        whole = np.broadcast_to(tokens[:, :, None, None], (*tokens.shape, shape[1], self.settings.grid_patch**2))
        return self._fields(whole, (shape[2], shape[3]))

    def rescaled(self, tokens: Tokens, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
        """See `Tokenizer.rescaled`."""
        transformed = np.stack(
            [
                forward_transform(sample.values[:, v].astype(np.float64), name)
                for v, name in enumerate(sample.variables)
            ],
            axis=1,
        )
        valid = self._patches(sample.valid)
        payload = (self._patches(transformed) - tokens.offset) / tokens.scale[:, :, None]
        return np.where(valid, payload, 0.0).astype(np.float32), np.asarray(valid)

    def decode(self, tokens: Tokens, payload: np.ndarray) -> np.ndarray:
        """Scaled patches (..., F, S, V, p * p) to physical fields (..., time, variable, row, column)."""
        physical = payload.astype(np.float64) * tokens.scale[:, :, None] + tokens.offset
        for v, row in enumerate(tokens.variable[0]):
            bound = lower_bound(VARIABLE_NAMES[row])
            if np.isfinite(bound):  # what lies on it comes back as it, not as what rounding leaves of it
                lowest = ((bound - tokens.offset[:, :, v]) / tokens.scale[:, v, None]).astype(np.float32)
                physical[..., v, :][payload[..., v, :] <= lowest] = bound
            physical[..., v, :] = inverse_transform(physical[..., v, :], VARIABLE_NAMES[row])
        return self._fields(physical, tokens.size).astype(np.float32)

    def _period(self, sample: Sample) -> int:
        """Columns of patches once around the globe; 0 where the grid does not go around or the seam cuts a patch."""
        columns, rest = divmod(sample.values.shape[3], self.settings.grid_patch)
        return columns if not rest and goes_around(sample.latitude, sample.longitude) else 0

    def arrange(self, values: np.ndarray) -> np.ndarray:
        """See `Tokenizer.arrange`; the padding of ragged edges is 0."""
        return self._patches(values[:, 0])

    def _patch_grid(self, size: tuple[int, ...]) -> tuple[int, int]:
        patch = self.settings.grid_patch
        return -(-size[0] // patch), -(-size[1] // patch)

    def _patches(self, field: np.ndarray) -> NDArray[np.generic]:
        """(F, V, Y, X) -> (F, S, V, p * p), padded at the high edges with zeros (False)."""
        patch = self.settings.grid_patch
        rows, columns = self._patch_grid(field.shape[2:])
        frames, variables, height, width = field.shape
        padded = np.zeros((frames, variables, rows * patch, columns * patch), field.dtype)
        padded[:, :, :height, :width] = field
        cut = padded.reshape(frames, variables, rows, patch, columns, patch)  # f v r p c q
        return cut.transpose(0, 2, 4, 1, 3, 5).reshape(frames, rows * columns, variables, patch * patch)

    def _fields(self, patches: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """(..., F, S, V, p * p) -> (..., F, V, Y, X), the padding cut away."""
        patch = self.settings.grid_patch
        rows, columns = self._patch_grid(size)
        *lead, frames, _, variables, _ = patches.shape
        cut = patches.reshape(*lead, frames, rows, columns, variables, patch, patch)  # .. f r c v p q
        whole = np.moveaxis(cut, -3, -5)  # .. f v r c p q
        whole = np.moveaxis(whole, -2, -3).reshape(*lead, frames, variables, rows * patch, columns * patch)
        return whole[..., : size[0], : size[1]]

    def _slot_features(self, sample: Sample) -> np.ndarray:
        """(S, 5): mean latitude and elevation of the known cells, mean direction of longitude, the level where all
        variables have the same, and the patch's extent in metres.
        """
        longitude = np.radians(sample.longitude.astype(np.float64))
        place = np.stack([sample.latitude, np.cos(longitude), np.sin(longitude), sample.elevation])[None].astype(
            np.float64
        )
        known = np.isfinite(place)
        count = self._patches(known)[0].sum(-1)  # s 4
        total = self._patches(np.where(known, place, 0.0))[0].sum(-1)
        mean = np.where(count > 0, total / np.maximum(count, 1), np.nan)
        rows, columns = self._patch_grid(sample.latitude.shape)
        out = np.full((rows * columns, len(SLOT_FEATURES)), np.nan, np.float32)
        out[:, 0] = mean[:, 0]
        out[:, 1] = np.degrees(np.arctan2(mean[:, 2], mean[:, 1]))
        out[:, 2] = mean[:, 3]
        levels = _log_levels(sample)
        out[:, 3] = levels[0] if (levels == levels[0]).all() else np.nan
        out[:, 4] = np.log(_spacing_m(sample) * self.settings.grid_patch)
        return out


def _log_levels(sample: Sample) -> np.ndarray:
    """Logarithm of each variable's level, float32 (V,); NaN where there is none, or one that is not above 0."""
    levels = np.array(sample.levels, np.float64)
    return np.log(np.where(levels > 0, levels, np.nan)).astype(np.float32)


def _spacing_m(sample: Sample) -> float:
    """Metres between cells: of rows on a lat-lon grid, the root of the mean area on others; NaN where unknown."""
    if is_lat_lon(sample.latitude, sample.longitude):
        steps = np.abs(np.diff(sample.latitude[:, 0].astype(np.float64)))
        return float(np.radians(steps.mean()) * EARTH_RADIUS_M) if steps.size else float("nan")
    areas = cell_areas(sample.latitude, sample.longitude)
    known = np.isfinite(areas)
    return float(np.sqrt(areas[known].mean())) if known.any() else float("nan")


def _own_forecast(past: Past, priors: list[LinearPrior] | None, *, leads: tuple[int, ...]) -> dict[str, np.ndarray]:
    """The linear prior's forecast of every cell; the cell's last value where there is no prior."""
    if priors is not None:
        return past.forecast(priors, leads)
    return {
        "anchor": past.last[..., None],
        "anchor_spread": np.zeros((*past.last.shape, 1), np.float32),
        "volatility": np.zeros((*past.last.shape[:3], len(HORIZONS)), np.float32),
    }


def _normalisation(
    sample: Sample, transformed: np.ndarray, *, num_context: int, statistics: Mapping[str, ChannelStatistics] | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Offset (F, V, Y, X), scale (V,) and home (V, Y, X), the climatology less the offset's mean level, from the first
    `num_context` frames and the training statistics. Offset and scale are numbers of float32, as the tokens hold them,
    so that decoding adds exactly what encoding took off.
    """
    offset, scale = np.zeros(transformed.shape), np.ones(len(sample.variables))
    home = np.zeros(transformed.shape[1:])
    for v, channel in enumerate(sample.channels):
        row = statistics.get(channel) if statistics else None
        cycle, own = np.zeros(transformed[:, v].shape), np.zeros(transformed.shape[2:], bool)
        if row is not None:
            cycle, own = row.cycle_at(
                sample.year_phase, sample.day_phase, latitude=sample.latitude, longitude=sample.longitude
            )
        context, valid = (transformed[:, v] - cycle)[:num_context], sample.valid[:num_context, v]
        count = valid.sum(axis=0)
        seen = context[valid]
        overall = row.mean if row else (float(seen.mean()) if seen.size else 0.0)
        level = np.where(valid, context, 0.0).sum(axis=0) / np.maximum(count, 1)
        level = np.where(count > 0, level, np.where(own, 0.0, overall))
        offset[:, v], home[v] = cycle + level, np.where(own, -level, 0.0)
        anomaly = (context - level)[valid]
        spread = float(np.sqrt((anomaly**2).mean())) if anomaly.size else 0.0
        told = _TOLD * float(np.sqrt((transformed[:num_context, v][valid] ** 2).mean())) if anomaly.size else 0.0
        spread = spread if spread > told else 0.0  # a constant is one, whatever rounding leaves of it
        floor = row.step_std if row else 0.0
        scale[v] = max(spread, 0.5 * floor, _LEAST_SCALE) if max(spread, floor) > 0 else 1.0
    return offset.astype(np.float32).astype(np.float64), scale.astype(np.float32).astype(np.float64), home
