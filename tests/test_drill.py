"""`sci-gpt drill` whole on two real processes, a torchrun that restarts by itself, two products broken on purpose."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from sci_gpt.config import PretrainConfig
from sci_gpt.config_file import load_config, show_config
from sci_gpt.errors import ConfigError
from sci_gpt.train.run_folder import LOG, read_lines
from sci_launch import arguments
from sci_launch.drill import Options, failed, short, table
from sci_launch.drill_compare import Difference, compare, keys_difference, loss_difference, weight_difference
from sci_launch.drill_faults import FAULTS, Result, flip_a_bit, passed_over
from sci_launch.drill_place import find_place
from sci_launch.drill_run import completed
from toy_store import toy_config, write_store

STEPS = 12
SEQUENCE = {  # so that the whole of `sci-gpt pretrain` runs on a sequence axis, and goes on with a tensor axis
    "parallel": {"processes": 2, "sequence_parallel": 2},
    "checkpoint": {"every": 8, "keep_every": 16, "keep_best": 1},
}
PATIENCE_SECONDS = 400.0
KEYS = {"fault", "passed", "steps_lost", "recovery_seconds", "max_loss_difference", "max_weight_difference"}
KEYS |= {"keys_differ", "why"}
# Appended to a copy of a product file: what a defect there would do.
SKIPS_A_SAMPLE = """
_whole = where_to_go_on


def where_to_go_on(run, identity, **named):
    from dataclasses import replace

    start = _whole(run, identity, **named)
    return replace(start, next_sample=start.next_sample + (start.step > 0))
"""
ONE_WEIGHT_OFF = """
_whole = Reader.read


def _read(self, name, kind=WEIGHT, *, slice_=None, start=0, stop=None):
    found = _whole(self, name, kind, slice_=slice_, start=start, stop=stop)
    if kind == WEIGHT and name == min(self.parameters) and start == 0 and found.numel():
        found = found.clone()
        found[0] += 1e-3
    return found


Reader.read = _read
"""


def command(arguments: Sequence[str], *, root: Path | None = None, code: int = 0) -> tuple[str, str]:
    """`sci-gpt ..` with the packages of `root`; what it wrote on stdout and stderr."""
    environment = dict(os.environ)
    if root is not None:
        places = [root, root / "tokenizers", root / "evals", root / "launch"]
        environment["PYTHONPATH"] = os.pathsep.join(map(str, places))
    done = subprocess.run(
        [sys.executable, "-m", "sci_launch.cli", *arguments],
        env=environment,
        cwd=root or Path.cwd(),
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout, done.stderr


@dataclass(frozen=True, kw_only=True)
class Drilled:
    """A drill's folder, configuration file and result; what it said."""

    folder: Path
    config: Path
    result: dict[str, Any]
    said: str

    def again(
        self, faults: str, *, more: Sequence[str] = (), root: Path | None = None, code: int = 0
    ) -> tuple[dict[str, Any], str]:
        """Another drill against the same straight run; its result and what it wrote on stderr."""
        words = ["drill", str(self.config), "--output", str(self.folder / "drill"), "--steps", str(STEPS), "--json"]
        found, said = command([*words, "--faults", faults, "--keep-straight", *more], root=root, code=code)
        return json.loads(found), said


@pytest.fixture(scope="module")
def drilled(tmp_path_factory: pytest.TempPathFactory) -> Drilled:
    folder = tmp_path_factory.mktemp("drill")
    write_store(folder / "store")
    path = folder / "toy.yaml"
    path.write_text(show_config(toy_config(folder / "store", folder / "runs" / "toy", **SEQUENCE)))
    words = ["drill", str(path), "--output", str(folder / "drill"), "--steps", str(STEPS), "--json"]
    found, said = command([*words, "--faults", "kill-rank,layout,corrupt"])
    return Drilled(folder=folder, config=path, result=json.loads(found), said=said)


def test_a_killed_rank_another_layout_and_a_flipped_bit_change_nothing(drilled: Drilled) -> None:
    assert drilled.result.keys() == {"faults"}
    killed, layout, corrupt = drilled.result["faults"]
    assert set(killed) == KEYS and (killed["fault"], layout["fault"]) == ("kill-rank", "layout")
    assert killed["passed"] and killed["max_loss_difference"] == killed["max_weight_difference"] == 0.0
    assert killed["keys_differ"] == layout["keys_differ"] == 0
    assert 0 <= killed["steps_lost"] <= STEPS // 2 and killed["recovery_seconds"] > 0.5
    assert layout["passed"] and layout["steps_lost"] == 0 and layout["max_loss_difference"] <= 1e-5
    assert corrupt["passed"] and corrupt["steps_lost"] == STEPS // 4 and corrupt["max_weight_difference"] == 0.0
    assert "kill-rank: passed" in drilled.said and " s in all" in drilled.said


