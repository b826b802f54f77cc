"""The whole configuration tree on one page: typed, frozen, unknown keys refused."""

from __future__ import annotations

from datetime import date
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, model_validator

from sci_gpt.config_model import CheckpointConfig, ModelConfig, Node, TokenizerConfig, WatchConfig
from sci_gpt.data.addresses import path_or_url

Where = Annotated[Path | str, AfterValidator(path_or_url)]  # a folder, or a URL that fsspec reads: s3://bucket/prefix


def _refuse_twice(what: str, names: list[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{what} {name!r} stands {names.count(name)} times; each stands once")


class SplitConfig(Node):
    """How one source is split. Time splits share the corpus calendar; the others hold whole things out.

    by: time (an era of the corpus calendar) | station (an era, and stations) | run (members of a simulation) | event;
    `valid` and `test` name what is held out whole (stations, runs, events). `gap_days` overrides the calendar's gap;
    `buffer_km` (by: station) leaves stations nearer than that to a held-out one out of training; `empty` names the
    splits that may hold nothing.
    """

    by: Literal["time", "run", "station", "event"]
    era: str | None = None
    gap_days: float | None = Field(default=None, gt=0)
    buffer_km: float | None = Field(default=None, gt=0)
    valid: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    empty: tuple[Literal["valid", "test"], ...] = ()

    @model_validator(mode="after")
    def _era_where_needed(self) -> Self:
        if (self.by in ("time", "station")) != (self.era is not None):
            raise ValueError(f"`era` goes with by: time and by: station, and only with them, got by: {self.by}")
        return self


class SourceConfig(Node):
    """One source: where its files are, who reads them, under what licence, how they split."""

    name: str
    reader: str
    modality: Literal["grid", "series", "trace"]
    nature: Literal["observation", "analysis", "simulation"]
    package: str | None = None
    files: tuple[str, ...]
    options: dict[str, Any] = Field(default_factory=dict)
    licence: str
    citation: str
    split: SplitConfig

    @model_validator(mode="after")
    def _real_weather_has_dates(self) -> Self:
        if self.split.by == "run" and self.nature != "simulation":
            raise ValueError(
                f"source {self.name!r}: split by run is for simulations, whose weather never happened, got nature: "
                f"{self.nature}; split it by time or station, on the corpus calendar"
            )
        return self


class EraConfig(Node):
    """A part of the calendar: training to `train_until`, validation to `valid_until`, test to `end`; dates inclusive.

    `valid_until` equal to `train_until` means no validation.
    """

    name: str
    start: date
    train_until: date
    valid_until: date
    end: date

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.start < self.train_until <= self.valid_until < self.end:
            raise ValueError(
                f"era {self.name!r}: start < train_until <= valid_until < end, got {self.start}, {self.train_until}, "
                f"{self.valid_until}, {self.end}"
            )
        return self


class CalendarConfig(Node):
    """One calendar for the corpus: eras do not overlap, so that on no date one real-world source trains and another is
    tested. A source lives in one era: its training lies before its validation, and that before its test.

    Between two splits `gap_days` are dropped; a window longer than the gap is refused.
    """

    gap_days: float = Field(gt=0)
    eras: tuple[EraConfig, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _named_once(self) -> Self:
        _refuse_twice("era", [era.name for era in self.eras])
        return self


class BuildConfig(Node):
    """Who does the work of a build, none of which changes what is built.

    workers: processes of Dask's LocalCluster (default: one per core); 0: this process does everything.
    memory_megabytes: for all processes together (default: four fifths of what is free now); as many workers are started
    as it holds.
    scheduler: address of a running Dask scheduler (tcp://HOST:PORT) whose workers share `output` and the files.
    """

    workers: int | None = Field(default=None, ge=0)
    memory_megabytes: float | None = Field(default=None, gt=0)
    scheduler: str | None = None

    @model_validator(mode="after")
    def _one_or_the_other(self) -> Self:
        if self.scheduler is not None and (self.workers is not None or self.memory_megabytes is not None):
            raise ValueError("workers and memory_megabytes are of the local cluster; with a scheduler leave them out")
        return self


class TokensConfig(Node):
    """What a build checks of the tokens that its series will become (see docs/tokenizers.md).

    allow: SOURCE/CHANNEL of series that are kept although their bins are too wide or their extremes clipped.
    """

    allow: tuple[str, ...] = ()


class DataConfig(Node):
    """`sci-gpt build`: sources, splits, shards.

    stretch_megabytes: longer stretches of a grid are cut in time, no window crosses a cut; it bounds the memory of a
    build (see docs/data.md). shard_megabytes: of a shard, about.
    """

    name: str
    output: Where
    calendar: CalendarConfig
    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    climatology_year_harmonics: int = Field(default=2, ge=0)
    climatology_day_harmonics: int = Field(default=2, ge=0)
    stretch_megabytes: float = Field(default=32.0, gt=0)
    shard_megabytes: float = Field(default=256.0, gt=0)
    tokens: TokensConfig = TokensConfig()
    build: BuildConfig = BuildConfig()

    @model_validator(mode="after")
    def _named_once(self) -> Self:
        _refuse_twice("source", [source.name for source in self.sources])
        return self


class MixtureEntry(Node):
    """A source's share of the tokens and the shape of its windows.

    frames: length of a document in frames; stride: frames between window starts; context_frames: C, the smallest and
    the largest number of frames from which the document's scales come (drawn from the sample's number); leads: frames
    ahead that each token is asked for; masked: share of the samples that hide tokens and ask for these instead.
    """

    source: str
    weight: float = Field(gt=0)
    frames: int = Field(ge=2)
    stride: int = Field(ge=1)
    context_frames: tuple[int, int]
    leads: tuple[int, ...] = (1,)
    masked: float = Field(default=0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        low, high = self.context_frames
        if not 1 <= low <= high < self.frames:
            raise ValueError(
                f"context_frames are [smallest, largest], each fewer than {self.frames} frames, got [{low}, {high}]"
            )
        if not self.leads or min(self.leads) < 1 or list(self.leads) != sorted(set(self.leads)):
            raise ValueError(f"leads are ascending and positive, got {list(self.leads)}")
        if high + self.leads[0] > self.frames:
            raise ValueError(f"{self.frames} frames hold no target {self.leads[0]} ahead of {high} context frames")
        return self


class PhaseConfig(Node):
    """A part of a run, up to completed step `until_step`: tokens in a row, rows in a step, and the mixture in them."""

    until_step: int = Field(ge=1)
    row_length: int = Field(ge=16)
    rows_per_step: int = Field(ge=1)
    mixture: tuple[MixtureEntry, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _named_once(self) -> Self:
        _refuse_twice("mixture source", [entry.source for entry in self.mixture])
        return self


class OptimizerConfig(Node):
    """AdamW with decoupled weight decay; `clip` is the global gradient norm."""

    learning_rate: float = Field(gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    clip: float = Field(default=1.0, gt=0)


class ScheduleConfig(Node):
    """Warm-up, stable, cooldown, in steps; `steps` is the whole length."""

    steps: int = Field(ge=1)
    warmup_steps: int = Field(ge=0)
    cooldown_steps: int = Field(ge=0)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.warmup_steps + self.cooldown_steps > self.steps:
            raise ValueError(
                "warmup_steps + cooldown_steps must fit in steps, "
                f"got {self.warmup_steps} + {self.cooldown_steps} > {self.steps}"
            )
        return self


class ParallelConfig(Node):
    """The layout of a run: `processes` in all, divided into tensor x sequence groups, each of which takes a share of
    the rows; `threads_per_process` compute, and as many read ahead; the backward pass computes nothing of a layer
    again, all but matrix products and attention (selective), or all (full); `offload` keeps the optimizer, or all
    weights too, in the host's memory; `extra_deepspeed` is passed on."""

    processes: int = Field(default=1, ge=1)
    tensor_parallel: int = Field(default=1, ge=1)
    sequence_parallel: int = Field(default=1, ge=1)
    threads_per_process: int = Field(default=1, ge=1)
    zero_stage: Literal[0, 1, 2, 3] = 1
    offload: Literal["none", "optimizer", "all"] = "none"
    accumulation: int = Field(default=1, ge=1)
    dtype: Literal["fp32", "bf16"] = "fp32"
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    extra_deepspeed: dict[str, Any] = Field(default_factory=dict)

    @property
    def data_parallel(self) -> int:
        """Groups of processes that each take a share of the rows."""
        return self.processes // (self.tensor_parallel * self.sequence_parallel)

    @model_validator(mode="after")
    def _works(self) -> Self:
        if self.dtype == "bf16" and self.zero_stage == 0:
            raise ValueError("dtype bf16 with zero_stage 0 gives a wrong gradient norm in DeepSpeed; use zero_stage 1")
        group = self.tensor_parallel * self.sequence_parallel
        if self.processes % group:
            raise ValueError(
                f"processes must be a multiple of tensor_parallel x sequence_parallel, got {self.processes} and "
                f"{self.tensor_parallel} x {self.sequence_parallel} = {group}"
            )
        return self


class ReadingConfig(Node):
    """What a run does about data that cannot be read.

    A read that fails is tried `attempts` times, `wait_seconds` before the second and twice as long before each further
    one. Then its sample weighs nothing, is named and counted; more than `most_passed_over` since the run was started or
    resumed stop it.
    """

    attempts: int = Field(default=4, ge=1)
    wait_seconds: float = Field(default=0.25, ge=0)
    most_passed_over: int = Field(default=100, ge=0)


class ValidationConfig(Node):
    """Every `every` steps, `windows` windows of each source's validation split are scored."""

    every: int = Field(ge=1)
    windows: int = Field(default=16, ge=1)


class TrackingConfig(Node):
    """MLflow: where runs go and under what names; `parent_run` is the id of the run that a study's runs belong to."""

    uri: str = "sqlite:///runs/mlflow/mlflow.db"
    artifacts: str = "runs/mlflow/artifacts"
    experiment: str
    registered_model: str | None
    parent_run: str | None = None

    @model_validator(mode="after")
    def _no_secret(self) -> Self:
        if urlsplit(self.uri).password is not None:
            raise ValueError(
                "uri holds a password, which would stand in logs, reports and MLflow; leave it out and set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment"
            )
        return self


class EvaluateConfig(Node):
    """`sci-gpt evaluate`: windows per source of the test split, bootstrap, the time-shuffled control run."""

    windows: int = Field(default=512, ge=1)
    windows_by_source: dict[str, int] = Field(default_factory=dict)
    bootstrap: int = Field(default=1000, ge=100)
    interval: float = Field(default=0.9, gt=0, lt=1)
    shuffled_run: Path | None = None


class PretrainConfig(Node):
    """`sci-gpt pretrain`: one run.

    phases: in order; the last ends with the schedule. Sample numbers go on across them, and so does each source in its
    epochs while its windows (frames, stride) stay the same.
    shuffle_block: windows in a shuffle block; a source is read block by block, in an order of their own (one with fewer
    windows is one block). It should span at least four shards per data-parallel rank of the largest layout planned for
    the run: the order does not depend on the actual layout, so it cannot be raised later.
    """

    name: str
    output: Path
    data: Where
    seed: int = Field(ge=0)
    shuffle_block: int = Field(default=65536, ge=1)
    shuffle_time: bool = False
    phases: tuple[PhaseConfig, ...] = Field(min_length=1)
    loss_factor: dict[Literal["grid", "series", "trace"], float]
    tokenizer: TokenizerConfig = TokenizerConfig()
    model: ModelConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    parallel: ParallelConfig = ParallelConfig()
    reading: ReadingConfig = ReadingConfig()
    watch: WatchConfig = WatchConfig()
    checkpoint: CheckpointConfig
    validation: ValidationConfig
    tracking: TrackingConfig
    evaluate: EvaluateConfig

    @property
    def mixture(self) -> tuple[MixtureEntry, ...]:
        """Every source of the run once, by its entry of the last phase that has it: what is validated, evaluated and
        forecast."""
        return tuple({entry.source: entry for phase in self.phases for entry in phase.mixture}.values())

    @model_validator(mode="after")
    def _phases_follow_each_other(self) -> Self:
        ends = [phase.until_step for phase in self.phases]
        if ends != sorted(set(ends)):
            raise ValueError(f"phases: until_step must rise from phase to phase, got {ends}")
        if ends[-1] != self.schedule.steps:
            raise ValueError(
                f"phases.{len(ends) - 1}.until_step is {ends[-1]}, schedule.steps is {self.schedule.steps}: the last "
                "phase ends with the schedule; set both"
            )
        last = {entry.source: entry.leads for entry in self.mixture}
        for number, phase in enumerate(self.phases):
            for entry in phase.mixture:
                if entry.leads != last[entry.source]:
                    raise ValueError(
                        f"phases.{number}: source {entry.source!r} is asked for leads {list(entry.leads)}, in a later "
                        f"phase for {list(last[entry.source])}; its heads learn one set: give it the same in all phases"
                    )
        return self

    @model_validator(mode="after")
    def _keys_that_exist(self) -> Self:
        sources = [entry.source for entry in self.mixture]
        for name in self.evaluate.windows_by_source:
            if name not in sources:
                close = get_close_matches(name, sources, n=1, cutoff=0.0)[0]
                raise ValueError(
                    f"evaluate.windows_by_source: unknown source {name!r}; nearest in the mixture: {close!r}"
                )
        missing = [modality for modality in ("grid", "series", "trace") if modality not in self.loss_factor]
        if missing:
            raise ValueError(f"loss_factor: missing {missing}; every modality has a factor, also one that is absent")
        return self
