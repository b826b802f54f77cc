"""A worker of test_parallel_engine.py: trains, saves, loads and breaks small engines at every ZeRO stage."""

from __future__ import annotations

import faulthandler
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from deepspeed.comm.torch import build_shm_op
from torch import Tensor, nn

from sci_gpt.parallel.engine import AdamWSettings, Engine
from sci_gpt.parallel.plan import ParallelPlan
from sci_gpt.parallel.worker import leaving
from sci_gpt.parallel.world import World
from sci_gpt.train import fragments
from sci_gpt.train.checkpoint import Reader, step_folder
from sci_gpt.train.commit import CheckpointWriter
from sci_gpt.train.signals import Requests

ADAMW = AdamWSettings(learning_rate=1e-2, betas=(0.9, 0.95), epsilon=1e-8, weight_decay=0.1, clip=0.05)
STEPS, SAVED = 5, 3
ROWS = 6
LINEAR = nn.functional.linear
PAIRS = [(0, 0), (1, 1), (2, 2), (1, 3), (3, 3), (3, 1), (1, 0), (0, 2), (2, 0), (2, 3)]


class Net(nn.Module):
    """Odd sizes, a tied, a frozen and an unused parameter: what a layout can get wrong."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.first = nn.Linear(5, 7)
        self.second = nn.Linear(7, 5, bias=False)
        self.tied = self.second.weight
        self.gain = nn.Parameter(torch.ones(1))
        self.frozen = nn.Parameter(torch.full((3,), 0.1), requires_grad=False)
        self.register_buffer("third", torch.tensor([1.0 / 3.0]), persistent=False)
        for parameter in self.parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5

    def forward(self, x: Tensor) -> Tensor:
        """(rows, 5) to (rows, 5)."""
        hidden = torch.tanh(self.first(x)) * self.gain
        return self.second(hidden) + self.frozen.sum() * (hidden @ self.tied.t())


def rows(step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, targets (6, 5) and weights (6,) of a step; the last rows weigh much more than the first."""
    generator = torch.Generator().manual_seed(100 + step)
    x, y = torch.randn(2, ROWS, 5, generator=generator)
    return x, y, torch.tensor([1.0, 0.0, 2.0, 5.0, 1.0, 9.0])


def weighted_sum(model: Any, step: int, take: slice) -> Tensor:
    """Sum of weight x squared error over some rows of a step."""
    x, y, weight = (part[take] for part in rows(step))
    return (((model(x) - y) ** 2).mean(dim=1) * weight).sum()


FACTORS = {"first.weight": 0.25, "tied": 0.5, "gain": 4.0}


def reference(factors: dict[str, float]) -> list[dict[str, float]]:
    """The same steps in plain torch, in one process, a group for each parameter."""
    model = Net()
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    trained = list(named.values())
    groups = [
        {
            "params": [parameter],
            "weight_decay": ADAMW.weight_decay if parameter.dim() > 1 else 0.0,
            "lr": ADAMW.learning_rate * factors.get(name, 1.0),
        }
        for name, parameter in named.items()
    ]
    adam = torch.optim.AdamW(groups, lr=ADAMW.learning_rate, betas=ADAMW.betas, eps=ADAMW.epsilon)
    seen = []
    for step in range(STEPS):
        loss = weighted_sum(model, step, slice(None)) / rows(step)[2].sum()
        loss.backward()
        norm = float(nn.utils.clip_grad_norm_(trained, ADAMW.clip))
        adam.step()
        adam.zero_grad()
        seen.append({"loss": float(loss), "norm": norm})
    return seen


def make(world: World, factors: dict[str, float] | None = None, **layout: Any) -> Engine:
    """An engine of the small model."""
    plan = ParallelPlan(data_parallel=world.size, **layout)
    return Engine(Net(), plan=plan, optimizer=ADAMW, world=world, rate_factors=factors or {})


def train(engine: Engine, steps: range, *, break_rank: int | None = None) -> list[dict[str, Any]]:
    """Run steps; rank `break_rank` gets a loss that is not a number."""
    world, count = engine.world, engine.plan.accumulation
    places = world.size * count
    seen = []
    for step in steps:
        share = ROWS // places
        total = 0.0
        for micro in range(count):
            at = (world.rank * count + micro) * share
            value = weighted_sum(engine, step, slice(at, at + share))
            total += float(value.detach())
            loss = value * engine.plan.loss_multiplier / float(rows(step)[2].sum())
            engine.backward(loss * math.nan if break_rank == world.rank else loss)
            outcome = engine.step()
        loss_everywhere = world.sum([total])[0] / float(rows(step)[2].sum())
        seen.append({"loss": loss_everywhere, "norm": outcome.gradient_norm, "applied": outcome.applied})
    return seen


def state(engine: Engine) -> dict[str, Tensor]:
    """Copies of what this rank owns."""
    return {name: tensor.clone() for name, tensor in fragments.hold(engine).tensors.items()}


def whole(folder: Path) -> dict[tuple[str, str], Tensor]:
    """Every tensor of a checkpoint."""
    reader = Reader(folder)
    return {
        (name, kind): reader.read(name, kind)
        for name, row in reader.parameters.items()
        for kind in (("weight", "exp_avg", "exp_avg_sq") if row["trainable"] else ("weight",))
    }


