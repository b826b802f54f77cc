"""Adapt a loaded model to a source of its own: statistics and prior from its training part, then some steps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from sci_gpt.config import MixtureEntry, OptimizerConfig, PretrainConfig
from sci_gpt.data.held import Held
from sci_gpt.data.prior import with_priors
from sci_gpt.data.statistics import TrainingStatistics
from sci_gpt.data.windows import Windows, WindowSpec
from sci_gpt.errors import ConfigError, DataError
from sci_gpt.model.init import initialize
from sci_gpt.model.inputs import ModelInputs, NoiseSettings
from sci_gpt.model.loss import valid_weights, weighted_sums
from sci_gpt.model.noise import noisy_inputs
from sci_gpt.model.predict import Predictor
from sci_gpt.model.transformer import SciGPT, build_model
from sci_gpt.model.widen import is_table, widened
from sci_gpt.model.width import rate_factors
from sci_gpt.recipes import parts
from sci_gpt.recipes.load import LoadedModel, SourceFacts
from sci_gpt.train.schedule import Schedule
from sci_tokenizers.left_out import without
from sci_tokenizers.packing import collate
from sci_tokenizers.sample import Sample
from sci_tokenizers.statistics import ChannelStatistics, SourceStatistics
from sci_tokenizers.table import make_tokenizer
from sci_tokenizers.tokens import Tokens
from sci_tokenizers.variables import VARIABLES

_HARMONICS = 2  # of the year and of the day, as `sci-gpt build` fits them by default
_VALID_WINDOWS = 64  # at most, evenly spread
_BATCH_TOKENS = 8192
_CACHED = 1024  # encoded documents that are kept


@dataclass(frozen=True, kw_only=True)
class AdaptSettings:
    """How a model is adapted; the same for a pretrained and an untrained one, so that the two can be compared.

    Attributes:
        learning_rate: of AdamW, after a warm-up of a twentieth of the steps; the second half of `max_steps` cools down.
        max_steps: at most.
        rows_per_step: documents in a step.
        patience: validations without a new best before it ends.
        validate_every: steps between validations.
        seed: of the order of documents.
        freeze: keep the trunk as it is; heads and variable tables alone learn.
    """

    learning_rate: float = 1e-3
    max_steps: int = 200
    rows_per_step: int = 8
    patience: int = 3
    validate_every: int = 10
    seed: int = 0
    freeze: bool = False

    def __post_init__(self) -> None:
        for name in ("max_steps", "rows_per_step", "patience", "validate_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is at least 1, got {getattr(self, name)}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ConfigError(f"learning_rate is a positive number, got {self.learning_rate}")


@dataclass(frozen=True, kw_only=True)
class Examples:
    """What a model is adapted to: stretches of one source in the units of the variable table.

    Attributes:
        source: its name; every stretch carries it.
        spec: shape of the documents (frames, context_frames, leads, stride).
        train: stretches that statistics, prior and weights learn from.
        valid: stretches that decide when to stop, and nothing else.
        options: what its reader would have to know to read it again (kept with the model).

    Raises:
        DataError: no stretch to train on or to validate with, or stretches of different kinds.
    """

    source: str
    spec: WindowSpec
    train: tuple[Sample, ...]
    valid: tuple[Sample, ...]
    options: dict[str, object] | None = None

    def __post_init__(self) -> None:
        if not self.train or not self.valid:
            raise DataError(
                f"source {self.source!r}: {len(self.train)} stretches to train on and {len(self.valid)} to validate "
                "with; give at least one of each"
            )
        head = self.train[0]
        for sample in (*self.train, *self.valid):
            kind = (sample.source, sample.modality, sample.channels)
            if kind != (self.source, head.modality, head.channels):
                raise DataError(
                    f"{sample.key}: stretches of {self.source!r} are {head.modality} of {', '.join(head.channels)}; "
                    f"this one is {sample.modality} of {', '.join(sample.channels)} from {sample.source!r}"
                )


@dataclass(frozen=True, kw_only=True)
class Adapted:
    """A model that knows the new source.

    Attributes:
        model: with the source's statistics, prior and windows; the weights of the best validation.
        best_step: steps behind those weights; 0: no step made it better on the validation part.
        history: (step, training loss since the last entry, validation loss), NaN where there is none.
        seconds: taken.
    """

    model: LoadedModel
    best_step: int
    history: tuple[tuple[int, float, float], ...]
    seconds: float

    @property
    def steps(self) -> int:
        """Steps taken, those after the best included."""
        return self.history[-1][0]


def from_scratch(like: LoadedModel, *, seed: int) -> LoadedModel:
    """The same shape, tokenizers, statistics and sources, with untrained weights drawn from `seed`."""
    model = build_model(like.model.shape, like.model.settings)
    initialize(model, seed)
    return replace(like, model=model.eval(), predictor=_predictor(like, model), step=0)


def adapt(
    start: LoadedModel, examples: Examples, *, settings: AdaptSettings, say: Callable[[str], None] = print
) -> Adapted:
    """Adapt a copy of `start` (which is not changed) to a source, in this process, the same to the bit for a seed.

    Args:
        start: pretrained, or `from_scratch`.
        examples: of the source.
        settings: of the optimizer.
        say: takes the lines of progress.

    Raises:
        DataError: no window fits the training or the validation part, or a channel without a value in training.
    """
    begin = time.monotonic()
    known = introduce(start, examples)
    model, documents = known.model, _Documents(known, examples, settings=settings)
    if settings.freeze:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("heads.") or is_table(name))
    optimizer, schedule = _optimizer(model, known.config.optimizer, settings=settings)
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    history = [(0, math.nan, documents.valid_loss())]
    best_step, best, losses = 0, _copy(model), []
    for step in range(settings.max_steps):
        model.train()
        loss = documents.loss(documents.batch(step))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, known.config.optimizer.clip)
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate(step) * group["rate_factor"]
        optimizer.step()
        losses.append(float(loss.detach()))
        if (step + 1) % settings.validate_every and step + 1 < settings.max_steps:
            continue
        history.append((step + 1, float(np.mean(losses)), documents.valid_loss()))
        losses = []
        if history[-1][2] < min(row[2] for row in history[:-1]):
            best_step, best = step + 1, _copy(model)
        say(_line(history, settings, best_step=best_step, seconds=time.monotonic() - begin))
        if sum(row[0] > best_step for row in history) >= settings.patience:
            break
    model.load_state_dict(best)
    model.requires_grad_(True)
    model.eval()
    return Adapted(model=known, best_step=best_step, history=tuple(history), seconds=time.monotonic() - begin)


def introduce(start: LoadedModel, examples: Examples) -> LoadedModel:
    """A copy of `start` that knows the source's statistics, prior and windows, its weights as they are.

    A variable without a row in the model's tables gets one; the rows of the others stay.

    Raises:
        DataError: as `adapt`.
    """
    head, table = examples.train[0], list(VARIABLES)
    settings = replace(start.model.settings, num_variables=len(table))
    model = build_model(start.model.shape, settings)
    model.load_state_dict(widened(start.model, table[: start.model.settings.num_variables], table=table))
    statistics = {**start.statistics, examples.source: fit_statistics(examples, start.config)}
    facts = SourceFacts(
        modality=head.modality,
        step_seconds=head.step_seconds,
        shape=(head.values.shape[1], head.values.shape[2], head.values.shape[3]),
        options=dict(examples.options or {}),
    )
    new = replace(
        start,
        model=model.eval(),
        config=with_entry(start.config, examples.spec),
        statistics=statistics,
        sources={**start.sources, examples.source: facts},
    )
    return replace(new, predictor=_predictor(new, model))


def fit_statistics(examples: Examples, config: PretrainConfig) -> SourceStatistics:
    """Statistics of the source's training part, completed by the linear prior fitted to it.

    A component that a seismometer does not have has none; of a table or field every channel must hold a value.

    Raises:
        DataError: a channel of a table or field without a value in the training part.
    """
    train = _heard(examples.train) if examples.train[0].modality == "trace" else examples.train
    head = train[0]
    cycles = 0 if head.modality == "trace" else _HARMONICS
    sums = TrainingStatistics(
        source=examples.source,
        variables=head.variables,
        levels=head.levels,
        num_year=cycles,
        num_day=cycles,
        by_cell=head.modality == "grid",
    )
    for sample in train:
        sums.add(sample)
    tokenizer = make_tokenizer(head.modality, parts.tokenizer_settings(config))
    windows = Windows(
        Held(splits={"train": examples.train}), examples.spec, split="train", frame_times=tokenizer.frame_times
    )
    return with_priors(windows, tokenizer, statistics=sums.finish())


def _heard(stretches: Sequence[Sample]) -> list[Sample]:
    """Records without the components that hold no value in any of them."""
    kept = np.flatnonzero(np.any([sample.valid.any(axis=(0, 2, 3)) for sample in stretches], axis=0))
    return [
        replace(
            sample,
            variables=tuple(sample.variables[v] for v in kept),
            levels=tuple(sample.levels[v] for v in kept),
            values=sample.values[:, kept],
            valid=sample.valid[:, kept],
        )
        for sample in stretches
    ]


def with_entry(config: PretrainConfig, spec: WindowSpec) -> PretrainConfig:
    """The run's configuration with the source among the windows of its last phase (one of that name is replaced)."""
    entry = MixtureEntry(
        source=spec.source,
        weight=spec.weight,
        frames=spec.frames,
        stride=spec.stride,
        context_frames=spec.context_frames,
        leads=spec.leads,
    )
    phases = [
        phase.model_copy(update={"mixture": tuple(one for one in phase.mixture if one.source != spec.source)})
        for phase in config.phases
    ]
    phases[-1] = phases[-1].model_copy(update={"mixture": (*phases[-1].mixture, entry)})
    return config.model_copy(update={"phases": tuple(phases)})


