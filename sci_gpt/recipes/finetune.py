"""Finetune on a user's own data: a table, a region of a grid or records; from the object to an adapted model."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from sci_gpt.data.windows import WindowSpec
from sci_gpt.errors import ConfigError, DataError, UnlikeTrainingWarning
from sci_gpt.recipes import parts
from sci_gpt.recipes.adapt import Adapted, AdaptSettings, Examples, adapt
from sci_gpt.recipes.blocks import Blocks, season_frames, split, window_spec
from sci_gpt.recipes.film import Notes
from sci_gpt.recipes.film_grid import tiles
from sci_gpt.recipes.film_series import TABLE_OPTION
from sci_gpt.recipes.films import film_kind
from sci_gpt.recipes.load import LoadedModel
from sci_gpt.recipes.rows import declare_all, parse_variable
from sci_gpt.recipes.table_guess import TableWords, read_table
from sci_tokenizers.sample import Sample
from sci_tokenizers.table import make_tokenizer

_PATIENCE = 6  # an untrained model needs some steps to catch up with its own start


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the user asks for and says of the data; what is left out is guessed or chosen.

    Attributes:
        name: of the source that the model learns; `forecast --source NAME` uses it.
        words: of a table; of a grid only `target` and `columns` are used, of records nothing.
        variables: `name:unit:kind[:transform]` of variables that are not in the table.
        place: latitude, longitude in degrees, elevation in m.
        horizon, context: steps ahead and of context (frames of 5 samples for records).
        settings: of the training.
    """

    name: str = "mine"
    words: TableWords | None = None
    variables: tuple[str, ...] = ()
    place: tuple[float, float, float] = (float("nan"), float("nan"), float("nan"))
    horizon: int | None = None
    context: int | None = None
    settings: AdaptSettings = AdaptSettings(patience=_PATIENCE)

    @classmethod
    def of(cls, **words: Any) -> Request:
        """A request from flat words: those of `TableWords` and of `Request`, and those of `AdaptSettings`.

        Raises:
            ConfigError: a word that is none of them.
        """
        homes: dict[str, type] = {name: kind for kind in (cls, TableWords, AdaptSettings) for name in _fields(kind)}
        for word in words:
            if word not in homes:
                raise ConfigError(f"finetune takes {', '.join(homes)}; got {word!r}")
        own = {kind: {w: v for w, v in words.items() if homes[w] is kind} for kind in (cls, TableWords, AdaptSettings)}
        if own[TableWords]:
            table = own[TableWords]
            if "target" not in table:
                raise ConfigError("name the column to forecast, as target='COL'")
            table["covariates"] = tuple(table.get("covariates", ()))
            own[cls]["words"] = TableWords(**table)
        if own[AdaptSettings]:
            own[cls]["settings"] = AdaptSettings(**{"patience": _PATIENCE, **own[AdaptSettings]})
        return cls(**own[cls])


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Data split and shaped, ready to adapt to.

    Attributes:
        examples: training and validation part.
        blocks: all three parts.
        like: the source of the pretraining whose windows these are modelled on.
        target: the channel that is scored; None: all.
        unit: in which the user has it.
        frame_times: times in a frame.
    """

    examples: Examples
    blocks: Blocks
    like: str
    target: str | None
    unit: str | None
    frame_times: int


@dataclass(frozen=True, kw_only=True)
class Finetuned:
    """The result: the adapted model, how the training went, and the parts of the data."""

    adapted: Adapted
    prepared: Prepared

    @property
    def model(self) -> LoadedModel:
        """The finetuned model."""
        return self.adapted.model


def finetune(start: LoadedModel, data: Any, *, request: Request, say: Callable[[str], None] = print) -> Finetuned:
    """Adapt `start` to data.

    Args:
        start: pretrained; not changed.
        data: pandas DataFrame, xarray Dataset or DataArray, obspy Stream.
        request: what is asked.
        say: takes a line per guess and the lines of progress.

    Raises:
        ConfigError, DataError, UnitError: what is asked or given cannot be understood or is too little.
    """
    prepared = prepare(start, data, request=request, say=say)
    return Finetuned(adapted=adapt(start, prepared.examples, settings=request.settings, say=say), prepared=prepared)


def prepare(start: LoadedModel, data: Any, *, request: Request, say: Callable[[str], None] = print) -> Prepared:
    """Understand data, choose windows like those of the nearest source of the pretraining, and split.

    Raises:
        ConfigError, DataError, UnitError: as `finetune`.
    """
    declare_all([parse_variable(words) for words in request.variables])
    if request.name in start.sources:
        raise ConfigError(
            f"the model knows a source {request.name!r} already; give yours another name, as --name my-station"
        )
    stretches, target, options, unit = _stretches(start, data, request=request, say=say)
    head = stretches[0]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UnlikeTrainingWarning)
        like = start.entry(head)
    for one in caught:
        say(f"note: {one.message}")
    tokenizer = make_tokenizer(head.modality, parts.tokenizer_settings(start.config))
    frames = max(sample.num_times for sample in stretches) // tokenizer.frame_times
    spec = window_spec(
        request.name,
        frames=frames,
        like=WindowSpec(**like.model_dump()),
        season=season_frames(head.step_seconds * tokenizer.frame_times),
        horizon=request.horizon,
        context=request.context,
    )
    if head.modality == "grid":
        boxes = tiles(*head.values.shape[2:], tile=start.sources[like.source].shape[1:])
        stretches = [_tile(sample, box, number=number) for sample in stretches for number, box in enumerate(boxes)]
    blocks = split(stretches, spec, frame_times=tokenizer.frame_times, what=f"source {request.name!r}")
    say(_describe(blocks, head, like=like.source, frame_times=tokenizer.frame_times))
    examples = Examples(source=request.name, spec=spec, train=blocks.train, valid=blocks.valid, options=options)
    return Prepared(
        examples=examples,
        blocks=blocks,
        like=like.source,
        target=target,
        unit=unit,
        frame_times=tokenizer.frame_times,
    )


def _stretches(
    start: LoadedModel, data: Any, *, request: Request, say: Callable[[str], None]
) -> tuple[list[Sample], str | None, dict[str, Any], str | None]:
    """The data as samples of the new source, the target's channel, what reads the next file alike, its unit."""
    kind, words = film_kind(data), request.words
    notes, options = Notes(place=request.place), dict(start.reader_options(kind.modality, None))
    unit = None
    if kind.modality == "series":
        if words is None:
            raise ConfigError("name the column to forecast, as --target COL")
        read = read_table(pd.DataFrame(data), words, say=say)
        data, columns = read.table, dict(read.words.columns)
        notes, options = replace(notes, columns=columns), {TABLE_OPTION: read.words.to_options()}
        unit = columns[words.target].partition(":")[2]
    elif kind.modality == "grid" and words is not None:
        if words.covariates:
            raise ConfigError("covariates are columns of a table; a field is forecast from its own past")
        chosen = {words.target: "", **words.columns}
        if words.target in words.units:
            variable = chosen[words.target].partition(":")[0]
            chosen[words.target] = f"{variable}:{words.units[words.target]}"
        notes = replace(notes, columns={words.target: chosen[words.target]})
    film = kind(data, notes=notes, options=options)
    if kind.modality == "grid" and len(film.contexts) > 1:
        names = ", ".join(sample.key for sample in film.contexts)
        raise ConfigError(f"the dataset holds {names}; name the one to forecast, as --target NAME")
    stretches = [
        replace(sample, source=request.name, key=f"{request.name}/{_plain(sample.key)}") for sample in film.contexts
    ]
    if kind.modality == "series":
        say(f"guess: one row every {_step(stretches[0])}; {_missing(stretches[0])} of the target missing")
    return stretches, None if kind.modality == "trace" else stretches[0].channels[0], options, unit


