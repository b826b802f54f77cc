"""Bad input on the command line: exit code 2, one line on stderr with name and remedy, nothing changed on disk."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from bad_input import CASES
from desk import STEP, Desk, Ended, close_desk, furnish, open_desk, run
from sci_gpt.train.checkpoint import committed, read_weights, step_folder, step_of, torn
from sci_gpt.train.run_folder import LOG, read_lines

PROCESSES = 2  # at a time


class Bench:
    """Runs cases in the background, each at a desk of its own, two at a time and each once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.template = furnish(folder / "template")
        self.desks: dict[str, Desk] = {}
        self._pool = ThreadPoolExecutor(PROCESSES)
        self._ended: dict[str, Future[Ended]] = {}

    def start(self, name: str) -> None:
        """Queue a case, unless it is already."""
        if name not in self._ended:
            self._ended[name] = self._pool.submit(self._run, name)

    def ended(self, name: str) -> Ended:
        """How a case's command ended; waits for it."""
        self.start(name)
        return self._ended[name].result()

    def _run(self, name: str) -> Ended:
        case = CASES[name]
        place = self.folder / name.replace(",", "").replace(" ", "-")
        desk = self.desks[name] = open_desk(self.template, place, disk_size=case.disk_size)
        limited = case.limited and not desk.mounted
        return run(desk, case.argv(desk), kept=case.kept, limited=limited, meanwhile=case.meanwhile)

    def close(self) -> None:
        """Wait for what runs, drop what waits, and unmount."""
        self._pool.shutdown(cancel_futures=True)
        for desk in self.desks.values():
            close_desk(desk)


@pytest.fixture(scope="module")
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    bench = Bench(tmp_path_factory.mktemp("bench"))
    for item in request.session.items:
        callspec = getattr(item, "callspec", None)
        if item.path == request.path and callspec is not None and callspec.params.get("name") in CASES:
            bench.start(callspec.params["name"])
    yield bench
    bench.close()


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_refused_in_one_line_and_changes_nothing(bench: Bench, name: str) -> None:
    case, ended = CASES[name], bench.ended(name)
    assert ended.code == 2, ended.error
    assert ended.error.count("\n") == 1 and ended.error.startswith("sci-gpt: "), ended.error
    for text in (*case.holds, case.remedy):
        assert text in ended.error, ended.error
    assert ended.changed == []


def test_after_a_full_disk_in_a_save_the_run_goes_on_from_the_checkpoint_before(bench: Bench) -> None:
    name = "full disk in a save, 2 processes"
    refused = re.search(r"(\S+step-(\d{8})) was not written", bench.ended(name).error)
    assert refused is not None and int(refused[2]) > STEP, bench.ended(name).error
    desk = bench.desks[name]
    folder = desk.disk / "run"
    assert committed(folder) == [step_folder(folder, STEP)] and torn(folder) == []
    original = read_weights(step_folder(bench.template / "toy" / "run", STEP))
    for parameter, tensor in read_weights(step_folder(folder, STEP)).items():
        assert tensor.equal(original[parameter]), parameter

    (desk.disk / "ballast").unlink(missing_ok=True)
    (desk.folder / refused[1]).mkdir()  # as a kill in the midst of that save would have left it
    (desk.folder / refused[1] / "rank-00000.safetensors.partial").write_bytes(b"cut")
    again = run(desk, desk.pretrain("output=disk/run", steps=STEP + 6, processes=2), meanwhile=None)
    torn_one = f"warning: {refused[1]} is torn (a save that never finished): ignored and removed\n"
    assert (again.code, again.error) == (0, torn_one), again.error
    assert f"resumes from disk/run/checkpoints/step-{STEP:08d}" in again.output
    assert [row["step"] for row in read_lines(folder / LOG) if "loss" in row] == list(range(STEP + 1, STEP + 7))
    assert [step_of(path) for path in committed(folder)] == [STEP, STEP + 6]
    assert read_weights(step_folder(folder, STEP + 6)).keys() == original.keys()


def test_every_kind_of_bad_input_that_was_asked_for_has_a_case() -> None:
    asked = (
        "missing file",
        "unreadable file",
        "variable not in the table",
        "unit that does not convert",
        "window longer than the data",
        "empty split",
        "NaNs everywhere",
        "misspelt key",
        "checkpoint of another fingerprint",
        "full disk",
        "full disk in a save",
        "Slurm that is not there",
    )
    for kind in asked:
        assert any(name.startswith(kind) for name in CASES), kind
