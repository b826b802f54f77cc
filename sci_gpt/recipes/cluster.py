"""Cluster: a run on named devices: memory and whether it fits, time of a step, hours, checkpoints, failures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sci_gpt.config import PretrainConfig
from sci_gpt.errors import ConfigError
from sci_gpt.model.transformer import SciGPT
from sci_gpt.parallel.device_memory import DeviceMemory
from sci_gpt.parallel.devices import MEASURED, Device, check_name, device_named
from sci_gpt.parallel.failures import daly, losses, young
from sci_gpt.parallel.memory import activation_bytes
from sci_gpt.parallel.roofline import Load, step_time
from sci_gpt.recipes import parts
from sci_gpt.recipes.remedies import lacking, lacking_on_host, memory_of, params_on_device, remedy

_OF_THE_TRUNK = ("trunk", "attention")


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What a run is planned for.

    Attributes:
        gpus_per_node: devices of a node; None: the processes divided over the nodes.
        gpu: a name of `devices.NAMES`.
        tokens: of the training whose hours are asked; None: those of the run.
        write_rate: GB per second that a node writes checkpoints with. 2: a parallel file system's share, assumed.
        hours_between_failures: of one node. 6,300: Llama 3's 419 unexpected interruptions in 54 days of 2,048 nodes
            (arXiv:2407.21783, section 3.3.4).
        restart_minutes: from a failure to the first step.
    """

    gpus_per_node: int | None = None
    gpu: str = MEASURED
    tokens: float | None = None
    write_rate: float = 2.0
    hours_between_failures: float = 6300.0
    restart_minutes: float = 10.0

    def __post_init__(self) -> None:
        check_name(self.gpu)
        for option, value in (
            ("--tokens", self.tokens),
            ("--write-gigabytes-per-second", self.write_rate),
            ("--hours-between-failures", self.hours_between_failures),
            ("--gpus-per-node", self.gpus_per_node),
        ):
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"{option} must be more than 0, got {value:g}")


def add_cluster(
    result: dict[str, Any], config: PretrainConfig, *, model: SciGPT, nodes: int, cluster: Cluster
) -> dict[str, Any]:
    """The plan with what the cluster adds.

    Returns:
        `result` and device (name, processes_per_node, peak_flops, memory_bytes, usable_bytes), bytes_per_device (by
        kind, and total: the most at once), bytes_by_moment, peak_moment, host_bytes_per_device (on a CPU they are in
        total and moments, too), fits, lacking_bytes (of the device, or of its host: host_lacks), remedy (None: it fits,
        or nothing helps), time (of the slowest phase's step, and of the run), checkpoint,
        failures. Each phase has its own time.

    Raises:
        ConfigError: no such device; processes that are not nodes x devices.
    """
    per_node = cluster.gpus_per_node or config.parallel.processes // nodes
    if per_node * nodes != config.parallel.processes:
        raise ConfigError(
            f"--nodes {nodes} x --gpus-per-node {per_node} are {per_node * nodes} devices, the run has "
            f"{config.parallel.processes} processes; set parallel.processes to {per_node * nodes}"
        )
    device = device_named(
        cluster.gpu,
        width=model.shape.width,
        tokens=max(phase.row_length for phase in config.phases),
        threads=config.parallel.threads_per_process,
        processes=per_node,
    )
    memory = memory_of(config, model=model, accelerator=device.kind == "gpu")
    short = lacking(memory, device=device)
    for phase, settings in zip(result["phases"], config.phases, strict=True):
        rows = parts.parallel_plan(config).micro_batch_rows(settings.rows_per_step)
        phase["time"] = _time_of_step(config, phase, model=model, device=device, per_node=per_node, rows=rows)
    time = _time_of_run(result, config, cluster=cluster, nodes=nodes)
    checkpoint = _checkpoint(result, device=device, nodes=nodes, cluster=cluster)
    return result | {
        "device": {
            "name": device.name,
            "nodes": nodes,
            "processes_per_node": per_node,
            "peak_flops": device.peak[config.parallel.dtype],
            "attainable": device.attainable,
            "memory_bytes": device.memory,
            "usable_bytes": device.memory - device.reserved,
            "host_memory_bytes": device.host_memory,
        },
        "bytes_per_device": _by_kind(memory),
        "bytes_by_moment": memory.moments | {"between_steps": memory.between_steps},
        "peak_moment": memory.peak,
        "host_bytes_per_device": memory.host,
        "fits": short <= 0,
        "lacking_bytes": max(0.0, short),
        "host_lacks": 0 < short == lacking_on_host(memory, device=device),
        "remedy": None if short <= 0 else remedy(config, model=model, device=device, gpus_per_node=per_node),
        "time": time,
        "checkpoint": checkpoint,
        "failures": _failures(checkpoint, time, every=config.checkpoint.every, cluster=cluster, nodes=nodes),
    }


