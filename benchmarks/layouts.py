"""Train the quickstart's real mixed batches at several layouts, in real processes, and give back losses and norms.

Used by parity.py, any_to_any.py and traffic.py, and in short form by the tests.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.counted import Counted
from sci_gpt.config import PretrainConfig
from sci_gpt.config_file import load_config
from sci_gpt.data.store import Store
from sci_gpt.model.inputs import ModelInputs
from sci_gpt.model.transformer import SciGPT
from sci_gpt.parallel.engine import Engine
from sci_gpt.parallel.groups import Groups
from sci_gpt.parallel.tensor import slice_of
from sci_gpt.parallel.worker import leaving
from sci_gpt.parallel.world import World
from sci_gpt.recipes import parts
from sci_gpt.recipes.pretrain import make_engine, make_model
from sci_gpt.recipes.validation import Validation
from sci_gpt.train import fragments
from sci_gpt.train.checkpoint import Reader, read_state
from sci_gpt.train.commit import CheckpointWriter
from sci_gpt.train.feed import Prefetch, StepReader, StepRows
from sci_gpt.train.objective import NextFrame
from sci_gpt.train.signals import Requests
from sci_gpt.train.trainer import Parts, Settings, Trainer
from sci_launch.local import run_workers
from sci_tokenizers.packing import Batch

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "pretrain" / "quickstart.yaml"
# Not as in the quickstart: a trunk whose heads four processes can share, two micro-batches, clipping in every step, a
# warm-up that is over soon, and a tenth of the rate (docs/parallel.md says why).
CHANGES = {
    "model.size": "200k",
    "optimizer.learning_rate": 5e-4,
    "parallel.accumulation": 2,
    "optimizer.clip": 0.05,
    "schedule.warmup_steps": 4,
    "schedule.cooldown_steps": 0,
}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One training: tensor, sequence and data axes, ZeRO stage, type, and more settings of the configuration.

    Attributes:
        steps: up to which it trains.
        base: configuration of the run; by default the quickstart's, with `CHANGES`.
        save: completed steps after which it writes a checkpoint into `folder`.
        load: checkpoint from which it starts.
        count: bytes of collectives are counted.
        validate: the last step is followed by a validation (which is not counted).
    """

    tensor: int = 1
    sequence: int = 1
    data: int = 1
    zero: int = 1
    dtype: str = "fp32"
    steps: int = 20
    base: str = ""
    changes: dict[str, Any] = field(default_factory=dict)
    folder: str = ""
    save: int = 0
    load: str = ""
    count: bool = False
    validate: bool = False

    @property
    def processes(self) -> int:
        """How many it takes."""
        return self.tensor * self.sequence * self.data

    @property
    def name(self) -> str:
        """For a table."""
        axes = {"TP": self.tensor, "SP": self.sequence, "DP": self.data}
        return f"{' x '.join(f'{axis}{size}' for axis, size in axes.items())}, ZeRO {self.zero}, {self.dtype}"

    def config(self, data: str | Path) -> PretrainConfig:
        """The configuration of this layout on the store `data`."""
        changes = {
            "data": data,
            **({} if self.base else CHANGES),
            "schedule.steps": self.steps,
            "phases.0.until_step": self.steps,
            "parallel.processes": self.processes,
            "parallel.tensor_parallel": self.tensor,
            "parallel.sequence_parallel": self.sequence,
            "parallel.zero_stage": self.zero,
            "parallel.dtype": self.dtype,
            **self.changes,
        }
        overrides = tuple(f"{key}={value}" for key, value in changes.items())
        return load_config(Path(self.base) if self.base else CONFIG, PretrainConfig, overrides=overrides)


class _Records:
    """A journal that keeps the records in memory."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self.samples: list[list[int]] = []

    def consumed(self, step: int, rows: StepRows) -> None:
        """Samples of this process."""
        self.samples.append(list(rows.samples))

    def step(self, record: dict[str, Any]) -> None:
        """A completed step."""
        self.steps.append({name: record[name] for name in ("step", "loss", "gradient_norm", "losses", "applied")})

    def validation(self, step: int, scores: Any) -> None:
        """Nothing is validated."""


class _Counting:
    """The objective, and the tokens of each batch that it was given."""

    def __init__(self, objective: NextFrame, tokens: list[int]) -> None:
        self.objective, self.tokens = objective, tokens
        self.weights, self.sums = objective.weights, objective.sums

    def inputs(self, batch: Batch) -> ModelInputs:
        """As the objective's."""
        self.tokens.append(int((batch.document >= 0).sum()))
        return self.objective.inputs(batch)


