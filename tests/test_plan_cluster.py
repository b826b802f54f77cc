"""A run planned on named devices: memory by kind adds up, what cannot fit is refused with the change that fits."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sci_gpt.config import PretrainConfig
from sci_gpt.config_file import show_config
from sci_gpt.errors import ConfigError
from sci_gpt.model.shapes import SHAPES
from sci_gpt.model.transformer import SciGPT
from sci_gpt.parallel.device_memory import device_memory
from sci_gpt.parallel.devices import DEVICES
from sci_gpt.parallel.plan import Offload, ParallelPlan
from sci_gpt.recipes import parts
from sci_gpt.recipes.cluster import Cluster, refuse_what_does_not_fit
from sci_gpt.recipes.plan import describe, plan
from sci_gpt.recipes.remedies import memory_of, params_on_device, remedy
from sci_launch import cli
from toy_store import toy_config, write_store

P = 30_000_000
_OFFLOADS: tuple[tuple[int, Offload], ...] = ((2, "none"), (2, "optimizer"), (3, "all"))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("toy") / "store")


def big(
    store: Path, run: Path, *, rows: int = 64, length: int = 2048, size: str = "7B", **layout: Any
) -> PretrainConfig:
    """A large model's run."""
    parallel = {"processes": 8, "dtype": "bf16"} | layout
    return toy_config(store, run, model={"size": size}, parallel=parallel, row_length=length, rows_per_step=rows)


# Bytes a parameter that DeepSpeed 0.19.8 holds on a CPU at the end of the backward pass, in the optimizer's step, and
# between steps, as measured with 30 M parameters (benchmarks/memory.py): one process and two.
@pytest.mark.parametrize(
    ("processes", "stage", "dtype", "backward", "step", "between"),
    [
        (1, 0, "fp32", 20, 16, 12),
        (1, 1, "fp32", 24, 32, 16),
        (2, 1, "fp32", 18, 18, 10),
        (1, 1, "bf16", 24, 28, 18),
        (2, 1, "bf16", 18, 18, 12),
        (1, 2, "fp32", 24, 32, 16),
        (2, 2, "fp32", 18, 18, 10),
        (1, 2, "bf16", 26, 26, 14),
        (1, 3, "fp32", 32, 36, 24),
        (2, 3, "fp32", 26, 20, 14),
        (1, 3, "bf16", 30, 34, 22),
    ],
)
def test_bytes_a_parameter(processes: int, stage: int, dtype: Any, backward: int, step: int, between: int) -> None:
    layout = ParallelPlan(data_parallel=processes, zero_stage=stage, dtype=dtype)
    found = device_memory(SHAPES["30M"], layout, num_params=P, num_tokens=1, accelerator=False)
    assert {moment: found.moments[moment] / P for moment in ("backward", "step")} == pytest.approx(
        {"backward": backward, "step": step}
    )
    assert found.between_steps / P == pytest.approx(between)
    assert found.total == max(found.moments.values())


# The same of two processes with offload: of the device, then of the host between steps.
@pytest.mark.parametrize(
    ("stage", "dtype", "offload", "accumulation", "backward", "step", "between", "host"),
    [
        (1, "bf16", "optimizer", 1, 12, 8, 2, 9),
        (2, "bf16", "optimizer", 2, 11, 4, 2, 9),
        (1, "fp32", "optimizer", 2, 12, 4, 4, 10),
        (2, "fp32", "optimizer", 1, 12, 4, 4, 10),
        (2, "fp32", "optimizer", 2, 12, 4, 4, 12),
        (3, "bf16", "optimizer", 1, 15, 5, 5, 10),
        (3, "fp32", "all", 1, 16, 4, 4, 12),
    ],
)
def test_bytes_a_parameter_with_offload(
    stage: int, dtype: Any, offload: Offload, accumulation: int, backward: int, step: int, between: int, host: int
) -> None:
    """AdamW's 8 bytes of the own half are the host's, in the step alone; on a CPU device and host share one memory."""
    layout = ParallelPlan(data_parallel=2, zero_stage=stage, dtype=dtype, offload=offload, accumulation=accumulation)
    found = device_memory(SHAPES["30M"], layout, num_params=P, num_tokens=1, accelerator=False)
    seen = (found.moments["backward"], found.moments["step"], found.between_steps, found.host_between_steps, found.host)
    assert [value / P for value in seen] == pytest.approx([backward, step, between, host, host + 4])
    both = found.with_host()
    assert both.between_steps / P == pytest.approx(between + host)
    assert {name: value / P for name, value in both.moments.items() if name != "forward"} == pytest.approx(
        {"backward": backward + host, "step": step + host + 4}
    )
    assert both.peak == max(both.moments, key=lambda moment: both.moments[moment])


