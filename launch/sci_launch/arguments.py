"""Arguments of the commands: what `sci-gpt COMMAND --help` lists; argparse only."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NoReturn

from sci_gpt.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaint is one line, like every other error of this command line."""

    def error(self, message: str) -> NoReturn:
        """Refuse the command line.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(f"{self.prog}: {message}; see `{self.prog} --help`")


def config_arguments(parser: argparse.ArgumentParser) -> None:
    """A configuration, overrides of its keys, and --show."""
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


def json_argument(parser: argparse.ArgumentParser) -> None:
    """--json."""
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object on stdout")


def inspect_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `sci-gpt inspect`."""
    parser.add_argument(
        "path",
        metavar="FILE|STORE|CONFIG",
        help="a data file; a store made by `sci-gpt build`, its folder or URL; with --tokens a pretraining's YAML file",
    )
    parser.add_argument(
        "--tokens",
        action="store_true",
        help="encode and decode windows of a pretraining's data: errors, bins, clipping, use of ids, rates; with plots",
    )
    parser.add_argument(
        "--family", metavar="NAME", help="who reads a file; left out, it follows from the file's ending"
    )
    json_argument(parser)


def pretrain_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `sci-gpt pretrain`."""
    config_arguments(parser)
    parser.add_argument(
        "--processes",
        metavar="N",
        type=int,
        help="local processes, in place of parallel.processes; the losses do not depend on it",
    )


_SLURM_ONLY = ("nodes", "time", "partition", "account", "options", "script")  # fields of sci_launch.slurm.Wishes


def slurm_wishes(parsed: argparse.Namespace) -> dict[str, Any]:
    """What was asked of Slurm on the command line, by the fields of `sci_launch.slurm.Wishes`.

    Raises:
        ConfigError: something was, with --on local.
    """
    wishes = {name: getattr(parsed, name) for name in _SLURM_ONLY if getattr(parsed, name) is not None}
    if wishes and parsed.on == "local":
        named = ", ".join("--sbatch" if name == "options" else f"--{name}" for name in wishes)
        raise ConfigError(f"{named}: only with --on slurm; leave it out, or launch on Slurm")
    return wishes


def launch_overrides(parsed: argparse.Namespace) -> tuple[str, ...]:
    """Overrides of the configuration: `--set`, and what --processes-per-node says of parallel.processes."""
    if parsed.processes_per_node is None:
        return tuple(parsed.overrides)
    nodes = 1 if parsed.nodes is None else parsed.nodes
    return (*parsed.overrides, f"parallel.processes={nodes * parsed.processes_per_node}")


def launch_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `sci-gpt launch`."""
    config_arguments(parser)
    parser.add_argument("--on", choices=("local", "slurm"), required=True, help="this machine, or a Slurm cluster")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the script and what would be submitted; change nothing"
    )
    parser.add_argument(
        "--processes-per-node",
        metavar="N",
        type=int,
        help="sets parallel.processes to nodes x N; left out, parallel.processes are divided over the nodes",
    )
    slurm = parser.add_argument_group("with --on slurm; what is left out stays as it stands in the script")
    slurm.add_argument("--nodes", metavar="N", type=int, help="nodes (default 1)")
    slurm.add_argument("--time", metavar="LIMIT", help="time limit of one allocation, as 12:00:00")
    slurm.add_argument("--partition", metavar="NAME", help="partition of the cluster")
    slurm.add_argument("--account", metavar="NAME", help="account that pays")
    slurm.add_argument(
        "--sbatch",
        dest="options",
        metavar="OPTION",
        action="append",
        help="any other option of sbatch, as --sbatch gpus-per-node=4; repeatable",
    )
    slurm.add_argument(
        "--script", metavar="FILE", type=Path, help="your copy of launch/slurm/pretrain.sbatch (default: that file)"
    )


def evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `sci-gpt evaluate`."""
    config_arguments(parser)
    parser.add_argument(
        "--run", metavar="FOLDER", type=Path, help="the run to score; left out, the configuration's output"
    )
    json_argument(parser)


def forecast_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `sci-gpt forecast`."""
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
        "--num-samples", metavar="N", type=int, help="N trajectories for quantiles, of a model trained with noise"
    )
    parser.add_argument(
        "--seed", metavar="S", type=int, help="of the trajectories: the same gives the same (default 0)"
    )
    parser.add_argument(
        "--source", metavar="NAME", help="a source of the training data that INPUT belongs to; left out: unseen"
    )
    parser.add_argument(
        "--calibrated", action="store_true", help="stretch the bands as the model's evaluation found on validation data"
    )
    parser.add_argument(
        "--place", metavar="LAT,LON[,ELEVATION]", help="where a CSV or miniSEED was recorded, degrees and m"
    )
    parser.add_argument("--time", metavar="COL", help="a CSV's time column; left out: the first one that holds times")
    parser.add_argument(
        "--columns", metavar="COL=VARIABLE[:UNIT],..", help="a CSV's columns in the words of the variable table"
    )
    json_argument(parser)


