"""Predicted throughput of Megatron's ten models on A100s beside what was measured (arXiv:2104.04473, table 1)."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

from benchmarks.results import write_section
from sci_gpt.parallel.devices import DEVICES
from sci_gpt.parallel.plan import ParallelPlan
from sci_gpt.parallel.published import Gpt
from sci_gpt.parallel.roofline import Load, step_time


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table: the model, its layout on DGX A100 nodes of 8, sequences in a step, measured TFLOP/s.

    And from Megatron-LM's script for it (examples/sc21/run_table_1.sh): sequences in a micro-batch, and into how many
    pieces of layers a pipeline stage is interleaved.
    """

    billions: float
    layers: int
    width: int
    heads: int
    tensor: int
    pipeline: int
    devices: int
    sequences: int
    teraflops: float
    micro: int
    pieces: int

    @property
    def data(self) -> int:
        """Copies of the model."""
        return self.devices // (self.tensor * self.pipeline)


def _row(*values: float) -> Row:
    billions, layers, width, heads, tensor, pipeline, devices, sequences, teraflops, micro, pieces = values
    return Row(
        billions=billions,
        layers=int(layers),
        width=int(width),
        heads=int(heads),
        tensor=int(tensor),
        pipeline=int(pipeline),
        devices=int(devices),
        sequences=int(sequences),
        teraflops=teraflops,
        micro=int(micro),
        pieces=int(pieces),
    )


TABLE = (
    _row(1.7, 24, 2304, 24, 1, 1, 32, 512, 137, 16, 1),
    _row(3.6, 30, 3072, 32, 2, 1, 64, 512, 138, 16, 1),
    _row(7.5, 36, 4096, 32, 4, 1, 128, 512, 142, 16, 1),
    _row(18.4, 40, 6144, 48, 8, 1, 256, 1024, 135, 8, 1),
    _row(39.1, 48, 8192, 64, 8, 2, 512, 1536, 138, 4, 1),
    _row(76.1, 60, 10240, 80, 8, 4, 1024, 1792, 140, 2, 3),
    _row(145.6, 80, 12288, 96, 8, 8, 1536, 2304, 148, 2, 2),
    _row(310.1, 96, 16384, 128, 8, 16, 1920, 2160, 155, 1, 2),
    _row(529.6, 105, 20480, 128, 8, 35, 2520, 2520, 163, 1, 3),
    _row(1008.0, 128, 25600, 160, 8, 64, 3072, 3072, 163, 1, 1),
)


def predicted(row: Row) -> float:
    """TFLOP/s per device, counted as the paper does (with the layers that are computed again).

    A stage of the pipeline is a model of layers / stages on tensor x data devices; the plan knows no pipeline, so that
    its bubble, (stages - 1) / (micro-batches x interleaved pieces) of the time, is added here.
    """
    gpt = Gpt(layers=row.layers, width=row.width, heads=row.heads)
    micro_batches = max(1, row.sequences // row.data // row.micro)
    layout = ParallelPlan(
        data_parallel=row.data,
        tensor_parallel=row.tensor,
        zero_stage=1,
        dtype="bf16",
        accumulation=micro_batches,
    )
    flops = gpt.flops(row.sequences)
    load = Load(
        divided_flops=flops * 3 / 4 / row.pipeline,  # the roofline adds the layers that are computed again
        whole_flops=0.0,
        activation_bytes=gpt.activation_bytes(row.micro, tensor=row.tensor) * row.layers / row.pipeline,
        num_params=gpt.parameters / row.tensor / row.pipeline,
        layers=-(-row.layers // row.pipeline),
        width=row.width,
        num_tokens=gpt.sequence * row.micro,
    )
    found = step_time(load, layout, device=DEVICES["a100"], gpus_per_node=8, checkpointing="full")
    seconds = found.step * (1 + (row.pipeline - 1) / (micro_batches * row.pieces))
    return flops / row.devices / seconds / 1e12


def lines_of_table() -> list[str]:
    """A line for each model."""
    lines = []
    for row in TABLE:
        ours = predicted(row)
        lines.append(
            f"| {row.billions:,} | {row.tensor} x {row.pipeline} x {row.data} | {row.teraflops:.0f} | {ours:.0f} | "
            f"{100 * (ours / row.teraflops - 1):+.0f} % |"
        )
    return lines


def main(arguments: list[str]) -> int:
    """Print the table and write it to RESULTS.md."""
    argparse.ArgumentParser(description=__doc__).parse_args(arguments)
    lines = [
        "| model, 10^9 parameters | tensor x pipeline x data | measured, TFLOP/s per GPU | predicted | error |",
        "|---|---|---|---|---|",
        *lines_of_table(),
        "",
        "Measured: Narayanan et al. 2021, table 1 (A100 of 80 GB, nodes of 8). Predicted: the roofline of `sci-gpt "
        f"plan`, with matrix products at {100 * DEVICES['a100'].attainable:.0f} % of their peak. Listed, not asserted. "
        "Made by `python -m benchmarks.megatron_table`.",
    ]
    print("\n".join(lines))
    write_section("megatron_table", lines, title="Predicted throughput of Megatron's models")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
