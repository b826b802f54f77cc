"""Saves in the background: what a file holds, who waits for whom, and where a failure comes out."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sci_gpt.errors import CheckpointError
from sci_gpt.train import commit
from sci_gpt.train.checkpoint import committed, latest, read_weights, step_folder
from sci_gpt.train.commit import CheckpointWriter, Saved
from sci_gpt.train.fragments import Holding
from sci_gpt.train.staging import Staging
from test_train_checkpoint import full_disk, holding, truth

WRITE = commit.write_safetensors
SECONDS = 10.0


class Gate:
    """Stands before every write of fragments: closed, a writing thread waits at it."""

    def __init__(self) -> None:
        self.opened = threading.Event()

    def write(self, path: Path, tensors: Mapping[str, Tensor], *, moved: Callable[[], None]) -> str:
        assert self.opened.wait(SECONDS), "nobody opened the gate"
        return WRITE(path, tensors, moved=moved)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate()
    monkeypatch.setattr(commit, "write_safetensors", gate.write)
    yield gate
    gate.opened.set()


def writer(run: Path, rank: int = 0, *, size: int = 1, **more: Any) -> CheckpointWriter:
    return CheckpointWriter(run, rank=rank, size=size, session="s", asynchronous=True, **more)


def test_a_save_returns_at_once_and_holds_the_weights_of_its_moment(tmp_path: Path, gate: Gate) -> None:
    told: list[Saved] = []
    mine, saving = holding(0, 1), writer(tmp_path, told=told.append)
    saving.save(2, mine, state={"step": 2})
    for tensor in mine.tensors.values():
        tensor.add_(1.0)  # training goes on
    saving.check()
    assert latest(tmp_path) is None and told == []
    gate.opened.set()
    saving.finish()
    assert latest(tmp_path) == step_folder(tmp_path, 2)
    for name, tensor in read_weights(step_folder(tmp_path, 2)).items():
        assert torch.equal(tensor, truth("weight")[name])
    (saved,) = told
    assert saved.step == 2 and 0 < saved.blocked_seconds < saved.seconds


def test_what_belongs_to_a_checkpoint_is_on_the_disk_before_it_counts(tmp_path: Path) -> None:
    """The logs of its steps: where they cannot be brought there, the checkpoint is not committed."""
    saving, seen = writer(tmp_path), list[list[str]]()
    saving.before_part = lambda: seen.append([path.name for path in step_folder(tmp_path, 2).glob("*.json")])
    saving.save(2, holding(0, 1), state={"step": 2})
    saving.finish()
    assert seen == [[]] and latest(tmp_path) == step_folder(tmp_path, 2)

    def full() -> None:
        raise OSError(28, "No space left on device", "log.jsonl")

    saving.before_part = full
    saving.save(4, holding(0, 1), state={"step": 4})
    with pytest.raises(CheckpointError, match=r"No space left on device: 'log\.jsonl'"):
        saving.finish()
    assert latest(tmp_path) == step_folder(tmp_path, 2)


def test_who_waits_for_a_save_hears_that_it_goes_on(tmp_path: Path) -> None:
    """A hang's limit starts anew with each tensor that is written, and while rank 0 waits within a limit of its own."""
    first, second = writer(tmp_path, 0, size=2), writer(tmp_path, 1, size=2)
    heard: list[float] = []
    first.moving = lambda: heard.append(time.monotonic())
    first.save(4, holding(0, 2), state={"step": 4})

    def late() -> None:
        time.sleep(2.5)  # longer than two looks
        second.save(4, holding(1, 2), state={})

    other = threading.Thread(target=late)
    other.start()
    first.finish()
    other.join()
    second.finish()
    assert len(heard) >= 2 and latest(tmp_path) == step_folder(tmp_path, 4)


def test_what_is_handed_in_as_state_is_that_of_its_moment(tmp_path: Path, gate: Gate) -> None:
    state = {"step": 2}
    saving = writer(tmp_path)
    saving.save(2, holding(0, 1), state=state)
    state["step"] = 99
    gate.opened.set()
    saving.finish()
    assert commit.read_state(step_folder(tmp_path, 2)) == {"step": 2}


def test_the_next_save_waits_for_the_one_under_way(tmp_path: Path, gate: Gate) -> None:
    saving = writer(tmp_path)
    saving.save(2, holding(0, 1), state={"step": 2})
    second = threading.Thread(target=lambda: saving.save(4, holding(0, 1), state={"step": 4}))
    second.start()
    second.join(0.2)
    assert second.is_alive() and committed(tmp_path) == []
    gate.opened.set()
    second.join(SECONDS)
    saving.finish()
    assert committed(tmp_path) == [step_folder(tmp_path, 2), step_folder(tmp_path, 4)]


