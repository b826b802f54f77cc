"""Plan: what a run will take before it is launched: parameters, tokens, memory, FLOPs, reading, checkpoint."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from sci_gpt.config import MixtureEntry, PhaseConfig, PretrainConfig
from sci_gpt.data.store import Store
from sci_gpt.errors import ConfigError
from sci_gpt.model.flops import PayloadWork, Work, document_pairs, training_flops
from sci_gpt.model.tiles import tiles_of
from sci_gpt.model.transformer import SciGPT
from sci_gpt.parallel.devices import MEASURED, matmul_rate
from sci_gpt.parallel.memory import activation_bytes, model_state_bytes
from sci_gpt.recipes import parts
from sci_gpt.recipes.cluster import Cluster, add_cluster, describe_cluster
from sci_gpt.recipes.reading import demand, describe_reading, reading
from sci_tokenizers.masked import tubes
from sci_tokenizers.sample import Modality
from sci_tokenizers.table import make_tokenizer
from sci_tokenizers.tokenizer import TokenizerSettings

_DRAWN = 16  # masked documents whose hidden tokens are counted
_NO_NUMBERS = ("flops_by_part", "reading")
_OF_A_PHASE = ("until_step", "row_length", "activation_bytes")
_GIVEN = "as given"
_CHECKPOINT_BYTES = 12  # per parameter: fp32 weight and two moments


def plan(
    config: PretrainConfig,
    tokens_per_second: float | None = None,
    *,
    nodes: int = 1,
    cluster: Cluster | None = None,
) -> dict[str, Any]:
    """What one step and one process take. Reads the store's manifest and index, no data.

    Args:
        config: of the run.
        tokens_per_second: of documents, as the whole run was seen to train (its progress line); None: what it could
            reach at most, at seconds_per_step_at_least.
        nodes: machines among which the processes are divided evenly.
        cluster: devices, and what is asked of them; None: this machine's CPU. What cannot fit is said in the result
            (`cluster.refuse_what_does_not_fit` raises).

    Returns:
        parameters: by part (context, embed, blocks, norm, heads) and total.
        phases: of each, until_step, tokens_per_step, rows_per_process, tokens_per_process (positions, the fill is below
            1), activation_bytes, flops_per_step, seconds_per_step_at_least; reading (`reading.reading`) with its
            demand (`reading.demand`).
        tokens_per_second_basis: what the demand's tokens per second are.
        tokens_per_step, rows_per_process, tokens_per_process, flops_per_step, seconds_per_step_at_least: the largest of
            the phases.
        tokens_per_run, flops_per_run, seconds_per_run_at_least: over all steps.
        bytes_per_process: weights, gradients and optimizer (ZeRO's arithmetic), activations of the largest phase (an
            estimate).
        checkpoint_bytes.
        device, bytes_per_device, fits, time, checkpoint, failures: of the cluster (`cluster.add_cluster`).

    seconds_per_step_at_least are FLOPs / what a matrix product of this width reaches on one process here, now.

    Raises:
        ConfigError, DataError: an unknown size, a layout or a rate that gives wrong numbers, no store.
    """
    _check_demand(config, tokens_per_second, nodes=nodes)
    parts.parallel_plan(config)  # refuses a layout that cannot divide the model
    with torch.device("meta"):
        model = SciGPT(parts.model_shape(config), parts.model_settings(config))
    phases = [_phase(config, phase, model=model) for phase in config.phases]
    _add_reading(config, phases, tokens_per_second=tokens_per_second, nodes=nodes)
    basis = "at most: a matrix product's rate here" if tokens_per_second is None else _GIVEN
    result = _totals(config, phases, model=model, basis=basis)
    return add_cluster(result, config, model=model, nodes=nodes, cluster=cluster or Cluster())


def _totals(config: PretrainConfig, phases: list[dict[str, Any]], *, model: SciGPT, basis: str) -> dict[str, Any]:
    """The model, what is largest of the phases, and the whole run."""
    layout = parts.parallel_plan(config)
    by_part = _parameters(model)
    total = sum(by_part.values())
    states = {stage: model_state_bytes(total, layout.zero_ranks, stage, dtype=layout.dtype) for stage in (0, 1, 2, 3)}
    largest = {name: max(phase[name] for phase in phases) for name in phases[0] if name not in _NO_NUMBERS}
    activations = largest["activation_bytes"]
    run = _of_run(config, phases)
    return {
        "name": config.name,
        "parameters": by_part | {"total": total},
        "processes": layout.world_size,
        "zero_stage": layout.zero_stage,
        "phases": phases,
        "tokens_per_second_basis": basis,
        **{
            name: value
            for name, value in largest.items()
            if name not in ("until_step", "row_length", "activation_bytes")
        },
        "tokens_per_run": run["tokens"],
        "flops_per_run": run["flops"],
        "seconds_per_run_at_least": run["seconds"],
        "bytes_per_process": {
            "model_states": states[layout.zero_stage],
            "activations": activations,
            "total": states[layout.zero_stage] + activations,
        },
        "model_state_bytes_by_zero_stage": {str(stage): value for stage, value in states.items()},
        "checkpoint_bytes": _CHECKPOINT_BYTES * total,
    }


def _parameters(model: SciGPT) -> dict[str, int]:
    """Parameters by part."""
    by_part: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = name.partition(".")[0]
        by_part[part] = by_part.get(part, 0) + parameter.numel()
    return by_part


def _of_run(config: PretrainConfig, phases: list[dict[str, Any]]) -> dict[str, float]:
    """Tokens, FLOPs and least seconds over all steps."""
    steps = np.diff([0, *(phase.until_step for phase in config.phases)])
    return {
        name: sum(int(count) * phase[f"{name}_per_step{end}"] for count, phase in zip(steps, phases, strict=True))
        for name, end in (("tokens", ""), ("flops", ""), ("seconds", "_at_least"))
    }


def _add_reading(
    config: PretrainConfig, phases: list[dict[str, Any]], *, tokens_per_second: float | None, nodes: int
) -> None:
    """What each phase reads, and how fast it must."""
    for phase, read in zip(phases, reading(config, Store.open(config.data)), strict=True):
        most = phase["tokens_per_step"] * read["packing"]["fill"] / phase["seconds_per_step_at_least"]
        phase["reading"] = read | {"demand": demand(read, tokens_per_second or most, nodes=nodes)}


def describe(result: dict[str, Any]) -> str:
    """The plan as lines for a person."""
    megabytes = {name: value / 1e6 for name, value in result["bytes_per_process"].items()}
    parameters = ", ".join(f"{name} {count:,}" for name, count in result["parameters"].items() if name != "total")
    several = len(result["phases"]) > 1
    here = result["device"]["name"] == MEASURED  # this machine's product rate says nothing of other devices
    given = result["tokens_per_second_basis"] == _GIVEN
    lines = [f"{result['name']}: {result['parameters']['total']:,} parameters ({parameters})"]
    for phase in result["phases"]:
        lines += [f"phase to step {phase['until_step']}"] if several else []
        lines += [
            f"tokens per step      {phase['tokens_per_step']:,} (per process {phase['tokens_per_process']:,})",
            f"FLOPs per step       {phase['flops_per_step']:.3g}",
        ]
        least = phase["seconds_per_step_at_least"]
        lines += [f"seconds per step     at least {least:.3f} (a matrix product's rate here)"] if here else []
        if here or given:
            lines += describe_reading(phase["reading"], basis=result["tokens_per_second_basis"])
    lines += [
        "the run" if several else "",
        f"tokens of the run    {result['tokens_per_run']:,}",
        f"FLOPs of the run     {result['flops_per_run']:.3g}"
        + (f", at least {result['seconds_per_run_at_least']:,.0f} s" if here else ""),
        f"layout               {result['processes']} processes, ZeRO {result['zero_stage']}",
        f"memory per process   {megabytes['model_states']:.1f} MB model states + {megabytes['activations']:.1f} MB "
        f"activations (ZeRO's arithmetic{', of the largest phase' if several else ''})",
        *describe_cluster(result),
    ]
    return "\n".join(line for line in lines if line)


def _check_demand(config: PretrainConfig, tokens_per_second: float | None, *, nodes: int) -> None:
    if tokens_per_second is not None and not 0 < tokens_per_second < float("inf"):
        raise ConfigError(f"--tokens-per-second must be more than 0, got {tokens_per_second}")
    if nodes < 1 or config.parallel.processes % nodes:
        raise ConfigError(f"--nodes must divide the {config.parallel.processes} processes of the run, got {nodes}")


def _phase(config: PretrainConfig, phase: PhaseConfig, *, model: SciGPT) -> dict[str, Any]:
    layout, shape = parts.parallel_plan(config), model.shape
    rows = -(-phase.rows_per_step // (layout.data_parallel * layout.accumulation))
    by_part = _flops_per_step(config, phase, model=model)
    flops = sum(by_part.values())
    rate = matmul_rate(shape.width, phase.row_length, threads=config.parallel.threads_per_process)
    return {
        "until_step": phase.until_step,
        "row_length": phase.row_length,
        "tokens_per_step": phase.rows_per_step * phase.row_length,
        "rows_per_process": rows * layout.accumulation,
        "tokens_per_process": rows * layout.accumulation * phase.row_length,
        "activation_bytes": activation_bytes(
            shape,
            rows * phase.row_length,
            dtype=layout.dtype,
            checkpointing=config.parallel.activation_checkpointing,
            tensor_parallel=layout.tensor_parallel,
            sequence_parallel=layout.sequence_parallel,
        ),
        "flops_per_step": flops,
        "flops_by_part": by_part,
        "seconds_per_step_at_least": flops / layout.world_size / rate,
    }


def _flops_per_step(config: PretrainConfig, phase: PhaseConfig, *, model: SciGPT) -> dict[str, float]:
    """FLOPs of the phase's documents in their shares of rows without gaps, by part (`flops.training_flops`)."""
    store, settings = Store.open(config.data), parts.tokenizer_settings(config)
    weight = sum(entry.weight for entry in phase.mixture)
    found: dict[str, float] = {}
    tokens = phase.rows_per_step * phase.row_length
    for entry in phase.mixture:
        work = document_work(
            entry,
            store.modality(entry.source),
            shape=store.shape(entry.source),
            settings=settings,
            radius=config.model.attention.radius,
        )
        for part, flops in training_flops(model, work).items():
            found[part] = found.get(part, 0.0) + entry.weight / weight * flops / work.positions * tokens
    return found


