"""The one small all-reduce of an optimizer step: everything that the ranks must agree on before the first backward."""

from __future__ import annotations

from dataclasses import dataclass, field

from sci_gpt.parallel.world import World
from sci_tokenizers.sample import LOSSES


@dataclass(frozen=True, kw_only=True)
class Report:
    """One rank's part.

    Attributes:
        weight: valid weight per modality of this step's micro-batches.
        passed_over: samples of this step that could not be read.
        stop, save: this rank was asked to stop after the step, to save after the step.
        wait_seconds: how long the rank waited for the step's data.
        previous_loss: loss sums per modality of the step before (its own report went out before the forward pass).
        previous_broken: the rank's loss of the step before was not finite.
    """

    weight: dict[str, float] = field(default_factory=dict)
    passed_over: int = 0
    stop: bool = False
    save: bool = False
    wait_seconds: float = 0.0
    previous_loss: dict[str, float] = field(default_factory=dict)
    previous_broken: bool = False


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """All ranks' parts together: the same on every rank.

    Attributes:
        weight, previous_loss: sums per modality.
        passed_over: sum.
        stop, save: any rank's.
        wait_seconds: the slowest rank's.
        previous_broken: the ranks whose loss was not finite.
    """

    weight: dict[str, float]
    passed_over: int
    stop: bool
    save: bool
    wait_seconds: float
    previous_loss: dict[str, float]
    previous_broken: tuple[int, ...]

    def global_weight(self, factor: dict[str, float]) -> float:
        """Sum over modalities of factor x valid weight: what every rank's loss is divided by."""
        return sum(factor[name.split("/")[0]] * self.weight[name] for name in LOSSES)


def agree(world: World, report: Report) -> Agreement:
    """Exchange reports: a collective, called once per optimizer step by every rank."""
    values = [report.weight.get(name, 0.0) for name in LOSSES]
    values += [report.previous_loss.get(name, 0.0) for name in LOSSES]
    values += [float(report.passed_over), float(report.stop), float(report.save), float(report.previous_broken)]
    values.append(report.wait_seconds)
    rows = world.gather(values)
    sums = [sum(column) for column in zip(*rows, strict=True)]
    count = len(LOSSES)
    return Agreement(
        weight=dict(zip(LOSSES, sums[:count], strict=True)),
        previous_loss=dict(zip(LOSSES, sums[count : 2 * count], strict=True)),
        passed_over=round(sums[2 * count]),
        stop=sums[2 * count + 1] > 0,
        save=sums[2 * count + 2] > 0,
        previous_broken=tuple(rank for rank, row in enumerate(rows) if row[2 * count + 3] > 0),
        wait_seconds=max(row[2 * count + 4] for row in rows),
    )
