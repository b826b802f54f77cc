"""Elastic order in real torchrun processes: stop at 4 ranks or lose one, go on at any number, and eat the same keys."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from elastic_worker import HIDDEN, WATCHDOG_SECONDS
from sci_gpt.config import PretrainConfig
from sci_gpt.config_file import show_config
from sci_gpt.data.curriculum import Curriculum
from sci_gpt.data.loader import attention_cost, deal, plan_step
from sci_gpt.data.store import Store
from sci_gpt.errors import CheckpointError
from sci_gpt.recipes import parts
from sci_gpt.train.checkpoint import latest, read_state
from sci_gpt.train.resume import where_to_go_on
from sci_gpt.train.run_folder import keys_log, read_lines
from toy_store import toy_config, write_store

STEPS, SAVED, STOPPED, BOUNDARY = 24, 10, 13, 8
KILLED_IN, KILLED_SAVED, KILLED_RANK = 17, 12, 2
CASES = ("mixture", "small", "uneven")
LATER = {"2 ranks": 2, "8 ranks": 8, "1 rank": 1}
# A launch is ended when its processes, each with a watchdog of its own, have not ended it.
PATIENCE_SECONDS = 4.0 * WATCHDOG_SECONDS


def configuration(case: str, folder: Path, *, run: str) -> PretrainConfig:
    """The run of a case.

    mixture: two phases and short epochs; one shard per source, so that there are fewer shards than ranks; a part of
        each source's samples is masked, of the series another part in the second phase.
    small: a source of 3 windows beside a larger one, with more samples in a step than it has windows.
    uneven: stretches of very different length, in shards that are as uneven.
    """
    phase = toy_config(folder / case, folder / "unused").model_dump(mode="json")["phases"][0]
    field, station, quake = phase["mixture"]
    phase |= {"rows_per_step": 6}  # 4 ranks: two rows each and two empty ones; 8 ranks: two of them get none
    phases = [phase | {"until_step": STEPS}]
    if case == "mixture":
        # Strides so wide that epochs end before and after the checkpoint.
        field, station, quake = field | {"stride": 6}, station | {"stride": 9}, quake | {"stride": 8}
        field, station, quake = field | {"masked": 0.5}, station | {"masked": 0.25}, quake | {"masked": 0.5}
        phases = [
            phase | {"until_step": BOUNDARY, "mixture": [field, station, quake]},
            phase | {"until_step": STEPS, "row_length": 200, "mixture": [quake, station | {"masked": 0.75}, field]},
        ]
    if case == "small":
        phases = [phase | {"until_step": STEPS, "mixture": [station | {"weight": 2.0}, field | {"weight": 1.0}]}]
    schedule = {"steps": STEPS, "warmup_steps": 4, "cooldown_steps": 6}
    return toy_config(folder / case, folder / "runs" / f"{case}-{run}", phases=phases, schedule=schedule)


@dataclass(frozen=True, kw_only=True)
class Runs:
    """Every run folder, by case and how it was run, and what the launches printed."""

    folder: Path
    output: dict[str, str]

    def config(self, case: str, how: str) -> PretrainConfig:
        """The configuration of a run."""
        return configuration(case, self.folder, run=how)

    def curriculum(self, case: str) -> Curriculum:
        """The samples of a case, with no phase begun."""
        config = self.config(case, "straight")
        return parts.curriculum(config, Store.open(config.data))

    def steps(self, case: str, how: str) -> list[dict[str, Any]]:
        """Per step its first sample and the (number, key) pairs that all ranks' files name, in order."""
        run = self.config(case, how).output
        steps: dict[int, dict[str, Any]] = {}
        for path in sorted((run / "keys").glob("rank-*.jsonl")):
            for record in read_lines(path):
                row = steps.setdefault(record["step"], {"step": record["step"], "first": record["first"], "eaten": []})
                assert row["first"] == record["first"], f"{path}: {record}"
                row["eaten"] += zip(record["samples"], record["keys"], strict=True)
        return [row | {"eaten": sorted(row["eaten"])} for _, row in sorted(steps.items())]

    def hidden(self, case: str, how: str) -> dict[int, str]:
        """Sample number -> digest of what it hides, over all ranks; a step that was done again hid the same again."""
        found: dict[int, str] = {}
        for path in sorted((self.config(case, how).output / HIDDEN).glob("rank-*.jsonl")):
            for record in read_lines(path):
                for number, digest in record["hidden"].items():
                    assert found.setdefault(int(number), digest) == digest, f"{path}: sample {number}"
        return found