def train(layout: Layout, world: World, *, data: str, session: str) -> dict[str, Any]:
    """Train one layout in this process and its like: steps {loss, gradient_norm, ..} and this process's samples."""
    config = layout.config(data)
    model = make_model(config)
    engine = make_engine(config, model, world=world)
    step, next_sample = 0, 0
    if layout.load:
        fragments.load(engine, Reader(Path(layout.load)))
        state = read_state(Path(layout.load))
        step, next_sample = state["step"], state["next_sample"]
    records, tokens = _Records(), list[int]()
    with CheckpointWriter(Path(layout.folder), rank=world.rank, size=world.size, session=session) as writer:

        def save(step: int, next_sample: int) -> None:
            if step == layout.save:
                writer.save(step, fragments.hold(engine), state={"step": step, "next_sample": next_sample})

        trainer = Trainer(
            _parts(config, engine, journal=records, save=save, tokens=tokens),
            Settings(
                schedule=parts.schedule(config),
                factor=parts.loss_factor(config),
                checkpoint_every=layout.save or layout.steps,
                validate_every=10**9,
                most_passed_over=0,
            ),
            step=step,
            next_sample=next_sample,
        )
        counted = Counted(_axes_of(engine.groups)) if layout.count else None
        with counted or nullcontext():
            trainer.run()
    scores = {}
    if layout.validate:
        with engine.precision():
            scores = Validation(config, Store.open(config.data), world=world)(engine.module)
    facts = _facts(engine, model, tokens=tokens)
    engine.close()
    return {
        "name": layout.name,
        "steps": records.steps,
        "samples": records.samples,
        "validation": scores,
        "traffic": counted.table() if counted else [],
        "facts": facts,
    }


def _parts(
    config: PretrainConfig, engine: Engine, *, journal: _Records, save: Callable[[int, int], None], tokens: list[int]
) -> Parts:
    """What the trainer works with; nothing is validated, and `tokens` gets those of each micro-batch."""
    world, settings = engine.world, parts.model_settings(config)
    curriculum = parts.curriculum(config, Store.open(config.data))
    objective = NextFrame(settings=settings.tokenizer, device=world.device, noise=settings.noise, seed=config.seed)
    reading = StepReader(curriculum, parts.place(config, rank=world.rank), settings=settings.tokenizer)
    return Parts(
        engine=engine,
        feed=Prefetch(reading),
        objective=_Counting(objective, tokens),
        journal=journal,
        save=save,
        validate=lambda model: {},
        requests=Requests(),
        name=curriculum.name,
    )


def _axes_of(groups: Groups | None) -> dict[str, str]:
    if groups is None:
        return {}
    named = {"tensor": groups.tensor, "sequence": groups.sequence, "zero": groups.zero}
    return {group.group_name: axis for axis, group in named.items() if group is not None}


def _facts(engine: Engine, model: SciGPT, *, tokens: list[int]) -> dict[str, Any]:
    """What the bytes of a step follow from: parameters held (below ZeRO 3), the trunk, tokens of each micro-batch."""
    held = 0
    for parameter in model.parameters():
        part = slice_of(parameter)
        entries = math.prod(fragments.whole_shape(parameter))
        held += entries if part is None else entries // part.shape[part.dim] * part.width
    return {
        "held": held,
        "accumulation": engine.plan.accumulation,
        "layers": model.shape.layers,
        "width": model.shape.width,
        "head_width": model.shape.head_width,
        "tokens": tokens,
    }


def run(layouts: Sequence[Layout], data: Path, *, threads: int = 1) -> list[dict[str, Any]]:
    """Train layouts of one number of processes, one after another in the same processes; what rank 0 saw of each, and
    the samples of all.

    Raises:
        WorkerFailure: a process crashed.
    """
    (processes,) = {layout.processes for layout in layouts}
    with tempfile.TemporaryDirectory(prefix="sci-gpt-") as folder:
        task = Path(folder) / "task.json"
        task.write_text(json.dumps({"data": str(data), "layouts": [asdict(layout) for layout in layouts]}))
        run_workers(
            ["benchmarks.layouts", str(task)],
            processes=processes,
            threads=threads,
            meeting_place=Path(folder) / "meet",
        )
        ranks = [json.loads((Path(folder) / f"seen-{rank}.json").read_text()) for rank in range(processes)]
    return [_together(of_ranks) for of_ranks in zip(*ranks, strict=True)]


def _together(ranks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What rank 0 saw, and `all_samples`, those of all ranks step by step."""
    shares = [rank["samples"] for rank in ranks if rank["samples"]]
    return ranks[0] | {"all_samples": [sorted(sum(step, [])) for step in zip(*shares, strict=True)]}


def apart(mine: Sequence[dict[str, Any]], reference: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Largest relative difference of losses and of gradient norms over the steps that both have; inf where one has a
    step less, or was skipped."""
    if [row["step"] for row in mine] != [row["step"] for row in reference]:
        return {"loss": math.inf, "gradient_norm": math.inf}
    worst = {"loss": 0.0, "gradient_norm": 0.0}
    for name in worst:
        for one, other in zip(mine, reference, strict=True):
            broken = one[name] is None or other[name] is None or not (one["applied"] and other["applied"])
            worst[name] = max(worst[name], math.inf if broken else abs(one[name] - other[name]) / abs(other[name]))
    return worst


def main() -> None:
    """A worker: `python -m benchmarks.layouts TASK.json`."""
    task = json.loads(Path(sys.argv[1]).read_text())
    with leaving(), Requests().listening():
        world = World.start(threads=1, timeout_seconds=60.0)
        session = world.share("layouts")
        seen = [train(Layout(**one), world, data=task["data"], session=session) for one in task["layouts"]]
        Path(sys.argv[1]).with_name(f"seen-{world.rank}.json").write_text(json.dumps(seen))
        world.stop()


if __name__ == "__main__":
    main()
