"""The tables of a drill in docs/faults.md: every fault, on this machine or over the nodes of a Slurm allocation."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import machine, write_section
from sci_gpt.config import PretrainConfig
from sci_gpt.config_file import load_config
from sci_launch.drill import Options, run
from sci_launch.drill_place import Here, find_place

PAGE = Path(__file__).resolve().parents[1] / "docs" / "faults.md"
_NUMBERS = ("steps_lost", "recovery_seconds", "max_loss_difference", "max_weight_difference", "keys_differ")


def lines(rows: Sequence[Mapping[str, Any]], *, processes: int, where: str, seconds: float) -> list[str]:
    """The section: a row for each fault."""
    out = [
        f"The quickstart's model, data and rows on {processes} processes {where}, 24 steps, a checkpoint every 6; "
        f"{seconds / 60:.0f} minutes.",
        "",
        "| fault | passed | steps lost | seconds to recover | losses differ | weights differ | samples differ |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        numbers = ["-" if row[name] is None else f"{row[name]:.3g}" for name in _NUMBERS]
        verdict = "yes" if row["passed"] else f"**no**: {row['why']}"
        out.append(f"| {row['fault']} | {verdict} | {' | '.join(numbers)} |")
    return [*out, "", f"Made by `python -m benchmarks.drill --write` ({machine()})."]


def main(arguments: Sequence[str] | None = None) -> int:
    """Drill, print the table; the drill's exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("configs/pretrain/quickstart.yaml"))
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--output", type=Path, help="folder of the drill's runs")
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.name}")
    parsed = parser.parse_args(arguments)
    here = isinstance(find_place(), Here)
    began = time.monotonic()
    options = Options(processes=parsed.processes, output=parsed.output)
    result, code = run(load_config(parsed.config, PretrainConfig), options)
    where = "of one machine" if here else "over the nodes of a Slurm allocation"
    out = lines(result["faults"], processes=parsed.processes, where=where, seconds=time.monotonic() - began)
    print("\n".join(out))
    if parsed.write:
        name, title = ("drill", "What it found on one machine") if here else ("drill-nodes", "What it found on nodes")
        write_section(name, out, title=title, path=PAGE)
    return code


if __name__ == "__main__":
    sys.exit(main())
