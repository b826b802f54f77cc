"""The command line `sci-gpt`: one function per command; a command's module is imported inside its function."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from sci_gpt.errors import ConfigError, DataError, SciGptError
from sci_launch.results import print_result, progress

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FAMILY_OF_ENDING = {
    ".nc": "netcdf",
    ".nc4": "netcdf",
    ".cdf": "netcdf",
    ".csv": "csv",
    ".dly": "ghcn",
    ".mseed": "miniseed",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """One command: what it does in a sentence, an example, its arguments and its function."""

    summary: str
    example: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaint is one line, like every other error of this command line."""

    def error(self, message: str) -> NoReturn:
        """Refuse the command line.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(f"{self.prog}: {message}; see `{self.prog} --help`")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0 done, 2 refused (one line on stderr says why), 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not sys.warnoptions:  # libraries warn their programmers; stderr is for the user (python -W default shows them)
        warnings.simplefilter("ignore")
    for name in ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK"):  # before anything imports MLflow: no usage reports
        os.environ.setdefault(name, "true")
    try:
        parsed = parser().parse_args(arguments)
        return COMMANDS[parsed.command].run(parsed)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output (`| head`) has gone; keep the flush at exit quiet
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
        return 0
    except Exception as error:
        message = _for_a_person(error)
        if message is None:
            raise
        print(f"sci-gpt: {' '.join(message.split())}", file=sys.stderr)
        return 2


def _for_a_person(error: Exception) -> str | None:
    """The one line for an error that the user can mend; None for a defect of ours, which keeps its traceback."""
    from sci_tokenizers.sample import SampleError  # these two load numpy, which `--help` does not need
    from sci_tokenizers.variables import UnitError, UnknownVariableError

    if isinstance(error, SciGptError | SampleError | UnitError | UnknownVariableError):
        return str(error)
    full = isinstance(error, OSError) and error.errno in _DISK_FULL
    # Libraries in C and Rust (HDF5, SQLite, safetensors) report a full disk in words of their own.
    words = ("no space left on device", "os error 28", "disk is full", "disk quota exceeded", "file too large")
    if full or any(word in str(error).lower() for word in words):
        where = getattr(error, "filename", None)
        return (
            f"no space left while writing {str(where)!r}: free some space or choose another output folder"
            if where
            else f"no space left on the output's disk ({error}): free some space or choose another output folder"
        )
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename!r}: {error.strerror}; check the path and its permissions"
    return None


def parser() -> Parser:
    """All commands and their options."""
    examples = "\n".join(
        f"  {name:<10}{command.summary}\n{'':<12}{command.example}" for name, command in COMMANDS.items()
    )
    top = Parser(
        prog="sci-gpt",
        description="Pretrain one model on grids, sensor series and seismic traces, evaluate it, forecast with it.",
        epilog=f"commands, each with an example:\n{examples}\n\n`sci-gpt COMMAND --help` lists a command's options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = top.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    for name, command in COMMANDS.items():
        sub = subparsers.add_parser(
            name,
            description=command.summary,
            epilog=f"example:\n  {command.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.arguments(sub)
    return top


def _config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", type=Path, help="a complete YAML file from configs/")
    parser.add_argument(
        "--set",
        dest="overrides",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="override a key, as a.b=c; list entries by number or name, as phases.0.mixture.co2.weight=2; repeatable",
    )
    parser.add_argument("--show", action="store_true", help="print the resolved configuration as YAML and stop")


def _json_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object on stdout")


def _build(parsed: argparse.Namespace) -> int:
    from sci_gpt.config import DataConfig, load_config, show_config

    config = load_config(parsed.config, DataConfig, overrides=tuple(parsed.overrides))
    if parsed.show:
        print(show_config(config), end="")
        return 0
    from sci_gpt.recipes.build import build

    with progress(parsed.json):
        report = build(config)
    return print_result(report.to_json(), as_json=True) if parsed.json else 0


def _inspect_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path", metavar="FILE|STORE", type=Path, help="a data file, or a folder made by `sci-gpt build`"
    )
    parser.add_argument(
        "--family", metavar="NAME", help="who reads a file; left out, it follows from the file's ending"
    )
    _json_argument(parser)


def _inspect(parsed: argparse.Namespace) -> int:
    if not parsed.path.exists():
        raise DataError(f"no file or store {str(parsed.path)!r}; give a data file or a folder made by `sci-gpt build`")
    from sci_gpt.recipes.inspect import inspect_file, inspect_store

    if parsed.path.is_dir():
        return print_result(inspect_store(parsed.path), as_json=parsed.json)
    family = parsed.family or _FAMILY_OF_ENDING.get(parsed.path.suffix.lower())
    if family is None:
        raise ConfigError(f"{str(parsed.path)!r}: its ending says not what it is; name one, as --family netcdf")
    return print_result(inspect_file(parsed.path, family), as_json=parsed.json)


def _pretrain_arguments(parser: argparse.ArgumentParser) -> None:
    _config_arguments(parser)
    parser.add_argument(
        "--processes",
        metavar="N",
        type=int,
        help="local processes, in place of parallel.processes; the losses do not depend on it",
    )


def _pretrain(parsed: argparse.Namespace) -> int:
    from sci_gpt.config import PretrainConfig, load_config, show_config

    overrides = list(parsed.overrides)
    if parsed.processes is not None:
        overrides.append(f"parallel.processes={parsed.processes}")
    config = load_config(parsed.config, PretrainConfig, overrides=tuple(overrides))
    if parsed.show:
        print(show_config(config), end="")
        return 0
    from sci_gpt.train.run_folder import read_complete
    from sci_launch.local import WorkerFailure, pretrain

    try:
        code = pretrain(config)
    except WorkerFailure as failure:  # a defect or a kill, not the user's error: the worker's last lines say which
        print(f"sci-gpt: {failure}", file=sys.stderr)
        return 1
    if code == 0 and config.tracking.registered_model is not None and read_complete(config.output) is not None:
        from sci_gpt.recipes.register import ALIAS, register_model

        version = register_model(config, config.output)
        print(f"registered models:/{config.tracking.registered_model}@{ALIAS}, version {version}", flush=True)
    return code


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    _config_arguments(parser)
    parser.add_argument(
        "--run", metavar="FOLDER", type=Path, help="the run to score; left out, the configuration's output"
    )
    _json_argument(parser)


def _evaluate(parsed: argparse.Namespace) -> int:
    from sci_gpt.config import PretrainConfig, load_config, show_config

    config = load_config(parsed.config, PretrainConfig, overrides=tuple(parsed.overrides))
    if parsed.show:
        print(show_config(config), end="")
        return 0
    from sci_evals.evaluate import evaluate

    with progress(parsed.json):
        result = evaluate(config, parsed.run or config.output)
    return print_result(result, as_json=True) if parsed.json else 0


def _forecast_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="models:/NAME@candidate, a run, a checkpoint or an exported folder"
    )
    parser.add_argument("input", metavar="INPUT", type=Path, help="a netCDF, CSV or miniSEED file")
    parser.add_argument(
        "--horizon", type=int, required=True, help="steps ahead: of the input's time axis; traces: of 0.1 s"
    )
    parser.add_argument(
        "--out", metavar="FILE", type=Path, required=True, help="where the forecast goes, same kind as INPUT"
    )
    parser.add_argument(
        "--quantiles", metavar="Q,Q,..", default="0.1,0.5,0.9", help="levels in 0..1 (default 0.1,0.5,0.9)"
    )
    parser.add_argument(
        "--source", metavar="NAME", help="a source of the training data that INPUT belongs to; left out: unseen"
    )
    parser.add_argument(
        "--place", metavar="LAT,LON[,ELEVATION]", help="where a CSV or miniSEED was recorded, degrees and m"
    )
    parser.add_argument("--time", metavar="COL", help="a CSV's time column; left out: the first one that holds times")
    parser.add_argument(
        "--columns", metavar="COL=VARIABLE[:UNIT],..", help="a CSV's columns in the words of the variable table"
    )
    _json_argument(parser)


def _forecast(parsed: argparse.Namespace) -> int:
    if not parsed.input.exists():  # before torch is imported, which takes seconds
        raise DataError(f"no file {str(parsed.input)!r}; check the path")
    from sci_gpt.recipes.forecast import FileOptions, forecast_file

    options = FileOptions.parse(
        quantiles=parsed.quantiles,
        source=parsed.source,
        place=parsed.place,
        time=parsed.time,
        columns=parsed.columns,
    )
    with progress(parsed.json):
        report = forecast_file(parsed.model, parsed.input, horizon=parsed.horizon, out=parsed.out, options=options)
    return print_result(report, as_json=parsed.json)


def _plan(parsed: argparse.Namespace) -> int:
    from sci_gpt.config import PretrainConfig, load_config, show_config

    config = load_config(parsed.config, PretrainConfig, overrides=tuple(parsed.overrides))
    if parsed.show:
        print(show_config(config), end="")
        return 0
    from sci_gpt.recipes.plan import describe, plan

    result = plan(config)
    if parsed.json:
        return print_result(result, as_json=True)
    print(describe(result))
    return 0


def _config_and_json(parser: argparse.ArgumentParser) -> None:
    _config_arguments(parser)
    _json_argument(parser)


COMMANDS: dict[str, Command] = {
    "build": Command(
        summary="read archives, split them, compute statistics and write shards",
        example="sci-gpt build configs/data/quickstart.yaml",
        arguments=_config_and_json,
        run=_build,
    ),
    "inspect": Command(
        summary="say what a file or a built store holds",
        example="sci-gpt inspect data/quickstart --json",
        arguments=_inspect_arguments,
        run=_inspect,
    ),
    "pretrain": Command(
        summary="train one model on all modalities; called again, it resumes from its last checkpoint",
        example="sci-gpt pretrain configs/pretrain/quickstart.yaml --processes 2",
        arguments=_pretrain_arguments,
        run=_pretrain,
    ),
    "evaluate": Command(
        summary="score a run on held-out windows against honest baselines, and draw the report",
        example="sci-gpt evaluate configs/pretrain/quickstart.yaml",
        arguments=_evaluate_arguments,
        run=_evaluate,
    ),
    "forecast": Command(
        summary="forecast from an unseen netCDF, CSV or miniSEED file; the same kind comes out, with quantiles",
        example="sci-gpt forecast models:/sci-gpt-quickstart@candidate station.csv --horizon 3 --out forecast.csv",
        arguments=_forecast_arguments,
        run=_forecast,
    ),
    "plan": Command(
        summary="parameters, tokens per step and memory per process of a run, before it starts",
        example="sci-gpt plan configs/pretrain/quickstart.yaml --json",
        arguments=_config_and_json,
        run=_plan,
    ),
}


if __name__ == "__main__":
    sys.exit(main())
