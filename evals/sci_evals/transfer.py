"""`sci-gpt transfer`: a pretrained model and one from scratch, adapted to the same few examples of unseen data."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sci_evals.evaluate import score_model
from sci_evals.figures import save
from sci_evals.scores import WindowScores
from sci_evals.tasks import task_for
from sci_evals.transfer_curves import ANCHOR, FINETUNED, SCRATCH, Curves, resample, saved, verdict
from sci_evals.transfer_data import Draw, draw, refuse_seen
from sci_evals.transfer_plot import draw_transfer
from sci_evals.windowset import WindowSet
from sci_gpt.config import EvaluateConfig, PretrainConfig
from sci_gpt.config_file import load_config
from sci_gpt.data.store import Store
from sci_gpt.errors import CheckpointError, ConfigError
from sci_gpt.recipes import parts
from sci_gpt.recipes.adapt import Adapted, AdaptSettings, adapt, from_scratch, introduce
from sci_gpt.recipes.load import LoadedModel, load_model
from sci_gpt.recipes.studies import TransferConfig, TransferTask
from sci_gpt.train.nested import Study
from sci_gpt.train.tracker import TrackingTarget
from sci_tokenizers.table import make_tokenizer
from sci_tokenizers.variables import VARIABLES

_FEW_BLOCKS = 10


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One adaptation with the learning rate that its validation part chose, and its errors on the test windows.

    Attributes:
        arm, examples, seed: which.
        learning_rate: chosen.
        valid: {learning rate: least validation loss}, of all that were tried.
        steps, best_step: of the chosen one.
        scores: on the test windows.
    """

    arm: str
    examples: int
    seed: int
    learning_rate: float
    valid: dict[float, float]
    steps: int
    best_step: int
    scores: WindowScores


def transfer(config: TransferConfig) -> dict[str, Any]:
    """Run a transfer; its pretraining is finished.

    Returns:
        {"tasks": {source: {"unit", "examples", "errors": {arm: [mean over seeds per number]}, "intervals", "saved",
        "verdict", "trials"}}, "figure", "seconds"}.

    Raises:
        CheckpointError: the pretraining has no checkpoint.
        ConfigError: a task that the pretraining saw, or that the store has not.
        DataError: too little data for a task.
    """
    begin = time.monotonic()
    torch.set_num_threads(config.threads)
    pretraining = load_config(config.pretrain, PretrainConfig)
    store, loaded = Store.open(config.data), load_model(pretraining.output)
    seen = Store.open(loaded.config.data)
    if seen.fingerprint != loaded.fingerprint:
        raise CheckpointError(
            f"{pretraining.output} was trained on data {loaded.fingerprint[:12]}, and {str(loaded.config.data)!r} is "
            f"{seen.fingerprint[:12]} by now: what it saw cannot be told; train it again"
        )
    for task in config.tasks:
        if task.source not in store.sources:
            raise ConfigError(f"task {task.source!r} is not in {str(config.data)!r}: {', '.join(store.sources)}")
        refuse_seen(loaded.config, seen, store=store, source=task.source)
    target = TrackingTarget(
        uri=pretraining.tracking.uri,
        artifacts=pretraining.tracking.artifacts,
        experiment=config.name,
        run_name=config.name,
    )
    study = Study(target, config.output, parameters=config.model_dump(mode="json"))
    found = {task.source: run_task(config, task, store=store, loaded=loaded, study=study) for task in config.tasks}
    curves = {source: result.pop("curves") for source, result in found.items()}
    units = {source: result["unit"] for source, result in found.items()}
    title = f"{loaded.config.name}: finetuned against from scratch, {100 * config.interval:g} % intervals"
    figure = save(draw_transfer(curves, units=units, title=title), config.output / "transfer.png")
    result = {"tasks": found, "figure": str(figure), "seconds": round(time.monotonic() - begin, 1)}
    table = config.output / "transfer.json"
    table.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    study.close(
        metrics={f"examples_saved/{source}": row["saved"]["saved"] for source, row in found.items()
                 if row["saved"]["saved"] is not None},
        artifacts=[table, figure],
    )  # fmt: skip
    print(f"\ntransfer: {result['seconds']:.0f} s; {table}, {figure}", flush=True)
    for row in found.values():
        print("\n".join(row["verdict"]), flush=True)
    return result


def run_task(
    config: TransferConfig, task: TransferTask, *, store: Store, loaded: LoadedModel, study: Study
) -> dict[str, Any]:
    """Every number of examples, arm and seed of one task, and its curves."""
    settings = parts.tokenizer_settings(loaded.config)
    frame_times = make_tokenizer(store.modality(task.source), settings).frame_times
    trials: list[Trial] = []
    total = len(config.examples) * len(config.seeds) * 2
    begin = time.monotonic()
    for count in config.examples:
        drawn = draw(
            store,
            task,
            count=count,
            valid_share=config.valid_share,
            frame_times=frame_times,
            most=config.test_windows,
        )
        if not trials and (drawn.left_out or drawn.test.left_out):
            print(f"{task.source}: rules of quality leave out {_poor(drawn)}", flush=True)
        examples = drawn.examples(task)
        anchor = score_model(introduce(loaded, examples).anchor().predictor, drawn.test)
        trials.append(
            Trial(arm=ANCHOR, examples=count, seed=0, learning_rate=0.0, valid={}, steps=0, best_step=0, scores=anchor)
        )
        for seed in config.seeds:
            for arm, start in ((FINETUNED, loaded), (SCRATCH, from_scratch(loaded, seed=seed))):
                trial = run_trial(config, task, start=start, drawn=drawn, name=(arm, count, seed))
                trials.append(trial)
                done = sum(one.arm != ANCHOR for one in trials)
                left = round((time.monotonic() - begin) / done * (total - done))
                error = float(_errors(trial.scores, drawn.test).sum() / _weights(trial.scores).sum())
                print(
                    f"{task.source} {done}/{total}: {arm}, {len(drawn.train)} + {len(drawn.valid)} examples, seed "
                    f"{seed} | rate {trial.learning_rate:g}, best step {trial.best_step} of {trial.steps} | test "
                    f"{error:.4g} | ETA of the task, as if all took as long: {left // 60}:{left % 60:02d}",
                    flush=True,
                )
                study.child(
                    f"{task.source} {arm} {count} seed {seed}",
                    parameters={"task": task.source, "arm": arm, "examples": count, "seed": seed,
                                "learning_rate": trial.learning_rate},
                    metrics={"test_crps": error, "best_step": float(trial.best_step), "steps": float(trial.steps),
                             "valid_loss": min(trial.valid.values())},
                )  # fmt: skip
    return summarise(config, trials, test=drawn.test, store=store)


