"""What launch/slurm/pretrain.sbatch asks of a configuration while the job runs: `python -m sci_launch.slurm_job`."""

from __future__ import annotations

import argparse
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from sci_gpt.config import PretrainConfig
from sci_gpt.config_file import load_config
from sci_gpt.errors import ConfigError, SciGptError
from sci_gpt.train.run_folder import read_complete
from sci_launch.allocator import preload


def processes_per_node(config: PretrainConfig, nodes: int) -> int:
    """The processes that each node starts.

    Raises:
        ConfigError: `parallel.processes` does not divide over the nodes.
    """
    processes = config.parallel.processes
    if nodes < 1 or processes % nodes:
        raise ConfigError(
            f"parallel.processes is {processes}, which does not divide over {nodes} nodes; set it to a multiple of the "
            "nodes, as --set parallel.processes=N or --processes-per-node, or ask for another number of nodes"
        )
    return processes // nodes


def is_complete(config: PretrainConfig) -> bool:
    """Whether the run folder holds all steps of the schedule.

    Raises:
        CheckpointError: the run is marked complete, but its last checkpoint is gone.
    """
    complete = read_complete(config.output)
    return complete is not None and complete["step"] >= config.schedule.steps


def free_port() -> int:
    """A port that nobody holds on this node now, for the rendezvous."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def main(argv: Sequence[str] | None = None) -> int:
    """`facts`: run folder, processes per node, threads of each, a free port, NAME=VALUE for the workers' environment, a
    line each. `complete`: exit code 0/1.

    Returns:
        2 where the configuration is refused; one line on stderr says why.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("question", choices=("facts", "complete"))
    parser.add_argument("config", type=Path)
    parser.add_argument("--nodes", type=int, default=1)
    parsed = parser.parse_args(argv)
    try:
        config = load_config(parsed.config, PretrainConfig)
        if parsed.question == "complete":
            return 0 if is_complete(config) else 1
        each = processes_per_node(config, parsed.nodes)
    except SciGptError as error:
        print(f"sci-gpt: {error}", file=sys.stderr)
        return 2
    allocator = [f"{name}={value}" for name, value in preload().items()]
    for fact in (config.output, each, config.parallel.threads_per_process, free_port(), *allocator):
        print(fact)
    return 0


if __name__ == "__main__":
    sys.exit(main())
