"""Points of a sweep: each one's pretraining configuration, and what its finished run says of size, tokens and loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml

from sci_gpt.config import PretrainConfig
from sci_gpt.config_file import load_config, parse_config, show_config
from sci_gpt.data.store import Store
from sci_gpt.errors import CheckpointError, ConfigError
from sci_gpt.model.shapes import SHAPES
from sci_gpt.recipes import parts
from sci_gpt.recipes.plan import plan
from sci_gpt.recipes.studies import SizeConfig, SweepConfig
from sci_gpt.train.checkpoint import read_state
from sci_gpt.train.run_folder import CONFIG, LOG, read_complete, read_lines

COLUMNS = ("modality", "params", "tokens", "loss", "flops", "epochs", "seed", "size", "unit", "learning_rate")
_UNITS = {"series": "nat per token", "grid": "CRPS of the scaled value", "trace": "CRPS in spreads of the anchor"}


@dataclass(frozen=True, kw_only=True)
class Point:
    """One training of a sweep: its size, its budget in tokens, and its whole configuration."""

    size: str
    tokens: int
    config: PretrainConfig

    @property
    def name(self) -> str:
        """Size, tokens and seed in words."""
        return f"{self.size}, {self.tokens:,} tokens, seed {self.config.seed}"


def points_of(sweep: SweepConfig, *, parent_run: str | None) -> list[Point]:
    """Every point, small budgets first.

    Args:
        sweep: the study.
        parent_run: MLflow's id of the run that the points' runs are children of; None: tracking has failed.

    Raises:
        ConfigError: a pretraining of several phases, an unknown size, a budget below one step, two budgets of as many
            steps.
    """
    base = load_config(sweep.pretrain, PretrainConfig, overrides=sweep.overrides)
    if len(base.phases) > 1:
        raise ConfigError(
            f"{sweep.pretrain} has {len(base.phases)} phases; a sweep cuts a run short, so name one of a single phase"
        )
    for size in sweep.sizes:
        if size.size not in SHAPES:
            raise ConfigError(f"sizes: one of {', '.join(SHAPES)}, got {size.size!r}")
    per_step = base.phases[0].row_length * base.phases[0].rows_per_step
    steps = {tokens: round(tokens / per_step) for tokens in sweep.tokens}
    if min(steps.values()) < 2 or len(set(steps.values())) < len(steps):
        raise ConfigError(
            f"tokens {list(sweep.tokens)} are {list(steps.values())} steps of {per_step:,}; give budgets of two steps "
            "or more that differ by a step at least"
        )
    return [
        _point(sweep, base, size=size, steps=steps[tokens], seed=seed, parent_run=parent_run)
        for tokens in sorted(sweep.tokens)
        for size in sweep.sizes
        for seed in sweep.seeds
    ]


def _point(
    sweep: SweepConfig, base: PretrainConfig, *, size: SizeConfig, steps: int, seed: int, parent_run: str | None
) -> Point:
    """The base with another size, length and seed; warm-up and cooldown keep their shares of the run."""
    tokens = steps * base.phases[0].row_length * base.phases[0].rows_per_step
    name = f"{size.size}-{tokens}-seed{seed}"
    tree = base.model_dump(mode="json")
    schedule = base.schedule
    tree |= {"name": f"{sweep.name} {name}", "output": str(sweep.output / "points" / name), "seed": seed}
    tree["model"]["size"] = size.size
    tree["optimizer"]["learning_rate"] = size.learning_rate or base.optimizer.learning_rate
    tree["phases"][0]["until_step"] = steps
    tree["schedule"] = {
        "steps": steps,
        "warmup_steps": min(schedule.warmup_steps, steps // 4),
        "cooldown_steps": min(round(steps * schedule.cooldown_steps / schedule.steps), steps - steps // 4),
    }
    tree["checkpoint"] = {"every": -(-steps // 2), "keep": 1}
    tree["validation"] = {"every": steps, "windows": sweep.validation_windows}
    tree["tracking"] |= {"experiment": sweep.name, "registered_model": None, "parent_run": parent_run}
    return Point(size=size.size, tokens=tokens, config=parse_config(tree, PretrainConfig, where=f"point {name}"))


def is_finished(point: Point) -> bool:
    """Whether the point was trained to its end before, with these very settings.

    Raises:
        ConfigError: its folder holds a run of other settings.
        CheckpointError: it is marked complete, but its checkpoint is gone.
    """
    path = point.config.output / CONFIG
    if not path.exists():
        return False
    before = _settings(yaml.safe_load(path.read_text(encoding="utf-8")))
    now = _settings(yaml.safe_load(show_config(point.config)))
    for key, value in now.items():
        if before.get(key) != value:
            raise ConfigError(
                f"point {point.name}: {point.config.output} was trained with {key} {before.get(key)!r}, and the sweep "
                f"says {value!r}; give the sweep another output, or delete that folder"
            )
    complete = read_complete(point.config.output)
    return complete is not None and int(complete["step"]) >= point.config.schedule.steps


def _settings(tree: dict[str, Any]) -> dict[str, Any]:
    """What of a run's configuration decides its weights and its validation loss."""
    names = ("seed", "shuffle_block", "shuffle_time", "phases", "loss_factor", "tokenizer", "model", "optimizer")
    return {name: tree.get(name) for name in (*names, "schedule", "validation", "data")}


