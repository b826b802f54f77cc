"""`sci-gpt finetune`: a file to a saved model, with the comparison that says what it was worth."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sci_evals import finetune_plot, finetune_report
from sci_evals.finetune_report import Comparison
from sci_gpt.errors import ConfigError, DataError
from sci_gpt.recipes.finetune import Finetuned, Request, finetune
from sci_gpt.recipes.forecast import FileOptions, kind_of, read_data
from sci_gpt.recipes.load import LoadedModel, load_model
from sci_gpt.recipes.register import ALIAS, track_finetuning
from sci_gpt.recipes.save import refuse_existing, save_model

_NAMES = str.maketrans("(),", "   ")  # what a metric's name may not hold
RESULT, PICTURE = "finetune.json", "finetune.png"


def _say(line: str) -> None:
    print(line, flush=True)


def parse_words(words: Mapping[str, Any]) -> Request:
    """A request from the words of a command line, as `arguments.finetune_arguments` names them.

    Raises:
        ConfigError: COL=UNIT without its sign, a place or missing code that is no number, a value out of range.
    """
    given: dict[str, Any] = {key: words[key] for key in ("name", "horizon", "context", "learning_rate", "max_steps")}
    given |= {key: words[key] for key in ("seed", "freeze")}
    given |= {"variables": tuple(words["variable"])}
    if words["place"]:
        given["place"] = FileOptions.parse(place=words["place"]).notes.place
    if words["target"]:
        given |= {
            "target": words["target"],
            "covariates": tuple(name for part in words["covariates"] for name in _unless_in(part)),
            "time": words["time"],
            "time_format": words["time_format"],
            "units": _pairs(words["units"], "units are COL=UNIT, as temp=degC"),
            "columns": _pairs(words["columns"], "columns are COL=VARIABLE[:UNIT]"),
            "missing": _codes(words["missing"]),
        }
    return Request.of(**given)


def _unless_in(part: str) -> list[str]:
    """Columns of one word: several with commas between, as in the other options."""
    return [name.strip() for name in part.split(",") if name.strip()]


def _pairs(words: Sequence[str], what: str) -> dict[str, str]:
    pairs = {}
    for word in (one for part in words for one in part.split(",")):
        name, sign, value = word.partition("=")
        if not sign or not name.strip() or not value.strip():
            raise ConfigError(f"{what}, got {word!r}")
        pairs[name.strip()] = value.strip()
    return pairs


def _codes(words: str | None) -> tuple[float, ...] | None:
    if words is None or words == "none":
        return None if words is None else ()
    try:
        return tuple(float(part) for part in words.split(","))
    except ValueError as error:
        raise ConfigError(f"--missing takes numbers with commas between, or none; got {words!r}") from error


def finetune_file(
    model_uri: str,
    path: Path,
    *,
    request: Request,
    out: Path,
    register: str | None = None,
    say: Callable[[str], None] = _say,
) -> dict[str, Any]:
    """Finetune a model on a file, compare, save; `out` holds model.json, model.safetensors, card.md and the report.

    Args:
        model_uri: as for `load_model`.
        path: a CSV, netCDF or miniSEED file.
        request: what is asked and said of the data.
        out: a folder that is not there yet.
        register: a name for it in the MLflow registry; None: not registered.
        say: takes the lines of progress, the table and the verdict.

    Returns:
        The content of finetune.json.

    Raises:
        ConfigError, DataError, UnitError, CheckpointError: what is asked or given cannot be understood or is too
            little; `out` exists.
    """
    begin = time.monotonic()
    refuse_existing(out)
    kind = kind_of(path)
    data, digest = read_data(kind, path)
    start = load_model(model_uri)
    try:
        result = finetune(start, data, request=request, say=say)
        comparison = finetune_report.compare(start, result, settings=request.settings, say=say)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    lines = finetune_report.table(comparison)
    for line in (*lines, comparison.verdict):
        say(line)
    report = _report(model_uri, path, request=request, result=result, digest=digest, comparison=comparison, out=out)
    origin = {"model": model_uri, "model_step": start.step, **{k: report[k] for k in ("data", "settings", "best_step")}}
    card = _card(start, request, report=report, lines=lines)
    save_model(result.model, out, origin=origin, card=card)
    finetune_plot.draw(comparison, out / PICTURE, target=result.prepared.target, unit=result.prepared.unit)
    report["seconds"] = round(time.monotonic() - begin, 1)
    (out / RESULT).write_text(json.dumps(report, indent=1, default=float) + "\n", encoding="utf-8")
    version = track_finetuning(out, params=_params(report), metrics=_metrics(report), register=register)
    if version is not None:
        say(f"registered models:/{register}@{ALIAS}, version {version}")
    say(f"saved {out} in {report['seconds']:.0f} s; picture: {out / PICTURE}; to forecast with it:")
    say(f"  {report['forecast']}")
    return report


def _report(
    model_uri: str,
    path: Path,
    *,
    request: Request,
    result: Finetuned,
    digest: str,
    comparison: Comparison,
    out: Path,
) -> dict[str, Any]:
    adapted, spec = result.adapted, result.prepared.blocks.spec
    horizon = max(spec.leads) * result.prepared.frame_times
    return {
        "model": model_uri,
        "data": {"file": str(path), "sha256": digest},
        "source": request.name,
        "target": result.prepared.target,
        "like": result.prepared.like,
        "windows": {"context": spec.context_frames[1], "leads": list(spec.leads)},
        "until": list(result.prepared.blocks.until),
        "settings": asdict(request.settings),
        "best_step": adapted.best_step,
        "history": [[step, None if loss != loss else loss, valid] for step, loss, valid in adapted.history],
        **finetune_report.plain(comparison),
        "forecast": f"sci-gpt forecast {out} {path} --source {request.name} --horizon {horizon} "
        f"--out forecast{path.suffix}",
    }


def _params(report: Mapping[str, Any]) -> dict[str, Any]:
    """What a run was made of, for MLflow."""
    flat = {key: report[key] for key in ("model", "source", "target", "like")}
    return flat | {"file": report["data"]["file"], "sha256": report["data"]["sha256"]} | report["settings"]


def _metrics(report: Mapping[str, Any]) -> dict[str, float]:
    """CRPS by name, and the differences with their intervals, where they are numbers."""
    found = {f"crps {row['name'].translate(_NAMES)}": row["crps"] for row in report["rows"]}
    for one in report["differences"]:
        found |= {f"{key} over {one['other'].translate(_NAMES)}": one[key] for key in ("share", "low", "high")}
    return {name: value for name, value in found.items() if math.isfinite(value)} | {"seconds": report["seconds"]}


def _card(start: LoadedModel, request: Request, *, report: dict[str, Any], lines: list[str]) -> str:
    """The model card in Markdown."""
    settings = request.settings
    return "\n".join(
        [
            f"# {request.name}: finetuned from {report['model']}",
            "",
            f"Pretrained for {start.step} steps on data `{start.fingerprint}` (code {start.code_version}), then "
            f"adapted to `{report['data']['file']}` (sha256 `{report['data']['sha256'][:12]}`): "
            f"{report['best_step']} steps of {settings.rows_per_step} documents, "
            f"learning rate {settings.learning_rate:g}, seed {settings.seed}.",
            "",
            report["verdict"],
            "",
            "```text",
            *lines,
            "```",
            "",
            "Not for warnings, operations or any decision on safety. Quantiles are marginal, per value and lead.",
            "The licence of the data is that of their owner and is not known here.",
            "",
        ]
    )
