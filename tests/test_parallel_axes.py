"""Tensor and sequence axes on two real processes, on made-up mixed batches: the same losses, norms and samples."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.layouts import Layout, apart, run
from benchmarks.traffic import AS_LARGE, rows
from sci_gpt.config_file import show_config
from sci_gpt.data.store import Store
from sci_gpt.errors import ConfigError
from sci_gpt.model.init import Start, initialize
from sci_gpt.model.inputs import NoiseSettings
from sci_gpt.model.shapes import SHAPES, ModelShape
from sci_gpt.model.transformer import ModelSettings, build_model
from sci_gpt.parallel import tensor
from sci_gpt.parallel.groups import Groups
from sci_gpt.parallel.plan import ParallelPlan
from sci_gpt.parallel.weights import held
from sci_gpt.recipes import parts
from sci_gpt.train.checkpoint import Reader, read_weights, step_folder
from sci_gpt.train.feed import StepReader
from sci_tokenizers.tokenizer import TokenizerSettings
from toy_store import toy_config, write_store

STEPS, SAVED = 8, 4
NOISY = {"model.noise.width": 4}
FEW = {"tensor": Layout(tensor=2), "sequence": Layout(sequence=2)}
MORE = {
    "tensor, ZeRO 2": Layout(tensor=2, zero=2),
    "tensor, ZeRO 3": Layout(tensor=2, zero=3),
    "sequence, ZeRO 2": Layout(sequence=2, zero=2),
    "sequence, ZeRO 3": Layout(sequence=2, zero=3),
    "data": Layout(data=2),
    "data, ZeRO 3": Layout(data=2, zero=3, changes=AS_LARGE),
    "data, ZeRO 3, offload": Layout(data=2, zero=3, changes={"parallel.offload": "all"}),
    "data, ZeRO 1, offload": Layout(data=2, zero=1, changes={"parallel.offload": "optimizer"}),
    "tensor, all computed again": Layout(tensor=2, changes={"parallel.activation_checkpointing": "full"}),
    "tensor, much computed again": Layout(tensor=2, changes={"parallel.activation_checkpointing": "selective"}),
}
COUNTED = ("data", "tensor", "sequence", "data, ZeRO 3")

Seen = dict[str, dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Place:
    """A configuration file, the store that it trains on, and where runs save."""

    base: Path
    store: Path
    runs: Path

    def of(self, layout: Layout, name: str = "", *, save: int = 0) -> Layout:
        """The layout on the made-up data; with `save` it leaves a checkpoint under its name."""
        changes = {"schedule.warmup_steps": 2, "schedule.cooldown_steps": 0, **layout.changes}
        fixed = replace(layout, base=str(self.base), steps=STEPS, changes=changes, count=name in COUNTED)
        return replace(fixed, save=save, folder=str(self.runs / name)) if save else fixed

    def saved(self, name: str, step: int = SAVED) -> Path:
        """The checkpoint of a run."""
        return step_folder(self.runs / name, step)

    def train(self, layouts: dict[str, Layout]) -> Seen:
        """One launch."""
        return dict(zip(layouts, run(list(layouts.values()), self.store), strict=True))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("axes")
    store = write_store(folder / "store", times={"field": [20]})  # three windows: exhausted in the first step
    config = toy_config(store, folder / "run", parallel={"accumulation": 2}, rows_per_step=2)
    (folder / "config.yaml").write_text(show_config(config))
    return Place(base=folder / "config.yaml", store=store, runs=folder / "runs")


@pytest.fixture(scope="module")
def few(place: Place) -> Seen:
    """Tensor and sequence axes, each going on from the other's checkpoint, beside one process: two launches."""
    two = {name: replace(place.of(layout, name, save=SAVED), validate=True) for name, layout in FEW.items()}
    two |= {
        f"{source} -> {target}": replace(place.of(FEW[target]), load=str(place.saved(source)))
        for source in FEW
        for target in FEW
    }
    one = {
        "alone": replace(place.of(Layout()), validate=True),
        "tensor -> alone": replace(place.of(Layout(zero=3)), load=str(place.saved("tensor"))),
        "bf16": place.of(Layout(dtype="bf16")),
    }
    return place.train(two) | place.train(one)


