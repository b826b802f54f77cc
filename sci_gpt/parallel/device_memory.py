"""Memory of one device by kind and moment of a step: what DeepSpeed 0.19.8 allocates for a layout, and activations."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sci_gpt.model.checkpointing import Checkpointing
from sci_gpt.model.shapes import ModelShape
from sci_gpt.parallel.memory import activation_bytes
from sci_gpt.parallel.plan import ParallelPlan

_BUCKET = 5e8  # values: DeepSpeed's reduce_bucket_size
_MASTER, _MOMENTS, _FP32 = 4.0, 8.0, 4.0
_SAVED = _FP32 + _MOMENTS  # bytes of a parameter in a checkpoint; each process writes its part of them


@dataclass(frozen=True, kw_only=True)
class DeviceMemory:
    """Bytes on one device, and on its host where the layout offloads.

    Attributes:
        weights, gradients, optimizer: model states; the optimizer's include the fp32 master copy.
        activations, activations_checkpointed: of one micro-batch, with nothing and with all layers computed again.
        buffers: the most of everything else: communication, copies, temporaries of the optimizer's step.
        moments: all that is there at once, by moment: forward (its end, activations complete), backward (its end,
            gradients complete and being reduced), step (of the optimizer).
        between_steps: what stays.
        host: the most of the host's memory, for offloaded states, their step, and the copy that an asynchronous save
            writes (on a CPU the same memory).
        host_between_steps: what stays of it.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    activations_checkpointed: float
    buffers: float
    moments: dict[str, float]
    between_steps: float
    host: float
    host_between_steps: float

    @property
    def total(self) -> float:
        """The most that is there at once; the kinds have their peaks at different moments and sum to more."""
        return max(self.moments.values())

    def with_host(self) -> DeviceMemory:
        """The same where the host's memory is the device's own (a CPU): every moment has what is on the host then."""
        moments = {name: value + self.host_between_steps for name, value in self.moments.items()}
        moments["step"] += self.host - self.host_between_steps
        return replace(self, moments=moments, between_steps=self.between_steps + self.host_between_steps)

    @property
    def peak(self) -> str:
        """The moment of it."""
        return max(self.moments, key=lambda moment: self.moments[moment])


@dataclass(frozen=True, kw_only=True)
class _States:
    """Bytes of a stage as DeepSpeed holds them: model states, what each moment has beside them, and what stays; of the
    host what stays, and what the step has beside it."""

    weights: float
    gradients: float
    optimizer: float
    forward: float
    backward: float
    step: float
    stays: float = 0.0
    gradients_stay: bool = False
    host: float = 0.0
    host_step: float = 0.0


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    """Values of DeepSpeed's buffers: its defaults, or what `extra_deepspeed` says of `zero_optimization`.

    Attributes:
        in_bucket: gradients that are reduced at once.
        bucket: what their buffers take: all of it on a GPU, on a CPU the pages that are written.
        ahead: what of it is there before the first gradient is.
        sub_group: values of a process that stage 3 updates at once.
        live, prefetch: gathered weights that stage 3 keeps, and those that it has twice as they come.
    """

    in_bucket: float
    bucket: float
    ahead: float
    sub_group: float
    live: float
    prefetch: float

    @classmethod
    def of(cls, plan: ParallelPlan, params: float, *, accelerator: bool) -> _Sizes:
        """Of a layout and its parameters."""
        said = plan.extra_deepspeed.get("zero_optimization", {})
        size = float(said.get("reduce_bucket_size", _BUCKET))
        twice = 2 if plan.zero_stage < 3 and said.get("overlap_comm", False) else 1
        return cls(
            in_bucket=min(params, size),
            bucket=twice * size if accelerator else min(params, size),
            ahead=twice * size if accelerator else 0.0,
            sub_group=float(said.get("sub_group_size", 1e9)),
            live=float(said.get("stage3_max_live_parameters", 1e9)),
            prefetch=float(said.get("stage3_prefetch_bucket_size", 5e7)),
        )


