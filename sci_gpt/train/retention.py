"""Which checkpoints of a run stay: the last ones, one every so many steps, and the best by validation loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Retention:
    """The rule.

    Attributes:
        last: newest checkpoints that stay.
        every: checkpoints at multiples of this many steps stay too; None: none for that reason.
        best: so many with the lowest validation loss stay too.
    """

    last: int = 2
    every: int | None = None
    best: int = 0

    def kept(self, losses: Mapping[int, float | None]) -> set[int]:
        """The steps that stay.

        Args:
            losses: of every committed step the validation loss (see `validation_loss`), None where there is none. Of
                equal ones the newest count as best.
        """
        steps = sorted(losses)
        stay = set(steps[-self.last :])
        if self.every is not None:
            stay |= {step for step in steps if step % self.every == 0}
        ranked = sorted((loss, -step) for step, loss in losses.items() if loss is not None)
        return stay | {-step for _, step in ranked[: self.best]}

    def most(self, steps: int) -> int:
        """How many checkpoints a run of so many steps keeps at most."""
        return self.last + self.best + (0 if self.every is None else steps // self.every)


def validation_loss(scores: Mapping[str, Mapping[str, float]], factor: Mapping[str, float]) -> float | None:
    """One number for a validation: its losses, weighed by the factors that weigh the modalities in training.

    Args:
        scores: {modality: {"loss": ..}}.
        factor: of each modality in the training loss.

    Returns:
        sum of factor x loss over the modalities / sum of their factors; None where nothing weighs, or it is not finite.
    """
    weights = {name: factor[name.split("/")[0]] for name in scores}
    whole = sum(weights.values())
    loss = sum(weights[name] * scores[name]["loss"] for name in scores) / whole if whole > 0 else math.nan
    return loss if math.isfinite(loss) else None