@pytest.fixture(scope="module")
def more(place: Place, few: Seen) -> Seen:
    """The other layouts of two processes, and a trunk conditioned on noise."""
    two = {name: place.of(layout, name, save=SAVED) for name, layout in MORE.items()}
    noisy = {"tensor, noise": Layout(tensor=2, changes=NOISY), "sequence, noise": Layout(sequence=2, changes=NOISY)}
    two |= {name: replace(place.of(layout, name, save=1), steps=2) for name, layout in noisy.items()}
    alone = {"alone, noise": replace(place.of(Layout(changes=NOISY), "alone, noise", save=1), steps=2)}
    return few | place.train(two) | place.train(alone)


def check_equal(seen: Seen, name: str) -> None:
    """Losses, norms and samples of a layout are those of one process."""
    worst = apart(seen[name]["steps"], seen["alone"]["steps"])
    assert worst["loss"] < 1e-5 and worst["gradient_norm"] < 1e-5, worst
    assert min(row["gradient_norm"] for row in seen["alone"]["steps"]) > 0.1, "clipping must be active"
    assert seen[name]["all_samples"] == seen["alone"]["all_samples"]


@pytest.mark.parametrize("name", FEW)
def test_two_axes_have_the_losses_and_norms_of_one_process(few: Seen, name: str) -> None:
    check_equal(few, name)


@pytest.mark.parametrize("name", MORE)
def test_losses_and_norms_are_those_of_one_process(more: Seen, name: str) -> None:
    check_equal(more, name)


def test_a_source_is_exhausted_and_starts_again_while_layouts_are_compared(place: Place) -> None:
    config = place.of(Layout()).config(place.store)
    curriculum = parts.curriculum(config, Store.open(place.store))
    read = StepReader(curriculum, parts.place(config, rank=0), settings=parts.tokenizer_settings(config))
    keys, n = [], 0
    for step in range(STEPS):
        rows_read = read(step, n)
        keys += [key for key in rows_read.keys if key.startswith("field/")]
        n = rows_read.next_sample
    windows = {one.spec.source: one.num_windows for one in curriculum.corpora[0].windows}
    assert len(keys) > windows["field"] == 3


@pytest.mark.parametrize("name", FEW)
def test_validation_gives_the_scores_of_one_process(few: Seen, name: str) -> None:
    """Scores of the validation after the last step; each group of processes has windows of its own."""
    assert set(few["alone"]["validation"]) == {"grid", "series", "trace"}
    for modality, scores in few["alone"]["validation"].items():
        assert few[name]["validation"][modality] == pytest.approx(scores, rel=1e-4, abs=1e-5), modality


def test_each_micro_batch_counts_once_in_bf16(few: Seen) -> None:
    """Norms of bf16 follow those of fp32 (2^-8 for each rounding); a micro-batch counted twice would give half more."""
    worst = apart(few["bf16"]["steps"], few["alone"]["steps"])
    assert worst["loss"] < 1e-2 and worst["gradient_norm"] < 5e-2, worst


@pytest.mark.parametrize("name", ["tensor, noise", "sequence, noise"])
def test_a_trunk_conditioned_on_noise_is_cut_too(place: Place, more: Seen, name: str) -> None:
    """The first moments after one step are the trunk's gradients; heads are left out, because where two members are
    equal the last digit decides the sign of their difference in the CRPS.
    """
    mine, theirs = (Reader(place.saved(run, 1)) for run in (name, "alone, noise"))
    assert "blocks.0.noise.weight" in mine.parameters
    for parameter in mine.parameters:
        if parameter.startswith("blocks."):
            found, wanted = (reader.read(parameter, "exp_avg") for reader in (mine, theirs))
            assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max())), parameter
    assert apart(more[name]["steps"][:1], more["alone, noise"]["steps"][:1])["loss"] < 1e-6


