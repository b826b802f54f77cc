"""Roofline: a step's time from a device's rates: products, memory traffic, communication by axis, what overlaps."""

from __future__ import annotations

from dataclasses import dataclass

from sci_gpt.model.checkpointing import Checkpointing
from sci_gpt.parallel.devices import Device
from sci_gpt.parallel.plan import ParallelPlan

_PASSES = 5.0  # over kept values: written and read forward, read backward, and their gradients written and read
_AGAIN = {"none": 0.0, "selective": 2.0, "full": 2.0}  # more passes where layers are computed again
_ADAM_BYTES = (
    44.0  # per parameter: gradient read 3 times (norm, clip, step), master, moments and weight read and written
)
_LATENCY = 15e-6  # seconds of a collective whatever its size
_FP32 = 4


@dataclass(frozen=True, kw_only=True)
class Load:
    """What a step gives one process to do.

    Attributes:
        divided_flops: of a step, of what the tensor and sequence axes divide (the trunk), over all processes.
        whole_flops: of what they do not (embeddings, heads), over all rows.
        activation_bytes: kept of a micro-batch on this process with nothing computed again.
        num_params: on this process before ZeRO divides them.
        layers, width: of the trunk.
        num_tokens: positions of a micro-batch of a data group.
    """

    divided_flops: float
    whole_flops: float
    activation_bytes: float
    num_params: float
    layers: int
    width: int
    num_tokens: int


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of a step by what they go to; `exposed` communication is what does not overlap with computing.

    Attributes:
        products: of matrices and attention, what is computed again included.
        traffic: memory passes of everything between products.
        optimizer: of AdamW, on the host where it is offloaded.
        zero, tensor, sequence: communication of each axis, whole.
        host: copies between device and host.
        exposed: of zero, tensor, sequence and host, what the step waits for.
        bytes_sent: per process, by axis.
    """

    products: float
    traffic: float
    optimizer: float
    zero: float
    tensor: float
    sequence: float
    host: float
    exposed: float
    bytes_sent: dict[str, float]

    @property
    def step(self) -> float:
        """Seconds of the whole step."""
        return self.products + self.traffic + self.optimizer + self.exposed


def step_time(
    load: Load, plan: ParallelPlan, *, device: Device, gpus_per_node: int, checkpointing: Checkpointing = "none"
) -> StepTime:
    """Time of a step.

    Products run at the attainable share of the peak and what is between them at that of the memory's bandwidth, one
    after the other. A group whose processes are neighbours on a node talks over the node's links; one that spans nodes
    over the network, where its members on a node share the node's adapters (a ring enters and leaves a node once).
    Rings move 2 (k - 1) / k of the bytes for an all-reduce over k, half of it for a gather or a scatter. Overlap is
    DeepSpeed's: at ZeRO 3 with both passes, at stages 1 and 2 with the backward pass where `overlap_comm` is set, but
    not in bf16 at stage 1, which sums after the pass (with offload it does not). Tensor and sequence axes wait.
    """
    products = (load.divided_flops / plan.world_size + load.whole_flops / plan.data_parallel) / (
        device.peak[plan.dtype] * device.attainable
    )
    products *= 4 / 3 if checkpointing == "full" else 1.0
    passes = (_PASSES + _AGAIN[checkpointing]) * load.activation_bytes * plan.accumulation
    traffic = passes / (device.bandwidth * device.attainable_bandwidth)
    sent = _sent(load, plan, checkpointing=checkpointing)
    seconds = _seconds(sent, plan, load=load, device=device, gpus_per_node=gpus_per_node)
    of_host, adam = _host(load, plan, device=device)
    computing = products + traffic
    hidden = 0.0
    if plan.zero_stage == 3:
        hidden = min(seconds["zero"], computing)
    elif _overlaps(plan):
        hidden = min(seconds["zero"] * _reduced_share(plan), computing * 2 / 3)
    return StepTime(
        products=products,
        traffic=traffic,
        optimizer=adam,
        zero=seconds["zero"],
        tensor=seconds["tensor"],
        sequence=seconds["sequence"],
        host=of_host,
        exposed=sum(seconds.values()) - hidden + of_host,
        bytes_sent=sent,
    )


def _weight_bytes(plan: ParallelPlan) -> int:
    return 2 if plan.dtype == "bf16" else 4


def _ring(processes: int) -> float:
    """Share of the bytes that a ring's process sends in a gather or a scatter."""
    return (processes - 1) / processes