def test_at_zero_1_all_gradients_wait_for_the_end_of_the_backward_pass() -> None:
    """Of a model larger than a bucket, which on a GPU is there from the first gradient on; accumulated ones stay."""
    params, bucket = 7e9, 500e6
    for dtype, weights, kept in (("bf16", 2, 4 / 8), ("fp32", 4, 0)):
        once, twice = (
            device_memory(
                SHAPES["7B"],
                ParallelPlan(data_parallel=8, dtype=dtype, offload="optimizer", accumulation=count),  # type: ignore[arg-type]
                num_params=int(params),
                num_tokens=1,
            )
            for count in (1, 2)
        )
        assert once.moments["backward"] == (weights + 4 + kept) * params + 4 * bucket
        assert once.buffers == kept * params + 4 * bucket
        assert once.moments["forward"] == weights * params + 4 * bucket + once.activations
        assert twice.moments["forward"] == once.moments["forward"] + 4 * params


def test_buffers_are_those_that_deepspeed_is_told() -> None:
    def backward(stage: int, **zero: Any) -> float:
        layout = ParallelPlan(data_parallel=8, zero_stage=stage, extra_deepspeed={"zero_optimization": zero})
        return device_memory(SHAPES["7B"], layout, num_params=7 * 10**9, num_tokens=1).moments["backward"]

    assert backward(2) - backward(2, reduce_bucket_size=100_000_000) == 2 * 4 * 400e6  # and the copy that is reduced
    assert backward(2, overlap_comm=True) - backward(2) == 4 * 500e6
    assert backward(3) - backward(3, stage3_max_live_parameters=10**8) == 4 * 900e6


def test_a_buffer_takes_its_whole_size_on_a_gpu() -> None:
    """Stage 3 keeps a bucket of 500 M fp32 values there, whatever the model; on a CPU the pages that are written."""
    layout = ParallelPlan(data_parallel=1, zero_stage=3)
    cpu, gpu = (
        device_memory(SHAPES["30M"], layout, num_params=P, num_tokens=1, accelerator=accelerator)
        for accelerator in (False, True)
    )
    assert gpu.between_steps - cpu.between_steps == 4 * (500e6 - P)


def test_offload_moves_the_optimizer_to_the_host() -> None:
    kept, moved, all_moved = (
        device_memory(
            SHAPES["7B"],
            ParallelPlan(data_parallel=8, zero_stage=stage, dtype="bf16", offload=offload),
            num_params=7 * 10**9,
            num_tokens=1,
        )
        for stage, offload in _OFFLOADS
    )
    assert kept.host == 0 and moved.optimizer == 0 and moved.host > kept.optimizer
    assert all_moved.weights == all_moved.gradients == all_moved.optimizer == 0


