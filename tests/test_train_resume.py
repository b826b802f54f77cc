"""Where a run goes on: the newest checkpoint that is whole, whatever happened to newer ones; real files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sci_gpt.errors import CheckpointError
from sci_gpt.train import checkpoint as reading
from sci_gpt.train.checkpoint import Reader, committed, damage, latest, read_manifest, sealed, step_folder, torn
from sci_gpt.train.commit import CheckpointWriter
from sci_gpt.train.resume import Start, where_to_go_on
from sci_gpt.train.retention import Retention
from sci_gpt.train.run_folder import set_aside
from test_train_checkpoint import holding

IDENTITY = {"seed": 1}
FILES = (
    "rank-00000.safetensors",
    "rank-00001.safetensors",
    "rank-00000.parts.json",
    "rank-00001.parts.json",
    "state.json",
    "manifest.json",
)


def save(run: Path, step: int, **more: Any) -> Path:
    """A whole checkpoint of two ranks."""
    state = {"identity": IDENTITY, "step": step, "next_sample": 10 * step, "phase_starts": [0]} | more
    for rank in (1, 0):
        writer = CheckpointWriter(run, rank=rank, size=2, session="s", retention=Retention(last=9))
        writer.save(step, holding(rank, 2), state=state)
    return step_folder(run, step)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with checkpoints of steps 2 and 4."""
    save(tmp_path, 2)
    save(tmp_path, 4)
    return tmp_path


def go_on(run: Path) -> Start:
    return where_to_go_on(run, IDENTITY)


def test_the_newest_checkpoint_is_taken_where_it_is_whole(run: Path) -> None:
    start = go_on(run)
    assert (start.checkpoint, start.step, start.next_sample, start.damaged) == (step_folder(run, 4), 4, 40, ())


@pytest.mark.parametrize("harm", ["flip", "cut", "empty", "remove"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_passed_over_and_said(run: Path, name: str, harm: str) -> None:
    path = step_folder(run, 4) / name
    data = bytearray(path.read_bytes())
    if harm == "remove":
        path.unlink()
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes({"flip": bytes(data), "cut": bytes(data[:-3]), "empty": b""}[harm])
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    start = go_on(run)
    assert (start.checkpoint, start.step, start.next_sample) == (step_folder(run, 2), 2, 20)
    if (name, harm) == ("manifest.json", "remove"):
        assert start.damaged == () and torn(run) == [step_folder(run, 4)]  # as a save that never finished leaves it
    else:
        ((folder, found),) = start.damaged
        assert folder == step_folder(run, 4) and str(path) in found
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before


def test_no_byte_can_flip_unseen(run: Path) -> None:
    """Every byte of every file of a checkpoint, one bit at a time, whichever bit: 7 changes an ASCII letter least."""
    for name in FILES:
        path = step_folder(run, 4) / name
        whole = path.read_bytes()
        for at in range(0, len(whole), 1 if name == "manifest.json" else 29):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            assert damage(step_folder(run, 4)) is not None, f"{name}, byte {at}"
        path.write_bytes(whole)
    assert damage(step_folder(run, 4)) is None


def test_where_none_is_whole_the_run_does_not_start_anew(run: Path) -> None:
    for step, name in ((2, "state.json"), (4, "rank-00001.safetensors")):
        path = step_folder(run, step) / name
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"no checkpoint of .* is whole: .*rank-00001.*state\.json.*put a copy"):
        go_on(run)


def test_a_folder_without_checkpoints_is_a_new_run(tmp_path: Path) -> None:
    assert go_on(tmp_path) == Start(checkpoint=None, step=0, next_sample=0)
    (tmp_path / "checkpoints" / "step-00000003").mkdir(parents=True)
    assert go_on(tmp_path) == Start(checkpoint=None, step=0, next_sample=0)


def test_a_checkpoint_of_another_run_or_format_is_refused_and_not_passed_over(run: Path) -> None:
    with pytest.raises(CheckpointError, match="step-00000004 is of another run: seed is 1 there and 2 here"):
        where_to_go_on(run, {"seed": 2})
    manifest = sealed(read_manifest(step_folder(run, 4)) | {"format": 99})
    (step_folder(run, 4) / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="checkpoint format 99, this code reads 1"):
        go_on(run)


def test_a_file_that_the_system_does_not_let_be_read_is_not_passed_over(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be whole: a run that went on from the one before would lose what is there."""

    def refused(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(reading, "file_sha256", refused)
    with pytest.raises(CheckpointError, match=r"rank-00000\.safetensors cannot be read .*Permission denied"):
        go_on(run)


def test_a_manifest_from_before_it_had_a_checksum_is_read(run: Path) -> None:
    path = step_folder(run, 4) / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    path.write_text(json.dumps(manifest))
    assert go_on(run).step == 4


class Ranks:
    """A world of two whose other rank found `theirs`, and whose rank 0 sees checkpoints `seen`."""

    size = 2

    def __init__(self, rank: int, *, seen: list[str], theirs: str = "") -> None:
        self.rank, self.seen, self.theirs, self.asked = rank, seen, theirs, list[str]()

    def share(self, value: str) -> str:
        return json.dumps(self.seen)

    def gather_texts(self, value: str) -> list[str]:
        self.asked.append(value)
        other, self.theirs = self.theirs, ""
        return [value, other] if self.rank == 0 else [other, value]


def test_ranks_share_the_reading_and_agree(run: Path) -> None:
    """The file of rank 1's share is damaged: rank 1 finds it, rank 0 does not, and both take the one before."""
    names = [path.name for path in committed(run)]
    path = step_folder(run, 4) / "rank-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    found = damage(step_folder(run, 4)) or ""
    first, second = Ranks(0, seen=names, theirs=found), Ranks(1, seen=names)
    starts = [where_to_go_on(run, IDENTITY, world=world) for world in (first, second)]  # type: ignore[arg-type]
    assert first.asked[0] == "" and second.asked[0] == found
    assert starts[0] == starts[1] and starts[0].step == 2 and starts[0].damaged == ((step_folder(run, 4), found),)


def test_ranks_take_what_rank_0_sees(run: Path) -> None:
    """On a network's file system another rank's listing may be older."""
    world: Any = Ranks(1, seen=["step-00000002"])
    assert where_to_go_on(run, IDENTITY, world=world).step == 2


def test_a_first_look_reads_only_small_files(run: Path) -> None:
    path = step_folder(run, 4) / "rank-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert where_to_go_on(run, IDENTITY, contents=False).step == 4
    (step_folder(run, 4) / "state.json").write_text("{}")
    assert where_to_go_on(run, IDENTITY, contents=False).step == 2


def test_a_damaged_checkpoint_is_kept_under_a_name_that_is_none(run: Path) -> None:
    aside = set_aside(step_folder(run, 4))
    assert aside.name == "step-00000004.damaged" and (aside / "manifest.json").exists()
    assert latest(run) == step_folder(run, 2) and torn(run) == []
    shutil.copytree(step_folder(run, 2), step_folder(run, 4))
    assert set_aside(step_folder(run, 4)).name == "step-00000004.damaged-2"
    assert committed(run) == [step_folder(run, 2)]


def test_files_that_a_start_has_verified_are_not_hashed_again(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[Path] = []
    monkeypatch.setattr(reading, "_verify_file", lambda path, sha256: hashed.append(path))
    folder = step_folder(run, 4)
    Reader(folder, verified=True).read("net.matrix")
    assert hashed == []
    Reader(folder).read("net.matrix")
    assert [path.name for path in hashed] == ["rank-00000.safetensors", "rank-00001.safetensors"]