@pytest.mark.parametrize(
    "name", ["tensor -> tensor", "tensor -> sequence", "tensor -> alone", "sequence -> tensor", "sequence -> sequence"]
)
def test_a_run_goes_on_at_another_layout(few: Seen, name: str) -> None:
    source, _, target = name.partition(" -> ")
    rest = few[source]["steps"][SAVED:]
    assert apart(few[name]["steps"], rest)["loss"] < 1e-5
    assert few[name]["all_samples"] == few[source]["all_samples"][SAVED:]
    if source == target:
        assert [row["loss"] for row in few[name]["steps"]] == [row["loss"] for row in rest]


def test_a_checkpoint_holds_each_element_once_whatever_the_layout(place: Place, more: Seen) -> None:
    whole = read_weights(place.saved("data, ZeRO 3"))
    for name in ("tensor", "tensor, ZeRO 3", "sequence, ZeRO 2"):
        lists = [json.loads(path.read_bytes()) for path in place.saved(name).glob("*.parts.json")]
        held_once = sum(stop - start for part in lists for *_, start, stop in part["fragments"])
        assert held_once == sum(values.numel() for values in whole.values())
        found = read_weights(place.saved(name))
        assert found.keys() == whole.keys()
        for parameter, values in found.items():
            assert torch.allclose(values, whole[parameter], rtol=1e-4, atol=1e-5), (name, parameter)


@pytest.mark.parametrize("name", COUNTED)
def test_collectives_carry_what_theory_says(more: Seen, name: str) -> None:
    found = rows((FEW | MORE)[name], more[name])
    assert found and all(row.within for row in found), found


def part(rank: int, size: int, *, shape: ModelShape) -> Any:
    """A model of the meta device as rank `rank` of `size` tensor processes has it."""
    plan = ParallelPlan(data_parallel=1, tensor_parallel=size)
    groups = Groups(plan=plan, position=plan.position(rank), tensor="a group", sequence=None, zero=None)
    settings = ModelSettings(tokenizer=TokenizerSettings(), noise=NoiseSettings(width=4))
    model = build_model(shape, settings, device="meta")
    tensor.divide(model, groups)
    return model


