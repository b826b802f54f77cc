"""The one small all-reduce of an optimizer step: everything that the ranks must agree on before the first backward."""

from __future__ import annotations

from dataclasses import dataclass, field

from sci_gpt.parallel.world import World
from sci_tokenizers.sample import LOSSES, MODALITIES


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
        previous_alone: seconds of the step before in which this rank waited for no other.
    """

    weight: dict[str, float] = field(default_factory=dict)
    passed_over: int = 0
    stop: bool = False
    save: bool = False
    wait_seconds: float = 0.0
    previous_loss: dict[str, float] = field(default_factory=dict)
    previous_broken: bool = False
    previous_alone: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """All ranks' parts together: the same on every rank.

    Attributes:
        weight, previous_loss: sums per modality.
        passed_over: sum.
        stop, save: any rank's.
        wait_seconds: the slowest rank's.
        previous_broken: the ranks whose loss was not finite.
        previous_alone, previous_share: of every rank, its seconds alone and its own loss sums.
    """

    weight: dict[str, float]
    passed_over: int
    stop: bool
    save: bool
    wait_seconds: float
    previous_loss: dict[str, float]
    previous_broken: tuple[int, ...]
    previous_alone: tuple[float, ...]
    previous_share: tuple[dict[str, float], ...]

    def global_weight(self, factor: dict[str, float]) -> float:
        """Sum over modalities of factor x valid weight: what every rank's loss is divided by."""
        return sum(factor[name.split("/")[0]] * weight for name, weight in self.weight.items())


def agree(world: World, report: Report) -> Agreement:
    """Exchange reports: a collective, called once per optimizer step by every rank."""
    values = [report.weight.get(name, 0.0) for name in MODALITIES]
    values += [report.previous_loss.get(name, 0.0) for name in MODALITIES]
    values += [float(report.passed_over), float(report.stop), float(report.save), float(report.previous_broken)]
    values.append(report.wait_seconds)
    flags, masked = 2 * len(MODALITIES), LOSSES[len(MODALITIES) :]
    values += [part.get(name, 0.0) for part in (report.weight, report.previous_loss) for name in masked]
    values.append(report.previous_alone)
    rows = world.gather(values)
    sums = [sum(column) for column in zip(*rows, strict=True)]
    count, last = len(MODALITIES), len(sums) - len(masked) - 1
    return Agreement(
        weight=_told(sums[:count] + sums[flags + 5 : last]),
        previous_loss=_told(sums[count : 2 * count] + sums[last:-1]),
        passed_over=round(sums[flags]),
        stop=sums[flags + 1] > 0,
        save=sums[flags + 2] > 0,
        previous_broken=tuple(rank for rank, row in enumerate(rows) if row[flags + 3] > 0),
        wait_seconds=max(row[flags + 4] for row in rows),
        previous_alone=tuple(row[-1] for row in rows),
        previous_share=tuple(_told(row[count : 2 * count] + row[last:-1]) for row in rows),
    )


def _told(sums: list[float]) -> dict[str, float]:
    """By name: every modality, and the masked objective where any rank has something of it."""
    return {name: value for name, value in zip(LOSSES, sums, strict=True) if name in MODALITIES or value != 0.0}