def config_and_json(parser: argparse.ArgumentParser) -> None:
    """A configuration and --json."""
    config_arguments(parser)
    json_argument(parser)


def plan_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `sci-gpt plan`."""
    config_and_json(parser)
    parser.add_argument(
        "--tokens-per-second",
        type=float,
        metavar="N",
        help="of the whole run, as its progress line prints them; without it the rate of a matrix product, a bound",
    )
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="machines that share the run's processes")
    parser.add_argument(
        "--gpus-per-node",
        type=int,
        metavar="G",
        help="sets parallel.processes to nodes x G; left out, parallel.processes are divided over the nodes",
    )
    parser.add_argument(
        "--gpu",
        default="measured",
        metavar="NAME",
        help="a100, a100-40gb, h100, h200, b200, l40s, mi300x, or measured: this machine's CPU (the default)",
    )
    parser.add_argument("--tokens", type=float, metavar="N", help="hours to N tokens; left out, to those of the run")
    parser.add_argument(
        "--write-gigabytes-per-second",
        type=float,
        metavar="RATE",
        default=2.0,
        help="with which one node writes a checkpoint (default 2)",
    )
    parser.add_argument(
        "--hours-between-failures",
        type=float,
        metavar="HOURS",
        default=6300.0,
        help="mean time between failures of one node; the run's is this / nodes (default 6300)",
    )


def plan_overrides(parsed: argparse.Namespace) -> tuple[str, ...]:
    """Overrides of the configuration: `--set`, and what --gpus-per-node says of parallel.processes."""
    if parsed.gpus_per_node is None:
        return tuple(parsed.overrides)
    return (*parsed.overrides, f"parallel.processes={parsed.nodes * parsed.gpus_per_node}")


def plan_cluster(parsed: argparse.Namespace) -> dict[str, Any]:
    """What was asked of devices, by the fields of `sci_gpt.recipes.cluster.Cluster`."""
    return {
        "gpus_per_node": parsed.gpus_per_node,
        "gpu": parsed.gpu,
        "tokens": parsed.tokens,
        "write_rate": parsed.write_gigabytes_per_second,
        "hours_between_failures": parsed.hours_between_failures,
    }


def export_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `sci-gpt export`."""
    parser.add_argument(
        "model", metavar="MODEL", help="a run, a checkpoint, an exported folder or models:/NAME@candidate"
    )
    parser.add_argument("--out", metavar="FOLDER", type=Path, required=True, help="the folder to make; not yet there")
    parser.add_argument(
        "--data",
        metavar="STORE",
        help="the store it was trained on, for licences and citations; left out: where its configuration says",
    )
    json_argument(parser)


def doctor_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `sci-gpt doctor`."""
    parser.add_argument(
        "--runs", metavar="FOLDER", type=Path, default=Path("runs"), help="where runs would lie (default: runs)"
    )
    parser.add_argument(
        "--data",
        metavar="CONFIG",
        type=Path,
        default=Path("configs/data/quickstart.yaml"),
        help="a data configuration whose packages are looked for (default: the quickstart's)",
    )
    json_argument(parser)


def finetune_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `sci-gpt finetune`; what is left out is guessed, and each guess is said."""
    parser.add_argument(
        "model", metavar="MODEL", help="models:/NAME@candidate, a run, a checkpoint or an exported folder"
    )
    parser.add_argument("input", metavar="FILE", type=Path, help="a CSV, netCDF or miniSEED file")
    parser.add_argument("--target", metavar="COL", help="the column (a netCDF's variable) to forecast")
    parser.add_argument("--time", metavar="COL", help="the time column; left out: the first that holds times")
    parser.add_argument("--time-format", metavar="FORMAT", help="how its times are written, as %%d.%%m.%%Y")
    parser.add_argument("--covariates", metavar="COL", nargs="+", default=[], help="columns whose past helps")
    parser.add_argument("--units", metavar="COL=UNIT", nargs="+", default=[], help="units, as temp=degC")
    parser.add_argument(
        "--columns", metavar="COL=VARIABLE[:UNIT]", nargs="+", default=[], help="columns in the table's words"
    )
    parser.add_argument(
        "--variable",
        metavar="NAME:UNIT:KIND[:TRANSFORM]",
        action="append",
        default=[],
        help="a variable that is not in the table, as turbidity:NTU:ratio (or interval, accumulated); repeatable",
    )
    parser.add_argument("--missing", metavar="CODES", help="numbers that mean missing, as -9999,1e20, or none")
    parser.add_argument("--place", metavar="LAT,LON[,ELEVATION]", help="where a CSV was recorded, degrees and m")
    parser.add_argument("--name", metavar="NAME", help="of the new source; left out: the file's name")
    parser.add_argument("--horizon", metavar="N", type=int, help="frames ahead; left out: as in the pretraining")
    parser.add_argument("--context", metavar="N", type=int, help="frames of context; left out: chosen")
    parser.add_argument("--learning-rate", metavar="RATE", type=float, default=1e-3, help="default 0.001")
    parser.add_argument("--max-steps", metavar="N", type=int, default=200, help="default 200")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of the order of examples (default 0)")
    parser.add_argument("--freeze", action="store_true", help="keep the trunk; heads alone learn")
    parser.add_argument("--out", metavar="FOLDER", type=Path, help="left out: runs/finetune-NAME; must not exist")
    parser.add_argument("--register", metavar="NAME", help="register the model with MLflow under this name")
    json_argument(parser)


