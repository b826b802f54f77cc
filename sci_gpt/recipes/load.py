"""Load a model from a run, a checkpoint, an exported folder or the registry, ready to forecast."""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file

from sci_gpt.config import MixtureEntry, PretrainConfig, TrackingConfig
from sci_gpt.config_file import parse_config
from sci_gpt.errors import CheckpointError, ConfigError, UnlikeTrainingWarning
from sci_gpt.model.heads import GaussianHead, MixtureHead
from sci_gpt.model.init import initialize
from sci_gpt.model.predict import Predictor
from sci_gpt.model.transformer import SciGPT, build_model
from sci_gpt.model.widen import with_levels
from sci_gpt.recipes import parts
from sci_gpt.recipes.asked import Asked, Sampling, ask, check_horizon, check_levels
from sci_gpt.recipes.film import Film, Notes
from sci_gpt.recipes.films import film_kind
from sci_gpt.recipes.rows import in_this_table
from sci_gpt.train.checkpoint import latest, read_state, read_weights
from sci_gpt.train.resume import with_old_model
from sci_tokenizers.sample import Sample
from sci_tokenizers.statistics import ChannelStatistics, statistics_from_json
from sci_tokenizers.variables import nearest

# Before anything imports MLflow: no usage reports to anybody, no progress bars for a copy of five megabytes.
for _name, _value in (
    ("MLFLOW_DISABLE_TELEMETRY", "true"),
    ("DO_NOT_TRACK", "true"),
    ("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false"),
):
    os.environ.setdefault(_name, _value)

EXPORT_FORMAT = 1
MODEL_JSON = "model.json"
WEIGHTS = "model.safetensors"


_STEP_RATIO = 8.0  # largest ratio between the step of an unseen series and that of the source it is treated like


