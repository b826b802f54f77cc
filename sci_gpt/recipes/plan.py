"""Plan: what a run will take before it is launched: parameters, tokens, memory per process, FLOPs, checkpoint bytes."""

from __future__ import annotations

import time
from typing import Any

import torch

from sci_gpt.config import MixtureEntry, PretrainConfig
from sci_gpt.data.store import Store
from sci_gpt.model.loss import flops_per_token
from sci_gpt.model.transformer import SciGPT
from sci_gpt.parallel.memory import activation_bytes, model_state_bytes
from sci_gpt.recipes import parts
from sci_tokenizers.table import make_tokenizer

_CHECKPOINT_BYTES = 12  # per parameter: fp32 weight and two moments


def plan(config: PretrainConfig) -> dict[str, Any]:
    """What one step and one process take. Reads the store's manifest (document lengths), no data.

    Returns:
        parameters: by part (context, embed, blocks, norm, heads) and total.
        tokens_per_step, rows_per_process, tokens_per_process: positions, the fill is below 1.
        bytes_per_process: weights, gradients and optimizer (ZeRO's arithmetic), activations (an estimate).
        flops_per_step, checkpoint_bytes.
        seconds_per_step_at_least: FLOPs / what a matrix product of this width reaches on one process here, now.

    Raises:
        ConfigError, DataError: an unknown size, a layout that gives wrong numbers, no store.
    """
    shape, layout = parts.model_shape(config), parts.parallel_plan(config)
    with torch.device("meta"):
        model = SciGPT(shape, parts.model_settings(config))
    by_part: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = name.partition(".")[0]
        by_part[part] = by_part.get(part, 0) + parameter.numel()
    total = sum(by_part.values())
    places = layout.data_parallel * layout.accumulation
    rows = -(-config.rows_per_step // places)
    states = {
        stage: model_state_bytes(total, layout.data_parallel, stage, dtype=layout.dtype) for stage in (0, 1, 2, 3)
    }
    activations = activation_bytes(shape, rows * config.row_length, dtype=layout.dtype)
    flops = _flops_per_step(config, model)
    return {
        "name": config.name,
        "parameters": by_part | {"total": total},
        "processes": layout.data_parallel,
        "zero_stage": layout.zero_stage,
        "tokens_per_step": config.rows_per_step * config.row_length,
        "rows_per_process": rows * layout.accumulation,
        "tokens_per_process": rows * layout.accumulation * config.row_length,
        "tokens_per_run": config.rows_per_step * config.row_length * config.schedule.steps,
        "bytes_per_process": {
            "model_states": states[layout.zero_stage],
            "activations": activations,
            "total": states[layout.zero_stage] + activations,
        },
        "model_state_bytes_by_zero_stage": {str(stage): value for stage, value in states.items()},
        "flops_per_step": flops,
        "seconds_per_step_at_least": flops / layout.data_parallel / _matmul_rate(shape.width, config),
        "checkpoint_bytes": _CHECKPOINT_BYTES * total,
    }


def describe(result: dict[str, Any]) -> str:
    """The plan as lines for a person."""
    megabytes = {name: value / 1e6 for name, value in result["bytes_per_process"].items()}
    parameters = ", ".join(f"{name} {count:,}" for name, count in result["parameters"].items() if name != "total")
    return "\n".join(
        [
            f"{result['name']}: {result['parameters']['total']:,} parameters ({parameters})",
            f"tokens per step      {result['tokens_per_step']:,} (per process {result['tokens_per_process']:,})",
            f"tokens of the run    {result['tokens_per_run']:,}",
            f"layout               {result['processes']} processes, ZeRO {result['zero_stage']}",
            f"memory per process   {megabytes['model_states']:.1f} MB model states + {megabytes['activations']:.1f} MB "
            "activations (estimate); Python and its libraries take about 500 MB more",
            f"FLOPs per step       {result['flops_per_step']:.3g}",
            f"seconds per step     at least {result['seconds_per_step_at_least']:.3f} (a matrix product's rate here)",
            f"checkpoint           {result['checkpoint_bytes'] / 1e6:.1f} MB",
        ]
    )


def _flops_per_step(config: PretrainConfig, model: SciGPT) -> float:
    """6 x parameters x tokens of the trunk, attention, and 6 x parameters of a modality's own parts for its tokens."""
    store, settings = Store.open(config.data), parts.tokenizer_settings(config)
    tables = ("variable", "variable_gain", "variable_bias")  # looked up, not multiplied
    weight = sum(entry.weight for entry in config.mixture)
    per_token = 0.0
    for entry in config.mixture:
        modality = store.modality(entry.source)
        length = entry.frames * make_tokenizer(modality, settings).num_slots(store.shape(entry.source))
        share = entry.weight / weight
        own = {"embed": 1.0, "heads": float(len(entry.leads)) * _asking_share(entry)}
        for part, times in own.items():
            multiplied = sum(
                parameter.numel()
                for name, parameter in getattr(model, part)[modality].named_parameters()
                if name.rpartition(".")[2] not in tables
            )
            per_token += share * 6.0 * multiplied * times
        per_token += share * flops_per_token(model.shape, length)
    per_token += 6.0 * sum(parameter.numel() for parameter in model.context.parameters())
    return per_token * config.rows_per_step * config.row_length


def _asking_share(entry: MixtureEntry) -> float:
    """Share of a document's frames that are asked for what follows: those from the last context frame on."""
    return 1.0 - (sum(entry.context_frames) / 2 - 1) / entry.frames


def _matmul_rate(width: int, config: PretrainConfig) -> float:
    """FLOPs per second of (tokens, width) x (width, 4 width) on this machine with a process's threads; takes 0.2 s."""
    threads = torch.get_num_threads()
    torch.set_num_threads(config.parallel.threads_per_process)
    try:
        left, right = torch.ones(config.row_length, width), torch.ones(width, 4 * width)
        begun, count = time.perf_counter(), 0
        while time.perf_counter() - begun < 0.2:
            left @ right
            count += 1
        return 8.0 * config.row_length * width * width * count / (time.perf_counter() - begun)
    finally:
        torch.set_num_threads(threads)