def device_memory(
    shape: ModelShape,
    plan: ParallelPlan,
    *,
    num_params: int,
    num_tokens: int,
    checkpointing: Checkpointing = "none",
    accelerator: bool = True,
    staged: bool = False,
) -> DeviceMemory:
    """Memory of one device.

    Args:
        shape: of the trunk.
        plan: the layout.
        num_params: parameters on a device before ZeRO divides them (with a tensor axis its share of the trunk).
        num_tokens: positions of a micro-batch of one process of a data group.
        checkpointing: of the run.
        accelerator: a GPU, where a buffer takes its whole size; on a CPU only the pages that are written count.
        staged: saves are asynchronous, for which a process keeps room for its fragments (`train.staging`).
    """
    states = _states(plan, float(num_params), accelerator=accelerator)
    kept: dict[Checkpointing, float] = {
        mode: activation_bytes(
            shape,
            num_tokens,
            dtype=plan.dtype,
            checkpointing=mode,
            tensor_parallel=plan.tensor_parallel,
            sequence_parallel=plan.sequence_parallel,
        )
        for mode in ("none", "selective", "full")
    }
    held = states.weights + states.optimizer + states.stays
    carried = states.gradients if states.gradients_stay or plan.accumulation > 1 else 0.0
    moments = {
        "forward": held + carried + states.forward + kept[checkpointing],
        "backward": held + states.gradients + states.backward,
        "step": held + states.gradients + states.step,
    }
    host = states.host + (_SAVED * num_params / plan.zero_ranks if staged else 0.0)
    return DeviceMemory(
        weights=states.weights,
        gradients=states.gradients,
        optimizer=states.optimizer,
        activations=kept["none"],
        activations_checkpointed=kept["full"],
        buffers=states.stays + max(states.forward, states.backward, states.step),
        moments=moments,
        between_steps=held + (states.gradients if states.gradients_stay else 0.0),
        host=host + states.host_step,
        host_between_steps=host,
    )


def _states(plan: ParallelPlan, params: float, *, accelerator: bool) -> _States:
    own, sizes = params / plan.zero_ranks, _Sizes.of(plan, params, accelerator=accelerator)
    at_once = min(own, sizes.sub_group) if plan.zero_stage == 3 else own
    # torch's AdamW: on a CPU the root of the second moment and its quotient, on a GPU (foreach) the root alone
    adam = at_once * (_FP32 if accelerator else 2 * _FP32)
    match plan.zero_stage:
        case 0:
            return _undivided(params, accelerator=accelerator)
        case 3:
            return _all_divided(plan, params, adam=adam, sizes=sizes)
        case _ if plan.offload != "none":
            return _optimizer_on_the_host(plan, params, sizes=sizes)
        case 1 if plan.dtype == "bf16":
            return _bf16_stage_1(plan, params, adam=adam)
        case _:
            return _optimizer_divided(plan, params, adam=adam, sizes=sizes)


def _undivided(params: float, *, accelerator: bool) -> _States:
    """fp32 with torch's own optimizer; gradients are reduced through one copy of a bucket."""
    return _States(
        weights=4 * params,
        gradients=4 * params,
        optimizer=_MOMENTS * params,
        forward=0.0,
        backward=_FP32 * min(params, _BUCKET),
        step=_FP32 * params if accelerator else 0.0,  # on a CPU one parameter at a time
    )


def _bf16_stage_1(plan: ParallelPlan, params: float, *, adam: float) -> _States:
    """BF16_Optimizer: fp32 gradients of all parameters stay, bf16 ones of the backward pass until the next."""
    own = params / plan.zero_ranks
    return _States(
        weights=2 * params,
        gradients=_FP32 * params,
        optimizer=(_MASTER + _MOMENTS) * own,
        forward=0.0,
        backward=2 * params + _FP32 * min(params, _BUCKET),
        step=2 * params + adam,
        gradients_stay=True,
    )