@pytest.mark.parametrize("size", ["tiny", "7B"])
def test_a_tensor_axis_divides_the_matrices_of_blocks(store: Path, tmp_path: Path, size: str) -> None:
    """4 w^2 + 3 w h of each layer; norms, embeddings and heads are whole."""
    shape = SHAPES[size]
    with torch.device("meta"):
        model = SciGPT(shape, parts.model_settings(big(store, tmp_path / "run", size=size)))
    divided = shape.layers * (4 * shape.width**2 + 3 * shape.width * shape.hidden)
    whole = model.num_parameters - divided
    assert params_on_device(model, tensor_parallel=2) == whole + divided // 2


def test_kinds_and_times_of_a_run_on_named_devices(store: Path, tmp_path: Path) -> None:
    config = big(store, tmp_path / "run", rows=16, length=1024, activation_checkpointing="full", processes=16)
    cluster = Cluster(gpu="h100", gpus_per_node=8, tokens=1e12)
    found = plan(config, nodes=2, cluster=cluster)
    kinds = found["bytes_per_device"]
    assert list(kinds) == [
        "weights", "gradients", "optimizer", "activations", "activations_checkpointed", "buffers", "total",
    ]  # fmt: skip
    parameters = found["parameters"]["total"]
    assert kinds["weights"] == 2 * parameters and kinds["gradients"] == 4 * parameters
    assert kinds["optimizer"] == pytest.approx(12 * parameters / 16)
    assert kinds["activations"] > 5 * kinds["activations_checkpointed"]
    assert kinds["total"] == max(found["bytes_by_moment"].values())
    time, peak = found["time"], 16 * DEVICES["h100"].peak["bf16"]
    assert time["mfu"] == pytest.approx(found["flops_per_step"] / time["seconds_per_step"] / peak)
    assert time["device_hours"] == pytest.approx(16 * 1e12 / time["run_tokens_per_second"] / 3600)
    assert found["checkpoint"]["write_seconds"] == pytest.approx(12 * parameters / 4e9)  # 2 nodes at 2 GB/s
    assert found["failures"]["hours_between_failures"] == 3150
    assert 0 < found["failures"]["lost_share_at_best"] <= found["failures"]["lost_share"]
    said = describe(found)
    assert "2 x 8 of h100" in said and "to 1,000,000,000,000 tokens" in said and "MFU" in said


@pytest.mark.parametrize(
    ("layout", "run", "expected"),
    [
        # activations of 64 / 8 rows of 2,048 tokens are most of it
        ({}, {"gpu": "h200"}, "--set parallel.activation_checkpointing=selective"),
        # (2 + 4 + 2 + 12 / 8 + 4 / 8) x 7 x 10^9 bytes in the step of stage 1, most of which stage 2 divides
        ({"activation_checkpointing": "full"}, {"rows": 8, "gpu": "a100-40gb"}, "--set parallel.zero_stage=2"),
        # rows of 8,192 tokens, 64 on each device: 34 layers x 2 x 4,096 bytes a token, as much again of one layer, and
        # 165 kB of the ends are 380 GB, of which 77 - 21 can be there at once
        (
            {"activation_checkpointing": "full", "zero_stage": 3},
            {"rows": 512, "length": 8192, "gpu": "h100"},
            "--set parallel.accumulation=8",
        ),
    ],
)
def test_the_first_change_that_fits_is_named(
    store: Path, tmp_path: Path, layout: dict[str, Any], run: dict[str, Any], expected: str
) -> None:
    device = DEVICES[run.pop("gpu")]
    config = big(store, tmp_path / "run", **run, **layout)
    with torch.device("meta"):
        model = SciGPT(SHAPES["7B"], parts.model_settings(config))
    assert memory_of(config, model=model, accelerator=device.kind == "gpu").total > device.memory - device.reserved
    found = remedy(config, model=model, device=device, gpus_per_node=8)
    assert found == expected