def torchrun(folder: Path, tasks: Sequence[dict[str, Any]], *, ranks: int, fails: bool = False) -> str:
    """Run the tasks on `ranks` processes under torchrun, which ends well or `fails`; what they printed."""
    path = folder / f"{ranks}-ranks.json"
    path.write_text(json.dumps(tasks))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={ranks}", "-m", "elastic_worker", str(path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.getenv("PYTHONPATH")])])
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"{ranks} ranks hang; {process.communicate()[0]}") from None
    assert bool(process.returncode) == fails, output
    return output


def task(config: PretrainConfig, *, until: int, **changes: Any) -> dict[str, Any]:
    """One task of a worker, with its configuration written."""
    path = config.output.parent / f"{config.output.name}.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(show_config(config), encoding="utf-8")
    facts = {"config": str(path), "until": until, "save": SAVED, "kill": None, "accumulation": 1, "threads": 1}
    return facts | changes


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """All cases: stopped at 4 ranks and once killed there, gone on at 2, 8 and 1, and straight through at 1."""
    folder = tmp_path_factory.mktemp("elastic")
    write_store(folder / "mixture")
    write_store(folder / "small", times={"station": [30]})
    lengths = {"field": [40, 16, 150, 22], "station": [400, 30, 25, 700, 60], "quake": [900, 160, 2000]}
    write_store(folder / "uneven", times=lengths, shard_bytes=12_000)
    runs = Runs(folder=folder, output={})
    first = [task(runs.config(case, "stopped"), until=STOPPED) for case in CASES]
    kill = [KILLED_IN, KILLED_RANK]
    first.append(task(runs.config("mixture", "killed"), until=STEPS, kill=kill, save=KILLED_SAVED))
    runs.output["4 ranks"] = torchrun(folder, first, ranks=4, fails=True)
    for how, ranks in LATER.items():
        changes = {"accumulation": 2, "threads": 3} if ranks == 2 else {"threads": 2} if ranks == 1 else {}
        tasks = []
        for case in CASES:
            config = runs.config(case, how)
            shutil.copytree(runs.config(case, "stopped").output, config.output)
            tasks.append(task(config, until=STEPS, **changes))
        if ranks == 2:
            tasks.append(task(runs.config("mixture", "killed"), until=STEPS))
        if ranks == 1:
            tasks += [task(runs.config(case, "straight"), until=STEPS) for case in CASES]
        runs.output[how] = torchrun(folder, tasks, ranks=ranks)
    return runs


@pytest.mark.parametrize("how", LATER)
@pytest.mark.parametrize("case", CASES)
def test_a_run_saved_at_4_ranks_goes_on_at_any_number(runs: Runs, case: str, how: str) -> None:
    """All ranks' files together are those of the uninterrupted run at one rank: nothing skipped, nothing twice."""
    straight = runs.steps(case, "straight")
    assert [row["step"] for row in straight] == list(range(1, STEPS + 1))
    numbers = [number for row in straight for number, _ in row["eaten"]]
    assert numbers == list(range(len(numbers))), "the uninterrupted run takes each number once"
    assert runs.steps(case, how) == straight, runs.output[how]
    new = [len(read_lines(keys_log(runs.config(case, how).output, rank))) for rank in range(LATER[how])]
    assert min(new) >= STEPS - SAVED, "a rank's file lacks steps"


def test_a_killed_rank_costs_no_sample(runs: Runs) -> None:
    """SIGKILL to one of 4 ranks between two checkpoints, then two ranks go on from the first."""
    assert "Signal 9 (SIGKILL) received" in runs.output["4 ranks"]
    eaten = read_lines(keys_log(runs.config("mixture", "killed").output, KILLED_RANK))
    assert [record["step"] for record in eaten] == list(range(1, KILLED_SAVED + 1)), "cut back to the checkpoint"
    assert runs.steps("mixture", "killed") == runs.steps("mixture", "straight")


@pytest.mark.parametrize("how", [*LATER, "killed"])
def test_a_run_that_goes_on_hides_the_same_values(runs: Runs, how: str) -> None:
    """Which samples are masked, which of their tokens are hidden and the values asked for, at any number of ranks."""
    straight, (curriculum, n) = runs.hidden("mixture", "straight"), (runs.curriculum("mixture"), 0)
    for row in runs.steps("mixture", "straight"):
        _, corpus = curriculum.at(row["step"] - 1, row["first"])
        masked = [number for number, _ in row["eaten"] if corpus.masked(number)]
        assert [number for number, _ in row["eaten"] if number in straight] == masked
        n += len(row["eaten"])
    assert 0.25 * n < len(straight) < 0.75 * n
    assert len(set(straight.values())) == len(straight)
    assert runs.hidden("mixture", how) == straight, runs.output["2 ranks" if how == "killed" else how]


