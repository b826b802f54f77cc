"""The parallel plan checks itself; model states agree with the ZeRO paper, activations with what autograd keeps."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sci_gpt.data.index import INDEX, quality_name
from sci_gpt.data.quality import SPAN
from sci_gpt.data.shard import Shard
from sci_gpt.data.store import Store
from sci_gpt.errors import ConfigError
from sci_gpt.model.init import initialize
from sci_gpt.model.shapes import SHAPES
from sci_gpt.model.transformer import SciGPT
from sci_gpt.parallel.memory import activation_bytes, model_state_bytes
from sci_gpt.parallel.plan import ParallelPlan
from sci_gpt.recipes import parts
from sci_gpt.recipes import reading as recipe
from sci_gpt.recipes.plan import describe, plan
from sci_gpt.recipes.reading import demand, describe_reading
from sci_gpt.train.feed import StepReader
from sci_gpt.train.objective import NextFrame
from toy_store import change_manifest, toy_config, write_store


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
    with pytest.raises(ConfigError, match="for 2 processes .* 3 were started"):
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


def test_the_plans_bytes_are_those_that_reading_a_window_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long stretches, whose windows lie in several blocks of checksums; each window is read with nothing kept."""
    times = {"field": [400], "station": [6000], "quake": [9000, 2000]}
    store = Store.open(write_store(tmp_path / "store", times=times))
    config = toy_config(store.path, tmp_path / "run")
    monkeypatch.setattr(recipe, "_LOOKED_AT", 100_000)  # all windows
    (phase,) = recipe.reading(config, store)
    read, sizes = Shard.read, list[int]()

    def counted(shard: Shard, offset: int, *, size: int) -> bytes:
        sizes.append(size)
        return read(shard, offset, size=size)

    monkeypatch.setattr(Shard, "read", counted)
    corpus = parts.curriculum(config, store).corpora[0]
    shares = []
    for windows, length in zip(corpus.windows, corpus.lengths, strict=True):
        sizes.clear()
        for window in range(0, windows.num_windows):
            store.close()
            windows.read(window)
        row = phase["sources"][windows.spec.source]
        assert sum(row["bytes_per_sample"].values()) == pytest.approx(sum(sizes) / windows.num_windows)
        assert row["bytes_per_token"] == pytest.approx(sum(sizes) / windows.num_windows / length)
        shares.append(row["bytes_per_token"])
    # every source has a third of the tokens
    assert phase["bytes_per_token"] == pytest.approx(sum(shares) / 3)
    assert list(phase["bytes_per_token_by_modality"].values()) == pytest.approx(shares)  # grid, series, trace
    assert phase["tokens_per_sample"] == pytest.approx(3 / sum(1 / length for length in corpus.lengths))


def test_a_rate_that_is_given_says_what_the_store_must_give(store: Path, tmp_path: Path) -> None:
    config = toy_config(store, tmp_path / "run")
    result = plan(config, 6e6, nodes=2)
    (phase,) = result["phases"]
    read, need = phase["reading"], phase["reading"]["demand"]
    assert need["gigabytes_per_second_and_node"] == pytest.approx(3e6 * read["bytes_per_token"] / 1e9)
    assert need["samples_per_second"] == pytest.approx(6e6 / read["tokens_per_sample"])
    assert "at 6,000,000 tokens/s" in describe(result) and "per node (as given)" in describe(result)
    bound = plan(config)
    most = bound["phases"][0]["reading"]
    assert most["demand"]["tokens_per_second"] == pytest.approx(
        most["packing"]["fill"] * 480 / bound["seconds_per_step_at_least"]
    )
    assert "at most: a matrix product's rate here" in describe(bound)
    with pytest.raises(ConfigError, match="--tokens-per-second must be more than 0, got 0"):
        plan(config, 0.0)
    with pytest.raises(ConfigError, match="--nodes must divide the 2 processes of the run, got 3"):
        plan(config, nodes=3)


def test_the_plan_says_what_quality_leaves_out(tmp_path: Path) -> None:
    """A station without values at its times 100..199 of 400: windows of 24 times, every 3: those from 102 to 174."""
    path = write_store(tmp_path / "store")
    spans = np.array([(0, 0, 100, 200)], SPAN)
    folder = path / "station" / "train"
    np.save(folder / quality_name(0), spans, allow_pickle=False)
    index = json.loads((folder / INDEX).read_text())
    index["shards"][0] |= {"num_spans": 1, "quality_crc32": zlib.crc32(spans.tobytes())}
    (folder / INDEX).write_text(json.dumps(index))
    change_manifest(path, {})
    (phase,) = recipe.reading(toy_config(path, tmp_path / "run"), Store.open(path))
    row = phase["sources"]["station"]
    assert row["left_out"] == {"missing": 25}
    assert row["share_left_out"] == pytest.approx(25 / (3 * 126))
    assert "6.6 % of windows left out" in "\n".join(
        describe_reading(phase | {"demand": demand(phase, 1.0, nodes=1)}, basis="")
    )
