"""Series tokenizer: a frame is a time, a slot is a variable at the station, a token is one quantized value."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from sci_tokenizers.autoregression import HORIZONS, own_forecast
from sci_tokenizers.memory import kin_weights, last_valid, memories
from sci_tokenizers.ongoing import OwnSettings
from sci_tokenizers.prior import Past
from sci_tokenizers.quantizer import ChronosQuantizer, mean_scale
from sci_tokenizers.sample import Sample
from sci_tokenizers.statistics import ChannelStatistics, known_priors
from sci_tokenizers.tokenizer import Tokenizer, TokenizerSettings, frame_features, log_scales, variable_rows
from sci_tokenizers.tokens import SLOT_FEATURES, Tokens
from sci_tokenizers.variables import VARIABLE_NAMES, VARIABLES, forward_transform, inverse_transform

_ORDERS = (4,)
_REFIT = 16
# Exact coordinates would name the station (or a climate model, by its grid): learned by heart they mislead at the next.
_REGION_DEGREES = 10.0
_PILE_SHARE = 0.2  # of a context's values that are equal: fewer are chance
_SPREAD_FLOOR = 0.1  # of the context's scale: calm or dry hours foretell nothing of the next gust or shower


class SeriesTokenizer(Tokenizer):
    """transform -> minus the training climatology's cycle and the context's median of what is left -> Chronos scale
    and bins.

    A source never seen has no climatology: the context's median alone is the offset. What the median took away stays
    known: the memory's last entry leads from the anchor to the climatology.
    """

    modality = "series"

    def __init__(self, settings: TokenizerSettings) -> None:
        super().__init__(settings)
        self.quantizer = ChronosQuantizer(settings.series_ids, settings.series_limit)

    @property
    def frame_times(self) -> int:
        """One time."""
        return 1

    def num_slots(self, shape: tuple[int, int, int]) -> int:
        """One slot per variable."""
        return shape[0]

    def encode(
        self,
        sample: Sample,
        *,
        num_context: int,
        leads: tuple[int, ...],
        statistics: Mapping[str, ChannelStatistics] | None = None,
    ) -> Tokens:
        """See `Tokenizer.encode`; payload (F, S, 1, 1) holds the centre of each id's bin."""
        self._check(sample, num_context, leads=leads)
        valid = sample.valid[:, :, 0, 0]
        scaled, offset, scale, home = _normalisation(sample, num_context=num_context, statistics=statistics)
        ids = self.quantizer.bins.ids(scaled, valid)
        payload = np.where(valid, self.quantizer.bins.centres(ids), 0.0).astype(np.float32)[:, :, None, None]
        last = last_valid(payload, valid[:, :, None, None])
        memory = memories(
            payload, valid[:, :, None, None], last=last, home=home[:, None, None], kin=kin_weights(sample.variables)
        )
        priors = known_priors(statistics, sample.channels, leads=leads)
        if priors is None:
            own = _own_forecast(last[:, :, 0, 0], valid, num_context=num_context, leads=leads)
        else:
            past = Past(
                payload=payload,
                valid=valid[:, :, None, None],
                last=last,
                memory=memory,
                scale=scale[:, None],
                slots_are_channels=True,
            )
            own = past.forecast(priors, leads)
        features, time = frame_features(sample, 1, statistics=statistics)
        return Tokens(
            key=sample.key,
            source=sample.source,
            modality="series",
            payload=payload,
            valid=valid[:, :, None, None],
            ids=ids,
            last=last,
            anchor=own["anchor"],
            anchor_spread=own["anchor_spread"],
            volatility=own["volatility"],
            memory=memory,
            weight=np.ones((len(scale), 1, 1), np.float32),
            variable=variable_rows(sample)[:, None],
            row=np.zeros(len(scale), np.int16),
            column=np.zeros(len(scale), np.int16),
            frame_features=features,
            slot_features=_slot_features(sample),
            log_scale=log_scales(scale, sample)[:, None],
            pile=_pile(payload[:num_context, :, 0, 0], valid[:num_context], variables=sample.variables)[:, None],
            offset=offset.astype(np.float32)[:, :, None, None],
            scale=scale.astype(np.float32)[:, None],
            time=time,
            num_context=num_context,
            leads=leads,
        )

    def scaled(
        self, sample: Sample, *, num_context: int, statistics: Mapping[str, ChannelStatistics] | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """What `encode` makes ids of: scaled values float64 (F, S), anything where not valid; and their scale (S,).

        Raises:
            TokenizerError: as `encode`.
        """
        self._check(sample, num_context)
        values, _, scale, _ = _normalisation(sample, num_context=num_context, statistics=statistics)
        return values, scale

    def own_settings(self) -> OwnSettings:
        """See `Tokenizer.own_settings`."""
        return OwnSettings(orders=_ORDERS, refit=_REFIT, steps=1, floor=_SPREAD_FLOOR)

    def arrange(self, values: np.ndarray) -> np.ndarray:
        """See `Tokenizer.arrange`."""
        return values[:, 0, :, :, 0][..., None]  # b v 1 1

    def snapped(self, payload: np.ndarray) -> np.ndarray:
        """The centre of each value's bin."""
        return np.asarray(
            self.quantizer.bins.centres(self.quantizer.bins.ids(payload, np.ones(payload.shape, bool))), np.float32
        )

    def ids_of(self, payload: np.ndarray, valid: np.ndarray) -> np.ndarray:
        """See `Tokenizer.ids_of`."""
        return self.quantizer.bins.ids(payload[..., 0, 0], valid[..., 0, 0])

    def cells(self, tokens: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """See `Tokenizer.cells`."""
        return tokens.reshape(shape)

    def rescaled(self, tokens: Tokens, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
        """See `Tokenizer.rescaled`; the payload holds the centres of the ids' bins."""
        valid = sample.valid[:, :, 0, 0]
        transformed = np.stack(
            [
                forward_transform(sample.values[:, s, 0, 0].astype(np.float64), name)
                for s, name in enumerate(sample.variables)
            ],
            axis=1,
        )
        ids = self.quantizer.bins.ids((transformed - tokens.offset[:, :, 0, 0]) / tokens.scale[:, 0], valid)
        payload = np.where(valid, self.quantizer.bins.centres(ids), 0.0).astype(np.float32)
        return payload[:, :, None, None], valid[:, :, None, None]

    def decode(self, tokens: Tokens, payload: np.ndarray) -> np.ndarray:
        """Scaled values (..., F, S, 1, 1) to physical (..., time, variable, 1, 1)."""
        transformed = payload.astype(np.float64) * tokens.scale[:, :, None] + tokens.offset
        names = [VARIABLE_NAMES[row] for row in tokens.variable[:, 0]]
        physical = np.stack(
            [inverse_transform(transformed[..., s, :, :], name) for s, name in enumerate(names)], axis=-3
        )
        return physical.astype(np.float32)

    def _clipped_share(self, tokens: Tokens, variable: int) -> float:
        valid = tokens.valid[:, variable, 0, 0]
        edge = np.abs(tokens.payload[:, variable, 0, 0]) >= self.settings.series_limit
        return float((edge & valid).sum() / max(valid.sum(), 1))


def _normalisation(
    sample: Sample, *, num_context: int, statistics: Mapping[str, ChannelStatistics] | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Transformed values less their offset by their scale (F, S), the offset (F, S), the scale (S,), and home (S,):
    where the climatology lies.
    """
    values, valid = sample.values[:, :, 0, 0], sample.valid[:, :, 0, 0]
    frames, slots = values.shape
    offset, floor = np.zeros((frames, slots)), np.full(slots, 1e-9)
    centred, farthest = np.zeros((frames, slots)), np.zeros((2, slots))
    for s, (name, channel) in enumerate(zip(sample.variables, sample.channels, strict=True)):
        transformed = forward_transform(values[:, s].astype(np.float64), name)
        row = statistics.get(channel) if statistics else None
        if row is not None:
            piles_up = VARIABLES[name].piles_up
            offset[:, s] = row.mean if piles_up else row.climatology_at(sample.year_phase, sample.day_phase)
            floor[s], farthest[:, s] = row.step_std, (row.minimum - row.mean, row.maximum - row.mean)
        centred[:, s] = transformed - offset[:, s]
    seen = np.where(valid[:num_context], centred[:num_context], np.nan)
    seen[:, ~valid[:num_context].any(axis=0)] = 0.0
    level = np.nanmedian(seen, axis=0)
    centred, offset = centred - level, offset + level
    # A context of calm or dry hours would make its own scale so small that the first gust or shower is clipped: the
    # training split's one-step spread is the floor.
    scale = np.maximum(mean_scale(centred[:num_context], valid[:num_context]), floor)
    # Without statistics the level is the whole value, 285 K say, and leads nowhere: the context's median is home. With
    # them a level beyond all of training (CO2 after 30 years more) is taken for the farthest one that training saw.
    return centred / scale, offset, scale, -np.clip(level, *farthest) / scale


def _pile(payload: np.ndarray, valid: np.ndarray, *, variables: tuple[str, ...]) -> np.ndarray:
    """(S,) the commonest value of each slot's context (F, S), for variables that pile up; NaN where it is rare."""
    out = np.full(len(variables), np.nan, np.float32)
    for s, name in enumerate(variables):
        if VARIABLES[name].piles_up and valid[:, s].any():
            values, counts = np.unique(payload[valid[:, s], s], return_counts=True)
            if counts.max() >= _PILE_SHARE * counts.sum():
                out[s] = values[counts.argmax()]
    return out


def _own_forecast(
    carried: np.ndarray, valid: np.ndarray, *, num_context: int, leads: tuple[int, ...]
) -> dict[str, np.ndarray]:
    """What each slot's own past says of the frames it is asked for (see `autoregression.own_forecast`), from carried
    values (F, S).

    Frames before the context's end are asked nothing and hold 0.
    """
    frames, slots = carried.shape
    own = own_forecast(
        carried.T.astype(np.float64),
        valid.T,
        origins=np.arange(num_context - 1, frames),
        steps=np.asarray(leads),
        orders=_ORDERS,
        refit=_REFIT,
    )
    anchor = np.zeros((frames, slots, 1, 1, len(leads)), np.float32)
    spread, volatility = np.zeros_like(anchor), np.zeros((frames, slots, 1, len(HORIZONS)), np.float32)
    anchor[num_context - 1 :, :, 0, 0] = own.mean.transpose(1, 0, 2)
    spread[num_context - 1 :, :, 0, 0] = np.log(np.maximum(own.spread, _SPREAD_FLOOR)).transpose(1, 0, 2)
    volatility[num_context - 1 :, :, 0] = own.volatility.transpose(1, 0, 2)
    return {"anchor": anchor, "anchor_spread": spread, "volatility": volatility}


def _slot_features(sample: Sample) -> np.ndarray:
    """(S, 5): place is the station's region, level the variable's, no extent."""
    out = np.full((len(sample.variables), len(SLOT_FEATURES)), np.nan, np.float32)
    out[:, 0] = _REGION_DEGREES * np.round(sample.latitude[0, 0] / _REGION_DEGREES)
    out[:, 1] = _REGION_DEGREES * np.round(sample.longitude[0, 0] / _REGION_DEGREES)
    out[:, 2] = sample.elevation[0, 0]
    out[:, 3] = np.log(np.asarray(sample.levels, np.float64))
    return out