def run_trial(
    config: TransferConfig, task: TransferTask, *, start: LoadedModel, drawn: Draw, name: tuple[str, int, int]
) -> Trial:
    """Adapt `start` with every learning rate; what its validation part likes best is scored on the test windows.

    Args:
        config, task: of the study.
        start: pretrained, or from scratch.
        drawn: the examples and the test windows.
        name: arm, number of examples, seed.
    """
    examples = drawn.examples(task)
    tried = {
        rate: adapt(start, examples, settings=settings_for(config, task, rate=rate, seed=name[2]), say=_quiet)
        for rate in config.learning_rates
    }
    valid = {rate: least_valid(adapted) for rate, adapted in tried.items()}
    best = min(valid, key=valid.__getitem__)
    scores = score_model(tried[best].model.predictor, drawn.test)
    return Trial(
        arm=name[0],
        examples=name[1],
        seed=name[2],
        learning_rate=best,
        valid=valid,
        steps=tried[best].steps,
        best_step=tried[best].best_step,
        scores=scores,
    )


def settings_for(config: TransferConfig, task: TransferTask, *, rate: float, seed: int) -> AdaptSettings:
    """The same for both arms: steps, documents in a step, patience."""
    return AdaptSettings(
        learning_rate=rate,
        max_steps=task.max_steps,
        rows_per_step=task.rows_per_step,
        patience=config.patience,
        validate_every=config.validate_every,
        seed=seed,
    )


def _poor(drawn: Draw) -> str:
    """What rules of quality cost: "3 training windows (constant 3), 0 test windows"."""
    parts = []
    for split, cost in (("training", drawn.left_out), ("test", drawn.test.left_out)):
        rules = ", ".join(f"{rule} {count}" for rule, count in cost.items())
        parts.append(f"{sum(cost.values())} {split} windows" + (f" ({rules})" if rules else ""))
    return ", ".join(parts)


def least_valid(adapted: Adapted) -> float:
    """The validation loss of the weights that were kept."""
    return min(row[2] for row in adapted.history)


def summarise(config: TransferConfig, trials: list[Trial], *, test: WindowSet, store: Store) -> dict[str, Any]:
    """Curves, examples saved and the verdict of one task."""
    weights = _weights(trials[0].scores)
    sums = {
        arm: np.array(
            [
                [_errors(trial.scores, test) for trial in trials if (trial.arm, trial.seed) == (arm, seed)]
                for seed in ((0,) if arm == ANCHOR else config.seeds)
            ]
        )
        for arm in (FINETUNED, SCRATCH, ANCHOR)
    }
    task = task_for(test.modality, store.step_seconds(test.source))
    blocks = task.bootstrap(test, EvaluateConfig(bootstrap=config.bootstrap, interval=config.interval)).blocks
    curves = Curves(
        examples=config.examples,
        errors={arm: rows.sum(axis=2) / weights.sum() for arm, rows in sums.items()},
        resampled=resample(sums, weights, blocks=blocks, resamples=config.bootstrap, seed=0),
        level=config.interval,
    )
    one = len(test.channels) == 1
    return {
        "unit": VARIABLES[test.variables[0]].unit if one else "standard deviations of the test windows, mean",
        "examples": list(config.examples),
        "errors": {arm: rows.mean(axis=0).tolist() for arm, rows in curves.errors.items()},
        "intervals": {arm: [curves.interval(column) for column in rows.T] for arm, rows in curves.resampled.items()},
        "test_windows": test.num_windows,
        "test_blocks": len(np.unique(blocks)),
        "saved": saved(curves),
        "verdict": [*verdict(test.source, curves), *_caution(test.source, len(np.unique(blocks)))],
        "trials": [{key: value for key, value in vars(trial).items() if key != "scores"} for trial in trials],
        "curves": curves,
    }


def _caution(source: str, blocks: int) -> list[str]:
    """A bootstrap of few blocks has intervals that are too narrow."""
    few = f"{source}: the test windows are {blocks} independent blocks: the intervals are too narrow"
    return [few] if blocks < _FEW_BLOCKS else []


def _errors(scores: WindowScores, test: WindowSet) -> np.ndarray:
    """Weighted CRPS of each window over leads and channels, (window,); several channels in units of their spread."""
    spread = np.ones(len(test.channels))
    if len(test.channels) > 1:
        spread = np.array([test.values[:, :, v][test.valid[:, :, v]].std() for v in range(len(test.channels))])
    return np.asarray((scores.total["crps"] / spread).sum(axis=(1, 2)))


def _weights(scores: WindowScores) -> np.ndarray:
    return np.asarray(scores.weight.sum(axis=(1, 2)))


def _quiet(line: str) -> None:
    """Lines of one adaptation are too many here; each trial prints its own."""