def rows_of(point: Point) -> list[dict[str, Any]]:
    """A finished point's lines of POINTS.csv, one per modality that was validated, and `epochs_by_source`.

    params: all of the model. tokens: of all modalities, as eaten (rows are not quite full). epochs: tokens of the
    line's modality, as eaten, by the distinct tokens of its training split.

    Raises:
        CheckpointError: the run's last validation is not in its log.
    """
    config, output = point.config, point.config.output
    scores = [row for row in read_lines(output / LOG) if "validation" in row and row["step"] == config.schedule.steps]
    complete = read_complete(output)
    if not scores or complete is None:
        raise CheckpointError(
            f"point {point.name}: {output / LOG} holds no validation of step {config.schedule.steps}; delete "
            f"{output} and call the sweep again"
        )
    eaten, distinct, modality = tokens_of(config, read_state(output / complete["checkpoint"]))
    planned = plan(config)
    sources = {name: [source for source in eaten if modality[source] == name] for name in modality.values()}
    return [
        {
            "modality": name,
            "params": planned["parameters"]["total"],
            "tokens": sum(eaten.values()),
            "loss": scores[-1]["validation"][name]["loss"],
            "flops": planned["flops_per_run"],
            "epochs": sum(eaten[one] for one in sources[name]) / sum(distinct[one] for one in sources[name]),
            "seed": config.seed,
            "size": point.size,
            "unit": _UNITS[name],
            "learning_rate": config.optimizer.learning_rate,
            "epochs_by_source": {one: eaten[one] / distinct[one] for one in sources[name]},
        }
        for name in sorted(scores[-1]["validation"])
    ]


def tokens_of(config: PretrainConfig, state: dict[str, Any]) -> tuple[dict[str, int], dict[str, int], dict[str, str]]:
    """Of each source: tokens that a run had eaten at a checkpoint, distinct tokens in its training split, modality."""
    store = Store.open(config.data)
    curriculum = parts.curriculum(config, store, starts=tuple(state["phase_starts"]))
    (corpus,) = curriculum.corpora
    given = corpus.order.given_until(int(state["next_sample"]))
    eaten, distinct = {}, {}
    for spec, windows, length, count in zip(corpus.specs, corpus.windows, corpus.lengths, given, strict=True):
        times = store.num_times(spec.source, "train")
        eaten[spec.source] = count * length
        distinct[spec.source] = times // windows.frame_times * (length // spec.frames)
    return eaten, distinct, {source: store.modality(source) for source in eaten}