@pytest.mark.parametrize("size", [2, 4])
def test_each_process_draws_its_slices_of_the_one_start(size: int) -> None:
    shape = SHAPES["200k"]
    settings = ModelSettings(tokenizer=TokenizerSettings(), noise=NoiseSettings(width=4))
    whole = build_model(shape, settings)
    initialize(whole, 5)
    named = dict(whole.named_parameters())
    cut = 0
    for rank in range(size):
        model = part(rank, size, shape=shape)
        start = Start.of(model, 5)
        assert {name for name, _ in model.named_parameters()} == set(named)
        for name, parameter in model.named_parameters():
            one = tensor.slice_of(parameter)
            mine = named[name] if one is None else named[name].narrow(one.dim, one.offset, one.width)
            count = mine.numel()
            for begin, stop in ((0, count), (count // 3, count - count // 5)):  # a piece of ZeRO 3 starts anywhere
                drawn = held(start, name, parameter=parameter, begin=begin, stop=stop)
                assert torch.equal(drawn, mine.reshape(-1)[begin:stop]), name
            cut += one is not None
    assert cut == size * shape.layers * 7


def test_what_all_of_a_tensor_group_have_whole_carries_no_mark() -> None:
    model = part(1, 2, shape=SHAPES["tiny"])
    marked = {name for name, p in model.named_parameters() if getattr(p, "tensor_model_parallel", False)}
    assert marked == {
        f"blocks.{layer}.{name}.weight"
        for layer in range(SHAPES["tiny"].layers)
        for name in ("query", "key", "value", "output", "gate", "up", "down")
    }


def test_a_layout_that_cannot_divide_the_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="must divide the model's 2 attention heads"):
        ParallelPlan(data_parallel=1, tensor_parallel=2, sequence_parallel=2).check_model(SHAPES["tiny"])
    odd = ModelShape(layers=1, width=64, heads=4, hidden=126)
    with pytest.raises(ConfigError, match="must divide the model's 126 MLP columns"):
        ParallelPlan(data_parallel=1, tensor_parallel=4).check_model(odd)


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage"),
        ({"gradient_clipping": 2.0}, "gradient_clipping"),
        ({"optimizer": {"type": "Adam"}}, "optimizer"),
        ({"bf16": {"enabled": True}}, "bf16"),
        ({"bfloat16": {"enabled": True}}, "bfloat16"),
        ({"zero_optimization": {"cpu_offload": True}}, "zero_optimization.cpu_offload"),
        ({"zero_optimization": {"zero_hpz_partition_size": 2}}, "zero_optimization.zero_hpz_partition_size"),
        ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, "zero_optimization.offload_param"),
        ({"zero_optimization": 3}, "zero_optimization"),
    ],
)
def test_a_setting_that_the_plan_owns_is_refused(extra: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=f"extra_deepspeed sets {named}, which the run's own settings decide"):
        ParallelPlan(data_parallel=2, extra_deepspeed=extra)


@pytest.mark.parametrize(
    ("name", "size"), [("reduce_bucket_size", "auto"), ("reduce_bucket_size", 0), ("sub_group_size", -1)]
)
def test_a_size_of_a_buffer_that_is_none_is_refused(name: str, size: Any) -> None:
    with pytest.raises(
        ConfigError, match=rf"zero_optimization.{name} is a number of values, at least [01], got {size!r}"
    ):
        ParallelPlan(data_parallel=2, extra_deepspeed={"zero_optimization": {name: size}})


def test_other_settings_are_passed_on_at_their_place() -> None:
    extra = {"zero_optimization": {"reduce_bucket_size": 1000}, "wall_clock_breakdown": True}
    config = ParallelPlan(data_parallel=2, zero_stage=2, extra_deepspeed=extra).deepspeed_config(clip=1.0)
    assert config["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 1000}
    assert config["wall_clock_breakdown"] is True


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ({"zero_stage": 0, "tensor_parallel": 2}, "ZeRO 0 is for data parallelism alone"),
        ({"zero_stage": 0, "sequence_parallel": 2}, "ZeRO 0 is for data parallelism alone"),
        ({"zero_stage": 0, "offload": "optimizer"}, "needs a ZeRO stage from 1 on"),
        ({"zero_stage": 2, "offload": "all"}, "set parallel.zero_stage to 3"),
        ({"checkpointing": "some"}, "activation_checkpointing is none or selective or full, got 'some'"),
        ({"offload": "disk"}, "offload is none, optimizer or all, got 'disk'"),
        ({"tensor_parallel": 0}, "tensor_parallel is at least 1"),
    ],
)
def test_a_layout_whose_result_is_not_known_is_refused(layout: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ParallelPlan(**({"data_parallel": 2} | layout))


def test_tensor_neighbours_stand_next_to_each_other() -> None:
    plan = ParallelPlan(data_parallel=2, sequence_parallel=3, tensor_parallel=2)
    positions = [plan.position(rank) for rank in range(plan.world_size)]
    assert positions[:4] == [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1)] and positions[6] == (1, 0, 0)
    assert [rank for rank in range(12) if plan.is_lead(rank)] == [0, 6]
    assert plan.zero_ranks == 6 and plan.loss_multiplier == 2
    assert plan.micro_batch_rows(5) == math.ceil(5 / 2)