def _sent(load: Load, plan: ParallelPlan, *, checkpointing: Checkpointing) -> dict[str, float]:
    """Bytes that a process sends in a step, by axis.

    ZeRO 0: gradients are summed, 2P values of a ring. ZeRO 1 and 2: DeepSpeed sums whole buckets of gradients (2P, at 2
    after every micro-batch) where theory scatters them (P), and gathers weights (P). ZeRO 3 gathers weights for both
    passes of every micro-batch and scatters gradients: 3P. Gradients are fp32. A tensor axis all-reduces tokens x width
    four times a layer, six times where the layer is computed again; a sequence axis exchanges queries, keys, values and
    results (4 all-to-alls) in each pass, and gathers the trunk's result.
    """
    size, of_zero = _weight_bytes(plan), _ring(plan.zero_ranks) * load.num_params
    match plan.zero_stage:
        case 0:
            zero = 2 * _FP32 * of_zero
        case 1:
            zero = (2 * _FP32 + size) * of_zero
        case 2:
            zero = (2 * _FP32 * plan.accumulation + size) * of_zero
        case _:
            zero = (_FP32 + 2 * size) * plan.accumulation * of_zero
    tokens = load.num_tokens / plan.sequence_parallel
    of_layer = tokens * load.width * size * plan.accumulation * load.layers
    passes = 3 if checkpointing == "full" else 2
    ends = 2 * plan.accumulation * load.num_tokens * load.width * size  # the trunk's result, and its gradient
    return {
        "zero": zero,
        "tensor": 2 * passes * 2 * of_layer * _ring(plan.tensor_parallel),
        "sequence": _ring(plan.sequence_parallel) * (4 * passes * of_layer / plan.tensor_parallel + ends),
    }


def _seconds(
    sent: dict[str, float], plan: ParallelPlan, *, load: Load, device: Device, gpus_per_node: int
) -> dict[str, float]:
    """Bytes over the links that a group has, and a latency for each collective."""
    tensor, sequence = plan.tensor_parallel, plan.sequence_parallel
    layers = load.layers * plan.accumulation
    groups = {  # size, distance between neighbours, collectives of a step
        "zero": (plan.zero_ranks, tensor, 2 if plan.zero_stage < 3 else 3 * layers),
        "tensor": (tensor, 1, 4 * layers),
        "sequence": (sequence, tensor, 8 * layers),
    }
    found = {}
    for axis, (size, stride, collectives) in groups.items():
        rate = link_rate(device, size=size, stride=stride, gpus_per_node=gpus_per_node, ring=axis != "sequence")
        found[axis] = sent[axis] / rate + _LATENCY * collectives if size > 1 else 0.0
    return found


def link_rate(device: Device, *, size: int, stride: int, gpus_per_node: int, ring: bool = True) -> float:
    """Bytes per second that each process of a group sends at the attainable share.

    Args:
        device: whose links they are.
        size: processes of the group.
        stride: between their numbers; numbers go node by node.
        gpus_per_node: processes of a node.
        ring: a ring crosses between nodes once a node, and its members there have their adapters for it together; an
            all-to-all sends nearly everything through each process's own.
    """
    if size * stride <= gpus_per_node:
        share = min(1.0, (size - 1) / device.link_peers) if device.link_peers else 1.0
        return device.link * share * device.attainable_bandwidth
    members = max(1, gpus_per_node // stride) if ring else 1
    return min(device.link, members * device.network) * device.attainable_bandwidth


def _host(load: Load, plan: ParallelPlan, *, device: Device) -> tuple[float, float]:
    """Seconds of copies to and from the host, and of AdamW where it is."""
    own = load.num_params / plan.zero_ranks
    adam = _ADAM_BYTES * own / (device.bandwidth * device.attainable_bandwidth)
    if plan.offload == "none" or device.kind == "cpu":
        return 0.0, adam
    size = _weight_bytes(plan)
    moved = (_FP32 * plan.accumulation + size) * own
    if plan.offload == "all":
        moved += 2 * size * own * plan.accumulation
    # a host's memory at 25 GB/s for each of its devices: eight channels of DDR4-3200 (204.8 GB/s) for eight devices
    return moved / (device.host_link * device.attainable_bandwidth), _ADAM_BYTES * own / 25e9


def _overlaps(plan: ParallelPlan) -> bool:
    after_the_pass = plan.zero_stage == 0 or (plan.zero_stage, plan.dtype, plan.offload) == (1, "bf16", "none")
    return bool(plan.extra_deepspeed.get("zero_optimization", {}).get("overlap_comm")) and not after_the_pass


def _reduced_share(plan: ParallelPlan) -> float:
    """Of ZeRO's bytes at stages 1 and 2, what is gradients in the backward pass."""
    gradients = 2 * _FP32 * (plan.accumulation if plan.zero_stage == 2 else 1)
    return gradients / (gradients + _weight_bytes(plan))
