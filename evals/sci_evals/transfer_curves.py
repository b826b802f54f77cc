"""Curves of a transfer: error over examples with intervals, examples saved at equal error, and the verdict in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

FINETUNED, SCRATCH, ANCHOR = "finetuned", "from scratch", "linear prior alone"
NOT_IDENTIFIABLE = "not identifiable"
_MOST_LOST = 0.05  # share of resamples without a crossing above which an end of the interval is open


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Errors of one task.

    Attributes:
        examples: ascending.
        errors: {arm: float64 (seed, examples)}, on all test windows.
        resampled: {arm: float64 (resample, examples)}, blocks of test windows and seeds drawn anew together.
        level: of intervals, 0..1.
    """

    examples: tuple[int, ...]
    errors: dict[str, np.ndarray]
    resampled: dict[str, np.ndarray]
    level: float

    def interval(self, values: np.ndarray) -> tuple[float, float]:
        """The central interval of resampled values."""
        tail = 50 * (1 - self.level)
        low, high = np.percentile(values, [tail, 100 - tail])
        return float(low), float(high)


def resample(
    sums: dict[str, np.ndarray], weights: np.ndarray, *, blocks: np.ndarray, resamples: int, seed: int
) -> dict[str, np.ndarray]:
    """Mean errors over blocks and seeds drawn with replacement, the same draws for every arm: (resample, examples).

    Args:
        sums: {arm: (seed, examples, window)}, weighted error sums.
        weights: (window,).
        blocks: int (window,), the block of each: windows of one block are not independent.
        resamples, seed: of the drawing.
    """
    names, inside = np.unique(blocks, return_inverse=True)
    member = np.zeros((len(blocks), len(names)))
    member[np.arange(len(blocks)), inside] = 1.0
    num_seeds = next(iter(sums.values())).shape[0]
    random = np.random.default_rng(seed)
    drawn = random.multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
    seeds = random.integers(num_seeds, size=(resamples, num_seeds))
    weight = drawn @ (weights @ member)
    found = {}
    for arm, rows in sums.items():
        by_block = rows @ member  # (seed, examples, block)
        per_seed = np.einsum("rb,seb->rse", drawn, by_block) / weight[:, None, None]
        found[arm] = np.take_along_axis(per_seed, seeds[:, :, None] % rows.shape[0], axis=1).mean(axis=1)
    return found


def needed(examples: Sequence[int], errors: np.ndarray, *, target: float) -> float:
    """Examples at which a curve first reaches an error, log-linear between its points.

    Returns:
        The number; -inf where the curve is below the target at its smallest number; inf where it never reaches it.
    """
    x, y = np.log(np.asarray(examples, float)), np.log(np.asarray(errors, float))
    goal = math.log(target)
    if y[0] <= goal:
        return -math.inf
    for i in range(len(x) - 1):
        if y[i + 1] <= goal:
            return float(np.exp(x[i] + (x[i + 1] - x[i]) * (y[i] - goal) / (y[i] - y[i + 1])))
    return math.inf


def saved(curves: Curves) -> dict[str, Any]:
    """Examples saved at equal error: those with which training from scratch first does as well as with its most, less
    those that a finetuned model needs for that. Where its curve falls to the end the first is its most.

    Returns:
        {"status": "found" | "at least" | "not identifiable", "error", "examples_needed", "saved", "low", "high",
        "why"}; `low` and `high` are None where too many resamples have no crossing.
    """
    most, least = curves.examples[-1], curves.examples[0]
    fine, scratch = (curves.errors[arm].mean(axis=0) for arm in (FINETUNED, SCRATCH))
    target = float(scratch[-1])
    found, enough = (needed(curves.examples, errors, target=target) for errors in (fine, scratch))
    draws = np.array(
        [
            max(needed(curves.examples, b, target=float(b[-1])), least)
            - needed(curves.examples, a, target=float(b[-1]))
            for a, b in zip(curves.resampled[FINETUNED], curves.resampled[SCRATCH], strict=True)
        ]
    )
    answer: dict[str, Any] = {"error": target, "examples_needed": None, "saved": None, "low": None, "high": None}
    if scratch[0] <= target:
        why = f"from scratch, {least} examples are as good as {most}: its curve does not fall, so none can be saved"
        return answer | {"status": NOT_IDENTIFIABLE, "why": why}
    if found == math.inf:
        why = f"the finetuned model does not reach the error of {most} examples from scratch with up to {most}"
        return answer | {"status": NOT_IDENTIFIABLE, "why": why}
    never, always = np.isneginf(draws).mean() > _MOST_LOST, np.isposinf(draws).mean() > _MOST_LOST
    low, high = curves.interval(np.clip(draws, least - most, most - least))
    if never and always:
        why = f"resampled curves cross in {100 * np.isfinite(draws).mean():.0f} % of the cases only"
        return answer | {"status": NOT_IDENTIFIABLE, "why": why}
    known = {"low": None if never else low, "high": None if always else high}
    if math.isinf(found):
        why = f"with {least} examples the finetuned model is already as good as {most} from scratch: the curves do not "
        return answer | known | {"status": "at least", "saved": enough - least, "why": why + "cross"}
    why = "" if round(enough) == most else f"from scratch, {enough:.0f} examples are as good as {most}"
    return answer | known | {"status": "found", "examples_needed": found, "saved": enough - found, "why": why}


def verdict(task: str, curves: Curves) -> list[str]:
    """The verdict in words: the ratio of errors with interval at each number of examples, then the examples saved."""
    lines, signs = [], []
    percent = f"{100 * curves.level:g} %"
    for number, count in enumerate(curves.examples):
        ratio = float(curves.errors[FINETUNED][:, number].mean() / curves.errors[SCRATCH][:, number].mean())
        low, high = curves.interval(curves.resampled[FINETUNED][:, number] / curves.resampled[SCRATCH][:, number])
        signs.append(1 if high < 1 else -1 if low > 1 else 0)
        says = {1: "finetuning is better", -1: "from scratch is better", 0: "no difference is established"}[signs[-1]]
        lines.append(f"{task}, {count} examples: error ratio {ratio:.3f} {percent} [{low:.3f}, {high:.3f}]: {says}")
    rescue = saved(curves)
    if rescue["status"] == NOT_IDENTIFIABLE:
        lines.append(f"{task}: examples saved at equal error: {NOT_IDENTIFIABLE} ({rescue['why']})")
    else:
        ends = [("open" if rescue[end] is None else f"{rescue[end]:.0f}") for end in ("low", "high")]
        more = "at least " if rescue["status"] == "at least" else ""
        because = f" ({rescue['why']})" if rescue["why"] else ""
        lines.append(
            f"{task}: examples saved at equal error: {more}{rescue['saved']:.0f} of {curves.examples[-1]}, {percent} "
            f"[{', '.join(ends)}]{because}"
        )
    worth = (
        "pretraining is worth it here" if 1 in signs and -1 not in signs else
        "pretraining is not worth it here" if -1 in signs and 1 not in signs else
        "it depends on the number of examples" if 1 in signs else
        "nothing is established either way"
    )  # fmt: skip
    return [*lines, f"{task}: {worth}"]
