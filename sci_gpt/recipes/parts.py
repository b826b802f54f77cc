"""From the configuration tree to the settings of the parts: the one place where config nodes become plain arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sci_gpt.config import ModelConfig, PretrainConfig
from sci_gpt.data.curriculum import Curriculum, Phase
from sci_gpt.data.faults import Patience
from sci_gpt.data.loader import Corpus, packing_report
from sci_gpt.data.store import Store
from sci_gpt.data.windows import WindowSpec
from sci_gpt.errors import ConfigError
from sci_gpt.model.inputs import NoiseSettings
from sci_gpt.model.shapes import SHAPES, ModelShape
from sci_gpt.model.transformer import ModelSettings
from sci_gpt.parallel.engine import AdamWSettings
from sci_gpt.parallel.plan import ParallelPlan
from sci_gpt.train.feed import Place
from sci_gpt.train.schedule import Schedule
from sci_gpt.train.tracker import TrackingTarget
from sci_tokenizers.tokenizer import TokenizerSettings


def tokenizer_settings(config: PretrainConfig) -> TokenizerSettings:
    """Sizes of tokens."""
    return TokenizerSettings(**config.tokenizer.model_dump())


def window_specs(config: PretrainConfig) -> tuple[WindowSpec, ...]:
    """The windows of every source, as its last phase has them."""
    return tuple(WindowSpec(**entry.model_dump()) for entry in config.mixture)


def phases(config: PretrainConfig) -> tuple[Phase, ...]:
    """The run's phases."""
    return tuple(
        Phase(
            until_step=phase.until_step,
            rows=phase.rows_per_step,
            row_length=phase.row_length,
            specs=tuple(WindowSpec(**entry.model_dump()) for entry in phase.mixture),
        )
        for phase in config.phases
    )


def curriculum(config: PretrainConfig, store: Store, *, starts: Sequence[int] = (0,)) -> Curriculum:
    """The run's samples, `starts` as a checkpoint has them.

    Raises:
        DataError: the store has not what the phases ask for, or a document is longer than a row.
    """
    return Curriculum(
        store,
        phases(config),
        seed=config.seed,
        settings=tokenizer_settings(config),
        shuffle_block=config.shuffle_block,
        shuffle_time=config.shuffle_time,
        starts=starts,
    )


def packing(config: PretrainConfig, phase: Phase, *, corpus: Corpus) -> dict[str, float]:
    """How well a phase's rows are packed, and dealt to the run's ranks (`packing_report`)."""
    return packing_report(
        corpus,
        rows=phase.rows,
        row_length=phase.row_length,
        ranks=config.parallel.data_parallel,
        accumulation=config.parallel.accumulation,
    )


def model_shape(config: PretrainConfig) -> ModelShape:
    """The trunk that `model.size` names.

    Raises:
        ConfigError: no such size.
    """
    if config.model.size not in SHAPES:
        raise ConfigError(f"model.size is one of {', '.join(SHAPES)}, got {config.model.size!r}")
    return SHAPES[config.model.size]


def model_settings(config: PretrainConfig) -> ModelSettings:
    """What beside the trunk decides the parameters."""
    model, attention = config.model, config.model.attention
    return ModelSettings(
        tokenizer=tokenizer_settings(config),
        mixture_components=model.mixture_components,
        id_table=model.id_table,
        radius=attention.radius,
        global_every=attention.global_every,
        base_width=model.base_width if model.width_rule == "mup" else None,
        noise=NoiseSettings(**model.noise.model_dump()),
    )


def parallel_plan(config: PretrainConfig) -> ParallelPlan:
    """The layout.

    Raises:
        ConfigError: a layout that gives wrong numbers (bf16 at ZeRO 0), or one that cannot divide the model.
    """
    parallel = config.parallel
    plan = ParallelPlan(
        data_parallel=parallel.data_parallel,
        sequence_parallel=parallel.sequence_parallel,
        tensor_parallel=parallel.tensor_parallel,
        zero_stage=parallel.zero_stage,
        offload=parallel.offload,
        accumulation=parallel.accumulation,
        checkpointing=parallel.activation_checkpointing,
        dtype=parallel.dtype,
        extra_deepspeed=parallel.extra_deepspeed,
    )
    plan.check_model(model_shape(config))
    return plan


def adamw_settings(config: PretrainConfig) -> AdamWSettings:
    """The optimizer."""
    return AdamWSettings(**config.optimizer.model_dump())


def schedule(config: PretrainConfig) -> Schedule:
    """Warm-up, stable, cooldown at the optimizer's rate."""
    return Schedule(peak=config.optimizer.learning_rate, **config.schedule.model_dump())


def tracking_target(config: PretrainConfig) -> TrackingTarget:
    """Where the run is tracked."""
    tracking = config.tracking
    return TrackingTarget(
        uri=tracking.uri, artifacts=tracking.artifacts, experiment=tracking.experiment, run_name=config.name
    )


def patience(config: PretrainConfig) -> Patience:
    """How long a failing read is tried again."""
    return Patience(attempts=config.reading.attempts, wait_seconds=config.reading.wait_seconds)


def place(config: PretrainConfig, *, rank: int) -> Place:
    """A rank's place among those that share the rows; ranks of one tensor or sequence group stand at the same."""
    plan = parallel_plan(config)
    return Place(rank=plan.position(rank).data, world=plan.data_parallel, accumulation=plan.accumulation)


def identity(config: PretrainConfig, store: Store) -> dict[str, Any]:
    """What must be equal for a run to go on from a checkpoint: all that decides its samples, its model and its loss.

    Schedule, optimizer and layout are free: a run may be prolonged, or go on over more processes. So are the phases
    that lie ahead of a checkpoint (`resume.eaten`).
    """
    tree = config.model_dump(mode="json")
    tree["model"] = config.model.model_dump(mode="json", exclude=_unchanged(config.model))
    for entry in (entry for phase in tree["phases"] for entry in phase["mixture"]):
        if not entry["masked"]:  # a run from before the objective goes on
            del entry["masked"]
    names = ("seed", "phases", "shuffle_block", "shuffle_time", "tokenizer", "model", "loss_factor")
    # The fingerprint's parts stand beside it: a refusal then names the source, and whether files or split differ.
    data = {"fingerprint": store.fingerprint, "data": store.manifest.get("fingerprint_parts", {})}
    return data | {name: tree[name] for name in names}


def _unchanged(model: ModelConfig) -> set[str]:
    """Keys that compute what was computed before they were there: older checkpoints do not have them."""
    later = {"attention", "width_rule", "base_width", "noise"}
    if model.width_rule == "mup":
        later -= {"width_rule", "base_width"}
    if model.attention.radius is not None:
        later -= {"attention"}
    return later - {"noise"} if model.noise.width else later


def loss_factor(config: PretrainConfig) -> dict[str, float]:
    """Factor per modality.

    Raises:
        ConfigError: a modality without one (0 leaves it out of the loss).
    """
    missing = [name for name in ("grid", "series", "trace") if name not in config.loss_factor]
    if missing:
        raise ConfigError(
            f"loss_factor names every modality (0 leaves one out of the loss); missing: {', '.join(missing)}"
        )
    return {str(name): float(value) for name, value in config.loss_factor.items()}
