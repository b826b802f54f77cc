"""ParallelPlan: the layout of a run, which checks itself and from which DeepSpeed's dictionary is derived."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, get_args

from sci_gpt.errors import ConfigError
from sci_gpt.model.checkpointing import Checkpointing
from sci_gpt.model.shapes import ModelShape

Dtype = Literal["fp32", "bf16"]
Offload = Literal["none", "optimizer", "all"]

# DeepSpeed's buffers, in values: what `device_memory` heeds of them.
_SIZES = ("reduce_bucket_size", "sub_group_size", "stage3_max_live_parameters", "stage3_prefetch_bucket_size")
# What of DeepSpeed's settings decides what a run computes: the plan, the optimizer and the trainer own it.
_OWNED = (
    "train_batch_size",
    "optimizer",
    "scheduler",
    "bf16",
    "bfloat16",
    "fp16",
    "amp",
    "torch_autocast",
    "data_types",
    "prescale_gradients",
    "gradient_predivide_factor",
    "tensor_parallel",
    "sequence_parallel_size",
    "pipeline",
    "elasticity",
    "activation_checkpointing",
    "data_efficiency",
    "curriculum_learning",
    "progressive_layer_drop",
    "compression_training",
    "seq_parallel_communication_data_type",
    "zero_optimization.offload_optimizer",
    "zero_optimization.offload_param",
    "zero_optimization.cpu_offload",
    "zero_optimization.cpu_offload_param",
    "zero_optimization.cpu_offload_use_pin_memory",
    "zero_optimization.zenflow",
    # Other divisions than the checkpoint's fragments know, and gradients of fewer bits.
    "zero_optimization.mics_shard_size",
    "zero_optimization.mics_hierarchical_params_gather",
    "zero_optimization.zero_hpz_partition_size",
    "zero_optimization.zero_quantized_weights",
    "zero_optimization.zero_quantized_nontrainable_weights",
    "zero_optimization.zero_quantized_gradients",
)


class Position(NamedTuple):
    """A process's place on the three axes."""

    data: int
    sequence: int
    tensor: int