def _optimizer_divided(plan: ParallelPlan, params: float, *, adam: float, sizes: _Sizes) -> _States:
    """DeepSpeedZeroOptimizer at stage 1 in fp32, and at stage 2 in both types.

    In fp32 all gradients are there at the end of the backward pass, in place (stage 1) or in the bucket into which they
    move; a bucket is reduced in a copy, and the own part is copied out of it and once more for the step. In bf16 (stage
    2) a bucket of bf16 gradients is converted to fp32 for the reduction, and the own part is kept in fp32 and bf16.
    """
    own, in_bucket, bucket = params / plan.zero_ranks, sizes.in_bucket, sizes.bucket
    if plan.dtype == "bf16":
        gradients, backward, step = _FP32 * own, 2 * bucket + _FP32 * in_bucket + 2 * own, 0.0
    elif plan.zero_stage == 2:
        # the bucket is reduced in a copy before the own part is taken out of it
        before = 0.0 if plan.accumulation > 1 else _FP32 * own
        gradients, backward, step = _FP32 * own, _FP32 * (bucket + in_bucket) - before, _FP32 * own
    else:
        gradients, backward = _FP32 * params, _FP32 * (in_bucket + sizes.ahead)
        step = 2 * _FP32 * own - _FP32 * params
    return _States(
        weights=(2 if plan.dtype == "bf16" else 4) * params,
        gradients=gradients,
        optimizer=(_MASTER + _MOMENTS) * own,
        forward=(2 if plan.dtype == "bf16" else 4) * sizes.ahead,
        backward=backward,
        step=step + adam,
    )


def _optimizer_on_the_host(plan: ParallelPlan, params: float, *, sizes: _Sizes) -> _States:
    """Stages 1 and 2 with offload: master copy, moments, own gradients and a copy of own weights are on the host.

    Stage 1 has all gradients (in bf16 their sums in fp32) until the backward pass has ended, then they move into the
    bucket, which is reduced in a copy. Stage 2 reduces a bucket as soon as it is full. In bf16 the own part is kept in
    fp32 until the step, in fp32 it goes to the host alone; there stage 2 has it once more between micro-batches.
    """
    size, own = (2.0 if plan.dtype == "bf16" else 4.0), params / plan.zero_ranks
    ahead, again = _FP32 * sizes.ahead, 0.0
    if plan.zero_stage == 1:
        kept = _FP32 * own if plan.dtype == "bf16" else 0.0
        gradients, backward = _FP32 * params, _FP32 * sizes.bucket + kept
        step = kept + _FP32 * (sizes.bucket - sizes.in_bucket) if plan.dtype == "bf16" else -gradients
    elif plan.dtype == "bf16":
        gradients, backward, step = _FP32 * own, 2 * sizes.bucket + _FP32 * sizes.in_bucket + 2 * own, 0.0
        ahead /= 2  # a bucket of bf16
    else:
        gradients, backward, step = 0.0, _FP32 * (sizes.bucket + sizes.in_bucket), 0.0
        again = _FP32 * own if plan.accumulation > 1 else 0.0
    return _States(
        weights=size * params,
        gradients=gradients,
        optimizer=0.0,
        forward=ahead,
        backward=backward,
        step=step,
        host=(_MASTER + _MOMENTS + _FP32 + size) * own + again,
        host_step=2 * _FP32 * own,
    )


def _all_divided(plan: ParallelPlan, params: float, *, adam: float, sizes: _Sizes) -> _States:
    """Stage 3: partitions of weights, master copy and fp32 gradients stay, and the bucket with them.

    Gathered weights may stay, and as they come they are there twice; a reduce-scatter interleaves a copy of the bucket
    and divides it into another; the step copies own gradients, a sub-group at a time.
    """
    size = 2.0 if plan.dtype == "bf16" else 4.0
    own, in_bucket = params / plan.zero_ranks, sizes.in_bucket
    gathered = size * min(params, sizes.live) if plan.zero_ranks > 1 else 0.0
    weights, optimizer, gradients = size * own, (_MASTER + _MOMENTS) * own, _FP32 * own
    offloaded = plan.offload != "none"
    return _States(
        weights=0.0 if plan.offload == "all" else weights,
        gradients=0.0 if offloaded else gradients,
        optimizer=0.0 if offloaded else optimizer,
        forward=gathered + (size * min(params, sizes.prefetch) if plan.zero_ranks > 1 else 0.0),
        backward=gathered + 2 * _FP32 * in_bucket,
        step=0.0 if offloaded else _FP32 * min(own, sizes.sub_group) + adam,
        stays=_FP32 * sizes.bucket,
        gradients_stay=True,
        host=optimizer + 2 * gradients + (weights if plan.offload == "all" else 0.0) if offloaded else 0.0,
        host_step=2 * _FP32 * min(own, sizes.sub_group) if offloaded else 0.0,
    )
