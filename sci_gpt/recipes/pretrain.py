"""Pretrain: one process of a run, from its configuration and the store to the loss; reads top to bottom."""

from __future__ import annotations

import shutil
import sys
import uuid
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from sci_gpt.config import PretrainConfig
from sci_gpt.config_file import load_config, show_config
from sci_gpt.data.curriculum import Curriculum
from sci_gpt.data.splits import check_window
from sci_gpt.data.store import Store
from sci_gpt.errors import CheckpointError
from sci_gpt.model.transformer import SciGPT, build_model
from sci_gpt.model.width import rate_factors
from sci_gpt.parallel.engine import Engine
from sci_gpt.parallel.groups import Groups
from sci_gpt.parallel.weights import place
from sci_gpt.parallel.worker import leaving, refusing
from sci_gpt.parallel.world import World
from sci_gpt.recipes import parts
from sci_gpt.recipes.priors import store_with_priors
from sci_gpt.recipes.validation import Validation
from sci_gpt.train import fragments, heap
from sci_gpt.train.checkpoint import Reader, committed, step_folder
from sci_gpt.train.commit import CheckpointWriter, Saved
from sci_gpt.train.feed import Prefetch, StepReader
from sci_gpt.train.journal import Progress, RunJournal, history, recent_losses
from sci_gpt.train.objective import NextFrame
from sci_gpt.train.resume import Start, code_version, where_to_go_on
from sci_gpt.train.retention import Retention, validation_loss
from sci_gpt.train.run_folder import COMPLETE, CONFIG, REQUEUE, cut_back, locked, set_aside, write_marker, write_whole
from sci_gpt.train.signals import Requests
from sci_gpt.train.spikes import WINDOW, Spikes
from sci_gpt.train.tracker import Tracker
from sci_gpt.train.trainer import Outcome, Parts, Settings, Trainer
from sci_gpt.train.watchdog import Watchdog, set_reports_aside
from sci_tokenizers.statistics import statistics_to_json
from sci_tokenizers.variables import BUILT_IN

_BYTES_PER_PARAMETER = 12  # of a checkpoint: fp32 weight and two moments


def pretrain(config: PretrainConfig, requests: Requests) -> Outcome:
    """Train one run, or go on with it from its newest checkpoint. Every process of the run calls this.

    Raises:
        ConfigError, DataError, CheckpointError: see the parts. Until all checks have passed, nothing is written.
    """
    store = Store.open(config.data, parts.patience(config))
    factor, identity = parts.loss_factor(config), parts.identity(config, store)
    start = where_to_go_on(config.output, identity, contents=False)
    curriculum = parts.curriculum(config, store, starts=start.phase_starts)
    _refuse_long_windows(curriculum)
    model = make_model(config)
    _refuse_full_disk(config, num_parameters := model.num_parameters)
    world = _join(config)
    start = where_to_go_on(config.output, identity, world=world)  # every byte, which all ranks together can read
    store = store_with_priors(store, config, checkpoint=start.checkpoint, world=world)
    curriculum = parts.curriculum(config, store, starts=start.phase_starts)
    feed = _feed(config, curriculum, rank=world.rank, start=start)
    validation = Validation(config, store, world=world)  # says which sources it has nothing of
    engine = make_engine(config, model, world=world)
    if start.checkpoint is not None:
        fragments.load(engine, Reader(start.checkpoint, verified=True))
    with ExitStack() as stack:
        progress = Progress(config.schedule.steps)
        writer = _open_run(config, engine, stack=stack, start=start, told=progress.saved)
        state, tracker = _state(config, store, identity=identity), None
        if world.rank == 0:
            _introduce(config, curriculum, num_parameters=num_parameters, start=start)
            tracker = _track(config, store)
        journal = _journal(config, world, writer=writer, progress=progress, tracker=tracker)
        watch = stack.enter_context(_watchdog(config, world, writer=writer))
        validated = partial(_validated, journal, factor=factor, before=start.validation)
        save = _saver(writer, engine, state=state, starts=curriculum.starts, tracker=tracker, validated=validated)
        trainer = Trainer(
            Parts(
                engine=engine,
                feed=feed,
                objective=_objective(config, world),
                journal=journal,
                save=save,
                validate=validation,
                requests=requests,
                name=curriculum.name,
                check=heap.after_each_step(writer.check, world.device),
                watch=watch,
                spikes=Spikes(recent_losses(config.output, WINDOW)),
            ),
            _settings(config),
            step=start.step,
            next_sample=start.next_sample,
        )
        outcome = trainer.run()
        writer.finish()  # before any marker says that the last checkpoint is there
        watch.close()
        journal.close()
        if tracker is not None:
            _mark_end(config.output, outcome)
            tracker.close("KILLED" if outcome.stopped else "FINISHED")
    world.stop()
    return outcome


