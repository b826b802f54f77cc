"""Compare two runs of a drill: losses of every step, final weights, and the samples that each step consumed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sci_gpt.train.checkpoint import latest, read_weights, step_of
from sci_gpt.train.run_folder import LOG, read_lines

Eaten = dict[int, Counter[tuple[int, str]]]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far a run is from another.

    Attributes:
        loss: largest |a - b| / |a| over all steps; infinite where a step is missing, stands twice, or has a loss in one
            run alone.
        weight: largest |a - b| over the elements of a tensor, divided by the tensor's largest |a|; over all tensors.
        keys: samples, with their step, that one run consumed and the other did not, or not as often.
        why: what is more than a number, for a person.
    """

    loss: float
    weight: float
    keys: int
    why: tuple[str, ...] = ()


def compare(straight: Path, other: Path) -> Difference:
    """Compare the run in folder `other` with the one in folder `straight`, both of them complete.

    Raises:
        ValueError: they are the same folder: a run is always equal to itself.
    """
    if straight.resolve() == other.resolve():
        raise ValueError(f"{straight} would be compared with itself")
    why: list[str] = []
    loss = loss_difference(read_lines(straight / LOG), read_lines(other / LOG), why=why)
    keys = keys_difference(eaten(straight), eaten(other), why=why)
    ends = [latest(straight), latest(other)]
    weight = math.inf
    if ends[0] is None or ends[1] is None or step_of(ends[0]) != step_of(ends[1]):
        why.append(f"last checkpoints are {', '.join('none' if end is None else end.name for end in ends)}")
    else:
        weight = weight_difference(read_weights(ends[0]), read_weights(ends[1]), why=why)
    return Difference(loss=loss, weight=weight, keys=keys, why=tuple(why))


def loss_difference(straight: list[dict[str, Any]], other: list[dict[str, Any]], *, why: list[str]) -> float:
    """Largest relative difference of the losses in two logs; what it is due to is added to `why`."""
    ours, theirs = (_losses(log) for log in (straight, other))
    worst, at = 0.0, 0
    for step in sorted(ours.keys() | theirs.keys()):
        a, b = ours.get(step, []), theirs.get(step, [])
        if len(a) != 1 or len(b) != 1:
            why.append(f"step {step} stands {len(b)} times in the log, {len(a)} times in the straight run's")
            return math.inf
        difference = _relative(a[0], b[0])
        if difference > worst:
            worst, at = difference, step
    if worst:
        why.append(f"losses differ most in step {at}: {theirs[at][0]} and {ours[at][0]} in the straight run")
    return worst


def weight_difference(
    straight: Mapping[str, Tensor], other: Mapping[str, Tensor], *, why: list[str] | None = None
) -> float:
    """Largest difference of the tensors, each relative to its own largest size in the straight run."""
    why = [] if why is None else why
    if straight.keys() != other.keys():
        why.append(f"tensors in one run alone: {', '.join(sorted(straight.keys() ^ other.keys()))}")
        return math.inf
    worst, at = 0.0, ""
    for name, tensor in straight.items():
        scale = float(tensor.abs().max()) if tensor.numel() else 0.0
        distance = float((tensor - other[name]).abs().max()) if tensor.numel() else 0.0
        difference = distance / scale if scale else distance
        if not difference <= worst:  # one that is no number is the worst
            worst, at = (difference if math.isfinite(difference) else math.inf), name
    if worst:
        why.append(f"weights differ most in {at}")
    return worst


def eaten(run: Path) -> Eaten:
    """(sample number, key) of every step, over all ranks' files, each as often as it stands there."""
    steps: Eaten = {}
    for path in sorted((run / "keys").glob("rank-*.jsonl")):
        for record in read_lines(path):
            pairs = zip(record["samples"], record["keys"], strict=True)
            steps.setdefault(record["step"], Counter()).update(pairs)
    return steps


def keys_difference(straight: Eaten, other: Eaten, *, why: list[str]) -> int:
    """How many samples are missing, repeated or extra in `other`; the first of them is added to `why`."""
    count = 0
    for step in sorted(straight.keys() | other.keys()):
        a, b = straight.get(step, Counter()), other.get(step, Counter())
        missing, extra = a - b, b - a
        if not count and (missing or extra):
            words = [f"{sum(missing.values())} missing, {sum(extra.values())} extra or repeated in step {step}"]
            words += [f"first missing: {min(missing)}"] if missing else []
            words += [f"first extra: {min(extra)}"] if extra else []
            why.append(f"samples: {', '.join(words)}")
        count += sum(missing.values()) + sum(extra.values())
    return count


def _losses(log: list[dict[str, Any]]) -> dict[int, list[float | None]]:
    found: dict[int, list[float | None]] = {}
    for record in log:
        if "validation" not in record:
            found.setdefault(record["step"], []).append(record["loss"])
    return found


def _relative(a: float | None, b: float | None) -> float:
    if a is None or b is None:
        return 0.0 if a is b else math.inf
    if a == b:
        return 0.0
    difference = abs(a - b) / abs(a) if a else math.inf
    return difference if math.isfinite(difference) else math.inf