def _tile(sample: Sample, box: tuple[slice, slice], *, number: int) -> Sample:
    rows, columns = box
    return replace(
        sample,
        key=f"{sample.key}/{number}",
        values=sample.values[:, :, rows, columns],
        valid=sample.valid[:, :, rows, columns],
        latitude=sample.latitude[box],
        longitude=sample.longitude[box],
        elevation=sample.elevation[box],
    )


def _describe(blocks: Blocks, head: Sample, *, like: str, frame_times: int) -> str:
    spec = blocks.spec
    ends = [f"{np.datetime64(int(seconds), 's')}" for seconds in blocks.until]
    context, ahead = spec.context_frames[1] * frame_times, [lead * frame_times for lead in spec.leads]
    return (
        f"split: train to {ends[0]}, gap of {context} times, valid to {ends[1]}, gap of {context} times, test; "
        f"a context of {context}, forecasts {', '.join(map(str, ahead))} ahead, steps of {_step(head)} "
        f"(as {like!r} of the pretraining)"
    )


def _step(sample: Sample) -> str:
    seconds = sample.step_seconds
    for unit, name in ((365.2425 * 86400, "a"), (365.2425 * 86400 / 12, "month"), (86400.0, "d"), (3600.0, "h")):
        if seconds >= 0.9 * unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds:g} s"


def _missing(sample: Sample) -> str:
    return f"{100 * (1 - sample.valid[:, 0].mean()):.1f} %"


def _plain(key: str) -> str:
    return key.replace("/", "-").replace("'", "")


def _fields(kind: type) -> tuple[str, ...]:
    hidden = ("words", "settings")
    return tuple(name for name in kind.__dataclass_fields__ if name not in hidden)  # type: ignore[attr-defined]


__all__ = ["DataError", "Finetuned", "Prepared", "Request", "finetune", "prepare"]