def make_model(config: PretrainConfig) -> SciGPT:
    """The run's model; its parameters have no memory yet."""
    model = build_model(parts.model_shape(config), parts.model_settings(config), device="meta")
    model.checkpointing = parts.parallel_plan(config).checkpointing
    return model


def make_engine(config: PretrainConfig, model: SciGPT, *, world: World) -> Engine:
    """A model cut as the run's plan says, its parameters drawn, under DeepSpeed.

    Raises:
        ConfigError: the plan is for another number of processes, or cannot divide the model.
    """
    plan, rates = parts.parallel_plan(config), rate_factors(model)
    groups = Groups.join(plan, world)
    place(model, groups, world=world, seed=config.seed)
    adamw = parts.adamw_settings(config)
    return Engine(model, plan=plan, optimizer=adamw, world=world, rate_factors=rates, groups=groups)


def _settings(config: PretrainConfig) -> Settings:
    return Settings(
        schedule=parts.schedule(config),
        factor=parts.loss_factor(config),
        checkpoint_every=config.checkpoint.every,
        validate_every=config.validation.every,
        most_passed_over=config.reading.most_passed_over,
    )


def _objective(config: PretrainConfig, world: World) -> NextFrame:
    settings = parts.model_settings(config)
    return NextFrame(settings=settings.tokenizer, device=world.device, noise=settings.noise, seed=config.seed)


def _refuse_long_windows(curriculum: Curriculum) -> None:
    """A window longer than the gap between the splits would join training and held-out times."""
    for windows in (windows for corpus in curriculum.corpora for windows in corpus.windows):
        check_window(curriculum.store, windows.spec.source, num_times=windows.spec.frames * windows.frame_times)


def _refuse_full_disk(config: PretrainConfig, num_parameters: int) -> None:
    """Before anything is written: room for the checkpoints that will be kept and the one being written."""
    kept = _retention(config).most(config.schedule.steps)
    there = min(kept, len(committed(config.output)))
    need = (kept + 1 - there) * num_parameters * _BYTES_PER_PARAMETER
    folder = config.output.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < need:
        raise CheckpointError(
            f"no space for the checkpoints of {str(config.output)!r}: {kept} kept and one being written, of which "
            f"{there} are there, need {need / 1e6:.0f} MB, {free / 1e6:.0f} MB are free; make room or lower "
            "checkpoint.keep (or keep_best, or raise keep_every)"
        )


def _retention(config: PretrainConfig) -> Retention:
    keep = config.checkpoint
    return Retention(last=keep.keep, every=keep.keep_every, best=keep.keep_best)


def _open_run(
    config: PretrainConfig, engine: Engine, *, stack: ExitStack, start: Start, told: Callable[[Saved], None]
) -> CheckpointWriter:
    """Take the run folder: rank 0 locks it, cuts the logs back, puts damaged and torn checkpoints away; others wait."""
    session, world = uuid.uuid4().hex, engine.world
    if world.rank == 0:
        stack.enter_context(locked(config.output))
        cut_back(config.output, start.step)
        set_reports_aside(config.output)
        write_whole(config.output / CONFIG, show_config(config))
        for folder, found in start.damaged:
            aside = set_aside(folder)
            _warn(f"{found}: {folder} is ignored, and kept as {aside.name} for you to look at or delete")
        for folder in CheckpointWriter.remove_torn(config.output):
            _warn(f"{folder} is torn (a save that never finished): ignored and removed")
    session = world.share(session)
    writer = CheckpointWriter(
        config.output,
        rank=world.rank,
        size=world.size,
        session=session,
        retention=_retention(config),
        asynchronous=config.checkpoint.asynchronous,
        told=told,
    )
    writer.prepare(fragments.hold(engine))
    return stack.enter_context(writer)


def _warn(what: str) -> None:
    print(f"warning: {what}", file=sys.stderr, flush=True)


def _join(config: PretrainConfig) -> World:
    # Longer than the watchdog's limit: it says more than a collective that gives up.
    patience = max(600.0, 2 * config.watch.hang_seconds)
    return World.start(threads=config.parallel.threads_per_process, timeout_seconds=patience)


def _journal(
    config: PretrainConfig, world: World, *, writer: CheckpointWriter, progress: Progress, tracker: Tracker | None
) -> RunJournal:
    """The journal, whose logs come to the disk with each checkpoint."""
    journal = RunJournal(config.output, rank=world.rank, progress=progress, tracker=tracker)
    writer.before_part = journal.sync
    return journal


def _watchdog(config: PretrainConfig, world: World, *, writer: CheckpointWriter) -> Watchdog:
    watch = Watchdog(config.output, rank=world.rank, size=world.size, limit_seconds=config.watch.hang_seconds)
    writer.moving = watch.again
    return watch


def _feed(config: PretrainConfig, curriculum: Curriculum, *, rank: int, start: Start) -> Prefetch:
    """A rank's feed, which reads the first step already: it is there when the engine is."""
    place, threads = parts.place(config, rank=rank), config.parallel.threads_per_process
    feed = Prefetch(StepReader(curriculum, place, settings=parts.tokenizer_settings(config), threads=threads))
    if start.step < config.schedule.steps:
        feed.begin(start.step, start.next_sample)
    return feed