def refuse_what_does_not_fit(result: dict[str, Any]) -> None:
    """Raises ConfigError where a device's memory, or its host's, is too small: by how much, and what fits."""
    if result["fits"]:
        return
    device, kinds, change = result["device"], result["bytes_per_device"], result["remedy"]
    on_host = _size(result["host_bytes_per_device"])
    if result["host_lacks"]:
        said = (
            f"the host must hold {on_host} for each device (states that are offloaded, and the copy that an "
            f"asynchronous save writes); one {device['name']} has {_size(device['host_memory_bytes'])} of it"
        )
    else:
        listed = ", ".join(f"{name} {_size(kinds[name])}" for name in ("weights", "gradients", "optimizer", "buffers"))
        if result["host_bytes_per_device"]:
            listed += f"; {'offloaded and staged' if device['name'] == MEASURED else 'on the host'} {on_host}"
        where = "a process of this machine" if device["name"] == MEASURED else f"one {device['name']}"
        said = (
            f"at the {result['peak_moment']} moment of a step a device holds {_size(kinds['total'])} ({listed}, "
            f"activations {_size(kinds['activations'])}, with full checkpointing "
            f"{_size(kinds['activations_checkpointed'])}); {where} has {_size(device['usable_bytes'])} for it"
        )
    raise ConfigError(
        f"{result['name']} does not fit: {said}, {_size(result['lacking_bytes'])} too little; "
        + (
            f"what fits: {change}"
            if change
            else "no checkpointing, ZeRO stage, micro-batch, offload or tensor axis makes it fit; choose a smaller "
            "model.size or row_length, or plan for other devices with --gpu, --nodes and --gpus-per-node"
        )
    )


def _by_kind(memory: DeviceMemory) -> dict[str, float]:
    names = ("weights", "gradients", "optimizer", "activations", "activations_checkpointed", "buffers", "total")
    return {name: getattr(memory, name) for name in names}


def _time_of_step(
    config: PretrainConfig, phase: dict[str, Any], *, model: SciGPT, device: Device, per_node: int, rows: int
) -> dict[str, Any]:
    layout, shape = parts.parallel_plan(config), model.shape
    tokens = rows * phase["tokens_per_step"] // _rows_of(phase)
    by_part = phase["flops_by_part"]
    inside = sum(by_part[name] for name in _OF_THE_TRUNK)
    load = Load(
        divided_flops=inside,
        whole_flops=phase["flops_per_step"] - inside,
        activation_bytes=activation_bytes(
            shape,
            tokens,
            dtype=layout.dtype,
            tensor_parallel=layout.tensor_parallel,
            sequence_parallel=layout.sequence_parallel,
        ),
        num_params=params_on_device(model, tensor_parallel=layout.tensor_parallel),
        layers=shape.layers,
        width=shape.width,
        num_tokens=tokens,
    )
    found = step_time(
        load,
        layout,
        device=device,
        gpus_per_node=per_node,
        checkpointing=config.parallel.activation_checkpointing,
    )
    peak = device.peak[layout.dtype] * layout.world_size
    return {
        "seconds_per_step": found.step,
        "mfu": phase["flops_per_step"] / (found.step * peak),
        "tokens_per_second": phase["tokens_per_step"] / found.step,
        "gigabytes_per_second_read": phase["tokens_per_step"]
        * phase["reading"]["packing"]["fill"]
        * phase["reading"]["bytes_per_token"]
        / found.step
        / 1e9,
        "seconds": {
            name: getattr(found, name)
            for name in ("products", "traffic", "optimizer", "zero", "tensor", "sequence", "host", "exposed")
        },
        "bytes_sent_per_process": found.bytes_sent,
    }


def _rows_of(phase: dict[str, Any]) -> int:
    rows: int = phase["tokens_per_step"] // phase["row_length"]
    return rows


def _time_of_run(result: dict[str, Any], config: PretrainConfig, *, cluster: Cluster, nodes: int) -> dict[str, Any]:
    phases = result["phases"]
    ends = [0, *(phase["until_step"] for phase in phases)]
    seconds = sum(
        (stop - start) * phase["time"]["seconds_per_step"]
        for start, stop, phase in zip(ends, ends[1:], phases, strict=False)
    )
    rate = result["tokens_per_run"] / seconds
    tokens = cluster.tokens or result["tokens_per_run"]
    slowest = max((phase["time"] for phase in phases), key=lambda time: float(time["seconds_per_step"]))
    return slowest | {
        "tokens": tokens,
        "run_tokens_per_second": rate,
        "hours": tokens / rate / 3600,
        "device_hours": tokens / rate / 3600 * config.parallel.processes,
    }