class _Documents:
    """Batches of the source for a model: training ones in a seeded order, and the validation part, always the same."""

    def __init__(self, known: LoadedModel, examples: Examples, *, settings: AdaptSettings) -> None:
        self.model, self.spec = known.model, examples.spec
        self.settings = parts.tokenizer_settings(known.config)
        self.modality = examples.train[0].modality
        self.tokenizer = make_tokenizer(self.modality, self.settings)
        self.statistics = known.statistics[examples.source]
        held = Held(splits={"train": examples.train, "valid": examples.valid})
        times = self.tokenizer.frame_times
        self.train = Windows(held, self.spec, split="train", frame_times=times)
        self._rows, self._seed = settings.rows_per_step, settings.seed
        self._cache: dict[tuple[int, int], Tokens] = {}
        valid = Windows(held, self.spec, split="valid", frame_times=times)
        count = min(_VALID_WINDOWS, valid.num_windows)
        chosen = np.linspace(0, valid.num_windows - 1, count).astype(int)
        longest = self.spec.context_frames[1]
        self._noise = known.model.settings.noise
        held_out = [self._encode(valid.read(int(n)), longest, statistics=self.statistics) for n in chosen]
        self.valid = _chunks(held_out, noise=self._noise, seed=settings.seed)
        if not sum(valid_weights(inputs)[self.modality] for inputs in self.valid):
            raise DataError(
                f"source {examples.source!r}: its validation part holds no value to forecast; give a longer or a more "
                "complete record"
            )

    def batch(self, step: int) -> ModelInputs:
        """The documents of a step: each window once in an epoch, in an order of the seed and the epoch."""
        number = self.train.num_windows
        low, high = self.spec.context_frames
        documents = []
        for place in range(step * self._rows, (step + 1) * self._rows):
            epoch, at = divmod(place, number)
            window = int(np.random.default_rng([self._seed, epoch]).permutation(number)[at])
            context = low + int(np.random.default_rng([self._seed, 1, place]).integers(high - low + 1))
            documents.append(self._document(window, context))
        # Fresh noise each step: the seed is that of the step, the documents are known by their keys.
        (inputs,) = _chunks(documents, noise=self._noise, seed=self._seed + step, most=None)
        return inputs

    def loss(self, inputs: ModelInputs) -> Tensor:
        """Mean loss of a batch: nats of a series, CRPS of a grid or trace in scaled units."""
        total, weight = self._sums(inputs)
        return total / max(weight, 1e-9)

    @torch.no_grad()
    def valid_loss(self) -> float:
        """Mean loss of the validation part."""
        self.model.eval()
        sums = [self._sums(inputs) for inputs in self.valid]
        return sum(float(total) for total, _ in sums) / sum(weight for _, weight in sums)

    def _sums(self, inputs: ModelInputs) -> tuple[Tensor, float]:
        total = weighted_sums(self.model(inputs), inputs, settings=self.settings)[self.modality]
        return total, valid_weights(inputs)[self.modality]

    def _document(self, window: int, context: int) -> Tokens:
        if (window, context) not in self._cache:
            if len(self._cache) >= _CACHED:
                self._cache.clear()
            sample = self.train.read(window)
            self._cache[window, context] = self._encode(sample, context, statistics=without(self.statistics, sample))
        return self._cache[window, context]

    def _encode(self, sample: Sample, context: int, *, statistics: Mapping[str, ChannelStatistics]) -> Tokens:
        return self.tokenizer.encode(sample, num_context=context, leads=self.spec.leads, statistics=statistics)


