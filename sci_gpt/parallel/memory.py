"""Memory of a layout: model states per device (the ZeRO paper's table 1) and an estimate of a step's activations."""

from __future__ import annotations

from sci_gpt.errors import ConfigError
from sci_gpt.model.checkpointing import Checkpointing
from sci_gpt.model.shapes import ModelShape

_WEIGHT_BYTES = {"bf16": 2, "fp32": 4}
_MASTER_AND_MOMENTS = 12  # fp32 master weight and two moments of Adam
# Widths and hidden widths that a layer keeps per token; widths that embeddings and heads keep.
_KEPT: dict[Checkpointing, tuple[float, float]] = {"none": (11.5, 4.0), "selective": (7.0, 2.0), "full": (1.0, 0.0)}
_ENDS = (12.0, 400.0)  # widths and values of what does not grow with the width: features, anchors, predictions
_FP32_ADAM = 8  # two moments; in fp32 the weights are their own master at ZeRO 0


def model_state_bytes(  # signature of DESIGN section 7
    num_params: int, data_parallel: int, zero_stage: int, *, dtype: str = "bf16", gradient_dtype: str | None = None
) -> float:
    """Bytes per device of weights, gradients and optimizer state.

    Rajbhandari et al. 2020 (ZeRO, arXiv:1910.02054), table 1: (2 + 2 + 12) x parameters under mixed precision, of which
    stage 1 divides the 12, stage 2 the 2 of the gradients too, stage 3 all.

    Args:
        num_params: parameters of the whole model.
        data_parallel: devices among which ZeRO divides.
        zero_stage: 0 to 3.
        dtype: bf16 (bf16 weights, fp32 master and two moments) or fp32 (fp32 weights and two moments; from stage 1 on
            DeepSpeed keeps a master copy of the partition in fp32 runs too).
        gradient_dtype: of the gradients, by default as the weights.

    Raises:
        ConfigError: a stage or a type that does not exist, or a count below 1.
    """
    for name, count in {"num_params": num_params, "data_parallel": data_parallel}.items():
        if count < 1:
            raise ConfigError(f"{name} is at least 1, got {count}")
    if zero_stage not in (0, 1, 2, 3):
        raise ConfigError(f"zero_stage is 0, 1, 2 or 3, got {zero_stage}")
    for value in (dtype, gradient_dtype or dtype):
        if value not in _WEIGHT_BYTES:
            raise ConfigError(f"dtype is one of {sorted(_WEIGHT_BYTES)}, got {value!r}")
    weights = float(_WEIGHT_BYTES[dtype])
    gradients = float(_WEIGHT_BYTES[gradient_dtype or dtype])
    optimizer = float(_FP32_ADAM if dtype == "fp32" and zero_stage == 0 else _MASTER_AND_MOMENTS)
    if zero_stage >= 1:
        optimizer /= data_parallel
    if zero_stage >= 2:
        gradients /= data_parallel
    if zero_stage >= 3:
        weights /= data_parallel
    return num_params * (weights + gradients + optimizer)


def activation_bytes(
    shape: ModelShape, num_tokens: int, *, dtype: str = "fp32", checkpointing: Checkpointing = "none"
) -> float:
    """Estimate of what one micro-batch keeps for its backward pass on one device.

    Per token, in values: each layer keeps 11.5 widths (what the two norms give, scaled and not, queries and keys
    after norm and after rotation, values, the attention's result as documents and as tokens) and 4 hidden widths (the
    two branches of SwiGLU, the gate, their product); embeddings and heads keep 12 widths and 400 values. Attention
    probabilities are not kept. With selective checkpointing a layer keeps 7 widths (its input, queries, keys, values,
    the attention's result, its two outputs) and 2 hidden widths (the two branches), with full its input alone; then one
    layer at a time has the rest again.

    Args:
        shape: of the trunk.
        num_tokens: token positions of the micro-batch (its rows x row length).
        dtype: fp32, or bf16 for half of it.
        checkpointing: what a layer computes again in its backward pass.

    Raises:
        ConfigError: a type or a way of checkpointing that does not exist.
    """
    if dtype not in _WEIGHT_BYTES:
        raise ConfigError(f"dtype is one of {sorted(_WEIGHT_BYTES)}, got {dtype!r}")
    if checkpointing not in _KEPT:
        raise ConfigError(f"activation_checkpointing is one of {sorted(_KEPT)}, got {checkpointing!r}")
    whole, kept = (
        widths * shape.width + hiddens * shape.hidden for widths, hiddens in (_KEPT["none"], _KEPT[checkpointing])
    )
    per_token = shape.layers * kept + (whole - kept) + _ENDS[0] * shape.width + _ENDS[1]
    return num_tokens * per_token * _WEIGHT_BYTES[dtype]
