"""Save at one layout, go on at another: the next 10 losses and the samples against the run that went straight on."""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.layouts import Layout, apart, run
from benchmarks.results import machine, write_section
from sci_gpt.train.checkpoint import step_folder

PAGE = Path(__file__).resolve().parents[1] / "docs" / "parallel.md"
SAVED, STEPS = 10, 20
LIMIT = {"fp32": 1e-5, "bf16": 1e-3}
SAVES = [
    Layout(tensor=2, data=2, zero=3),
    Layout(tensor=2, sequence=2, zero=2),
    Layout(data=2, zero=1),
    Layout(data=2, zero=2, dtype="bf16"),
]
LOADS = [
    Layout(),
    Layout(data=4, zero=1),
    Layout(tensor=4, zero=1),
    Layout(sequence=2, data=2, zero=2),
    Layout(tensor=2, data=2, zero=3),
    Layout(tensor=2, sequence=2, zero=3),
    Layout(data=2, zero=2, dtype="bf16"),
    Layout(zero=0),
]


def go_on(saves: Sequence[Layout], loads: Sequence[Layout], *, data: Path, folder: Path) -> list[dict[str, Any]]:
    """Train `saves` straight through with a checkpoint in between, then go on from each at each of `loads`, and at its
    own layout; rows {saved, loaded, loss, same_samples, exact, within}.
    """
    trained = [
        replace(layout, steps=STEPS, save=SAVED, folder=str(folder / f"run-{number}"))
        for number, layout in enumerate(saves)
    ]
    straight = _run(trained, data)
    pairs = [
        (source, replace(layout, steps=STEPS, load=str(step_folder(Path(source.folder), SAVED))))
        for source in trained
        for layout in [replace(source, save=0), *(one for one in loads if _axes(one) != _axes(source))]
    ]
    seen = _run([layout for _, layout in pairs], data)
    rows = []
    for (source, layout), after in zip(pairs, seen, strict=True):
        before = straight[trained.index(source)]
        rest, same_layout = before["steps"][SAVED:], _axes(layout) == _axes(source)
        worst = apart(after["steps"], rest)["loss"]
        exact = [row["loss"] for row in after["steps"]] == [row["loss"] for row in rest]
        limit = LIMIT["bf16" if "bf16" in (layout.dtype, source.dtype) else "fp32"]
        same_samples = after["all_samples"] == before["all_samples"][SAVED:]
        rows.append(
            {
                "saved": source.name,
                "loaded": layout.name,
                "loss": worst,
                "exact": exact,
                "same_samples": same_samples,
                "within": same_samples and (exact if same_layout else worst <= limit) and math.isfinite(worst),
            }
        )
    return rows


def _axes(layout: Layout) -> tuple[Any, ...]:
    return (layout.tensor, layout.sequence, layout.data, layout.zero, layout.dtype)


def _run(layouts: Sequence[Layout], data: Path) -> list[dict[str, Any]]:
    """As `layouts.run`, of any numbers of processes, in the order given."""
    found: dict[int, dict[str, Any]] = {}
    for processes in sorted({layout.processes for layout in layouts}):
        numbers = [number for number, layout in enumerate(layouts) if layout.processes == processes]
        found |= dict(zip(numbers, run([layouts[number] for number in numbers], data), strict=True))
    return [found[number] for number in range(len(layouts))]


def lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The table."""
    out = [
        f"Saved after step {SAVED}; largest relative difference of the next {STEPS - SAVED} losses from the run that "
        f"went straight on (limit {LIMIT['fp32']:.0e}, with bf16 {LIMIT['bf16']:.0e}; at the same layout bit for bit).",
        "",
        "| saved at | goes on at | losses differ by | same samples | |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        differ = "0 (bit for bit)" if row["exact"] else f"{row['loss']:.1e}"
        verdict = "" if row["within"] else "**beyond**"
        out.append(
            f"| {row['saved']} | {row['loaded']} | {differ} | {'yes' if row['same_samples'] else 'no'} | {verdict} |"
        )
    return [*out, ""]


def main() -> int:
    """Exit code 1 where a pair is beyond the limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data/quickstart"), help="the quickstart's store")
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.name}")
    parsed = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sci-gpt-") as folder:
        rows = go_on(SAVES, LOADS, data=parsed.data, folder=Path(folder))
    text = lines(rows)
    minutes = (time.monotonic() - begun) / 60
    made = f"Made by `python -m benchmarks.any_to_any --write` in {minutes:.0f} min ({machine()})."
    print("\n".join([*text, made]))
    if parsed.write:
        write_section("any_to_any", [*text, made], title="From any layout to any other", path=PAGE)
    beyond = [f"{row['saved']} -> {row['loaded']}" for row in rows if not row["within"]]
    if beyond:
        print(f"beyond the limit: {'; '.join(beyond)}", file=sys.stderr)
    return 1 if beyond else 0


if __name__ == "__main__":
    raise SystemExit(main())