def test_each_rank_reads_the_rows_that_are_dealt_to_it(runs: Runs) -> None:
    """Rank r's own file, against the dealing of each step's rows."""
    for case in CASES:
        config, curriculum, n = runs.config(case, "stopped"), runs.curriculum(case), 0
        logs = [read_lines(keys_log(config.output, rank)) for rank in range(4)]
        for step in range(STOPPED):
            phase, corpus = curriculum.at(step, n)
            plan = plan_step(corpus, n, rows=phase.rows, row_length=phase.row_length)
            shares = deal(plan, world=4, cost=attention_cost(corpus, plan))
            for rank, share in enumerate(shares):
                assert logs[rank][step]["samples"] == [i for row in share for i in row], (case, step, rank)
            n = plan.next_sample


def test_the_cases_are_what_they_say(runs: Runs) -> None:
    """Epochs end on both sides of the checkpoint; a source is smaller than its part of a step; shards are uneven."""
    ends: dict[str, dict[str, tuple[int, int]]] = {}  # source: last epoch begun before the checkpoint, and after it
    for case in CASES:
        curriculum, most = runs.curriculum(case), 0
        epochs: dict[str, dict[str, int]] = {"before": {}, "after": {}}
        for row in runs.steps(case, "straight"):
            _, corpus = curriculum.at(row["step"] - 1, row["first"])
            drawn = [corpus.order.sample(number) for number, _ in row["eaten"]]
            for source, _, epoch in drawn:
                part = epochs["before" if row["step"] <= SAVED else "after"]
                part[corpus.specs[source].source] = max(part.get(corpus.specs[source].source, 0), epoch)
            counts = Counter(corpus.specs[source].source for source, _, _ in drawn)
            most = max(most, counts["station"])
        ends[case] = {name: (epochs["before"].get(name, 0), last) for name, last in epochs["after"].items()}
        if case == "small":
            assert curriculum.corpora[0].order.sizes[0] == 3 < most
    assert any(before > 0 for before, _ in ends["mixture"].values()), ends
    assert sum(after > before for before, after in ends["mixture"].values()) >= 2, ends
    assert ends["small"]["station"][1] > ends["small"]["station"][0] > 5, ends
    for name in ("field", "station", "quake"):
        shards = json.loads((runs.folder / "mixture" / name / "train" / "index.json").read_text())["shards"]
        assert len(shards) == 1 < 4
    uneven = json.loads((runs.folder / "uneven" / "station" / "train" / "index.json").read_text())["shards"]
    sizes = [shard["num_times"] for shard in uneven]
    assert len(sizes) >= 2 and max(sizes) > 1.5 * min(sizes), sizes


def test_the_checkpoint_holds_one_integer_and_where_the_phases_began(runs: Runs) -> None:
    for case in CASES:
        folder = runs.config(case, "stopped").output / "checkpoints" / f"step-{SAVED:08d}"
        state, straight = read_state(folder), runs.steps(case, "straight")
        assert state.keys() == {"identity", "step", "next_sample", "phase_starts"}
        assert state["next_sample"] == straight[SAVED]["first"]
        assert state["phase_starts"] == ([0, straight[BOUNDARY]["first"]] if case == "mixture" else [0])


def test_another_corpus_mixture_or_seed_is_refused(runs: Runs) -> None:
    config = runs.config("mixture", "stopped")
    store = Store.open(config.data)
    another = replace(store, manifest={**store.manifest, "fingerprint": "another"})
    assert where_to_go_on(config.output, parts.identity(config, store)).checkpoint == latest(config.output)
    first = config.phases[0].mixture[0]
    heavier = config.phases[0].model_copy(
        update={"mixture": (first.model_copy(update={"weight": 2.0}), *config.phases[0].mixture[1:])}
    )
    refused = {
        "fingerprint is 0123456789abcdef there and another here": (config, another),
        "seed is 3 there and 4 here": (config.model_copy(update={"seed": 4}), store),
        r"phases\.0\.mixture\.0\.weight is 1\.0 there and 2\.0 here": (
            config.model_copy(update={"phases": (heavier, *config.phases[1:])}),
            store,
        ),
    }
    for message, (mine, corpus) in refused.items():
        with pytest.raises(CheckpointError, match=f"is of another run: {message}; give this run another output"):
            where_to_go_on(config.output, parts.identity(mine, corpus))