def _checkpoint(result: dict[str, Any], *, device: Device, nodes: int, cluster: Cluster) -> dict[str, float]:
    """Every process writes its own part; staging copies it to the host's memory first."""
    size = float(result["checkpoint_bytes"])
    copied = device.host_link * device.attainable_bandwidth if device.kind == "gpu" else device.bandwidth
    return {
        "bytes": size,
        "write_seconds": size / (nodes * cluster.write_rate * 1e9),
        "staging_seconds": size / result["processes"] / copied,
    }


def _failures(
    checkpoint: dict[str, float], time: dict[str, Any], *, every: int, cluster: Cluster, nodes: int
) -> dict[str, float]:
    """As if training waited for the whole write: an asynchronous save costs less."""
    between = cluster.hours_between_failures * 3600 / nodes
    save, restart = checkpoint["write_seconds"], cluster.restart_minutes * 60
    best = daly(save, seconds_between_failures=between)
    chosen = every * time["seconds_per_step"]
    at_best, at_chosen = (
        losses(interval, save_seconds=save, seconds_between_failures=between, restart_seconds=restart)
        for interval in (best, chosen)
    )
    return {
        "hours_between_failures": between / 3600,
        "best_interval_seconds": best,
        "best_interval_seconds_young": young(save, seconds_between_failures=between),
        "best_interval_steps": max(1.0, round(best / time["seconds_per_step"])),
        "lost_share_at_best": at_best.total,
        "interval_seconds": chosen,
        "lost_share": at_chosen.total,
        "expected_failures": time["hours"] / (between / 3600),
        "expected_lost_hours": time["hours"] * at_chosen.lost,
    }


def _size(number: float) -> str:
    return f"{number / 1e9:,.1f} GB" if number >= 1e9 else f"{number / 1e6:,.1f} MB"


def describe_cluster(result: dict[str, Any]) -> list[str]:
    """The cluster's part of the plan as lines for a person."""
    device, kinds, time = result["device"], result["bytes_per_device"], result["time"]
    moments, seconds, failures = result["bytes_by_moment"], time["seconds"], result["failures"]
    checkpoint = result["checkpoint"]
    where = "this machine's CPU, measured" if device["name"] == MEASURED else device["name"]
    names = ("weights", "gradients", "optimizer", "activations", "buffers")
    host = result["host_bytes_per_device"]
    return [
        f"devices              {device['nodes']} x {device['processes_per_node']} of {where}: "
        f"{device['peak_flops'] / 1e12:,.4g} TFLOP/s, {_size(device['usable_bytes'])} for a run",
        "memory per device    " + ", ".join(f"{name} {_size(kinds[name])}" for name in names),
        f"                     activations with full checkpointing {_size(kinds['activations_checkpointed'])}"
        + (f"; on the host {_size(host)}" if host else ""),
        "                     at once " + ", ".join(f"{name} {_size(value)}" for name, value in moments.items()),
        f"                     most {_size(kinds['total'])}: "
        + ("fits" if result["fits"] else f"{_size(result['lacking_bytes'])} too little")
        + (f" of the host's {_size(device['host_memory_bytes'])}" if result["host_lacks"] else ""),
        f"step                 {time['seconds_per_step']:.4g} s: products {seconds['products']:.3g}, memory passes "
        f"{seconds['traffic']:.3g}, optimizer {seconds['optimizer']:.3g}, waiting for communication "
        f"{seconds['exposed']:.3g} (of ZeRO {seconds['zero']:.3g}, tensor {seconds['tensor']:.3g}, sequence "
        f"{seconds['sequence']:.3g}, host {seconds['host']:.3g})",
        f"rate                 {time['run_tokens_per_second']:,.0f} tokens/s, MFU {100 * time['mfu']:.1f} %, "
        f"{time['gigabytes_per_second_read']:.3g} GB/s read",
        f"to {time['tokens']:,.0f} tokens {time['hours']:,.3g} hours, {time['device_hours']:,.3g} device hours",
        f"checkpoint           {_size(checkpoint['bytes'])}, written in {checkpoint['write_seconds']:.3g} s, staged in "
        f"{checkpoint['staging_seconds']:.2g} s",
        f"failures             one in {failures['hours_between_failures']:,.4g} hours; best interval "
        f"{failures['best_interval_seconds']:,.0f} s ({failures['best_interval_steps']:,.0f} steps, loses "
        f"{100 * failures['lost_share_at_best']:.2g} %); checkpoint.every is {failures['interval_seconds']:,.3g} s, "
        f"loses {100 * failures['lost_share']:.2g} %; {failures['expected_failures']:.2g} failures and "
        f"{failures['expected_lost_hours']:.2g} hours of lost work expected",
    ]
