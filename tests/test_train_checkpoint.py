"""Checkpoints of our own format: written by several ranks, committed last, verified, read at any cut."""

from __future__ import annotations

import json
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sci_gpt.errors import CheckpointError
from sci_gpt.train.checkpoint import (
    MOMENTS,
    Reader,
    Slice,
    committed,
    latest,
    read_manifest,
    read_state,
    read_weights,
    sealed,
    step_folder,
    tensor_key,
    torn,
)
from sci_gpt.train.commit import CheckpointWriter, write_safetensors
from sci_gpt.train.fragments import Holding

SHAPES = {"net.matrix": (6, 4), "net.bias": (5,), "net.cube": (3, 4, 2)}
KINDS = ("weight", *MOMENTS)


def truth(kind: str) -> dict[str, Tensor]:
    """Whole tensors of one kind: distinct numbers everywhere."""
    base = 1000.0 * KINDS.index(kind)
    return {name: base + torch.randn(shape, generator=_generator(name)) for name, shape in SHAPES.items()}


def _generator(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(sum(map(ord, name)))


def holding(rank: int, size: int, *, tp_dim: dict[str, int] | None = None, step: float = 7.0) -> Holding:
    """What a rank owns: a flat share of each parameter, or a tensor-parallel slice of those in `tp_dim`."""
    tensors: dict[str, Tensor] = {}
    rows: list[list[object]] = []
    for name, shape in SHAPES.items():
        dim = (tp_dim or {}).get(name)
        for kind in KINDS:
            whole = truth(kind)[name]
            if dim is None:
                flat = whole.reshape(-1)
                start, stop = flat.numel() * rank // size, flat.numel() * (rank + 1) // size
                offset, width, piece = 0, shape[0], flat[start:stop]
            else:
                width = shape[dim] // size
                offset, start = rank * width, 0
                piece = whole.narrow(dim, offset, width).reshape(-1)
                stop = piece.numel()
            tensors[tensor_key(name, kind, offset=offset, start=start)] = piece
        rows.append([name, offset, width, start, stop])
    parameters = {
        name: {"shape": list(shape), "tp_dim": (tp_dim or {}).get(name), "trainable": True}
        for name, shape in SHAPES.items()
    }
    return Holding(tensors=tensors, fragments=rows, parameters=parameters, adam_step=step)


def writer(run: Path, rank: int, *, size: int = 2, session: str = "one", timeout: float = 5.0) -> CheckpointWriter:
    return CheckpointWriter(run, rank=rank, size=size, session=session, timeout_seconds=timeout)


def save(run: Path, step: int, *, size: int = 2, tp_dim: dict[str, int] | None = None) -> Path:
    """A whole checkpoint: the other ranks first, rank 0 last."""
    for rank in reversed(range(size)):
        writer(run, rank, size=size).save(
            step, holding(rank, size, tp_dim=tp_dim), state={"step": step, "next_sample": 5}
        )
    return step_folder(run, step)


@pytest.mark.parametrize("tp_dim", [None, {"net.matrix": 0, "net.cube": 1}, {"net.matrix": 1, "net.cube": 2}])
def test_weights_and_moments_come_back_whole(tmp_path: Path, tp_dim: dict[str, int] | None) -> None:
    folder = save(tmp_path, 3, tp_dim=tp_dim)
    for name, tensor in read_weights(folder).items():
        assert torch.equal(tensor, truth("weight")[name])
    reader = Reader(folder)
    for kind in MOMENTS:
        for name, tensor in truth(kind).items():
            assert torch.equal(reader.read(name, kind).view(tensor.shape), tensor)
    assert reader.adam_step == 7.0
    assert read_state(folder)["next_sample"] == 5


@pytest.mark.parametrize("saved", [None, {"net.matrix": 0}, {"net.matrix": 1}])
@pytest.mark.parametrize("wanted", [None, 0, 1])
def test_any_range_of_any_slice_is_read(tmp_path: Path, saved: dict[str, int] | None, wanted: int | None) -> None:
    if saved and wanted is not None and saved["net.matrix"] != wanted:
        reader = Reader(save(tmp_path, 1, tp_dim=saved))
        with pytest.raises(CheckpointError, match="saved divided along dimension"):
            reader.read("net.matrix", slice_=Slice(wanted, 0, 2))
        return
    reader = Reader(save(tmp_path, 1, tp_dim=saved))
    whole = truth("weight")["net.matrix"]
    parts = (
        [(whole, None)]
        if wanted is None
        else [(whole.narrow(wanted, at, 2), Slice(wanted, at, 2)) for at in range(0, whole.shape[wanted], 2)]
    )
    for part, slice_ in parts:
        flat = part.reshape(-1)
        for start in range(flat.numel()):
            for stop in range(start + 1, flat.numel() + 1):
                assert torch.equal(reader.read("net.matrix", slice_=slice_, start=start, stop=stop), flat[start:stop])


def test_nothing_is_committed_before_every_rank_has_written(tmp_path: Path) -> None:
    writer(tmp_path, 1).save(4, holding(1, 2), state={})
    folder = step_folder(tmp_path, 4)
    assert latest(tmp_path) is None and torn(tmp_path) == [folder]
    with pytest.raises(CheckpointError, match="is no checkpoint: it holds no manifest.json"):
        read_weights(folder)
    writer(tmp_path, 0).save(4, holding(0, 2), state={"step": 4})
    assert latest(tmp_path) == folder and torn(tmp_path) == []


def test_rank_0_waits_for_a_late_rank(tmp_path: Path) -> None:
    thread = threading.Thread(target=lambda: writer(tmp_path, 0).save(4, holding(0, 2), state={"step": 4}))
    thread.start()
    thread.join(0.3)
    assert thread.is_alive() and latest(tmp_path) is None
    writer(tmp_path, 1).save(4, holding(1, 2), state={})
    thread.join(5)
    assert not thread.is_alive() and latest(tmp_path) == step_folder(tmp_path, 4)


def test_a_rank_that_never_writes_ends_the_save_and_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    before = save(tmp_path, 2)
    with pytest.raises(CheckpointError, match=r"ranks \[1\] left no part list in 0\.2 s.*step-00000002 is intact"):
        writer(tmp_path, 0, timeout=0.2).save(4, holding(0, 2), state={"step": 4})
    assert latest(tmp_path) == before and not step_folder(tmp_path, 4).exists()
    assert torch.equal(read_weights(before)["net.bias"], truth("weight")["net.bias"])


def test_a_part_list_of_an_earlier_start_does_not_count(tmp_path: Path) -> None:
    writer(tmp_path, 1, session="killed").save(4, holding(1, 2), state={})
    with pytest.raises(CheckpointError, match=r"ranks \[1\] left no part list"):
        writer(tmp_path, 0, session="new", timeout=0.2).save(4, holding(0, 2), state={"step": 4})


def test_torn_folders_are_listed_and_removed(tmp_path: Path) -> None:
    before = save(tmp_path, 2)
    writer(tmp_path, 1).save(4, holding(1, 2), state={})
    assert CheckpointWriter.remove_torn(tmp_path) == [step_folder(tmp_path, 4)]
    assert committed(tmp_path) == [before] and not step_folder(tmp_path, 4).exists()


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        save(tmp_path, step)
    assert committed(tmp_path) == [step_folder(tmp_path, 2), step_folder(tmp_path, 10)]


def test_a_step_is_saved_once(tmp_path: Path) -> None:
    save(tmp_path, 2)
    with pytest.raises(CheckpointError, match="already committed"):
        writer(tmp_path, 0).save(2, holding(0, 2), state={})


@pytest.mark.parametrize("name", ["rank-00001.safetensors", "rank-00000.parts.json", "state.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_noticed_and_the_file_named(tmp_path: Path, name: str, damage: str) -> None:
    folder = save(tmp_path, 2)
    path = folder / name
    data = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    else:
        data[-5] ^= 1
        path.write_bytes(bytes(data) if damage == "flip" else bytes(data[:-8]))
    with pytest.raises(CheckpointError, match=name):
        if name == "state.json":
            read_state(folder)
        else:
            read_weights(folder)


def test_another_format_version_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, 2)
    manifest = sealed(read_manifest(folder) | {"format": 99})
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="checkpoint format 99, this code reads 1"):
        read_weights(folder)


def test_elements_in_no_file_are_noticed(tmp_path: Path) -> None:
    share = holding(1, 2)
    share.fragments[0][4] -= 2  # the part list claims two elements less than the parameter has
    writer(tmp_path, 1).save(2, share, state={})
    writer(tmp_path, 0).save(2, holding(0, 2), state={"step": 2})
    with pytest.raises(CheckpointError, match="net.matrix .weight.: elements 22..24 of slice"):
        read_weights(step_folder(tmp_path, 2))


def test_ranks_that_disagree_on_adams_step_are_refused(tmp_path: Path) -> None:
    writer(tmp_path, 1).save(2, holding(1, 2, step=8.0), state={})
    with pytest.raises(CheckpointError, match=r"step counters differ between ranks: \[7.0, 8.0\]"):
        writer(tmp_path, 0).save(2, holding(0, 2), state={"step": 2})
    assert latest(tmp_path) is None


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """No file may grow beyond `room` bytes: writes fail with an OSError, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_checkpoint_before_and_no_folder(tmp_path: Path) -> None:
    before = save(tmp_path, 2)
    with full_disk(300):
        with pytest.raises(CheckpointError, match="was not written: .*File too large.*make room"):
            writer(tmp_path, 1).save(4, holding(1, 2), state={})
        with pytest.raises(CheckpointError, match="was not written: rank 0: .*step-00000002 is intact"):
            writer(tmp_path, 0).save(4, holding(0, 2), state={"step": 4})
    assert latest(tmp_path) == before and not step_folder(tmp_path, 4).exists()


def test_rank_0_knows_at_once_of_a_rank_that_had_no_room_even_for_the_cause(tmp_path: Path) -> None:
    before = save(tmp_path, 2)
    with full_disk(0), pytest.raises(CheckpointError, match="was not written: .*File too large"):
        writer(tmp_path, 1).save(4, holding(1, 2), state={})
    with pytest.raises(CheckpointError, match=r"rank 1: it could not write its part; make room.*step-00000002 is int"):
        writer(tmp_path, 0).save(4, holding(0, 2), state={"step": 4})
    assert latest(tmp_path) == before and not step_folder(tmp_path, 4).exists()


def test_the_files_are_safetensors_that_the_library_reads(tmp_path: Path) -> None:
    tensors = {"a:weight:0:0": torch.randn(7), "b:weight:0:0": torch.randn(2, 3)[:, 1], "c": torch.zeros(0)}
    write_safetensors(tmp_path / "x.safetensors", tensors)
    back = load_file(tmp_path / "x.safetensors")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_only_fp32_is_written(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="fragment 'a' must be float32, got torch.bfloat16"):
        write_safetensors(tmp_path / "x.safetensors", {"a": torch.zeros(2, dtype=torch.bfloat16)})
