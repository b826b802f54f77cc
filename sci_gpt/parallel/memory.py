"""Memory of a layout: model states per device (the ZeRO paper's table 1) and an estimate of a step's activations."""

from __future__ import annotations

from sci_gpt.errors import ConfigError
from sci_gpt.model.checkpointing import Checkpointing
from sci_gpt.model.shapes import ModelShape

_WEIGHT_BYTES = {"bf16": 2, "fp32": 4}
_MASTER_AND_MOMENTS = 12  # fp32 master weight and two moments of Adam
# Bytes that a layer keeps per token, counted on the CPU: of its width what is whole on every process of a tensor group
# and what is divided among them, and of the hidden width, which is divided.
_KEPT: dict[tuple[str, Checkpointing], tuple[float, float, float]] = {
    ("fp32", "none"): (16.0, 28.0, 16.0),
    ("fp32", "selective"): (12.0, 16.0, 8.0),
    ("fp32", "full"): (4.0, 0.0, 0.0),
    ("bf16", "none"): (20.0, 26.0, 8.0),
    ("bf16", "selective"): (6.0, 8.0, 4.0),
    ("bf16", "full"): (2.0, 0.0, 0.0),
}
# Bytes per width, and beside it, of what embeddings and heads keep per token: features, anchors, predictions.
_ENDS = {"fp32": (48.0, 1600.0), "bf16": (40.0, 1400.0)}
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
    shape: ModelShape,
    num_tokens: int,
    *,
    dtype: str = "fp32",
    checkpointing: Checkpointing = "none",
    tensor_parallel: int = 1,
    sequence_parallel: int = 1,
) -> float:
    """Estimate of what one micro-batch keeps for its backward pass on one device.

    Per token each layer keeps in fp32 11 widths (what the two norms give, scaled and not; queries and keys after norm
    and after rotation, values, the attention's result as documents and as tokens) and 4 hidden widths (the two branches
    of SwiGLU, the gate, their product). In bf16 the four norms keep 8 of the widths in fp32, so that a width takes 46
    bytes in place of 44, a hidden width half. Attention probabilities are not kept. With selective checkpointing a
    layer keeps 7 widths (its input, queries, keys, values, the attention's result, its two outputs) and 2 hidden widths
    (the two branches), with full its input alone; then one layer at a time has the rest again. Embeddings and heads
    keep 12 widths and 400 values, more or less by modality.

    Args:
        shape: of the trunk.
        num_tokens: token positions of the micro-batch (its rows x row length).
        dtype: fp32 or bf16.
        checkpointing: what a layer computes again in its backward pass.
        tensor_parallel: processes among which heads and hidden widths are divided.
        sequence_parallel: processes among which the trunk's tokens are divided; embeddings and heads see all.

    Raises:
        ConfigError: a type or a way of checkpointing that does not exist.
    """
    if dtype not in _WEIGHT_BYTES:
        raise ConfigError(f"dtype is one of {sorted(_WEIGHT_BYTES)}, got {dtype!r}")
    modes = sorted({mode for _, mode in _KEPT})
    if checkpointing not in modes:
        raise ConfigError(f"activation_checkpointing is one of {modes}, got {checkpointing!r}")

    def of_a_layer(mode: Checkpointing) -> float:
        whole, divided, hidden = _KEPT[dtype, mode]
        return whole * shape.width + (divided * shape.width + hidden * shape.hidden) / tensor_parallel

    kept = of_a_layer(checkpointing)
    per_token = (shape.layers * kept + of_a_layer("none") - kept) / sequence_parallel
    of_width, beside = _ENDS[dtype]
    return num_tokens * (per_token + of_width * shape.width + beside)
