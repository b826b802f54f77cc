"""Remedies: whether a run fits on its devices, and the first change of its configuration that makes it fit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sci_gpt.config import PretrainConfig
from sci_gpt.errors import ConfigError
from sci_gpt.model.transformer import SciGPT
from sci_gpt.parallel.device_memory import DeviceMemory, device_memory
from sci_gpt.parallel.devices import Device
from sci_gpt.recipes import parts

_DIVIDED = ("query", "key", "value", "output", "gate", "up", "down")  # of a block, by a tensor axis
_MOST_NODES = 4096

Change = dict[str, Any]  # keys of `parallel` and their values


def params_on_device(model: SciGPT, *, tensor_parallel: int) -> int:
    """Parameters of one process before ZeRO divides them: blocks' matrices are divided, all else is whole."""
    divided = sum(
        parameter.numel()
        for name, parameter in model.blocks.named_parameters()
        if name.split(".")[1] in _DIVIDED and parameter.dim() == 2
    )
    return model.num_parameters - divided + divided // tensor_parallel


def memory_of(config: PretrainConfig, *, model: SciGPT, accelerator: bool) -> DeviceMemory:
    """Of the phase whose micro-batches are the largest; on a CPU with the host's, which is the same memory."""
    layout = parts.parallel_plan(config)
    tokens = max(layout.micro_batch_rows(phase.rows_per_step) * phase.row_length for phase in config.phases)
    found = device_memory(
        model.shape,
        layout,
        num_params=params_on_device(model, tensor_parallel=layout.tensor_parallel),
        num_tokens=tokens,
        checkpointing=config.parallel.activation_checkpointing,
        accelerator=accelerator,
        staged=config.checkpoint.asynchronous,
    )
    return found if accelerator else found.with_host()


def lacking(memory: DeviceMemory, *, device: Device) -> float:
    """Bytes that a device, or its host, has too few; 0 or less: it fits."""
    return max(memory.total - (device.memory - device.reserved), lacking_on_host(memory, device=device))


def lacking_on_host(memory: DeviceMemory, *, device: Device) -> float:
    """Bytes that the host has too few for one device; a CPU is its own host."""
    return memory.host - device.host_memory if device.kind == "gpu" else 0.0


def remedy(config: PretrainConfig, *, model: SciGPT, device: Device, gpus_per_node: int) -> str | None:
    """The first change that fits, in the words of the configuration; None: none of those that are tried.

    Tried alone, in this order: saves for which training waits, activation checkpointing, higher ZeRO stages, smaller
    micro-batches, offload, tensor parallelism within a node; then these together; then that on more nodes.
    """
    waiting = config.checkpoint.model_copy(update={"asynchronous": False})
    if _fits(config.model_copy(update={"checkpoint": waiting}), {}, model=model, device=device):
        return "--set checkpoint.asynchronous=false"
    for change in _changes(config, gpus_per_node=gpus_per_node):
        if _fits(config, change, model=model, device=device):
            return _in_words(change)
    together: Change = {"activation_checkpointing": "full", "zero_stage": 3}
    most = max(_accumulations(config), default=config.parallel.accumulation)
    for more in ({}, {"accumulation": most}, {"accumulation": most, "offload": "all"}):
        if _fits(config, together | more, model=model, device=device):
            return _in_words(together | more)
    processes = config.parallel.processes
    while device.kind == "gpu" and (processes := 2 * processes) <= _MOST_NODES * gpus_per_node:
        change = together | {"processes": processes}
        if _fits(config, change, model=model, device=device):
            return f"{_in_words(change)} (--nodes {-(-processes // gpus_per_node)} --gpus-per-node {gpus_per_node})"
    return None


def _changes(config: PretrainConfig, *, gpus_per_node: int) -> Iterator[Change]:
    parallel = config.parallel
    modes = ("none", "selective", "full")
    for mode in modes[modes.index(parallel.activation_checkpointing) + 1 :]:
        yield {"activation_checkpointing": mode}
    for stage in range(parallel.zero_stage + 1, 4):
        yield {"zero_stage": stage}
    for accumulation in _accumulations(config):
        yield {"accumulation": accumulation}
    if parallel.offload == "none" and parallel.zero_stage > 0:
        yield {"offload": "optimizer"}
    yield {"offload": "all", "zero_stage": 3}
    tensor = 2 * parallel.tensor_parallel
    while tensor <= gpus_per_node:
        yield {"tensor_parallel": tensor}
        tensor *= 2


def _accumulations(config: PretrainConfig) -> list[int]:
    """Twice, four times, .. as many micro-batches, down to one row each."""
    rows = max(phase.rows_per_step for phase in config.phases) / config.parallel.data_parallel
    found, accumulation = [], 2 * config.parallel.accumulation
    while accumulation < 2 * rows:
        found.append(accumulation)
        accumulation *= 2
    return found


def _fits(config: PretrainConfig, change: Change, *, model: SciGPT, device: Device) -> bool:
    try:
        changed = config.model_copy(update={"parallel": config.parallel.model_copy(update=change)})
        group = changed.parallel.tensor_parallel * changed.parallel.sequence_parallel
        if changed.parallel.processes % group:
            return False
        memory = memory_of(changed, model=model, accelerator=device.kind == "gpu")
        return lacking(memory, device=device) <= 0
    except ConfigError:  # a layout that cannot divide the model
        return False


def _in_words(change: Change) -> str:
    return " ".join(f"--set parallel.{key}={value}" for key, value in change.items())
