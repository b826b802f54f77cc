"""Give a model's parameters their memory and their start, each process only what it holds: no process needs the whole.

Private names of deepspeed 0.19.8 stand here, in engine.py and in train/fragments.py.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sci_gpt.model.init import Start
from sci_gpt.model.transformer import SciGPT
from sci_gpt.parallel import sequence, tensor
from sci_gpt.parallel.groups import Groups
from sci_gpt.parallel.world import World

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def place(model: SciGPT, groups: Groups, *, world: World, seed: int) -> None:
    """Cut a model of the meta device as the plan says, and draw what this process holds of it.

    Below ZeRO 3 that is its tensor slices. At ZeRO 3 it is a piece of each slice: modules get their memory one after
    another, and each is divided before the next one has any, so that a process never holds more than the largest
    module beside its pieces. The elements are the same at every layout (`Start`).

    Args:
        model: whose parameters have no memory (`build_model(..., device="meta")`).
        groups: of the plan.
        world: the processes.
        seed: of the run.
    """
    start = Start.of(model, seed)
    tensor.divide(model, groups)
    sequence.divide(model, groups)
    if groups.plan.zero_stage < 3:
        for module in model.modules():
            _allocate(module, device=world.device, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(
                    held(start, name, parameter=parameter, begin=0, stop=parameter.numel()).view_as(parameter)
                )
        return
    divided: list[nn.Parameter] = []
    for prefix, module in reversed(list(model.named_modules())):  # children before their parents
        own = _allocate(module, device=world.device, dtype=_DTYPES[groups.plan.dtype])
        if not own:
            continue
        _partition(module, own, groups=groups, first=divided[0] if divided else None)
        divided += own.values()
        for local, parameter in own.items():
            _fill(start, f"{prefix}.{local}" if prefix else local, parameter=parameter)


def held(start: Start, name: str, *, parameter: Tensor, begin: int, stop: int) -> Tensor:
    """Flat elements [begin, stop) of what this process has of a parameter below ZeRO 3: the whole, or its slice."""
    part = tensor.slice_of(parameter)
    if part is None:
        return start.values(name, _shape(parameter), start=begin, stop=stop)
    rows, columns = part.shape
    if part.dim == 0:
        first = part.offset * columns
        return start.values(name, part.shape, start=first + begin, stop=first + stop)
    top, bottom = begin // part.width, -(-stop // part.width)  # of the rows that hold the range; drawn whole
    drawn = start.values(name, part.shape, start=top * columns, stop=bottom * columns).view(-1, columns)
    mine = drawn[:, part.offset : part.offset + part.width].reshape(-1)
    return mine[begin - top * part.width : stop - top * part.width]


def _shape(parameter: Any) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _allocate(module: nn.Module, *, device: torch.device, dtype: torch.dtype) -> dict[str, nn.Parameter]:
    """Memory for a module's own parameters of the meta device; by their name in it."""
    own = {}
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.is_meta:
            fresh = nn.Parameter(torch.empty_like(parameter, device=device, dtype=dtype), parameter.requires_grad)
            if (part := tensor.slice_of(parameter)) is not None:
                tensor.mark(fresh, part)
            setattr(module, name, fresh)
            own[name] = fresh
    return own


def _partition(module: nn.Module, own: dict[str, nn.Parameter], *, groups: Groups, first: Any) -> None:
    """Divide a module's own parameters, whose children's are divided; `first` is any that is, None for the first."""
    # Imported here, after World.start has chosen DeepSpeed's accelerator.
    import deepspeed

    if first is not None:
        first.convert_to_zero_parameters(param_list=list(own.values()))
    else:
        deepspeed.zero.Init(
            module=module,
            data_parallel_group=None if groups.mpu is None else groups.zero,
            config_dict_or_path=groups.plan.deepspeed_config(clip=1.0),
            dtype=_DTYPES[groups.plan.dtype],
            mpu=groups.mpu,
        )


@torch.no_grad()
def _fill(start: Start, name: str, *, parameter: Any) -> None:
    """Draw this process's piece of a divided parameter."""
    piece = parameter.ds_tensor
    begin = piece.ds_numel * dist.get_rank(group=parameter.ds_process_group)
    count = min(piece.ds_numel, parameter.ds_numel - begin)
    if count > 0:
        piece[:count].copy_(held(start, name, parameter=parameter, begin=begin, stop=begin + count))
