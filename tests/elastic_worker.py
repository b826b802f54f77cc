"""A worker of test_elastic_order.py under torchrun: reads steps, logs the keys, saves, goes on, or kills itself."""

from __future__ import annotations

import faulthandler
import hashlib
import json
import os
import signal
import sys
import uuid
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sci_gpt.config import PretrainConfig
from sci_gpt.config_file import load_config
from sci_gpt.data.store import Store
from sci_gpt.parallel.worker import leaving
from sci_gpt.parallel.world import World
from sci_gpt.recipes import parts
from sci_gpt.train.checkpoint import WEIGHT, Reader, tensor_key
from sci_gpt.train.commit import CheckpointWriter
from sci_gpt.train.feed import Place, Prefetch, StepReader, StepRows
from sci_gpt.train.fragments import Holding
from sci_gpt.train.journal import Progress, RunJournal
from sci_gpt.train.resume import where_to_go_on
from sci_gpt.train.run_folder import LineLog, cut_back, locked
from sci_tokenizers.packing import Batch

WATCHDOG_SECONDS = 60
HIDDEN = "hidden"  # folder of a run: what each rank's masked documents hide, {"hidden": {sample number: digest}} a step


def holding(world: World, step: int) -> Holding:
    """A model of one number per rank, which is the step."""
    key = tensor_key("model", WEIGHT, offset=0, start=world.rank)
    return Holding(
        tensors={key: torch.tensor([float(step)])},
        fragments=[["model", 0, world.size, world.rank, world.rank + 1]],
        parameters={"model": {"shape": [world.size], "tp_dim": None, "trainable": False}},
        adam_step=None,
    )


def hides(rows: StepRows) -> dict[int, str]:
    """Sample number -> digest of the tokens that a masked document hides and of the values it asks for."""
    return {number: digest for batch in rows.batches for number, digest in _hides(batch)}


def _hides(batch: Batch) -> list[tuple[int, str]]:
    found = []
    for payload in batch.payloads.values():
        asked = payload.index[payload.unit_token[payload.unit_lead == 0]]  # in the order of the hidden values
        for number, (start, frames, slots) in zip(batch.numbers, batch.spans, strict=True):
            inside = (asked >= start) & (asked < start + frames * slots)
            if inside.any():
                values = payload.hidden_values[inside][payload.hidden_valid[inside]]
                parts = (asked[inside] - start).astype("<i8").tobytes() + values.astype("<f4").tobytes()
                found.append((number, hashlib.blake2b(parts, digest_size=8).hexdigest()))
    return found


def run(task: dict[str, Any], world: World, *, session: str) -> None:
    """One run folder, from where it stands up to `until` completed steps, with a checkpoint after every `save`-th.

    The process group's all-reduce is the barrier of a step, as in training. A step that takes a minute ends the process
    with all stacks.
    """
    config = load_config(Path(task["config"]), PretrainConfig)
    store = Store.open(config.data)
    identity = parts.identity(config, store)
    start = where_to_go_on(config.output, identity)
    if start.checkpoint is not None and Reader(start.checkpoint).read("model").unique().tolist() != [start.step]:
        raise AssertionError(f"{start.checkpoint} does not hold the state of step {start.step}")
    curriculum = parts.curriculum(config, store, starts=start.phase_starts)
    place = Place(rank=world.rank, world=world.size, accumulation=task["accumulation"])
    settings = parts.tokenizer_settings(config)
    with ExitStack() as stack:
        if world.rank == 0:
            stack.enter_context(locked(config.output))
            cut_back(config.output, start.step)
        world.barrier()
        writer = CheckpointWriter(config.output, rank=world.rank, size=world.size, session=session)
        journal = RunJournal(config.output, rank=world.rank, progress=Progress(task["until"]), tracker=None)
        hidden = LineLog(config.output / HIDDEN / f"rank-{world.rank}.jsonl")
        feed = Prefetch(StepReader(curriculum, place, settings=settings, threads=task["threads"]))
        n = start.next_sample
        for step in range(start.step, task["until"]):
            faulthandler.dump_traceback_later(WATCHDOG_SECONDS, exit=True)
            rows, _ = feed.get(step, n)
            if len({tuple(row) for row in world.gather([rows.first, rows.next_sample, rows.num_tokens])}) > 1:
                raise AssertionError(f"step {step}: ranks disagree on its samples")
            journal.consumed(step + 1, rows)
            hidden.append({"hidden": hides(rows)})
            n = rows.next_sample
            if task["kill"] == [step + 1, world.rank]:
                os.kill(os.getpid(), signal.SIGKILL)
            if (step + 1) % task["save"] == 0:
                state = {
                    "identity": identity,
                    "step": step + 1,
                    "next_sample": n,
                    "phase_starts": list(curriculum.starts(step + 1)),
                }
                writer.save(step + 1, holding(world, step + 1), state=state)
        faulthandler.cancel_dump_traceback_later()
        feed.close()
        journal.close()
        hidden.close()
        world.barrier()


def main() -> None:
    """`elastic_worker TASKS.json`: [{config, until, save, kill: [step, rank] or null, accumulation, threads}]."""
    with leaving():
        dist.init_process_group("gloo", timeout=timedelta(seconds=WATCHDOG_SECONDS))
        world = World(rank=dist.get_rank(), size=dist.get_world_size(), device=torch.device("cpu"))
        session = world.share(uuid.uuid4().hex)
        for task in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
            run(task, world, session=session)
        world.stop()


if __name__ == "__main__":
    main()
