"""The engine under DeepSpeed on two real processes: against plain torch, at every ZeRO stage and between stages."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from engine_worker import PAIRS, SAVED
from sci_gpt.errors import ConfigError
from sci_gpt.parallel.world import World
from sci_launch.local import run_workers

STAGES = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks saw (one launch for the whole file)."""
    folder = tmp_path_factory.mktemp("engine")
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)
    try:
        run_workers(["engine_worker", str(folder)], processes=2, threads=1, meeting_place=folder / "meet")
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return [json.loads((folder / f"seen-{rank}.json").read_text()) for rank in (0, 1)]


def test_the_private_names_of_deepspeed_are_where_they_were(seen: list[dict[str, Any]]) -> None:
    missing = {name for rank in seen for stage in STAGES for name in rank[f"zero{stage}"]["missing"]}
    assert not missing, (
        f"this version of deepspeed has moved {sorted(missing)}: find their successors, and change "
        "sci_gpt/train/fragments.py and sci_gpt/parallel/engine.py"
    )
    assert not seen[0]["shared_memory_op"], (
        "deepspeed compiles its shared-memory op again (a minute at the first start): mend _init_deepspeed in "
        "sci_gpt/parallel/world.py"
    )


@pytest.mark.parametrize("stage", STAGES)
def test_losses_and_norms_are_those_of_plain_torch(seen: list[dict[str, Any]], stage: int) -> None:
    for rank in seen:
        for step, expected in zip(rank[f"zero{stage}"]["steps"], rank["reference"], strict=True):
            assert step["loss"] == pytest.approx(expected["loss"], rel=1e-6)
            assert step["norm"] == pytest.approx(expected["norm"], rel=1e-5)
            assert step["norm"] > 0.05 and step["applied"]  # clipping is active in every step


def test_micro_batches_give_the_same_losses(seen: list[dict[str, Any]]) -> None:
    losses = [step["loss"] for step in seen[0]["accumulated"]]
    assert losses == pytest.approx([step["loss"] for step in seen[0]["reference"]], rel=1e-6)


def test_parameters_with_rates_of_their_own_learn_as_in_plain_torch(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        expected = [step["loss"] for step in rank["factored"]["reference"]]
        assert expected != pytest.approx([step["loss"] for step in rank["reference"]], rel=1e-3)
        for stage in ("0", "1", "3"):
            assert [step["loss"] for step in rank["factored"][stage]] == pytest.approx(expected, rel=1e-6)


def test_bf16_follows_fp32(seen: list[dict[str, Any]]) -> None:
    losses = [step["loss"] for step in seen[0]["bf16"]]
    assert losses == pytest.approx([step["loss"] for step in seen[0]["reference"]], rel=2e-2)
    assert seen[0]["bf16_buffer"], "constants of the model (frequencies) must stay fp32"


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_same_layout_goes_on_bit_for_bit_in_bf16(seen: list[dict[str, Any]], stage: int) -> None:
    """Losses and norms, and in the end weights and moments; a frozen weight, which is bf16 here, is saved as fp32."""
    for rank in seen:
        found = rank[f"bf16-{stage}"]
        assert found["again"] == found["straight"] and found["same"] and found["types"] == ["torch.float32"]


def test_a_closed_engine_leaves_torchs_own_linear_behind(seen: list[dict[str, Any]]) -> None:
    """ZeRO 3 puts another in its place, with which a later bf16 model of the process rounds its gradients otherwise."""
    assert all(rank["linear_is_torchs"] for rank in seen)


def test_a_crash_below_python_will_say_where_python_stood(seen: list[dict[str, Any]]) -> None:
    assert all(rank["crashes_say_where"] for rank in seen)


@pytest.mark.parametrize("stage", STAGES)
def test_a_loss_that_is_no_number_on_one_rank_is_refused_on_all(seen: list[dict[str, Any]], stage: int) -> None:
    for rank in seen:
        result = rank[f"zero{stage}"]
        assert [step["applied"] for step in result["broken"]] == [False]
        assert result["unchanged"], "weights or moments moved in a step that was refused"
        assert result["then"][0]["applied"], "the step after a refused one must be taken"
    assert not seen[0]["bf16_broken"][0]["applied"]


@pytest.mark.parametrize(("saved", "loaded"), PAIRS)
def test_a_checkpoint_loads_at_another_stage(seen: list[dict[str, Any]], saved: int, loaded: int) -> None:
    for rank in seen:
        result = rank[f"{saved}->{loaded}"]
        assert result["same"], "weights or moments written again differ from those that were loaded"
        losses = [step["loss"] for step in result["steps"]]
        expected = [step["loss"] for step in rank[f"zero{saved}"]["steps"][SAVED:]]
        if saved == loaded:  # bit for bit
            assert losses == expected
        assert losses == pytest.approx(expected, rel=1e-6)


def test_restarts_on_several_machines_need_a_new_store_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torchrun gives a worker; tests/test_drill.py has the restart itself."""
    torchrun = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in (torchrun | {"TORCHELASTIC_MAX_RESTARTS": "3"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        World.start()


def test_contradictory_places_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ConfigError, match=r"RANK is within 0\.\.WORLD_SIZE - 1, got RANK=3"):
        World.start()
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(ConfigError, match="must be numbers"):
        World.start()