@dataclass(frozen=True, kw_only=True)
class ParallelPlan:
    """How one run is cut over processes: data x sequence x tensor of them, tensor neighbours next to each other.

    Attributes:
        data_parallel: groups of processes that each take a share of the rows of a step.
        sequence_parallel: processes among which the tokens of a share are divided in the trunk (Ulysses, Jacobs et al.
            2023: in attention each has some heads of all tokens).
        tensor_parallel: processes among which attention heads and MLP columns are divided (Shoeybi et al. 2019).
        zero_stage: what ZeRO divides among data x sequence processes: 0 nothing, 1 optimizer state, 2 and gradients, 3
            and weights.
        offload: what lies in the host's memory: none, optimizer (its state and step), all (the weights too).
        accumulation: micro-batches per process and optimizer step.
        checkpointing: what of a layer the backward pass computes again: none, selective or full.
        dtype: of weights and activations; the master weights and moments are fp32 in both, gradients are reduced in
            fp32.
        extra_deepspeed: more of DeepSpeed's settings, as its documentation writes them.

    Raises:
        ConfigError: a number out of range; a layout whose result is wrong or unknown (ZeRO 0 with bf16, whose norm and
            weights are 2e-2 off, or with tensor or sequence axes); offload at a stage that has none; an extra setting
            that the plan owns.
    """

    data_parallel: int
    sequence_parallel: int = 1
    tensor_parallel: int = 1
    zero_stage: int = 1
    offload: Offload = "none"
    accumulation: int = 1
    checkpointing: Checkpointing = "none"
    dtype: Dtype = "fp32"
    extra_deepspeed: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        for name in ("data_parallel", "sequence_parallel", "tensor_parallel", "accumulation"):
            if getattr(self, name) < 1:
                raise ConfigError(f"the parallel plan's {name} is at least 1, got {getattr(self, name)}")
        if self.zero_stage not in (0, 1, 2, 3):
            raise ConfigError(f"zero_stage is 0, 1, 2 or 3, got {self.zero_stage}")
        if self.dtype not in ("fp32", "bf16"):
            raise ConfigError(f"dtype is fp32 or bf16, got {self.dtype!r}")
        if self.offload not in ("none", "optimizer", "all"):
            raise ConfigError(f"offload is none, optimizer or all, got {self.offload!r}")
        if self.checkpointing not in get_args(Checkpointing):
            raise ConfigError(
                f"activation_checkpointing is {' or '.join(get_args(Checkpointing))}, got {self.checkpointing!r}"
            )
        if self.zero_stage == 0:
            self._check_undivided()
        if self.offload == "all" and self.zero_stage != 3:
            raise ConfigError(
                f"offload all keeps the weights on the host, which ZeRO {self.zero_stage} needs on every device; set "
                "parallel.zero_stage to 3, or parallel.offload to optimizer"
            )
        self.deepspeed_config(clip=1.0)  # refuses extra settings
        self._check_sizes()

    def _check_sizes(self) -> None:
        """DeepSpeed's buffers; the memory that a plan foresees depends on them."""
        said = self.extra_deepspeed.get("zero_optimization", {})
        for name in _SIZES:
            size, least = said.get(name, 1), int(name == "reduce_bucket_size")
            if isinstance(size, bool) or not isinstance(size, int | float) or not least <= size < float("inf"):
                raise ConfigError(
                    f"extra_deepspeed.zero_optimization.{name} is a number of values, at least {least}, got {size!r}"
                )

    def _check_undivided(self) -> None:
        if self.dtype == "bf16":
            raise ConfigError(
                "bf16 needs fp32 master weights, which ZeRO 0 does not keep; set parallel.zero_stage to 1"
            )
        if self.tensor_parallel > 1 or self.sequence_parallel > 1:
            raise ConfigError(
                f"ZeRO 0 is for data parallelism alone, got tensor_parallel {self.tensor_parallel} and "
                f"sequence_parallel {self.sequence_parallel}; set parallel.zero_stage to 1"
            )
        if self.offload != "none":
            raise ConfigError(f"offload {self.offload} needs a ZeRO stage from 1 on; set parallel.zero_stage to 1")

    def check(self, world_size: int) -> None:
        """Raises ConfigError where the plan is not for `world_size` processes."""
        if self.world_size != world_size:
            raise ConfigError(
                f"the plan is for {self.world_size} processes (data {self.data_parallel} x sequence "
                f"{self.sequence_parallel} x tensor {self.tensor_parallel}), {world_size} were started; "
                "set parallel.processes to the number started"
            )

    def check_model(self, shape: ModelShape) -> None:
        """Raises ConfigError where the trunk's heads or MLP columns cannot be divided as the plan says."""
        if shape.heads % (self.tensor_parallel * self.sequence_parallel):
            raise ConfigError(
                f"tensor_parallel {self.tensor_parallel} x sequence_parallel {self.sequence_parallel} must divide the "
                f"model's {shape.heads} attention heads; choose parallel.tensor_parallel and "
                "parallel.sequence_parallel, or model.size, so that it does"
            )
        if shape.hidden % self.tensor_parallel:
            raise ConfigError(
                f"tensor_parallel {self.tensor_parallel} must divide the model's {shape.hidden} MLP columns; choose "
                "another parallel.tensor_parallel or model.size"
            )

    @property
    def world_size(self) -> int:
        """Processes of the run."""
        return self.data_parallel * self.sequence_parallel * self.tensor_parallel

    @property
    def zero_ranks(self) -> int:
        """Processes among which ZeRO divides: those that hold the same slice of every parameter."""
        return self.data_parallel * self.sequence_parallel

    def position(self, rank: int) -> Position:
        """Where a process stands; all with the same `data` see the same rows."""
        rest, tensor = divmod(rank, self.tensor_parallel)
        data, sequence = divmod(rest, self.sequence_parallel)
        return Position(data=data, sequence=sequence, tensor=tensor)

    def is_lead(self, rank: int) -> bool:
        """Whether a process speaks for those that see the same rows."""
        return self.position(rank)[1:] == (0, 0)

    @property
    def loss_multiplier(self) -> int:
        """What the loss is multiplied by, because DeepSpeed divides gradients by data x sequence and accumulation.

        Each process of a sequence group computes the whole loss of their rows, which counts once: its share of it is
        one in `sequence_parallel`, and the two factors cancel.
        """
        return self.data_parallel * self.accumulation

    def micro_batch_rows(self, rows_per_step: int) -> int:
        """Rows of the largest micro-batch: rows are dealt to data_parallel x accumulation of them."""
        return -(-rows_per_step // (self.data_parallel * self.accumulation))

    def deepspeed_config(self, *, clip: float) -> dict[str, Any]:
        """DeepSpeed's dictionary for this layout; `clip` is the largest global gradient norm.

        The optimizer is torch's own AdamW (DeepSpeed's compiles C++ at the first start), and gradients travel in fp32.

        Raises:
            ConfigError: an extra setting that the plan owns.
        """
        zero: dict[str, Any] = {"stage": self.zero_stage}
        if self.offload != "none":
            zero["offload_optimizer"] = {"device": "cpu"}
        if self.offload == "all":
            zero["offload_param"] = {"device": "cpu"}
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": clip if self.zero_stage > 0 else 0.0,  # at ZeRO 0 the engine clips and keeps the norm
            "steps_per_print": 10**9,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "communication_data_type": "fp32",
        }
        if self.dtype == "bf16":
            # At ZeRO 1 DeepSpeed adds each micro-batch's gradients to fp32 sums; without `immediate_grad_update` it
            # does not clear them (0.19.8), and the first micro-batch counts as often as there are micro-batches.
            config["bf16"] = {"enabled": True, "check_grad_overflow": True, "immediate_grad_update": True}
            config["data_types"] = {"grad_accum_dtype": "fp32"}
        return _merged(config, self.extra_deepspeed, path="")


def _merged(own: dict[str, Any], extra: Mapping[str, Any], *, path: str) -> dict[str, Any]:
    """Both dictionaries; refuses a key of `extra` that is in `own` or among `_OWNED`, at any depth."""
    merged = dict(own)
    for key, value in extra.items():
        name = f"{path}{key}"
        if isinstance(own.get(key), dict) and isinstance(value, Mapping) and name not in _OWNED:
            merged[key] = _merged(own[key], value, path=f"{name}.")
        elif key in own or name in _OWNED:
            raise ConfigError(
                f"extra_deepspeed sets {name}, which the run's own settings decide"
                f"{f' ({own[key]!r} here)' if key in own else ''}; leave it out of parallel.extra_deepspeed and set "
                "the parallel, optimizer or schedule key for it"
            )
        else:
            merged[key] = value
    return merged