def test_an_asynchronous_save_takes_memory_of_the_host(store: Path, tmp_path: Path) -> None:
    """12 bytes of each parameter, over the processes that share them; where only they are too much, that is said."""
    config = big(store, tmp_path / "run", activation_checkpointing="full", processes=8)
    waiting = config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"asynchronous": False})})
    with torch.device("meta"):
        model = SciGPT(SHAPES["7B"], parts.model_settings(config))
    with_copy, without = (memory_of(one, model=model, accelerator=True) for one in (config, waiting))
    assert without.host == 0 and with_copy.host == 12 * model.num_parameters / 8
    assert with_copy.moments == without.moments
    small_host = replace(DEVICES["b200"], host_memory=1e9)
    assert remedy(config, model=model, device=small_host, gpus_per_node=8) == "--set checkpoint.asynchronous=false"


def test_a_host_that_is_too_small_is_what_the_refusal_names(store: Path, tmp_path: Path) -> None:
    """70 B on 8 GPUs at ZeRO 3 with offload: the GPUs have room, their 250 GB of the host are too few."""
    layout: dict[str, Any] = {"activation_checkpointing": "full", "zero_stage": 3, "offload": "optimizer"}
    found = plan(
        big(store, tmp_path / "run", size="70B", rows=8, **layout), cluster=Cluster(gpu="h100", gpus_per_node=8)
    )
    assert found["host_lacks"] and found["bytes_per_device"]["total"] < found["device"]["usable_bytes"]
    assert found["lacking_bytes"] == pytest.approx(found["host_bytes_per_device"] - 250e9)
    with pytest.raises(
        ConfigError, match=r"the host must hold 2\d\d\.\d GB .*; one h100 has 250\.0 GB of it, \d+\.\d GB too"
    ):
        refuse_what_does_not_fit(found)
    assert "GB too little of the host's 250.0 GB" in describe(found)


def test_more_nodes_are_named_where_nothing_else_fits(store: Path, tmp_path: Path) -> None:
    """70 B on 4 GPUs, of 80 GB and 250 GB of the host: 18 bytes / 4 are 315 GB. The least power of two is named."""
    layout: dict[str, Any] = {"activation_checkpointing": "full", "zero_stage": 3}
    config = big(store, tmp_path / "run", size="70B", rows=4, processes=4, **layout)
    found = plan(config, cluster=Cluster(gpu="h100", gpus_per_node=4))
    assert not found["fits"]
    named = re.search(r"--nodes (\d+) --gpus-per-node 4", found["remedy"])
    assert named is not None
    for nodes, fits in ((int(named[1]), True), (int(named[1]) // 2, False)):
        more = big(store, tmp_path / "run", size="70B", rows=4, processes=4 * nodes, **layout)
        assert plan(more, nodes=nodes, cluster=Cluster(gpu="h100", gpus_per_node=4))["fits"] is fits


def test_the_command_refuses_and_says_by_how_much(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(show_config(big(store, tmp_path / "run", processes=2)))
    asked = ["plan", str(path), "--nodes", "1", "--gpus-per-node", "8", "--gpu", "h200"]
    assert cli.main(asked) == 2
    said = capsys.readouterr().err
    assert "toy does not fit" in said and "too little; what fits: --set parallel.activation_checkpointing" in said
    change = said.rpartition("what fits: ")[2].split()
    assert cli.main([*asked, *change, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fits"] is True


def test_a_plan_that_contradicts_itself_is_refused(store: Path, tmp_path: Path) -> None:
    config = big(store, tmp_path / "run")
    with pytest.raises(ConfigError, match="are 4 devices, the run has 8 processes"):
        plan(config, nodes=1, cluster=Cluster(gpu="h100", gpus_per_node=4))
    with pytest.raises(ConfigError, match="--gpu is one of .*, got 'h300'"):
        Cluster(gpu="h300")
    with pytest.raises(ConfigError, match="--hours-between-failures must be more than 0"):
        Cluster(hours_between_failures=0)
    found = plan(toy_config(store, tmp_path / "run"))
    refuse_what_does_not_fit(found)
    assert found["device"]["name"] == "measured" and found["remedy"] is None