@pytest.mark.parametrize("where", ["check", "save", "finish", "exit"])
def test_a_failure_comes_out_once_and_earlier_checkpoints_stay(tmp_path: Path, gate: Gate, where: str) -> None:
    gate.opened.set()
    with writer(tmp_path) as saving:
        saving.save(2, holding(0, 1), state={"step": 2})
    before = latest(tmp_path)
    saving = writer(tmp_path)
    with full_disk(300):
        saving.save(4, holding(0, 1), state={"step": 4})
        assert saving._thread is not None
        saving._thread.join(SECONDS)
    with pytest.raises(CheckpointError, match="step-00000004 was not written: rank 0: .*File too large.*is intact"):
        if where == "exit":
            with saving:
                pass
        elif where == "save":
            saving.save(6, holding(0, 1), state={"step": 6})
        else:
            getattr(saving, where)()
    assert committed(tmp_path) == [before] and not step_folder(tmp_path, 4).exists()
    saving.check()
    saving.finish()  # it is told once: whoever catches it can go on
    saving.save(6, holding(0, 1), state={"step": 6})
    saving.finish()
    assert latest(tmp_path) == step_folder(tmp_path, 6)


def test_rank_0_hears_of_another_ranks_failure_and_does_not_wait(tmp_path: Path) -> None:
    first, second = writer(tmp_path, 0, size=2), writer(tmp_path, 1, size=2)
    with full_disk(0):
        second.save(4, holding(1, 2), state={})
        assert second._thread is not None
        second._thread.join(SECONDS)
    first.save(4, holding(0, 2), state={"step": 4})
    with pytest.raises(CheckpointError, match="rank 1: it could not write its part"):
        first.finish()
    with pytest.raises(CheckpointError, match="was not written: .*File too large"):
        second.check()
    assert not step_folder(tmp_path, 4).exists()


def test_an_error_that_is_no_full_disk_comes_out_as_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path, tensors: Mapping[str, Tensor], *, moved: Callable[[], None]) -> str:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(commit, "write_safetensors", broken)
    first, second = writer(tmp_path, 0, size=2), writer(tmp_path, 1, size=2)
    second.save(4, holding(1, 2), state={})
    with pytest.raises(RuntimeError, match="out of memory"):
        second.finish()
    monkeypatch.setattr(commit, "write_safetensors", WRITE)
    first.save(4, holding(0, 2), state={"step": 4})
    with pytest.raises(CheckpointError, match="rank 1: out of memory"):  # not after a timeout of ten minutes
        first.finish()


def test_a_run_that_fails_still_ends_the_save_under_way(tmp_path: Path, gate: Gate) -> None:
    def train() -> None:
        with writer(tmp_path) as saving:
            saving.save(2, holding(0, 1), state={"step": 2})
            threading.Timer(0.2, gate.opened.set).start()
            raise ValueError("ten steps in a row")

    with pytest.raises(ValueError, match="ten steps in a row"):
        train()
    assert latest(tmp_path) == step_folder(tmp_path, 2)


def test_a_run_that_fails_does_not_wait_long_for_ranks_that_may_be_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(commit, "_LEAVING_SECONDS", 0.1)
    with pytest.raises(ValueError, match="a rank is gone"), writer(tmp_path, 0, size=2) as saving:
        saving.save(2, holding(0, 2), state={"step": 2})
        raise ValueError("a rank is gone")
    assert "warning: checkpoint" in (said := capsys.readouterr().err) and "ranks [1] left no part list" in said
    assert not step_folder(tmp_path, 2).exists()


def test_staging_memory_is_reused_and_grows() -> None:
    staging = Staging()
    small, large = holding(0, 2), holding(0, 1)
    staging.reserve(small)
    assert staging.num_bytes == 4 * sum(tensor.numel() for tensor in small.tensors.values())
    places = []
    for mine in (small, small, large, small):
        copied = staging.copy(mine)
        assert copied.tensors.keys() == mine.tensors.keys() and copied.fragments == mine.fragments
        for name, tensor in mine.tensors.items():
            assert torch.equal(copied.tensors[name], tensor)
            assert copied.tensors[name].data_ptr() != tensor.data_ptr()
        places.append(next(iter(copied.tensors.values())).data_ptr())
    assert places[0] == places[1] and places[2] == places[3]
    assert staging.num_bytes == 4 * sum(tensor.numel() for tensor in large.tensors.values())


def test_memory_is_taken_before_the_first_save_and_only_where_it_is_needed(tmp_path: Path) -> None:
    for asynchronous, expected in ((True, 4 * sum(t.numel() for t in holding(0, 1).tensors.values())), (False, 0)):
        saving = CheckpointWriter(tmp_path, rank=0, size=1, session="s", asynchronous=asynchronous)
        saving.prepare(holding(0, 1))
        assert saving._staging.num_bytes == expected


def test_only_fp32_is_copied() -> None:
    odd = Holding(tensors={"a": torch.zeros(2, dtype=torch.bfloat16)}, fragments=[], parameters={}, adam_step=None)
    with pytest.raises(TypeError, match="fragment 'a' must be float32, got torch.bfloat16"):
        Staging().copy(odd)
