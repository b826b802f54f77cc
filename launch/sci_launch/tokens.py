"""`sci-gpt inspect CONFIG --tokens`: measures what a run's tokens keep, shows it, and refuses what they would spoil."""

from __future__ import annotations

import argparse
from pathlib import Path

from sci_gpt.config import PretrainConfig
from sci_gpt.config_file import load_config
from sci_gpt.errors import ConfigError
from sci_gpt.recipes.token_page import inspect_tokens, table_of
from sci_gpt.recipes.token_report import refuse, to_json
from sci_launch.results import print_result, progress


def run(parsed: argparse.Namespace) -> int:
    """Carry out the command; 0. The report is shown before a channel is refused.

    Raises:
        ConfigError: no pretraining's configuration.
        DataError: no store, or a channel that is refused.
    """
    path = Path(parsed.path)
    if parsed.family is not None:
        raise ConfigError("--family goes with a data file, --tokens with a pretraining's configuration; leave one out")
    if path.is_dir() or path.suffix.lower() not in (".yaml", ".yml"):
        raise ConfigError(f"--tokens wants a pretraining's YAML file, as configs/pretrain/quickstart.yaml, got {path}")
    with progress(parsed.json):
        report = inspect_tokens(load_config(path, PretrainConfig))
    result = to_json(report)
    if parsed.json:
        print_result(result, as_json=True)
    else:
        print(table_of(report))
    refuse(result["refused"])
    return 0
