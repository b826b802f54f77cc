"""Where DeepSpeed keeps each element of weights and moments, at any ZeRO stage: what a rank writes, and how it loads.

Private names of deepspeed 0.19.8 (a test fails loudly when they change). "Flat" is the key in the optimizer's state:

    ZeRO 0    the parameter itself, whole on every rank; the ranks share the writing
    ZeRO 1/2  one fp32 flat tensor per parameter group; `param._hp_mapping` (None: nothing of it here) has the range in
              the parameter and in the flat tensor; alignment padding is in no mapping, so it is never written
    ZeRO 3    one fp32 flat tensor per sub-group: this rank's piece of each parameter, one after another; a piece has
              ceil(numel / ranks) elements, so the last ones end in padding and are cut by `ds_numel`

"Ranks" are those of the sequence x data group. Under tensor parallelism a parameter is what this rank has of it: its
slice, or the whole, which the first rank of the tensor group writes for all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sci_gpt.errors import CheckpointError
from sci_gpt.parallel.engine import Engine
from sci_gpt.parallel.tensor import slice_of
from sci_gpt.train.checkpoint import MOMENTS, WEIGHT, Reader, Slice, tensor_key


@dataclass(frozen=True, kw_only=True, eq=False)
class Fragment:
    """Flat elements [start, start + numel) of `name`, or of this rank's slice of it; on this rank they lie at
    flat[offset : offset + numel].
    """

    name: str
    parameter: nn.Parameter
    start: int
    numel: int
    flat: Tensor
    offset: int

    def view(self, tensor: Tensor) -> Tensor:
        """The fragment's elements in `flat` or in a tensor of the optimizer's state that lies like it."""
        return tensor.detach().view(-1)[self.offset : self.offset + self.numel]


@dataclass(frozen=True, kw_only=True)
class Holding:
    """What this rank writes of a checkpoint.

    Attributes:
        tensors: fp32 pieces by their name in the file; they are views of live memory, so write before the next step.
        fragments: their addresses [name, slice offset, slice width, start, stop].
        parameters: {name: shape, tp_dim, trainable} of the whole model.
        adam_step: updates that Adam has made, None where this rank holds no state of it.
    """

    tensors: dict[str, Tensor]
    fragments: list[list[Any]]
    parameters: dict[str, dict[str, Any]]
    adam_step: float | None


def hold(engine: Engine) -> Holding:
    """Collect what this rank owns: over all ranks every element of the model exactly once.

    Raises:
        CheckpointError: Adam's step counters differ between parameters, which one flat tensor could not carry over.
    """
    tensors: dict[str, Tensor] = {}
    rows: list[list[Any]] = []
    steps: set[float] = set()
    for fragment in _fragments(engine, owned=True):
        part = slice_of(fragment.parameter)
        at, width = (part.offset, part.width) if part else (0, whole_shape(fragment.parameter)[0])
        rows.append([fragment.name, at, width, fragment.start, fragment.start + fragment.numel])
        tensors[tensor_key(fragment.name, WEIGHT, offset=at, start=fragment.start)] = fragment.view(
            fragment.flat
        ).float()
        if fragment.parameter.requires_grad:
            state = engine.adam.state.get(fragment.flat, {})  # empty before the first step
            if "step" in state:
                steps.add(float(state["step"]))
            for kind in MOMENTS:
                moment = fragment.view(state[kind]) if kind in state else torch.zeros(fragment.numel)
                tensors[tensor_key(fragment.name, kind, offset=at, start=fragment.start)] = moment
    if len(steps) > 1:
        raise CheckpointError(
            f"Adam's step counters differ between parameters ({sorted(steps)}): every parameter must get a gradient in "
            "every step, so that a checkpoint can be loaded at any layout; look for a module that a step leaves out"
        )
    parameters = {
        name: {
            "shape": list(whole_shape(parameter)),
            "tp_dim": part.dim if (part := slice_of(parameter)) else None,
            "trainable": parameter.requires_grad,
        }
        for name, parameter in engine.module.named_parameters()
    }
    return Holding(tensors=tensors, fragments=rows, parameters=parameters, adam_step=max(steps, default=None))


@torch.no_grad()
def load(engine: Engine, reader: Reader) -> None:
    """Fill weights and moments at this layout from a checkpoint of any layout. Rates and betas stay the engine's.

    Raises:
        CheckpointError: parameters of other names or shapes, or a damaged file.
    """
    saved = {name: reader.shape(name) for name in reader.parameters}
    here = {name: whole_shape(parameter) for name, parameter in engine.module.named_parameters()}
    different = sorted(name for name in saved.keys() | here.keys() if saved.get(name) != here.get(name))
    if different:
        name = different[0]
        raise CheckpointError(
            f"{reader.folder} is of another model: {len(different)} parameters differ, such as {name!r}: "
            f"{saved.get(name, 'absent')} in the checkpoint, {here.get(name, 'absent')} in the model"
        )
    zero, stage = engine.deepspeed.optimizer, engine.plan.zero_stage
    # At ZeRO 3 param_groups are empty between steps: step() lends them one sub-group's flat tensor at a time.
    flats = (
        zero.fp32_partitioned_groups_flat if stage == 3 else [t for g in engine.adam.param_groups for t in g["params"]]
    )
    states = {id(flat): _adam_state(engine, flat, step=reader.adam_step) for flat in flats if flat.requires_grad}
    for fragment in _fragments(engine, owned=False):
        part, stop = slice_of(fragment.parameter), fragment.start + fragment.numel
        mine = Slice(dim=part.dim, offset=part.offset, width=part.width) if part else None
        weight = reader.read(fragment.name, WEIGHT, slice_=mine, start=fragment.start, stop=stop)
        fragment.view(fragment.flat).copy_(weight)
        # A parameter that was frozen when saved and trains now starts with moments of zero.
        if fragment.parameter.requires_grad and reader.parameters[fragment.name]["trainable"]:
            for kind in MOMENTS:
                moment = reader.read(fragment.name, kind, slice_=mine, start=fragment.start, stop=stop)
                fragment.view(states[id(fragment.flat)][kind]).copy_(moment)
    _refresh_working_weights(zero, stage)


def _refresh_working_weights(zero: Any, stage: int) -> None:
    """The masters are right; now the weights that the forward pass uses, which are copies of them (in fp32 too)."""
    if stage == 3:
        for group in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        if zero.persistent_parameters:  # kept whole between steps: drop the stale copies and gather again
            zero.persistent_parameters[0].partition(zero.persistent_parameters)
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
    elif stage > 0:
        zero.update_lp_params()


def _adam_state(engine: Engine, flat: Tensor, *, step: float) -> dict[str, Any]:
    """Adam creates its state in its first step, so a fresh engine has none: make what torch would.

    Tensors that exist are filled in place, since DeepSpeed's fragments may already point into them.
    """
    state: dict[str, Any] = engine.adam.state[flat]
    for kind in MOMENTS:  # zeroed with the padding, which at ZeRO 3 may hold anything and is in no fragment
        state[kind] = state[kind].zero_() if kind in state else torch.zeros_like(flat, requires_grad=False)
    on_device = engine.adam.defaults.get("fused") or engine.adam.defaults.get("capturable")
    state["step"] = torch.tensor(step, dtype=torch.float32, device=flat.device if on_device else "cpu")
    return state


def whole_shape(parameter: Tensor) -> tuple[int, ...]:
    """Shape of the whole parameter (at ZeRO 3 `parameter.shape` is (0,))."""
    if (part := slice_of(parameter)) is not None:
        return part.shape
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _piece(parameter: Any) -> tuple[int, int]:
    """(start, elements without padding) of this rank's piece at ZeRO 3."""
    start = parameter.ds_tensor.ds_numel * dist.get_rank(group=parameter.ds_process_group)
    return start, min(parameter.ds_tensor.ds_numel, parameter.ds_numel - start)


