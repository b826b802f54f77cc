"""A fitted law as lines for a person, and as a folder with JSON and figures."""

from __future__ import annotations

import json
import math
from pathlib import Path

from sci_evals.figures import save
from sci_evals.law_fit import ALLOCATION, BUDGETS, Fit
from sci_evals.law_uncertainty import Interval
from sci_evals.laws import PARAMETERS
from sci_evals.laws_plot import draw_fit, draw_isoflops
from sci_gpt.errors import DataError


def describe(result: Fit) -> str:
    """The fit as lines for a person."""
    points, percent = result.points, f"{100 * result.level:g} %"
    sizes, budgets = points.distinct()
    lines = [f"L(N, D) = E + A / N^alpha + B / D^beta, {len(points)} points: {sizes} params x {budgets} tokens"]
    logarithms = {"A": "ln A", "B": "ln B"}
    for name in PARAMETERS:
        error = result.standard_errors[name]
        known = "" if name in result.not_identifiable else f"standard error of {logarithms.get(name, name)} {error:.2g}"
        low_high = f"{percent} {_ends(result.intervals[name])}"
        lines.append(f"{name:<6}{_value(result.values[name]):>10}   {low_high:<30} {known}".rstrip())
    lines.append(
        f"objective {result.objective:.6g} (sum of Huber losses), residual {100 * result.residual_rms:.3g} % of the "
        f"loss (root mean square), condition number {result.condition:.2g}"
    )
    if ALLOCATION not in result.not_identifiable:
        for symbol, name in (("N", "exponent_params"), ("D", "exponent_tokens")):
            interval_text = _ends(result.intervals[name])
            lines.append(f"{symbol}_opt ~ C^{result.values[name]:.3f}, {percent} {interval_text}")
        for times in BUDGETS:
            params, tokens = (
                f"{_value(result.values[key])} {_ends(result.intervals[key])}"
                for key in (f"params_{times}x", f"tokens_{times}x")
            )
            flops = times * float(points.flops.max())
            far = "" if times == 1 else f" ({times} times the largest of the points)"
            lines.append(f"at C = {flops:.3g} FLOPs{far}: N_opt {params}, D_opt {tokens}")
    lines += [f"NOT IDENTIFIABLE  {name}: {why}" for name, why in result.not_identifiable.items()]
    return "\n".join(lines)


def write_fit(result: Fit, folder: Path, *, title: str | None) -> list[Path]:
    """fit.json, fit.png and isoflop.png in `folder`, made if need be; their paths.

    Raises:
        DataError: the folder is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise DataError(f"--out {str(folder)!r} is a file; name a folder")
    folder.mkdir(parents=True, exist_ok=True)
    written = folder / "fit.json"
    written.write_text(json.dumps(result.to_json(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return [
        written,
        save(draw_fit(result, title=title), folder / "fit.png"),
        save(draw_isoflops(result, title=title), folder / "isoflop.png"),
    ]


def _value(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "beyond 1e308"


def _ends(interval: Interval) -> str:
    if interval == (None, None):
        return "no interval"
    return "[" + ", ".join("open" if end is None else f"{end:.4g}" for end in interval) + "]"
