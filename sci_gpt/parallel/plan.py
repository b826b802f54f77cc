"""ParallelPlan: the layout of a run, which checks itself and from which DeepSpeed's dictionary is derived."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from sci_gpt.errors import ConfigError

Dtype = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class ParallelPlan:
    """How one run is cut over processes.

    Attributes:
        data_parallel: processes that each take a share of the rows of a step.
        zero_stage: what ZeRO divides among them: 0 nothing, 1 optimizer state, 2 and gradients, 3 and weights.
        accumulation: micro-batches per process and optimizer step.
        dtype: of weights and activations; the master weights and moments are fp32 in both.

    Raises:
        ConfigError: a number out of range, or bf16 at ZeRO 0 (DeepSpeed's result is 2e-2 off there).
    """

    data_parallel: int
    zero_stage: int = 1
    accumulation: int = 1
    dtype: Dtype = "fp32"

    def __post_init__(self) -> None:
        for name in ("data_parallel", "accumulation"):
            if getattr(self, name) < 1:
                raise ConfigError(f"the parallel plan's {name} is at least 1, got {getattr(self, name)}")
        if self.zero_stage not in (0, 1, 2, 3):
            raise ConfigError(f"zero_stage is 0, 1, 2 or 3, got {self.zero_stage}")
        if self.dtype not in ("fp32", "bf16"):
            raise ConfigError(f"dtype is fp32 or bf16, got {self.dtype!r}")
        if self.dtype == "bf16" and self.zero_stage == 0:
            raise ConfigError(
                "bf16 needs fp32 master weights, which ZeRO 0 does not keep; set parallel.zero_stage to 1"
            )

    def check(self, world_size: int) -> None:
        """Raises ConfigError where the plan is not for `world_size` processes."""
        if self.data_parallel != world_size:
            raise ConfigError(
                f"the plan is for {self.data_parallel} processes, {world_size} were started; "
                "set parallel.processes to the number started"
            )

    @property
    def loss_multiplier(self) -> int:
        """What the loss is multiplied by, because DeepSpeed divides gradients by both."""
        return self.data_parallel * self.accumulation

    def deepspeed_config(self, *, clip: float) -> dict[str, Any]:
        """DeepSpeed's dictionary for this layout; `clip` is the largest global gradient norm.

        The optimizer is torch's own AdamW (DeepSpeed's compiles C++ at the first start), and gradients travel in fp32.
        """
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": clip if self.zero_stage > 0 else 0.0,  # at ZeRO 0 the engine clips and keeps the norm
            "steps_per_print": 10**9,
            "zero_optimization": {"stage": self.zero_stage},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "communication_data_type": "fp32",
        }
        if self.dtype == "bf16":
            config["bf16"] = {"enabled": True, "check_grad_overflow": True}
            config["data_types"] = {"grad_accum_dtype": "fp32"}
        return config
