"""The model card in Markdown: what a model was trained on, licences, scores with intervals, intended use and limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sci_gpt.config import PretrainConfig

_USE = """
## How to load it

```python
import sci_gpt

model = sci_gpt.load_model("THIS FOLDER")  # torch alone: neither DeepSpeed nor MLflow is needed
model.forecast(data, horizon=1)  # xarray, pandas or obspy in, the same kind out
```

`model.safetensors` holds the weights (fp32), `model.json` the configuration, the tokenizers' settings, the table of
variables and the statistics of the training split with the linear priors fitted to it. Nothing in here is pickled.

## Intended use

Research on pretraining for Earth data: forecasts with quantiles of grids, series and seismic traces like
those above, and adaptation to others.

## Limits

- Not for warnings, operations or any decision on safety; it forecasts waveforms, never earthquakes.
- Quantiles are marginal, per value and lead: no trajectories, no intervals of sums over time or space.
- Nothing is forecast beyond the largest lead that the nearest source was trained for.
- A source never seen is scaled by its own context; where the table above has nothing like it, expect little.
- Statistics come from the training split alone; the climate of other years is not in them.
"""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is known of a model's scores.

    Attributes:
        rows: of the run's evaluation.json, those of the trained model: skill with interval, against which baseline.
        interval: of the intervals, 0..1.
        missing: why there are no rows, in a sentence; empty where there are some.
    """

    rows: Sequence[Mapping[str, Any]] = ()
    interval: float = 0.9
    missing: str = "These weights were not evaluated when this card was written."


def card(
    config: PretrainConfig,
    description: Mapping[str, Any],
    *,
    manifest: Mapping[str, Any],
    evaluation: Evaluation | None = None,
) -> str:
    """The model card.

    Args:
        config: of the run.
        description: the content of model.json.
        manifest: of the data store, for licences and citations.
        evaluation: its scores; left out: none are known.
    """
    lines = [
        f"# {config.tracking.registered_model or config.name}",
        "",
        f"SciGPT, {description['num_parameters']:,} parameters, {_steps(config, description['step'])} tokens, "
        f"seed {config.seed}, code {description['code_version']}, data fingerprint `{description['fingerprint']}`.",
        "",
        "## Data",
        "",
        "| source | modality | nature | share of tokens | step, s | leads, frames | licence | citation |",
        "|---|---|---|---|---|---|---|---|",
    ]
    shares = _shares(config, int(description["step"]))
    for entry in config.mixture:
        row, facts = manifest["sources"][entry.source], description["sources"][entry.source]
        leads = ", ".join(str(lead) for lead in entry.leads)
        lines.append(
            f"| {entry.source} | {facts['modality']} | {row['nature']} | {100 * shares[entry.source]:.3g} % "
            f"| {facts['step_seconds']:g} | {leads} | {row['licence']} | {' '.join(str(row['citation']).split())} |"
        )
    lines += ["", "## Evaluation", "", *_evaluation(evaluation or Evaluation())]
    return "\n".join(lines) + "\n" + _USE


def _evaluation(evaluation: Evaluation) -> list[str]:
    """The table of scores, or why there is none."""
    if not evaluation.rows:
        return [evaluation.missing]
    lines = [
        "Held-out windows; skill = 1 - score / score of the best baseline on the same windows, with "
        f"{100 * evaluation.interval:g} % block-bootstrap intervals. Below 0 the baseline is better.",
        "",
        "| source | region | channel | lead | metric | skill | interval | score | best baseline | windows |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in evaluation.rows:
        span = "one block" if row["low"] is None else f"[{row['low']:+.4f}, {row['high']:+.4f}]"
        score = "" if row["score"] is None else f"{row['score']:.4g} {row['unit']}"
        lines.append(
            f"| {row['source']} | {row['region']} | {row['channel']} | {row['lead']} | {row['metric']} "
            f"| {row['skill']:+.4f} | {span} | {score} | {row['baseline']} | {row['num_windows']} |"
        )
    return lines


def _shares(config: PretrainConfig, step: int) -> dict[str, float]:
    """Each source's share of the tokens that `step` steps have eaten, by the weights of their phases."""
    tokens: dict[str, float] = dict.fromkeys((entry.source for entry in config.mixture), 0.0)
    start = 0
    for phase in config.phases:
        eaten = max(0, min(phase.until_step, step) - start) * phase.row_length * phase.rows_per_step
        total = sum(entry.weight for entry in phase.mixture)
        for entry in phase.mixture:
            tokens[entry.source] += eaten * entry.weight / total
        start = phase.until_step
    whole = sum(tokens.values())
    return {source: count / whole if whole else 0.0 for source, count in tokens.items()}


def _steps(config: PretrainConfig, step: int) -> str:
    """What the steps were made of: "100 steps of 3,584, then 50 of 8,192"."""
    taken: list[str] = []
    start = 0
    for phase in config.phases:
        if start < step or not taken:
            steps = f"{min(phase.until_step, step) - start}{'' if taken else ' steps'}"
            taken.append(f"{steps} of {phase.row_length * phase.rows_per_step:,}")
        start = phase.until_step
    return ", then ".join(taken)