def missing_names(engine: Engine) -> list[str]:
    """The private names of DeepSpeed on which train/fragments.py and parallel/world.py rely, and which are gone."""
    zero, stage = engine.deepspeed.optimizer, engine.plan.zero_stage
    owners: list[tuple[Any, tuple[str, ...]]] = [(engine.deepspeed, ("get_global_grad_norm", "was_step_applied"))]
    parameter = engine.module.first.weight  # type: ignore[union-attr]
    if stage in (1, 2):
        mapped = [p for p in engine.module.parameters() if getattr(p, "_hp_mapping", None) is not None]
        owners += [(zero, ("update_lp_params",)), (parameter, ("_hp_mapping",))]
        owners += [
            (vars(p)["_hp_mapping"], ("lp_fragment_address", "hp_fragment_address", "param_group_index"))
            for p in mapped
        ]
    if stage == 3:
        owners.append((parameter, ("ds_tensor", "ds_numel", "ds_shape", "ds_process_group")))
        names = ("fp16_groups", "fp32_partitioned_groups_flat", "persistent_parameters")
        owners.append((zero, (*names, "_reassign_or_swap_out_partitioned_parameters")))
        owners.append((parameter.ds_tensor, ("ds_numel",)))  # type: ignore[union-attr]
    return [f"{type(owner).__name__}.{name}" for owner, names in owners for name in names if not hasattr(owner, name)]


def bf16_again(world: World, stage: int, folder: Path, *, session: str) -> dict[str, Any]:
    """A run in bf16, and one that goes on from its checkpoint at the same layout: steps of both, and whether all that
    this rank holds is equal bit for bit in the end."""
    run, engine = folder / f"bf16-{stage}", make(world, zero_stage=stage, dtype="bf16")
    train(engine, range(SAVED))
    held = fragments.hold(engine)
    CheckpointWriter(run, rank=world.rank, size=world.size, session=session).save(SAVED, held, state={})
    types = sorted({str(tensor.dtype) for tensor in held.tensors.values()})
    straight, end = train(engine, range(SAVED, STEPS)), state(engine)
    engine.close()
    world.barrier()
    engine = make(world, zero_stage=stage, dtype="bf16")
    fragments.load(engine, Reader(step_folder(run, SAVED)))
    again, other = train(engine, range(SAVED, STEPS)), state(engine)
    engine.close()
    same = end.keys() == other.keys() and all(torch.equal(end[name], other[name]) for name in end)
    return {"straight": straight, "again": again, "same": same, "types": types}


def main() -> None:
    """All cases, in one process group."""
    folder = Path(sys.argv[1])
    with leaving(), Requests().listening():
        world = World.start()
        session = world.share("s")
        seen: dict[str, Any] = {"reference": reference({}), "shared_memory_op": build_shm_op() is not None}
        for stage in (0, 1, 2, 3):
            engine = make(world, zero_stage=stage)
            missing = missing_names(engine)
            runs = train(engine, range(SAVED))
            save = CheckpointWriter(folder / f"zero{stage}", rank=world.rank, size=world.size, session=session)
            save.save(SAVED, fragments.hold(engine), state={"step": SAVED})
            runs += train(engine, range(SAVED, STEPS))
            before = state(engine)
            broken = train(engine, range(1), break_rank=1)
            after = state(engine)
            seen[f"zero{stage}"] = {
                "steps": runs,
                "missing": missing,
                "broken": broken,
                "unchanged": all(torch.equal(before[name], after[name]) for name in before),
                "then": train(engine, range(1)),
            }
            engine.close()
            world.barrier()
        engine = make(world, zero_stage=1, accumulation=3)
        seen["accumulated"] = train(engine, range(STEPS))
        engine.close()
        seen["factored"] = {"reference": reference(FACTORS)}
        for stage in (0, 1, 3):
            engine = make(world, FACTORS, zero_stage=stage)
            engine.set_learning_rate(ADAMW.learning_rate)  # as the trainer does
            seen["factored"][str(stage)] = train(engine, range(STEPS))
            engine.close()
        engine = make(world, zero_stage=1, dtype="bf16")
        seen["bf16_buffer"] = float(engine.module.get_buffer("third")) == float(torch.tensor(1.0 / 3.0))
        seen |= {"bf16": train(engine, range(STEPS)), "bf16_broken": train(engine, range(1), break_rank=0)}
        engine.close()
        seen |= {f"bf16-{stage}": bf16_again(world, stage, folder, session=session) for stage in (1, 2, 3)}
        seen |= {"linear_is_torchs": nn.functional.linear is LINEAR, "crashes_say_where": faulthandler.is_enabled()}
        for number, (saved, loaded) in enumerate(PAIRS):
            engine = make(world, zero_stage=loaded)
            if number % 2:
                train(engine, range(50, 52))  # an engine that has already run holds stale copies and moments
            source = step_folder(folder / f"zero{saved}", SAVED)
            fragments.load(engine, Reader(source))
            run = folder / f"again-{saved}-{loaded}"
            CheckpointWriter(run, rank=world.rank, size=world.size, session=session).save(
                SAVED, fragments.hold(engine), state={}
            )
            world.barrier()
            mine, theirs = whole(step_folder(run, SAVED)), whole(source)
            seen[f"{saved}->{loaded}"] = {
                "same": mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine),
                "steps": train(engine, range(SAVED, STEPS)),
            }
            engine.close()
        (folder / f"seen-{world.rank}.json").write_text(json.dumps(seen))
        world.stop()


if __name__ == "__main__":
    main()