def _chunks(
    documents: list[Tokens], *, noise: NoiseSettings, seed: int, most: int | None = _BATCH_TOKENS
) -> list[ModelInputs]:
    """Documents as batches of at most `most` tokens each (one document at least); None: one batch."""
    chunks: list[list[Tokens]] = [[]]
    for tokens in documents:
        held = sum(one.num_tokens for one in chunks[-1])
        if most is not None and chunks[-1] and held + tokens.num_tokens > most:
            chunks.append([])
        chunks[-1].append(tokens)
    return [
        noisy_inputs(collate([chunk], sum(tokens.num_tokens for tokens in chunk)), noise=noise, seed=seed)
        for chunk in chunks
    ]


def _optimizer(
    model: SciGPT, optimizer: OptimizerConfig, *, settings: AdaptSettings
) -> tuple[torch.optim.Optimizer, Schedule]:
    """AdamW as in pretraining (betas, decay, rates by width), and its rates."""
    factors, groups = rate_factors(model), dict[float, list[torch.nn.Parameter]]()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(factors.get(name, 1.0), []).append(parameter)
    made = torch.optim.AdamW(
        [{"params": learned, "rate_factor": factor} for factor, learned in groups.items()],
        lr=settings.learning_rate,
        betas=optimizer.betas,
        eps=optimizer.epsilon,
        weight_decay=optimizer.weight_decay,
    )
    steps = settings.max_steps
    warmup = min(steps // 20, steps)
    return made, Schedule(peak=settings.learning_rate, steps=steps, warmup_steps=warmup, cooldown_steps=steps // 2)


def _copy(model: SciGPT) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _predictor(loaded: LoadedModel, model: SciGPT) -> Predictor:
    return Predictor(model.eval(), parts.tokenizer_settings(loaded.config), statistics=loaded.statistics)


def _line(history: list[tuple[int, float, float]], settings: AdaptSettings, *, best_step: int, seconds: float) -> str:
    step, loss, valid = history[-1]
    left = seconds / step * (settings.max_steps - step)
    return (
        f"step {step}/{settings.max_steps}  {step * settings.rows_per_step / seconds:.0f} documents/s  "
        f"at most {left:.0f} s left  loss {loss:.4f}  valid {valid:.4f}  best at step {best_step}"
    )
