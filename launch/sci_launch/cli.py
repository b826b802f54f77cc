"""The command line `sci-gpt`: one function per command; a command's module is imported inside its function."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sci_gpt.errors import ConfigError, DataError
from sci_launch import arguments
from sci_launch.results import print_result, progress, progress_of_processes

if TYPE_CHECKING:
    from sci_gpt.config import Node

Kind = TypeVar("Kind", bound="Node")
_NETCDF = dict.fromkeys((".nc", ".nc4", ".cdf"), "netcdf")
_FAMILY_OF_ENDING = _NETCDF | {".csv": "csv", ".dly": "ghcn", ".mseed": "miniseed"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """One command: what it does in a sentence, an example, its arguments and its function."""

    summary: str
    example: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0 done, 2 refused (one line on stderr says why), 130 interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not sys.warnoptions:  # libraries warn their programmers; stderr is for the user (python -W default shows them)
        warnings.simplefilter("ignore")
    for name in ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK"):  # before anything imports MLflow: no usage reports
        os.environ.setdefault(name, "true")
    try:
        parsed = parser().parse_args(words)
        return COMMANDS[parsed.command].run(parsed)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output (`| head`) has gone; keep the flush at exit quiet
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
        return 0
    except Exception as error:
        from sci_launch.refusals import for_a_person  # loads numpy, which `--help` does not need

        message = for_a_person(error)
        if message is None:
            raise
        print(f"sci-gpt: {' '.join(message.split())}", file=sys.stderr)
        return 2


def parser() -> arguments.Parser:
    """All commands and their options."""
    examples = "\n".join(
        f"  {name:<10}{command.summary}\n{'':<12}{command.example}" for name, command in COMMANDS.items()
    )
    top = arguments.Parser(
        prog="sci-gpt",
        description="Pretrain one model on grids, sensor series and seismic traces, evaluate it, forecast with it.",
        epilog=f"commands, each with an example:\n{examples}\n\n`sci-gpt COMMAND --help` lists a command's options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = top.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=arguments.Parser)
    for name, command in COMMANDS.items():
        sub = subparsers.add_parser(
            name,
            description=command.summary,
            epilog=f"example:\n  {command.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.arguments(sub)
    return top


def _config(parsed: argparse.Namespace, kind: type[Kind], *, overrides: Iterable[str]) -> Kind | None:
    """The configuration of a command; None where it was only to be shown, which is done."""
    from sci_gpt.config_file import load_config, show_config

    config = load_config(parsed.config, kind, overrides=tuple(overrides))
    if parsed.show:
        print(show_config(config), end="")
    return None if parsed.show else config


def _build(parsed: argparse.Namespace) -> int:
    from sci_gpt.config import DataConfig

    config = _config(parsed, DataConfig, overrides=parsed.overrides)
    if config is None:
        return 0
    from sci_gpt.recipes.build import build

    with progress(parsed.json):
        report = build(config)
    return print_result(report.to_json(), as_json=True) if parsed.json else 0


def _inspect(parsed: argparse.Namespace) -> int:
    path = Path(parsed.path)
    if parsed.tokens:
        from sci_launch.tokens import run

        return run(parsed)
    remote = "://" in parsed.path
    if not remote and not path.exists():
        raise DataError(f"no file or store {parsed.path!r}; give a data file, or a store made by `sci-gpt build`")
    from sci_gpt.recipes.inspect import inspect_file, inspect_store

    if remote or path.is_dir():
        return print_result(inspect_store(parsed.path), as_json=parsed.json)
    family = parsed.family or _FAMILY_OF_ENDING.get(path.suffix.lower())
    if family is None:
        raise ConfigError(f"{parsed.path!r}: its ending says not what it is; name one, as --family netcdf")
    return print_result(inspect_file(path, family), as_json=parsed.json)


def _pretrain(parsed: argparse.Namespace) -> int:
    from sci_gpt.config import PretrainConfig

    overrides = list(parsed.overrides)
    if parsed.processes is not None:
        overrides.append(f"parallel.processes={parsed.processes}")
    config = _config(parsed, PretrainConfig, overrides=overrides)
    if config is None:
        return 0
    return _train_here(config)


def _train_here(config: Any, *, dry_run: bool = False) -> int:
    from sci_gpt.train.run_folder import read_complete
    from sci_launch.local import WorkerFailure, describe, pretrain

    if dry_run:
        print(describe(config))
        return 0
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


def _launch(parsed: argparse.Namespace) -> int:
    from sci_gpt.config import PretrainConfig

    config = _config(parsed, PretrainConfig, overrides=arguments.launch_overrides(parsed))
    wishes = arguments.slurm_wishes(parsed)
    if config is None:
        return 0
    if parsed.on == "local":
        return _train_here(config, dry_run=parsed.dry_run)
    from sci_launch.slurm import Wishes, launch

    launch(config, Wishes(**wishes), dry_run=parsed.dry_run)
    return 0


def _drill(parsed: argparse.Namespace) -> int:
    from sci_gpt.config import PretrainConfig

    config = _config(parsed, PretrainConfig, overrides=parsed.overrides)
    if config is None:
        return 0
    from sci_launch.drill import Options, run

    asked = {name: getattr(parsed, name) for name in ("output", "processes", "keep_straight", "hang_seconds")}
    with progress(parsed.json):
        result, code = run(config, Options(**asked, steps=parsed.steps, faults=arguments.drill_faults(parsed)))
    if parsed.json:
        print_result(result, as_json=True)
    return code


def _evaluate(parsed: argparse.Namespace) -> int:
    from sci_gpt.config import PretrainConfig

    config = _config(parsed, PretrainConfig, overrides=parsed.overrides)
    if config is None:
        return 0
    from sci_evals.evaluate import evaluate

    with progress(parsed.json):
        result = evaluate(config, parsed.run or config.output)
    return print_result(result, as_json=True) if parsed.json else 0


def _forecast(parsed: argparse.Namespace) -> int:
    if not parsed.input.exists():  # before torch is imported, which takes seconds
        raise DataError(f"no file {str(parsed.input)!r}; check the path")
    from sci_gpt.recipes.forecast import FileOptions, forecast_file

    words = ("quantiles", "source", "place", "time", "columns")
    options = FileOptions.parse(**{name: getattr(parsed, name) for name in words})
    options = dataclasses.replace(options, num_samples=parsed.num_samples, seed=parsed.seed)
    with progress(parsed.json):
        report = forecast_file(
            parsed.model,
            parsed.input,
            horizon=parsed.horizon,
            out=parsed.out,
            options=options,
            calibrated=parsed.calibrated,
        )
    return print_result(report, as_json=parsed.json)


def _finetune(parsed: argparse.Namespace) -> int:
    if not parsed.input.exists():  # before torch is imported, which takes seconds
        raise DataError(f"no file {str(parsed.input)!r}; check the path")
    from sci_evals.finetune_file import finetune_file, parse_words

    name = parsed.name or parsed.input.stem
    out = parsed.out or Path("runs") / f"finetune-{name}"
    with progress(parsed.json):
        request = parse_words(vars(parsed) | {"name": name})
        report = finetune_file(parsed.model, parsed.input, request=request, out=out, register=parsed.register)
    return print_result(report, as_json=True) if parsed.json else 0


def _plan(parsed: argparse.Namespace) -> int:
    from sci_gpt.config import PretrainConfig

    config = _config(parsed, PretrainConfig, overrides=arguments.plan_overrides(parsed))
    if config is None:
        return 0
    from sci_gpt.recipes import cluster, plan

    wanted = cluster.Cluster(**arguments.plan_cluster(parsed))
    result = plan.plan(config, parsed.tokens_per_second, nodes=parsed.nodes, cluster=wanted)
    cluster.refuse_what_does_not_fit(result)
    if not parsed.json:
        print(plan.describe(result))
    return print_result(result, as_json=True) if parsed.json else 0


def _sweep(parsed: argparse.Namespace) -> int:
    from sci_gpt.recipes.studies import SweepConfig

    config = _config(parsed, SweepConfig, overrides=parsed.overrides)
    if config is None:
        return 0
    from sci_launch.local import WorkerFailure
    from sci_launch.sweep import sweep

    try:
        with progress_of_processes(parsed.json):
            result = sweep(config)
    except WorkerFailure as failure:
        print(f"sci-gpt: {failure}", file=sys.stderr)
        return 1
    return print_result(result, as_json=True) if parsed.json else 0


def _fit(parsed: argparse.Namespace) -> int:
    from sci_launch.fit import run

    return run(parsed)


def _transfer(parsed: argparse.Namespace) -> int:
    from sci_gpt.config import PretrainConfig
    from sci_gpt.config_file import load_config
    from sci_gpt.recipes.studies import TransferConfig

    config = _config(parsed, TransferConfig, overrides=parsed.overrides)
    if config is None:
        return 0
    from sci_evals.transfer import transfer

    with progress_of_processes(parsed.json):
        code = _train_here(load_config(config.pretrain, PretrainConfig))
        result = transfer(config) if code == 0 else {}
    return print_result(result, as_json=True) if parsed.json and code == 0 else code


def _export(parsed: argparse.Namespace) -> int:
    from sci_gpt.recipes.export import export

    return print_result(export(parsed.model, parsed.out, data=parsed.data), as_json=parsed.json)


def _doctor(parsed: argparse.Namespace) -> int:
    from sci_launch.doctor import describe, doctor

    report = doctor(runs=parsed.runs, data=parsed.data)
    if parsed.json:
        print_result(report, as_json=True)
    else:
        print(describe(report))
    return 0 if report["ok"] else 1


COMMANDS: dict[str, Command] = {
    "build": Command(
        summary="read archives, split them, compute statistics and write shards",
        example="sci-gpt build configs/data/quickstart.yaml",
        arguments=arguments.config_and_json,
        run=_build,
    ),
    "inspect": Command(
        summary="say what a file or a built store holds, or with --tokens what a run's tokens keep of its data",
        example="sci-gpt inspect data/quickstart --json",
        arguments=arguments.inspect_arguments,
        run=_inspect,
    ),
    "pretrain": Command(
        summary="train one model on all modalities; called again, it resumes from its last checkpoint",
        example="sci-gpt pretrain configs/pretrain/quickstart.yaml --processes 2",
        arguments=arguments.pretrain_arguments,
        run=_pretrain,
    ),
    "evaluate": Command(
        summary="score a run on held-out windows against honest baselines, and draw the report",
        example="sci-gpt evaluate configs/pretrain/quickstart.yaml",
        arguments=arguments.evaluate_arguments,
        run=_evaluate,
    ),
    "forecast": Command(
        summary="forecast from an unseen netCDF, CSV or miniSEED file; the same kind comes out, with quantiles",
        example="sci-gpt forecast models:/sci-gpt-quickstart@candidate station.csv --horizon 3 --out forecast.csv",
        arguments=arguments.forecast_arguments,
        run=_forecast,
    ),
    "finetune": Command(
        summary="adapt a model to a file of your own, and say whether the pretraining was worth it there",
        example="sci-gpt finetune models:/sci-gpt-quickstart@candidate station.csv --target temp --units temp=degC",
        arguments=arguments.finetune_arguments,
        run=_finetune,
    ),
    "plan": Command(
        summary="parameters, memory, tokens and bytes to read per second of a run, before it starts",
        example="sci-gpt plan configs/pretrain/quickstart.yaml --json",
        arguments=arguments.plan_arguments,
        run=_plan,
    ),
    "launch": Command(
        summary="start a pretraining run here, or submit it to Slurm, where it requeues itself until it is complete",
        example="sci-gpt launch configs/pretrain/quickstart.yaml --on slurm --nodes 2 --dry-run",
        arguments=arguments.launch_arguments,
        run=_launch,
    ),
    "drill": Command(
        summary="kill, stop, cut and spoil a short run on purpose; does it go on as if nothing had been?",
        example="sci-gpt drill configs/pretrain/quickstart.yaml --processes 4",
        arguments=arguments.drill_arguments,
        run=_drill,
    ),
    "sweep": Command(
        summary="train sizes x token budgets, finished points only once, and fit a law to their validation losses",
        example="sci-gpt sweep configs/sweeps/quickstart.yaml",
        arguments=arguments.config_and_json,
        run=_sweep,
    ),
    "fit": Command(
        summary="fit a scaling law to the points of trained models, with intervals and what they cannot tell",
        example="sci-gpt fit POINTS.csv --law chinchilla --out runs/fit",
        arguments=arguments.fit_arguments,
        run=_fit,
    ),
    "transfer": Command(
        summary="finetuned against from scratch on few examples of data that the pretraining never saw",
        example="sci-gpt transfer configs/transfer/quickstart.yaml",
        arguments=arguments.config_and_json,
        run=_transfer,
    ),
    "export": Command(
        summary="write a model as a folder that stands alone: safetensors, configuration, statistics, tokenizers, card",
        example="sci-gpt export runs/quickstart --out runs/quickstart-exported",
        arguments=arguments.export_arguments,
        run=_export,
    ),
    "doctor": Command(
        summary="check this machine and installation; exit code 1 where something that is needed is wrong",
        example="sci-gpt doctor --json",
        arguments=arguments.doctor_arguments,
        run=_doctor,
    ),
}


if __name__ == "__main__":
    sys.exit(main())
