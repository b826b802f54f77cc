"""The parallel plan checks itself; model states agree with the ZeRO paper, activations with what autograd keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sci_gpt.data.store import Store
from sci_gpt.errors import ConfigError
from sci_gpt.model.init import initialize
from sci_gpt.model.shapes import SHAPES
from sci_gpt.model.transformer import SciGPT
from sci_gpt.parallel.memory import activation_bytes, model_state_bytes
from sci_gpt.parallel.plan import ParallelPlan
from sci_gpt.recipes import parts
from sci_gpt.recipes.plan import describe, plan
from sci_gpt.train.feed import StepReader
from sci_gpt.train.objective import NextFrame
from toy_store import toy_config, write_store


def test_bf16_at_zero_0_is_refused() -> None:
    with pytest.raises(ConfigError, match="bf16 needs fp32 master weights"):
        ParallelPlan(data_parallel=2, zero_stage=0, dtype="bf16")


@pytest.mark.parametrize(
    ("change", "named"),
    [({"data_parallel": 0}, "data_parallel"), ({"zero_stage": 4}, "zero_stage"), ({"accumulation": 0}, "accumulation")],
)
def test_a_number_out_of_range_is_named(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        ParallelPlan(**({"data_parallel": 2} | change))


def test_a_plan_for_another_world_is_refused() -> None:
    with pytest.raises(ConfigError, match="for 2 processes, 3 were started"):
        ParallelPlan(data_parallel=2).check(3)


def test_the_dictionary_reduces_gradients_in_fp32_and_names_the_stage() -> None:
    config = ParallelPlan(data_parallel=2, zero_stage=2, accumulation=3, dtype="bf16").deepspeed_config(clip=0.5)
    assert config["zero_optimization"]["stage"] == 2
    assert config["gradient_accumulation_steps"] == 3
    assert config["gradient_clipping"] == 0.5
    assert config["communication_data_type"] == "fp32"
    assert config["data_types"]["grad_accum_dtype"] == "fp32"
    assert config["bf16"]["check_grad_overflow"] is True


# Rajbhandari et al. 2020, figure 1 and table 1: 7.5 B parameters on 64 devices, GB (10^9 bytes) per device.
@pytest.mark.parametrize(("stage", "gigabytes"), [(0, 120.0), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_model_states_agree_with_the_zero_paper(stage: int, gigabytes: float) -> None:
    assert model_state_bytes(7_500_000_000, 64, stage) / 1e9 == pytest.approx(gigabytes, abs=0.06)


def test_fp32_states_on_one_process() -> None:
    # 4 weight + 4 gradient + 8 moments; from stage 1 on a master copy of the partition too
    assert model_state_bytes(1000, 1, 0, dtype="fp32") == 16_000
    assert model_state_bytes(1000, 1, 1, dtype="fp32") == 20_000
    assert model_state_bytes(1000, 2, 1, dtype="fp32") == 14_000


@pytest.mark.parametrize(
    ("arguments", "named"), [((0, 1, 1), "num_params"), ((1, 0, 1), "data_parallel"), ((1, 1, 7), "zero_stage")]
)
def test_impossible_states_are_refused(arguments: tuple[int, int, int], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        model_state_bytes(*arguments)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("toy") / "store")


@pytest.mark.parametrize("size", ["tiny", "1M"])
def test_activations_agree_with_what_autograd_keeps(store: Path, tmp_path: Path, size: str) -> None:
    config = toy_config(store, tmp_path / "run", model={"size": size}, parallel={"processes": 1})
    opened, settings = Store.open(store), parts.tokenizer_settings(config)
    reader = StepReader(parts.curriculum(config, opened), parts.place(config, rank=0), settings=settings)
    batch = reader(0, 0).batches[0]
    model = SciGPT(SHAPES[size], parts.model_settings(config))
    initialize(model, 0)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    objective = NextFrame(settings=settings, device=torch.device("cpu"))
    inputs = objective.inputs(batch)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        alive: Any = objective.sums(model(inputs), inputs)
    measured = sum(kept.values())
    assert alive and measured > 0
    assert activation_bytes(SHAPES[size], 3 * 160) == pytest.approx(measured, rel=0.3)


def test_the_plan_of_a_run_adds_up(store: Path, tmp_path: Path) -> None:
    config = toy_config(store, tmp_path / "run")
    result = plan(config)
    model = SciGPT(SHAPES["tiny"], parts.model_settings(config))
    assert result["parameters"]["total"] == sum(parameter.numel() for parameter in model.parameters())
    assert (
        sum(count for name, count in result["parameters"].items() if name != "total") == result["parameters"]["total"]
    )
    assert result["tokens_per_step"] == 3 * 160
    assert result["tokens_per_process"] == 2 * 160  # 3 rows on 2 processes: one of them holds 2
    assert result["bytes_per_process"]["model_states"] == model_state_bytes(
        result["parameters"]["total"], 2, 1, dtype="fp32"
    )
    # at least 6 x trunk parameters x tokens, at most as if every parameter met every token twice
    tokens = result["tokens_per_step"]
    assert 6 * SHAPES["tiny"].trunk_parameters * tokens < result["flops_per_step"]
    assert result["flops_per_step"] < 24 * result["parameters"]["total"] * tokens
    assert f"{result['parameters']['total']:,} parameters" in describe(result)


def test_the_plan_of_several_phases_reports_each_and_needs_room_for_the_largest(store: Path, tmp_path: Path) -> None:
    whole = toy_config(store, tmp_path / "run")
    (short,) = whole.model_dump(mode="json")["phases"]
    long = short | {"row_length": 400, "rows_per_step": 2, "mixture": short["mixture"][1:]}
    short = short | {"until_step": 20}
    result = plan(toy_config(store, tmp_path / "run", phases=[short, long]))
    first, second = result["phases"]
    assert (first["until_step"], second["until_step"]) == (20, 24)
    assert (first["tokens_per_step"], second["tokens_per_step"]) == (3 * 160, 2 * 400)
    assert result["tokens_per_run"] == 20 * 3 * 160 + 4 * 2 * 400
    # a process holds 2 rows of 160 in the first phase, 1 of 400 in the second
    assert (first["tokens_per_process"], second["tokens_per_process"]) == (320, 400)
    assert result["tokens_per_process"] == 400
    assert result["bytes_per_process"]["activations"] == activation_bytes(SHAPES["tiny"], 400)
    assert result["flops_per_run"] == pytest.approx(20 * first["flops_per_step"] + 4 * second["flops_per_step"])
    assert first["flops_per_step"] == plan(whole)["flops_per_step"]
    said = describe(result)
    assert "phase to step 20" in said and "phase to step 24" in said and "of the largest phase" in said