def _fragments(engine: Engine, *, owned: bool) -> Iterator[Fragment]:
    """What this rank holds; `owned`: only what it must write."""
    stage = engine.plan.zero_stage
    # named_parameters gives a tied parameter once, by its first name: the same at every layout of the same model.
    names = {
        parameter: name
        for name, parameter in engine.module.named_parameters()
        if not owned or _writes(engine, parameter)
    }
    if stage in (1, 2):
        yield from _mapped(engine, names)
    elif stage == 3:
        yield from _pieces(engine, names)
    parameter: Any
    for parameter, name in names.items():
        if stage > 0 and parameter.requires_grad:
            continue
        if stage == 3:  # frozen: in no optimizer partition, but divided like the others
            start, numel = _piece(parameter)
            flat, offset = parameter.ds_tensor, 0
        else:
            rank, size = _place(engine) if owned else (0, 1)
            start = parameter.numel() * rank // size
            numel = parameter.numel() * (rank + 1) // size - start
            flat, offset = parameter, start
        if numel > 0:
            yield Fragment(name=name, parameter=parameter, start=start, numel=numel, flat=flat, offset=offset)


def _writes(engine: Engine, parameter: nn.Parameter) -> bool:
    """Whether this rank writes of what it holds of a parameter: of one that all of a tensor group have whole, the
    first."""
    return engine.groups is None or engine.groups.position.tensor == 0 or slice_of(parameter) is not None


def _place(engine: Engine) -> tuple[int, int]:
    """This rank among those that hold the same slices, and how many they are."""
    if engine.groups is None:
        return engine.world.rank, engine.world.size
    return engine.groups.zero_rank, engine.groups.plan.zero_ranks


def _mapped(engine: Engine, names: dict[nn.Parameter, str]) -> Iterator[Fragment]:
    for parameter, name in names.items():
        mapping: Any = getattr(parameter, "_hp_mapping", None)
        if mapping is not None:
            yield Fragment(
                name=name,
                parameter=parameter,
                start=mapping.lp_fragment_address.start,
                numel=mapping.lp_fragment_address.numel,
                flat=engine.adam.param_groups[mapping.param_group_index]["params"][0],
                offset=mapping.hp_fragment_address.start,
            )


def _pieces(engine: Engine, names: dict[nn.Parameter, str]) -> Iterator[Fragment]:
    zero = engine.deepspeed.optimizer
    for flat, group in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True):
        offset = 0
        for parameter in group:
            start, numel = _piece(parameter)
            if parameter in names and numel > 0:
                yield Fragment(
                    name=names[parameter], parameter=parameter, start=start, numel=numel, flat=flat, offset=offset
                )
            offset += parameter.ds_tensor.ds_numel