@dataclass(frozen=True, kw_only=True)
class SourceFacts:
    """What a model remembers of a source: modality, step in s, (variables, rows, columns), its reader's options."""

    modality: str
    step_seconds: float
    shape: tuple[int, int, int]
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model with all that forecasting needs. Make it with `load_model`.

    Attributes:
        model: the network, in evaluation mode.
        predictor: quantiles in physical units for windows of samples.
        config: of its pretraining run.
        statistics: of the training split, {source: {channel: ChannelStatistics}}.
        sources: what it was trained on.
        fingerprint: of the data store that it was trained on.
        step: optimizer steps behind these weights; 0 for untrained ones.
        code_version: of the code that trained it.
    """

    model: SciGPT
    predictor: Predictor
    config: PretrainConfig
    statistics: Mapping[str, Mapping[str, ChannelStatistics]]
    sources: Mapping[str, SourceFacts]
    fingerprint: str
    step: int
    code_version: str

    def untrained(self, *, trunk: bool = True) -> LoadedModel:
        """The same shape, tokenizers and statistics at the weights that training started from.

        Args:
            trunk: False leaves the layers out, for the same forecasts sooner: an untrained head adds nothing to its
                start whatever the trunk says.
        """
        model = build_model(self.model.shape, self.model.settings)
        initialize(model, self.config.seed)
        if not trunk:
            model.blocks = torch.nn.ModuleList()
        predictor = Predictor(model.eval(), parts.tokenizer_settings(self.config), statistics=self.statistics)
        return replace(self, model=model, predictor=predictor, step=0)

    def anchor(self) -> LoadedModel:
        """What the heads correct, alone: linear priors and autoregressions, nothing learned by gradients, no trunk."""
        one = self.untrained(trunk=False)
        for head in one.model.heads.values():
            assert isinstance(head, GaussianHead | MixtureHead)
            head.start_lean = 0.0
        return one

    def forecast(
        self,
        data: Any,
        horizon: int,
        *,
        quantiles: Sequence[float] = (0.1, 0.5, 0.9),
        num_samples: int | None = None,
        seed: int | None = None,
        notes: Notes | None = None,
    ) -> Any:
        """Forecast the steps that follow `data`; the same kind of object comes back.

        Without `num_samples` every step from 1 to `horizon` is forecast directly from the data (no step is fed back),
        so the horizon is limited to the largest lead of the nearest source in training, and quantiles are marginal: per
        value and lead. Samples are trajectories: coherent in space, across the variables of a table and in time,
        frame by frame, each fed back; the horizon is limited by the length of the training's documents. Each variable
        of a Dataset and each seismometer of a Stream is drawn by itself.

        Args:
            data: xarray Dataset or DataArray with time, latitude, longitude; pandas DataFrame with a DatetimeIndex and
                columns named `variable` or `variable [unit]` (or named in `notes`); obspy Stream.
            horizon: steps ahead, of the data's own step; for a Stream samples at the working rate (see TraceFilm).
            quantiles: levels within 0..1, ascending; not used with `num_samples`.
            num_samples: trajectories, of a model that was trained with noise (`model.noise`).
            seed: of the samples: the same seed gives the same; None: 0.
            notes: what the data do not say of themselves.

        Returns:
            xarray with dimensions lead_time and quantile; a long DataFrame; or a Stream with a trace per quantile. With
            `num_samples` the same with `sample`, numbers from 0 on, for quantile.

        Raises:
            ConfigError: a horizon, level or source that the model cannot serve, or samples of a model without noise.
            DataError: data too short, without valid values, or not understood.
            CheckpointError: a model that has diverged.
        """
        sampling = Sampling.of(num_samples, seed, noise_width=self.model.settings.noise.width)
        levels, horizon = check_levels(quantiles), check_horizon(horizon)
        notes = notes or Notes()
        if notes.source is not None and notes.source not in self.sources:
            raise ConfigError(
                f"source {notes.source!r} is not one that this model knows ({', '.join(self.sources)}); "
                f"nearest: {nearest(notes.source, self.sources)!r}"
            )
        kind = film_kind(data)
        film = kind(data, notes=notes, options=self.reader_options(kind.modality, notes.source))
        answers = self._answers(film, horizon=horizon, levels=levels, sampling=sampling)
        if sampling is not None:
            return film.answer(answers, tuple(range(sampling.num_samples)), kind="sample")
        return film.answer(answers, levels)

    def entry(self, sample: Sample) -> MixtureEntry:
        """The mixture entry whose windows a sample's forecast takes: its own source's, else that of the nearest source.

        Nearest is first by step (as a ratio), then by variables in common, then by the largest lead.

        Raises:
            ConfigError: the model was trained on no source of this modality.
        """
        entries = {entry.source: entry for entry in self.config.mixture}
        if sample.source in entries and sample.source in self.sources:
            return entries[sample.source]
        same = [name for name in entries if name in self.sources and self.sources[name].modality == sample.modality]
        if not same:
            trained = sorted({facts.modality for facts in self.sources.values()})
            raise ConfigError(
                f"this model was trained on {', '.join(trained)}, and {sample.key!r} is of modality "
                f"{sample.modality!r}: take a model whose mixture holds a {sample.modality} source, or pretrain one"
            )

        def distance(name: str) -> tuple[float, int, int]:
            ratio = math.log(self.sources[name].step_seconds / sample.step_seconds)
            known = {channel.partition("@")[0] for channel in self.statistics[name]}
            return round(abs(ratio), 3), -len(known.intersection(sample.variables)), -max(entries[name].leads)

        nearest = min(same, key=distance)
        if distance(nearest)[0] > math.log(_STEP_RATIO):
            steps = ", ".join(f"{name} {self.sources[name].step_seconds:g} s" for name in same)
            warnings.warn(
                f"{sample.key!r} has a step of {sample.step_seconds:g} s, and this model was trained on {steps}: none "
                f"within a factor of {_STEP_RATIO:g}; it is treated like {nearest!r}, so trust the forecast little",
                UnlikeTrainingWarning,
                stacklevel=2,
            )
        return entries[nearest]

    def reader_options(self, modality: str, source: str | None) -> Mapping[str, Any]:
        """Options of the reader of `source`, else of the first source of this modality in the mixture."""
        names = [source] if source is not None else [entry.source for entry in self.config.mixture]
        facts = (self.sources[name] for name in names if name in self.sources)
        return next((row.options for row in facts if row.modality == modality), {})

    def _refuse_foreign(self, sample: Sample) -> None:
        """A sample said to be of a trained source must have its channels: their statistics scale it."""
        known = self.statistics.get(sample.source, {})
        for v, channel in enumerate(sample.channels):
            if known and channel not in known and sample.valid[:, v].any():
                raise ConfigError(
                    f"source {sample.source!r} has no channel {channel!r}, it has {', '.join(known)}; leave --source "
                    "out for data that are not of it"
                )

    def _asked(self, film: Film, index: int, *, horizon: int, trajectories: bool) -> Asked:
        """What is asked of one context; grids are cut into tiles, as in training."""
        sample = film.contexts[index]
        entry = self.entry(sample)
        self._refuse_foreign(sample)
        return ask(
            film,
            index,
            entry=entry,
            tile=self.sources[entry.source].shape[1:],
            frame_times=self.predictor.tokenizers[sample.modality].frame_times,
            horizon=horizon,
            trajectories=trajectories,
        )

    def _answers(
        self, film: Film, *, horizon: int, levels: tuple[float, ...], sampling: Sampling | None
    ) -> list[np.ndarray]:
        """(levels or samples, horizon, variable, row, column) for each context; those that ask for as many frames of as
        many go through the model together.
        """
        contexts = range(len(film.contexts))
        asked = [self._asked(film, index, horizon=horizon, trajectories=sampling is not None) for index in contexts]
        alike: dict[tuple[int, int], list[Asked]] = {}
        for one in asked:
            alike.setdefault((one.num_context, one.num_leads), []).append(one)
        answers: dict[int, np.ndarray] = {}
        for (num_context, num_leads), group in alike.items():
            windows = [window for one in group for window in one.windows]
            if sampling is not None:
                arrays = self.predictor.trajectories(
                    windows,
                    num_context=num_context,
                    num_frames=num_leads,
                    num_samples=sampling.num_samples,
                    seed=sampling.seed,
                )
            else:
                leads = tuple(range(1, num_leads + 1))
                arrays = self.predictor.quantiles(windows, num_context=num_context, leads=leads, levels=levels)
            rest = iter(arrays)
            for one in group:
                answers[id(one)] = one.joined([next(rest) for _ in one.windows], horizon)
        return [answers[id(one)] for one in asked]


def load_model(uri: str | Path, *, tracking_uri: str | None = None) -> LoadedModel:
    """Load a model.

    Args:
        uri: a run folder (its newest checkpoint), a checkpoint folder, an exported folder, or `models:/NAME@ALIAS`.
        tracking_uri: of the registry; left out: MLFLOW_TRACKING_URI, else the embedded one under runs/mlflow.

    Raises:
        CheckpointError: nothing there, damaged, or of another model.
    """
    torch.set_flush_denormal(True)
    folder = model_folder(uri, tracking_uri=tracking_uri)
    if (folder / MODEL_JSON).exists():
        return _read_export(folder)
    return assemble(read_state(folder), read_weights(folder), where=str(folder))


def model_folder(uri: str | Path, *, tracking_uri: str | None = None) -> Path:
    """The exported folder (holds model.json) or the checkpoint that `uri` names; as `load_model`.

    Raises:
        CheckpointError: nothing there.
    """
    if str(uri).startswith("models:/"):
        return _registered(str(uri), tracking_uri)
    folder = Path(uri)
    if not folder.is_dir():
        raise CheckpointError(
            f"no model folder {str(uri)!r}; give a run folder, a checkpoint or models:/NAME@candidate"
        )
    checkpoint = latest(folder) if (folder / "checkpoints").is_dir() else folder
    if checkpoint is None:
        raise CheckpointError(f"run folder {str(folder)!r} holds no finished checkpoint; let `sci-gpt pretrain` run on")
    return checkpoint


def assemble(state: Mapping[str, Any], weights: Mapping[str, torch.Tensor], *, where: str) -> LoadedModel:
    """A loaded model from a checkpoint's state (or an exported `model.json`) and its whole fp32 weights.

    Raises:
        CheckpointError: the weights are not those of the model that the state describes.
    """
    config = parse_config(with_old_model(state["config"]), PretrainConfig, where=where)
    statistics = statistics_from_json(state["statistics"])
    weights, num_variables = in_this_table(state, weights, where=where)
    settings = replace(parts.model_settings(config), num_variables=num_variables)
    model = build_model(parts.model_shape(config), settings)
    try:
        model.load_state_dict(with_levels(weights, model), strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"{where}: weights do not fit model {config.model.size!r}: {error}") from error
    model.eval()
    return LoadedModel(
        model=model,
        predictor=Predictor(model, settings.tokenizer, statistics=statistics),
        config=config,
        statistics=statistics,
        sources={
            name: SourceFacts(**{**facts, "shape": tuple(facts["shape"])}) for name, facts in state["sources"].items()
        },
        fingerprint=str(state["fingerprint"]),
        step=int(state["step"]),
        code_version=str(state["code_version"]),
    )


def tracking_address(uri: str | None) -> str:
    """The tracking server to ask: the given one, else MLFLOW_TRACKING_URI, else the embedded one under runs/mlflow."""
    return uri or os.environ.get("MLFLOW_TRACKING_URI") or str(TrackingConfig.model_fields["uri"].default)


def _read_export(folder: Path) -> LoadedModel:
    try:
        state = json.loads((folder / MODEL_JSON).read_text(encoding="utf-8"))
        if state.get("format") != EXPORT_FORMAT:
            raise CheckpointError(
                f"{folder} is of export format {state.get('format')!r}, this code reads {EXPORT_FORMAT}"
            )
        found = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
        if found != state["weights_sha256"]:
            raise CheckpointError(
                f"{folder / WEIGHTS} is damaged: its sha256 differs from {MODEL_JSON}'s; export it again"
            )
        return assemble(state, load_file(folder / WEIGHTS), where=str(folder))
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"exported model {str(folder)!r} cannot be read: {error}; export it again") from error


def _registered(uri: str, tracking_uri: str | None) -> Path:
    """The exported folder inside a registered model's artifacts."""
    # Imported here: MLflow takes seconds to load, and only the registry needs it.
    import mlflow
    from mlflow.exceptions import MlflowException

    address = tracking_address(tracking_uri)
    if address.startswith("sqlite:///") and not Path(address.removeprefix("sqlite:///")).exists():
        raise CheckpointError(
            f"no tracking database {address!r} here, so no {uri!r}; run `sci-gpt pretrain` or set MLFLOW_TRACKING_URI"
        )
    name, _, alias = uri.removeprefix("models:/").partition("@")
    name, _, number = name.partition("/")
    if not name or bool(alias) == bool(number):
        raise ConfigError(f"a registered model is models:/NAME@ALIAS or models:/NAME/VERSION, got {uri!r}")
    # A client of our own: the registry that MLflow has in mind for this process is the user's affair.
    client = mlflow.MlflowClient(tracking_uri=address, registry_uri=address)
    try:
        version = client.get_model_version_by_alias(name, alias).version if alias else number
        place = client.get_model_version_download_uri(name, str(version))
        root = Path(mlflow.artifacts.download_artifacts(artifact_uri=place, tracking_uri=address))
    except MlflowException as error:
        raise CheckpointError(
            f"{uri!r} is not in the registry at {address!r}: {error.message}; `sci-gpt pretrain` registers a model"
        ) from error
    flavor = yaml.safe_load((root / "MLmodel").read_text(encoding="utf-8"))["flavors"]["python_function"]
    return root / flavor["artifacts"]["model"]["path"]