def document_work(
    entry: MixtureEntry,
    modality: Modality,
    *,
    shape: tuple[int, int, int],
    settings: TokenizerSettings,
    radius: int | None,
) -> Work:
    """What a document of a source gives the model to do, in the mean over its numbers of context frames.

    A grid's neighbourhoods are counted as those of a region, at whose sides some are smaller than around the globe. The
    share of masked documents sees later frames too, and asks for what it hides, the mean of a few draws.
    """
    slots, variables = make_tokenizer(modality, settings).num_slots(shape), 1 if modality == "series" else shape[0]
    tiles = None
    if modality == "grid" and radius is not None:
        rows, columns = (-(-size // settings.grid_patch) for size in shape[1:])
        row, column = np.divmod(np.arange(rows * columns), columns)
        tiles = tiles_of(row, column, period=0, radius=radius)

    def mean(ahead: float, masked: float) -> float:
        return (1.0 - entry.masked) * ahead + entry.masked * masked

    pairs = (document_pairs(entry.frames, slots, causal=causal) for causal in (True, False))
    near = (document_pairs(entry.frames, slots, causal=causal, tiles=tiles) for causal in (True, False))
    units = mean(_asked_ahead(entry, slots), _hidden(entry, slots) if entry.masked else 0.0)
    return Work(
        positions=entry.frames * slots,
        tokens=entry.frames * slots,
        wide_pairs=mean(*pairs),
        near_pairs=mean(*near),
        payloads={modality: PayloadWork(rows=entry.frames * slots * variables, units=units, answers=units * variables)},
    )


def _asked_ahead(entry: MixtureEntry, slots: int) -> float:
    """Units of a next-frame document."""
    first, last = entry.context_frames
    asked = [max(0, entry.frames - lead - context + 1) for context in range(first, last + 1) for lead in entry.leads]
    return slots * sum(asked) / (last - first + 1)


def _hidden(entry: MixtureEntry, slots: int) -> float:
    """Units of a masked document: its hidden tokens."""
    first, last = entry.context_frames
    contexts = [first + key % (last - first + 1) for key in range(_DRAWN)]
    drawn = [tubes(entry.frames, slots, num_context=context, key=key) for key, context in enumerate(contexts)]
    return float(np.mean([hidden.sum() for hidden in drawn]))
