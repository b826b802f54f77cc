"""20 losses and gradient norms at every layout within 4 processes, against one process; exits 1 beyond limits."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.layouts import Layout, apart, run
from benchmarks.results import machine, write_section

PAGE = Path(__file__).resolve().parents[1] / "docs" / "parallel.md"
AXES = [(2, 1, 1), (1, 2, 1), (1, 1, 2), (4, 1, 1), (1, 4, 1), (1, 1, 4), (2, 2, 1), (2, 1, 2), (1, 2, 2)]
STEPS = 20
# Largest relative difference: fp32 as the design asks; bf16 rounds partial sums (2^-8 each) in another order, and after
# some steps the weights differ by as much.
LIMITS = {"fp32": {"loss": 1e-5, "gradient_norm": 1e-5}, "bf16": {"loss": 1e-3, "gradient_norm": 2e-2}}


def table(axes: Sequence[tuple[int, int, int]] = AXES, dtypes: Iterable[str] = ("fp32", "bf16")) -> list[Layout]:
    """All layouts that are compared: each (TP, SP, DP) at ZeRO 1, 2, 3, and ZeRO 0 where it is allowed."""
    layouts = [
        Layout(tensor=tensor, sequence=sequence, data=data, zero=zero, dtype=dtype, steps=STEPS)
        for dtype in dtypes
        for tensor, sequence, data in [(1, 1, 1), *axes]
        for zero in (0, 1, 2, 3)
        if zero or (tensor == sequence == 1 and dtype == "fp32")
    ]
    return sorted(layouts, key=lambda layout: layout.processes)


def reference(layout: Layout) -> Layout:
    """One process, against which a layout is held: the first stage that has master weights."""
    return Layout(zero=1, dtype=layout.dtype, steps=STEPS, changes=layout.changes)


def compare(layouts: Sequence[Layout], data: Path) -> list[dict[str, Any]]:
    """Train all, a process group for each number of processes; rows {layout, loss, gradient_norm, within}."""
    wanted = list({layout.dtype: reference(layout) for layout in layouts}.values())
    references = dict(zip([layout.dtype for layout in wanted], run(wanted, data), strict=True))
    rows = []
    for processes in sorted({layout.processes for layout in layouts}):
        group = [layout for layout in layouts if layout.processes == processes]
        begun = time.monotonic()
        for layout, seen in zip(group, run(group, data), strict=True):
            worst = apart(seen["steps"], references[layout.dtype]["steps"])
            within = all(worst[name] <= limit for name, limit in LIMITS[layout.dtype].items())
            rows.append({"layout": layout, **worst, "within": within})
        print(f"{processes} processes: {len(group)} layouts in {time.monotonic() - begun:.0f} s", flush=True)
    return rows


def lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The table: a row per (TP, SP, DP) and type, the stages side by side."""
    out = []
    for dtype in ("fp32", "bf16"):
        of_type = [row for row in rows if row["layout"].dtype == dtype]
        if not of_type:
            continue
        limits = LIMITS[dtype]
        out += [
            f"{dtype}, largest relative difference over {STEPS} steps, loss / gradient norm "
            f"(limits {limits['loss']:.0e} / {limits['gradient_norm']:.2g}):",
            "",
            "| TP | SP | DP | ZeRO 0 | ZeRO 1 | ZeRO 2 | ZeRO 3 |",
            "|---|---|---|---|---|---|---|",
        ]
        for axes in dict.fromkeys((r["layout"].tensor, r["layout"].sequence, r["layout"].data) for r in of_type):
            cells = {
                r["layout"].zero: f"{r['loss']:.1e} / {r['gradient_norm']:.1e}{'' if r['within'] else ' **beyond**'}"
                for r in of_type
                if (r["layout"].tensor, r["layout"].sequence, r["layout"].data) == axes
            }
            out.append(f"| {' | '.join(str(a) for a in axes)} | {' | '.join(cells.get(z, '') for z in range(4))} |")
        out.append("")
    return out


def main() -> int:
    """Exit code 1 where a layout is beyond the limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data/quickstart"), help="the quickstart's store")
    parser.add_argument("--dtypes", nargs="+", choices=list(LIMITS), default=list(LIMITS), help="of these types alone")
    parser.add_argument("--processes", type=int, default=4, help="layouts of at most so many")
    parser.add_argument("--rate", type=float, help="another learning rate, into a table of its own")
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.name}")
    parsed = parser.parse_args()
    begun = time.monotonic()
    changes = {"optimizer.learning_rate": parsed.rate} if parsed.rate else {}
    layouts = [replace(layout, changes=changes) for layout in table(dtypes=parsed.dtypes)]
    rows = compare([layout for layout in layouts if layout.processes <= parsed.processes], parsed.data)
    minutes, words = (time.monotonic() - begun) / 60, " ".join(sys.argv[1:])
    made = f"Made by `python -m benchmarks.parity {words}` in {minutes:.0f} min ({machine()})."
    for dtype in parsed.dtypes:
        text = [*lines([row for row in rows if row["layout"].dtype == dtype]), made]
        print("\n".join(text))
        if parsed.write:
            name, title = f"parity-{dtype}", f"Any layout, the same loss: {dtype}"
            if parsed.rate:
                name, title = f"{name}-rate", f"{title}, learning rate {parsed.rate:g}"
            write_section(name, text, title=title, path=PAGE)
    beyond = [row["layout"].name for row in rows if not row["within"]]
    if beyond:
        print(f"beyond the limit: {'; '.join(beyond)}", file=sys.stderr)
    return 1 if beyond else 0


if __name__ == "__main__":
    raise SystemExit(main())