def test_the_other_faults_change_nothing_either(drilled: Drilled) -> None:
    """Bit for bit the straight run's losses and weights after each of them."""
    found, _ = drilled.again("sigterm,kill-all,hang,non-finite,tracking", more=("--hang-seconds", "5"))
    rows = {row["fault"]: row for row in found["faults"]}
    assert tuple(rows) == ("sigterm", "kill-all", "hang", "non-finite", "tracking")
    for row in rows.values():
        assert row["passed"] and set(row) == KEYS, row
        assert row["max_loss_difference"] == row["max_weight_difference"] == row["keys_differ"] == 0, row
    for name in ("kill-all", "hang"):
        assert rows[name]["steps_lost"] <= STEPS // 2 and rows[name]["recovery_seconds"] > 0.5, rows[name]


def broken(folder: Path, root: Path, file: str, *, more: str) -> Path:
    """A copy of the product with something appended to one file."""
    for name in ("sci_gpt", "tokenizers", "evals", "launch"):
        shutil.copytree(root / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    with (folder / file).open("a", encoding="utf-8") as copied:
        copied.write(more)
    return folder


def test_a_resume_that_skips_a_sample_fails_the_drill(drilled: Drilled, root: Path, tmp_path: Path) -> None:
    copy = broken(tmp_path, root, "sci_gpt/train/resume.py", more=SKIPS_A_SAMPLE)
    result, said = drilled.again("layout", root=copy, code=1)
    (row,) = result["faults"]
    assert not row["passed"] and row["keys_differ"] > 0
    assert "sci-gpt: drill: layout failed: " in said and "keys_differ" in said and "missing" in said


def test_a_weight_that_is_off_by_a_thousandth_fails_the_drill(drilled: Drilled, root: Path, tmp_path: Path) -> None:
    copy = broken(tmp_path, root, "sci_gpt/train/checkpoint.py", more=ONE_WEIGHT_OFF)
    result, said = drilled.again("layout", root=copy, code=1)
    (row,) = result["faults"]
    assert not row["passed"] and row["keys_differ"] == 0 and row["max_weight_difference"] > 1e-4
    assert "sci-gpt: drill: layout failed: " in said and "max_weight_difference" in said


@pytest.mark.parametrize("machines", [1, 2])
def test_torchrun_starts_the_workers_again_and_they_go_on(drilled: Drilled, machines: int) -> None:
    """SIGKILL of one worker under `torchrun --max-restarts`: nobody else does anything, and nothing is lost.

    Two machines are two torchruns with a worker each.
    """
    straight = load_config(drilled.folder / "drill" / "straight" / "config.yaml", PretrainConfig)
    config = straight.model_copy(update={"output": drilled.folder / f"elastic-{machines}"})
    path = drilled.folder / f"elastic-{machines}.yaml"
    path.write_text(show_config(config))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{probe.getsockname()[1]}"
    words = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={machines}", f"--nproc-per-node={2 // machines}"]
    words += ["--max-restarts=2", "--rdzv-backend=c10d", f"--rdzv-endpoint={place}", "--rdzv-id=drill"]
    words += ["-m", "sci_gpt.recipes.pretrain", str(path)]
    said = [drilled.folder / f"elastic-{machines}-{number}.txt" for number in range(machines)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"} if machines > 1 else {}
    agents: list[subprocess.Popen[bytes]] = []
    try:
        for file in said:
            with file.open("wb") as out:
                agents.append(
                    subprocess.Popen(
                        words, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
                    )
                )
        deadline = time.monotonic() + PATIENCE_SECONDS / 2
        while not any(row["step"] > STEPS // 4 for row in read_lines(config.output / LOG)):
            assert all(agent.poll() is None for agent in agents), [file.read_text() for file in said]
            assert time.monotonic() < deadline, "the run did not get far enough"
            time.sleep(0.01)
        workers = [child for agent in agents for child in psutil.Process(agent.pid).children()]
        (worker,) = [child for child in workers if child.environ().get("RANK") == "1"]
        worker.kill()
        codes = [agent.wait(PATIENCE_SECONDS / 2) for agent in agents]
    finally:
        for agent in agents:
            if agent.poll() is None:
                os.killpg(agent.pid, signal.SIGKILL)
    output = "".join(file.read_text() for file in said)
    assert codes == [0] * machines, output
    assert "resumes from" in output and f"complete: {STEPS} steps" in output
    difference = compare(straight.output, config.output)
    assert (difference.loss, difference.weight, difference.keys) == (0.0, 0.0, 0), difference.why


def test_losses_are_compared_step_by_step() -> None:
    """Largest of |1 - 1.1| / 1, 0 and |4 - 4.2| / 4: 0.1; a step that is missing or stands twice is infinitely far."""

    def log(*losses: float | None) -> list[dict[str, Any]]:
        return [{"step": step, "loss": loss} for step, loss in enumerate(losses, 1)]

    why: list[str] = []
    assert loss_difference(log(1.0, 2.0, 4.0), log(1.1, 2.0, 4.2), why=why) == pytest.approx(0.1)
    assert why == ["losses differ most in step 1: 1.1 and 1.0 in the straight run"]
    assert loss_difference(log(1.0, None), log(1.0, None), why=[]) == 0.0
    assert loss_difference(log(1.0, None), log(1.0, 2.0), why=[]) == float("inf")
    assert loss_difference(log(1.0, 2.0), log(1.0), why=why) == float("inf")
    assert loss_difference(log(1.0), log(1.0) * 2, why=why) == float("inf")
    assert why[1:] == [
        "step 2 stands 0 times in the log, 1 times in the straight run's",
        "step 1 stands 2 times in the log, 1 times in the straight run's",
    ]
    scores = [{"step": 1, "validation": {}}]
    assert loss_difference(log(1.0) + scores, log(1.0), why=[]) == 0.0


def test_weights_are_compared_on_each_tensor_s_own_scale() -> None:
    """0.001 of 2 in one tensor, 0.001 of 0.1 in the other: 0.01 is the larger."""
    ours = {"a": torch.tensor([2.0, 1.0]), "b": torch.tensor([0.1, 0.0]), "zero": torch.zeros(2)}
    theirs = {"a": torch.tensor([2.0, 1.001]), "b": torch.tensor([0.1, 0.001]), "zero": torch.zeros(2)}
    assert weight_difference(ours, theirs) == pytest.approx(0.01)
    assert weight_difference(ours, ours) == 0.0
    assert weight_difference(ours, ours | {"zero": torch.tensor([0.0, 0.5])}) == 0.5
    assert weight_difference(ours, ours | {"a": torch.tensor([2.0, float("nan")])}) == float("inf")
    assert weight_difference(ours, {"a": ours["a"]}) == float("inf")


def test_samples_are_counted_as_missing_repeated_and_extra() -> None:
    ours = {1: Counter([(0, "a"), (1, "b")]), 2: Counter([(2, "c")])}
    why: list[str] = []
    assert keys_difference(ours, ours, why=why) == 0 and why == []
    skipped = {1: Counter([(0, "a"), (1, "b")]), 2: Counter([(3, "d")])}
    assert keys_difference(ours, skipped, why=why) == 2
    assert why == ["samples: 1 missing, 1 extra or repeated in step 2, first missing: (2, 'c'), first extra: (3, 'd')"]
    assert keys_difference(ours, {**ours, 2: Counter({(2, "c"): 2})}, why=[]) == 1
    assert keys_difference(ours, {1: ours[1]}, why=[]) == 1


def test_a_run_is_not_compared_with_itself(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with pytest.raises(ValueError, match="compared with itself"):
        compare(tmp_path / "run", tmp_path / "link")


def test_two_folders_are_two_runs(tmp_path: Path) -> None:
    """Each run's own log and keys are read: a difference in either shows, and so does the lack of a checkpoint."""
    for name, loss, key in (("straight", 1.0, "a"), ("other", 1.5, "b")):
        (tmp_path / name / "keys").mkdir(parents=True)
        (tmp_path / name / LOG).write_text(json.dumps({"step": 1, "loss": loss}) + "\n")
        line = json.dumps({"step": 1, "samples": [0], "keys": [key]})
        (tmp_path / name / "keys" / "rank-0.jsonl").write_text(line + "\n")
    difference = compare(tmp_path / "straight", tmp_path / "other")
    assert (difference.loss, difference.keys, difference.weight) == (0.5, 2, float("inf"))
    assert difference.why[-1] == "last checkpoints are none, none"


def test_a_step_is_completed_when_a_rank_has_noted_its_samples(tmp_path: Path) -> None:
    """Step 3 was done, though a kill came before the log told of it; a drill counts it as lost."""
    assert completed(tmp_path) == 0
    (tmp_path / "keys").mkdir()
    (tmp_path / LOG).write_text('{"step": 1}\n{"step": 2}\n')
    for rank, last in ((0, 2), (1, 3)):
        lines = [json.dumps({"step": step, "samples": [], "keys": []}) + "\n" for step in range(1, last + 1)]
        (tmp_path / "keys" / f"rank-{rank}.jsonl").write_text("".join(lines))
    assert completed(tmp_path) == 3


def test_a_good_checkpoint_that_is_passed_over_is_said() -> None:
    assert passed_over(12, origin=12) == () == passed_over(12, origin=6, intact=False)
    assert passed_over(12, origin=6) == ("it went on from step 6, and passed over the checkpoint of step 12",)


def test_each_limit_fails_a_fault_by_itself() -> None:
    def failures(name: str, *, lost: int = 0, asynchronous: bool = False, **differs: float) -> list[str]:
        numbers: dict[str, Any] = {"loss": 0.0, "weight": 0.0, "keys": 0} | differs
        result = Result(steps_lost=lost, recovery_seconds=1.0, difference=Difference(**numbers, why=("reason",)))
        return FAULTS[name].failures(result, every=6, asynchronous=asynchronous)

    assert failures("kill-rank", lost=6) == []
    assert failures("kill-rank", lost=7) == ["steps_lost 7 > 6", "reason"]
    assert failures("kill-rank", lost=12, asynchronous=True) == [] == failures("corrupt", lost=6, asynchronous=True)
    assert failures("kill-all", lost=13, asynchronous=True) == ["steps_lost 13 > 12", "reason"]
    assert failures("corrupt", lost=7, asynchronous=True) == ["steps_lost 7 > 6", "reason"]
    assert failures("sigterm", lost=1) == ["steps_lost 1 > 0", "reason"]
    assert failures("kill-all", loss=1e-9) == ["max_loss_difference 1e-09 > 0", "reason"]
    assert failures("kill-all", weight=float("nan")) == ["max_weight_difference nan > 0", "reason"]
    assert failures("layout", loss=1e-6) == []
    assert failures("layout", loss=2e-5) == ["max_loss_difference 2e-05 > 1e-05", "reason"]
    assert failures("layout", keys=1) == ["keys_differ 1 > 0", "reason"]
    row: dict[str, Any] = dict.fromkeys(KEYS) | {"fault": "hang", "passed": False, "why": "no page"}
    assert failed({"faults": [row, row | {"passed": True}]}) == ["drill: hang failed: no page"]
    assert table([row]).splitlines()[1].split() == ["hang", "NO", "-", "-", "-", "-", "-", "no", "page"]


def test_the_short_run_is_the_configuration_s_own(tmp_path: Path) -> None:
    whole = toy_config("store", tmp_path / "runs" / "toy")
    phases = tuple(whole.phases[0].model_copy(update={"until_step": end}) for end in (1, 2, 24))
    config = whole.model_copy(update={"phases": phases})
    straight = short(config, Options(steps=8, processes=3))
    assert straight.output == tmp_path / "runs" / "toy-drill" / "straight"
    assert [phase.until_step for phase in straight.phases] == [1, 2, 8]
    assert (straight.schedule.steps, straight.checkpoint.every, straight.checkpoint.keep) == (8, 2, 4)
    assert (straight.checkpoint.keep_every, straight.checkpoint.keep_best) == (None, 0)
    assert straight.parallel.processes == 3 and straight.tracking.registered_model is None
    assert straight.model == config.model and straight.phases[0].mixture == config.phases[0].mixture


def test_what_cannot_be_drilled_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = toy_config("store", tmp_path / "runs" / "toy")
    refused = {
        "--faults: there is no 'sigtrem'; there are sigterm, kill-rank": Options(faults=("sigtrem",)),
        "give --processes 2 or more": Options(processes=1),
        "--steps is a multiple of 4, at least 8: .* got 4": Options(steps=4),
        "--steps is a multiple of 4, .* got 11": Options(steps=11),
    }
    for message, options in refused.items():
        with pytest.raises(ConfigError, match=message):
            short(config, options)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="Slurm does not name its nodes .there is no scontrol on PATH"):
        find_place({"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]"})


def test_a_folder_that_is_not_a_drill_s_is_left_alone(drilled: Drilled, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    words = ["drill", str(drilled.config), "--output", str(tmp_path)]
    _, said = command(words, code=2)
    assert "is not a drill's folder" in said and (tmp_path / "thesis.tex").exists()


def test_the_help_knows_every_fault() -> None:
    assert tuple(FAULTS) == arguments.DRILL_FAULTS
    assert all(name in arguments.DRILL_LIMITS for name in FAULTS if name != "kill-all")
    assert (FAULTS["layout"].loss, FAULTS["layout"].weight) == (1e-5, 1e-4)
    bit_equal = [name for name, fault in FAULTS.items() if fault.loss == fault.weight == 0.0]
    assert bit_equal == [name for name in FAULTS if name != "layout"]
    assert {name for name, fault in FAULTS.items() if fault.lost == 0} == {
        "sigterm",
        "layout",
        "non-finite",
        "tracking",
    }


def test_one_bit_is_flipped_and_no_more(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(9)))
    flip_a_bit(path)
    assert path.read_bytes() == bytes([0, 1, 2, 3, 5, 5, 6, 7, 8])