def fit_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `sci-gpt fit`."""
    parser.add_argument(
        "points",
        metavar="POINTS.csv",
        type=Path,
        help="one trained model per line: params, tokens, loss; where known flops, epochs, modality",
    )
    parser.add_argument("--law", choices=("chinchilla",), default="chinchilla", help="the form (default: chinchilla)")
    parser.add_argument("--modality", metavar="NAME", help="the lines of this modality, where the table has several")
    parser.add_argument("--out", metavar="FOLDER", type=Path, help="where fit.json, fit.png and isoflop.png go")
    parser.add_argument("--title", metavar="TEXT", help="a heading of the figures and of the printed law")
    parser.add_argument(
        "--bootstrap", metavar="N", type=int, default=1000, help="refits behind the 90 %% intervals (default 1000)"
    )
    parser.add_argument("--seed", metavar="S", type=int, default=0, help="of the refits' weights (default 0)")
    json_argument(parser)


def drill_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `sci-gpt drill`."""
    config_and_json(parser)
    parser.add_argument(
        "--output", metavar="FOLDER", type=Path, help="of the drill's runs; left out: runs/NAME-drill; it is emptied"
    )
    parser.add_argument("--steps", metavar="N", type=int, default=24, help="of every run (default 24)")
    parser.add_argument(
        "--processes", metavar="N", type=int, help="of every run, 2 or more, in place of parallel.processes"
    )
    parser.add_argument(
        "--faults", metavar="NAME,NAME,..", help=f"some of {', '.join(DRILL_FAULTS)} (left out: all of them)"
    )
    parser.add_argument(
        "--keep-straight", action="store_true", help="take the straight run that the last drill left in the folder"
    )
    parser.add_argument(
        "--hang-seconds",
        metavar="S",
        type=float,
        default=20.0,
        help="after so long a stopped rank counts as a hang (default 20, and never less than 10 steps)",
    )
    parser.epilog = f"{parser.epilog or ''}\n\n{DRILL_LIMITS}"


DRILL_FAULTS = ("sigterm", "kill-rank", "kill-all", "layout", "corrupt", "hang", "non-finite", "tracking")
DRILL_LIMITS = """\
a fault is passed when, against the straight run,
  losses of all steps and final weights   bit-equal; after layout losses within 1e-5, weights within 1e-4 of the largest
                                          of their tensor (Adam makes rounding of small gradients larger)
  samples of every step                   none missing, repeated or extra (keys_differ 0)
  steps done twice (steps_lost)           those since the newest checkpoint, at most checkpoint.every; twice that after
                                          kill-rank, kill-all and hang where saves are asynchronous (the newest may be
                                          unfinished); none after sigterm, layout, non-finite, tracking
and what belongs to it happened: sigterm leaves the marker `requeue`; kill-rank is said; corrupt goes on from the
checkpoint before, and says so; hang is ended without help, and its report names the stopped rank; non-finite skips one
step, names its rows and leaves the weights alone; tracking loses no metric.
exit code: 0 all passed, 1 one did not (stderr names it), 2 refused configuration"""


def drill_faults(parsed: argparse.Namespace) -> tuple[str, ...]:
    """What --faults asks for; all of them where it is left out."""
    return DRILL_FAULTS if parsed.faults is None else tuple(name for name in parsed.faults.split(",") if name)
