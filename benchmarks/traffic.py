"""Bytes that each collective of a training step carries, counted, against theory; exits 1 beyond what is explained."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import layouts
from benchmarks.results import machine, write_section

PAGE = Path(__file__).resolve().parents[1] / "docs" / "parallel.md"
TOLERANCE = 0.02
# By default DeepSpeed keeps small parameters whole, and what it gathered until it holds a thousand million elements: a
# small model would be gathered once, where a large one is gathered for the forward and again for the backward pass.
AS_LARGE = {
    "parallel.extra_deepspeed": "{zero_optimization: {stage3_param_persistence_threshold: 0, "
    "stage3_max_live_parameters: 0, stage3_max_reuse_distance: 0, stage3_prefetch_bucket_size: 0}}"
}
CHOSEN = (  # of two processes, of four
    (
        layouts.Layout(data=2, zero=1),
        layouts.Layout(data=2, zero=1, dtype="bf16"),
        layouts.Layout(data=2, zero=2),
        layouts.Layout(data=2, zero=2, dtype="bf16"),
        layouts.Layout(data=2, zero=3, changes=AS_LARGE),
        layouts.Layout(data=2, zero=3, dtype="bf16", changes=AS_LARGE),
        layouts.Layout(tensor=2),
        layouts.Layout(tensor=2, dtype="bf16"),
        layouts.Layout(sequence=2),
        layouts.Layout(sequence=2, dtype="bf16"),
    ),
    (
        layouts.Layout(tensor=2, data=2, zero=1),
        layouts.Layout(tensor=2, sequence=2, zero=2),
        layouts.Layout(sequence=2, data=2, zero=3, changes=AS_LARGE),
        layouts.Layout(tensor=2, data=2, zero=3, changes=AS_LARGE),
    ),
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A collective of a step: axis and kind, bytes counted and expected, the theory and what explains a difference."""

    axis: str
    kind: str
    counted: float
    expected: float
    theory: str

    @property
    def within(self) -> bool:
        """Whether theory and explanation give what was counted."""
        return abs(self.counted - self.expected) <= TOLERANCE * max(self.expected, 1.0)


def rows(layout: layouts.Layout, seen: dict[str, Any]) -> list[Row]:
    """Counted (of a training with `count`, see `layouts.train`) against expected, bytes per process and step."""
    steps, facts = len(seen["steps"]), seen["facts"]
    counted: Counter[tuple[str, str]] = Counter()
    for axis, kind, dtype, _calls, volume in seen["traffic"]:
        if dtype in ("float32", "bfloat16"):  # other types: numbers that ranks agree on, a few hundred bytes
            counted["zero" if axis == "world" else axis, kind] += volume / steps
    foreseen = [
        Row(axis=axis, kind=kind, counted=counted[axis, kind], expected=bytes_expected, theory=theory)
        for axis, kind, bytes_expected, theory in [*_of_zero(layout, facts), *_of_axes(layout, facts, steps=steps)]
    ]
    others = counted.keys() - {(row.axis, row.kind) for row in foreseen}
    return foreseen + [
        Row(axis=axis, kind=kind, counted=counted[axis, kind], expected=0.0, theory="not foreseen")
        for axis, kind in sorted(others)
    ]


def _of_zero(layout: layouts.Layout, facts: dict[str, Any]) -> list[tuple[str, str, float, str]]:
    """Gradients and weights among the processes that hold the same slices (Rajbhandari et al. 2020, section 7)."""
    if layout.data * layout.sequence == 1 or layout.zero == 0:
        return []
    held, wide, micro = facts["held"], _WIDE[layout.dtype], facts["accumulation"]
    if layout.zero == 3:
        return [
            ("zero", "reduce-scatter", 4.0 * held * micro, "P of gradients a micro-batch (fp32)"),
            ("zero", "all-gather", 2.0 * wide * held * micro, "2 P of weights a micro-batch: forward and backward"),
        ]
    sums = micro if layout.zero == 2 else 1
    often = "a micro-batch, which keeps its part alone" if layout.zero == 2 else "a step"
    whole = "summed whole (a ring carries 2 P; theory: reduce-scatter, P): DeepSpeed sums buckets of several owners"
    return [
        ("zero", "all-reduce", 4.0 * held * sums, f"P of gradients {often} (fp32), {whole}"),
        ("zero", "all-gather", float(wide * held), "P of weights a step"),
    ]


def _of_axes(layout: layouts.Layout, facts: dict[str, Any], *, steps: int) -> list[tuple[str, str, float, str]]:
    """Activations of the tensor and sequence axes."""
    layers, width, wide = facts["layers"], facts["width"], float(_WIDE[layout.dtype])
    own = sum(-(-count // layout.sequence) for count in facts["tokens"]) / steps
    found = []
    if layout.tensor > 1:
        norms = layers * facts["accumulation"] * 2 * facts["head_width"]
        theory = "4 sums of tokens x width a layer and micro-batch, 2 of a head's width (norms of queries and keys)"
        share = "; of each sequence rank's own tokens" if layout.sequence > 1 else ""
        found.append(("tensor", "all-reduce", wide * (4 * layers * own * width + norms) + _NORM_BYTES, theory + share))
    if layout.sequence > 1:
        theory = "queries, keys, values and what is mixed, forward and backward: 8 x own tokens x width a layer"
        share = "; of each tensor rank's own heads" if layout.tensor > 1 else ""
        sent = wide * 8 * layers * own * width / layout.tensor
        found.append(("sequence", "all-to-all", sent, theory + share))
        whole = wide * layout.sequence * own * width
        found.append(("sequence", "all-gather", whole, "what the heads get: all tokens x width"))
    return found


_WIDE = {"fp32": 4, "bf16": 2}  # bytes of a value
_NORM_BYTES = 4.0  # the gradient's norm, one number


def main() -> int:
    """Exit code 1 where a difference is not explained."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data/quickstart"), help="the quickstart's store")
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.name}")
    parsed = parser.parse_args()
    out = [
        "Bytes per process and optimizer step of two micro-batches, counted at the process groups: the size of the",
        "tensor that is summed, gathered or exchanged. P: bytes of what a process holds below ZeRO 3. At ZeRO 3",
        "DeepSpeed's limits on what it keeps are set to 0 (by default a model as small as this is gathered once).",
        "",
        "| layout | axis | collective | counted, kB | expected, kB | theory, and what differs from it |",
        "|---|---|---|---|---|---|",
    ]
    beyond = []
    counting = [[replace(layout, steps=4, count=True) for layout in group] for group in CHOSEN]
    seen_all = [seen for group in counting for seen in layouts.run(group, parsed.data)]
    for layout, seen in zip(itertools.chain(*counting), seen_all, strict=True):
        for row in rows(layout, seen):
            out.append(
                f"| {layout.name} | {row.axis} | {row.kind} | {row.counted / 1e3:,.1f} | {row.expected / 1e3:,.1f} "
                f"| {row.theory} |"
            )
            beyond += [] if row.within else [f"{layout.name}: {row.axis} {row.kind}"]
    out += ["", f"Made by `python -m benchmarks.traffic --write` ({machine()})."]
    print("\n".join(out))
    if parsed.write:
        write_section("traffic", out, title="What a step sends", path=PAGE)
    if beyond:
        print(f"not explained: {'; '.join(beyond)}", file=sys.stderr)
    return 1 if beyond else 0


if __name__ == "__main__":
    raise SystemExit(main())