def _introduce(config: PretrainConfig, curriculum: Curriculum, *, num_parameters: int, start: Start) -> None:
    facts = [f"{config.name}: {num_parameters:,} parameters"]
    for phase, corpus in zip(curriculum.phases, curriculum.corpora, strict=True):
        packing = parts.packing(config, phase, corpus=corpus)
        until = f"to step {phase.until_step}: " if len(curriculum.phases) > 1 else ""
        facts += [
            f"{until}{phase.rows} rows x {phase.row_length} tokens per step",
            f"{100 * packing['mixed_rows']:.0f} % of rows hold two or more modalities",
            f"fill {100 * packing['fill']:.1f} %",
            f"attention cost over ranks within {100 * packing['cost_spread']:.1f} %",
        ]
    costs = {w.spec.source: w.left_out for corpus in curriculum.corpora for w in corpus.windows if w.left_out}
    for source, cost in costs.items():
        listed = ", ".join(f"{count} {rule}" for rule, count in cost.items())
        facts.append(f"windows of {source} left out: {listed}")
    plan = parts.parallel_plan(config)
    axes = {"data": plan.data_parallel, "sequence": plan.sequence_parallel, "tensor": plan.tensor_parallel}
    layout = " x ".join(f"{name} {size}" for name, size in axes.items() if size > 1)
    facts.append(f"{plan.world_size} processes{f' ({layout})' if layout else ''}, ZeRO {plan.zero_stage}")
    print(" | ".join(facts), flush=True)
    if start.checkpoint is not None:
        print(f"resumes from {start.checkpoint}", flush=True)


def _track(config: PretrainConfig, store: Store) -> Tracker:
    parent = {"mlflow.parentRunId": config.tracking.parent_run} if config.tracking.parent_run else {}
    return Tracker(
        parts.tracking_target(config),
        config.output,
        parameters=config.model_dump(mode="json"),
        tags={"fingerprint": store.fingerprint, "code_version": code_version()} | parent,
        artifacts=(config.output / CONFIG,),
        history=history(config.output),
    )


def _state(config: PretrainConfig, store: Store, *, identity: dict[str, Any]) -> dict[str, Any]:
    """What of state.json does not change during a run."""
    tree = config.model_dump(mode="json")
    return {
        "identity": identity,
        "config": tree,
        "tokenizers": tree["tokenizer"],
        "fingerprint": store.fingerprint,
        "code_version": code_version(),
        "variables": list(BUILT_IN),
        "statistics": statistics_to_json(store.statistics),
        "sources": {
            source: {
                "modality": store.modality(source),
                "step_seconds": store.step_seconds(source),
                "shape": list(store.shape(source)),
                "options": store.manifest["sources"][source].get("options", {}),
            }
            for source in store.sources
        },
    }


def _saver(
    writer: CheckpointWriter,
    engine: Engine,
    *,
    state: dict[str, Any],
    starts: Callable[[int], tuple[int, ...]],
    tracker: Tracker | None,
    validated: Callable[[], Mapping[str, Any] | None],
) -> Callable[[int, int], None]:
    def save(step: int, next_sample: int) -> None:
        changing = {
            "step": step,
            "next_sample": next_sample,
            "phase_starts": list(starts(step)),
            "schedule": state["config"]["schedule"] | {"completed": step},
            "mlflow_run": tracker.run_id if tracker is not None else None,
            "validation": validated(),
        }
        writer.save(step, fragments.hold(engine), state=changing | state)

    return save


def _validated(
    journal: RunJournal, *, factor: Mapping[str, float], before: Mapping[str, Any] | None
) -> Mapping[str, Any] | None:
    """{"step", "loss"} of the run's last validation; `before`: of the checkpoint from which it goes on."""
    if journal.validated is None:
        return before
    step, scores = journal.validated
    return {"step": step, "loss": validation_loss(scores, factor)}


def _mark_end(run: Path, outcome: Outcome) -> None:
    """A requeue marker beside a checkpoint from which the run should go on, or the mark of a complete run."""
    checkpoint = step_folder(run, outcome.step).relative_to(run)
    name = REQUEUE if outcome.stopped else COMPLETE
    write_marker(run, name, content={"step": outcome.step, "checkpoint": str(checkpoint)})
    print(
        f"{'stopped after' if outcome.stopped else 'complete:'} {outcome.step} steps, saved in {run / checkpoint}",
        flush=True,
    )


def main() -> None:
    """A worker process: `python -m sci_gpt.recipes.pretrain CONFIG`, RANK and WORLD_SIZE in the environment."""
    requests = Requests()
    with leaving(), refusing(), requests.listening():
        pretrain(load_config(Path(sys.argv[1]), PretrainConfig), requests)


if __name__ == "__main__":
    main()
