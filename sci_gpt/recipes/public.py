"""The model that `sci_gpt.load_model` gives: it forecasts, is finetuned on the user's data, and embeds them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from sci_gpt.errors import ConfigError, DataError
from sci_gpt.recipes import load, parts
from sci_gpt.recipes.calibrated import load_calibrated
from sci_gpt.recipes.film import Notes
from sci_gpt.recipes.films import film_kind
from sci_gpt.recipes.finetune import Finetuned, Request, finetune
from sci_gpt.recipes.load import LoadedModel
from sci_gpt.recipes.save import save_model
from sci_tokenizers.sample import Sample
from sci_tokenizers.table import make_tokenizer


@dataclass(frozen=True, kw_only=True)
class Features:
    """What a model knows at the ends of contexts, for other methods to use.

    Attributes:
        documents: float32 (N, width), a vector per context: the mean over its slots.
        slots: float32 (N, slots, width): per variable of a table, patch of a field, receiver of a record.
        time: float64 (N,), end of each context, seconds since 1970.
        channels: of the data.
        num_context: times in a context.
    """

    documents: np.ndarray
    slots: np.ndarray
    time: np.ndarray
    channels: tuple[str, ...]
    num_context: int


@dataclass(frozen=True, kw_only=True)
class Model(LoadedModel):
    """A loaded model with all that a user does with it; the verbs of `LoadedModel`, finetune, embed and save."""

    def finetune(self, data: Any, *, say: Callable[[str], None] = print, **words: Any) -> tuple[Model, Finetuned]:
        """Adapt a copy to data of your own; `sci_evals.finetune_report.compare` then says what it was worth.

        Args:
            data: pandas DataFrame, xarray Dataset or DataArray, obspy Stream.
            say: takes a line per guess and the lines of progress.
            words: target="COL", and where wanted covariates, time, time_format, units, columns, missing, variables,
                place, name, horizon, context, learning_rate, max_steps, rows_per_step, patience, validate_every,
                seed, freeze, as `sci-gpt finetune` has them (see `finetune.Request`).

        Returns:
            The finetuned model, and how it came about (history, split, examples).

        Raises:
            ConfigError, DataError, UnitError: what is asked or given cannot be understood or is too little.
        """
        result = finetune(self, data, request=Request.of(**words), say=say)
        return public(result.model), result

    def embed(
        self, data: Any, *, every: int | None = None, num_context: int | None = None, notes: Notes | None = None
    ) -> Features:
        """Features of data: the trunk's output at the end of a context, for a regression or classifier of your own.

        Args:
            data: as for `forecast`, of one place (a table, one variable of a grid, one record).
            every: frames between the contexts' ends; None: the last context alone.
            num_context: frames of context; None: as many as the nearest source of the training had.
            notes: what the data do not say of themselves.

        Raises:
            ConfigError: several contexts at once, or a context longer than the data.
            DataError: as `forecast`.
        """
        notes = notes or Notes()
        kind = film_kind(data)
        film = kind(data, notes=notes, options=self.reader_options(kind.modality, notes.source))
        if len(film.contexts) != 1:
            raise ConfigError(f"embed takes one place and variable at a time, got {len(film.contexts)}; choose one")
        sample = film.contexts[0]
        entry = self.entry(sample)
        times = make_tokenizer(sample.modality, parts.tokenizer_settings(self.config)).frame_times
        context = num_context or min(entry.frames - max(entry.leads), sample.num_times // times)
        if context < 1 or context * times > sample.num_times or (every is not None and every < 1):
            raise ConfigError(
                f"a context of {context} frames of {times} times, every {every}, does not fit {sample.num_times} times"
            )
        last = sample.num_times - context * times
        starts = range(last % (every * times), last + 1, every * times) if every else range(last, last + 1)
        whole = film.extend(sample, times)
        windows = [whole.window(start, start + (context + 1) * times) for start in starts]
        return _features(self, windows, context=context, times=times)


def _features(model: LoadedModel, windows: list[Sample], *, context: int, times: int) -> Features:
    slots = np.stack(model.predictor.embed(windows, num_context=context))
    if not np.isfinite(slots).all():
        raise DataError(f"{windows[0].key}: the model's features are not finite; its training has diverged")
    return Features(
        documents=slots.mean(axis=1),
        slots=slots,
        time=np.array([window.time[context * times - 1] for window in windows]),
        channels=windows[0].channels,
        num_context=context * times,
    )


def public(loaded: LoadedModel) -> Model:
    """The same model with the public verbs."""
    return Model(**{field.name: getattr(loaded, field.name) for field in fields(LoadedModel)})


def load_model(uri: str | Path, *, tracking_uri: str | None = None, calibrated: bool = False) -> Model:
    """Load a model; see `sci_gpt.recipes.load.load_model` for what `uri` may be.

    Args:
        calibrated: its forecasts go through the calibration that its evaluation fitted on validation data.

    Raises:
        CheckpointError: nothing there, damaged, or of another model; no calibration of it where one is asked for.
    """
    one = load_calibrated if calibrated else load.load_model
    return public(one(uri, tracking_uri=tracking_uri))


__all__ = ["Features", "Model", "load_model", "public", "save_model"]
