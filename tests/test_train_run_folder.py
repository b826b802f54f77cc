"""The run folder's logs, lock and markers; what must be equal to resume; the tracker when its server fails."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from sci_gpt.errors import CheckpointError, ConfigError
from sci_gpt.train.journal import Progress, RunJournal, history
from sci_gpt.train.resume import check_same_run, code_version
from sci_gpt.train.run_folder import (
    LineLog,
    cut_back,
    keys_log,
    locked,
    read_complete,
    read_lines,
    write_marker,
    write_whole,
)
from sci_gpt.train.tracker import Tracker, TrackingTarget, flatten


def test_a_resume_cuts_every_log_back_to_the_checkpoint(tmp_path: Path) -> None:
    for path in (tmp_path / "log.jsonl", keys_log(tmp_path, 0), keys_log(tmp_path, 1)):
        log = LineLog(path)
        for step in range(1, 6):
            log.append({"step": step, "what": path.name})
        log.close()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "wh')  # cut by a kill
    write_marker(tmp_path, "requeue", content={"step": 5})
    cut_back(tmp_path, 3)
    for path in (tmp_path / "log.jsonl", keys_log(tmp_path, 0), keys_log(tmp_path, 1)):
        assert read_lines(path) == [{"step": step, "what": path.name} for step in (1, 2, 3)]
    assert not (tmp_path / "requeue").exists()
    log = LineLog(tmp_path / "log.jsonl")
    log.append({"step": 4})
    log.close()
    assert [record["step"] for record in read_lines(tmp_path / "log.jsonl")] == [1, 2, 3, 4]


@pytest.mark.parametrize("damage", [b"\x00\xff\x00", b"null", b"[1]", b""])
def test_a_line_that_is_no_record_is_named_with_its_remedy(tmp_path: Path, damage: bytes) -> None:
    content = b'{"step": 1}\n' + damage + b'\n{"step": 3}\n'
    (tmp_path / "log.jsonl").write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"log\.jsonl, line 2: expected a JSON record, .* remove that line"
    ) as error:
        cut_back(tmp_path, 2)
    assert "\n" not in str(error.value)
    assert (tmp_path / "log.jsonl").read_bytes() == content, "nothing is thrown away"


def test_what_lost_power_damaged_after_the_checkpoint_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_bytes(b'{"step": 1}\n{"step": 2}\n\x00\x00\x00\n{"step": 4}\n\x00\x00')
    cut_back(tmp_path, 2)
    assert read_lines(tmp_path / "log.jsonl") == [{"step": 1}, {"step": 2}]


def write_often(path: Path, number: int) -> int:
    for _ in range(30):
        write_whole(path, str(number) * 1000)
    return 30


def test_several_processes_write_one_file_at_once(tmp_path: Path) -> None:
    """As the ranks of a hang do: none fails, and the file is one of theirs, whole."""
    with ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert list(pool.map(write_often, [tmp_path / "page"] * 4, range(4))) == [30] * 4
    assert (tmp_path / "page").read_text() in {str(number) * 1000 for number in range(4)}
    assert list(tmp_path.iterdir()) == [tmp_path / "page"]


def test_logs_come_to_the_disk_with_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0's keys and log, another rank's keys; and what is written whole, with the name that its folder holds."""
    synced: list[str] = []
    fsync = os.fsync

    def noting(number: int) -> None:
        synced.append(os.path.relpath(os.readlink(f"/proc/self/fd/{number}"), tmp_path))
        fsync(number)

    monkeypatch.setattr(os, "fsync", noting)
    journals = [RunJournal(tmp_path, rank=rank, progress=Progress(3), tracker=None) for rank in (0, 1)]
    assert synced == ["keys", ".", ".", "..", "keys", "."], "the names of new files and folders"
    synced.clear()
    for journal in journals:
        journal.sync()
    assert synced == ["keys/rank-0.jsonl", "log.jsonl", "keys/rank-1.jsonl"]
    write_marker(tmp_path, "requeue", content={"step": 5})
    assert synced[3].startswith("requeue.") and synced[4:] == ["."]


def test_a_log_on_a_full_disk_says_which_file_it_is() -> None:
    log = LineLog(Path("/dev/full"))
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        log.append({"step": 1})


def test_a_marker_on_a_full_disk_says_which_file_it_is(tmp_path: Path) -> None:
    (tmp_path / f"requeue.{os.getpid()}-{threading.get_ident()}.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device: '.*/requeue'"):
        write_marker(tmp_path, "requeue", content={"step": 5})


def test_a_run_is_trained_by_one_process_at_a_time(tmp_path: Path) -> None:
    with locked(tmp_path / "run"):
        with pytest.raises(ConfigError, match="another process is training in .*run"), locked(tmp_path / "run"):
            raise AssertionError("the folder was taken twice")
    with locked(tmp_path / "run"):
        pass


def test_a_complete_mark_without_its_checkpoint_is_refused(tmp_path: Path) -> None:
    assert read_complete(tmp_path) is None
    write_marker(tmp_path, "complete.json", content={"step": 3, "checkpoint": "checkpoints/step-00000003"})
    with pytest.raises(CheckpointError, match="'checkpoints/step-00000003' holds no checkpoint"):
        read_complete(tmp_path)
    (tmp_path / "checkpoints/step-00000003").mkdir(parents=True)
    (tmp_path / "checkpoints/step-00000003/manifest.json").write_text("{}")
    assert read_complete(tmp_path) == {"step": 3, "checkpoint": "checkpoints/step-00000003"}


def test_what_differs_is_named_with_both_values() -> None:
    saved = {"fingerprint": "aaa", "mixture": [{"source": "x", "weight": 0.5}], "seed": 1}
    check_same_run(saved, json.loads(json.dumps(saved)), checkpoint=Path("c"))
    mine = {"fingerprint": "bbb", "mixture": [{"source": "x", "weight": 0.25}], "seed": 1}
    with pytest.raises(CheckpointError) as error:
        check_same_run(saved, mine, checkpoint=Path("c"))
    assert "fingerprint is aaa there and bbb here" in str(error.value)
    assert "mixture.0.weight is 0.5 there and 0.25 here" in str(error.value)
    assert "seed" not in str(error.value)


def test_a_source_that_came_or_went_is_named() -> None:
    with pytest.raises(CheckpointError, match="mixture.1.source is y there and absent here"):
        check_same_run(
            {"mixture": [{"source": "x"}, {"source": "y"}]}, {"mixture": [{"source": "x"}]}, checkpoint=Path("c")
        )


def test_the_code_version_is_a_commit_or_a_version() -> None:
    assert len(code_version()) >= 5


def test_trees_are_flattened_to_dotted_names() -> None:
    tree = {"a": {"b": 1}, "c": [1, 2], "d": [{"e": None}]}
    assert flatten(tree) == {"a.b": "1", "c": "[1, 2]", "d.0.e": "None"}


def test_the_progress_line() -> None:
    lines: list[str] = []
    stream = type("Stream", (), {"write": lambda self, text: lines.append(text), "flush": lambda self: None})()
    progress = Progress(100, every_seconds=1000.0, stream=stream)
    record = {"step": 40, "tokens": 500, "wait_seconds": 0.5, "loss": 1.25}
    progress.step(record)
    progress.step(record)
    assert lines == []
    progress.validation(40, {"grid": {"loss": 2.0, "skill": 0.125}})
    # two steps of 500 tokens in 4 s: 250 tokens/s, 60 steps left at 2 s each, 1 s of 4 waited
    assert progress.line(record, 4.0) == (
        "step 40/100 | 250 tokens/s | ETA 2:00 | loss 1.2500 | skill grid +0.125 | waits for data 25.0 %"
    )
    assert "validation: grid loss 2.0000 skill +0.125" in lines[0]


def test_the_end_of_a_run_says_how_long_all_its_sessions_waited_for_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of 3 steps of 2, 5 and 3 s, the first in an earlier session: 0.5, 0 and 0.25 s, which is 7.5 % of 10 s."""
    record = {"tokens": 5, "loss": 1.0, "losses": {}, "gradient_norm": 1.0, "learning_rate": 0.1, "passed_over": 0}
    for session in ([(1, 2.0, 0.5)], [(2, 5.0, 0.0), (3, 3.0, 0.25)]):
        journal = RunJournal(tmp_path, rank=0, progress=Progress(3, every_seconds=1000.0), tracker=None)
        for step, seconds, waited in session:
            journal.step(record | {"step": step, "seconds": seconds, "wait_seconds": waited, "applied": True})
        journal.validation(session[-1][0], {"grid": {"loss": 1.0, "skill": 0.0}})
        journal.close()
    assert "waits for data 7.50 % of 10.0 s of steps" in capsys.readouterr().out.splitlines()
    shares = [metrics["wait_share"] for _, metrics in history(tmp_path) if "wait_share" in metrics]
    assert shares == [0.25, 0.0, pytest.approx(0.25 / 3)]


def test_a_tracking_failure_is_said_once_and_stops_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    target = TrackingTarget(
        uri=f"sqlite:///{tmp_path}/file/below/a.db", artifacts=str(tmp_path / "artifacts"), experiment="e", run_name="r"
    )
    begun = time.monotonic()
    tracker = Tracker(target, tmp_path, parameters={"a": 1}, tags={})
    for step in range(3):
        tracker.metrics(step, {"loss": 1.0})
    tracker.close()
    assert time.monotonic() - begun < 20
    assert tracker.run_id is None and tracker.failures >= 1
    said = capfd.readouterr().err
    assert said.count("warning: tracking at") == 1 and "all metrics are in" in said and "log.jsonl" in said


def test_what_mlflow_lacks_of_the_history_is_written_once(tmp_path: Path) -> None:
    target = TrackingTarget(
        uri=f"sqlite:///{tmp_path}/mlflow/a.db", artifacts=str(tmp_path / "artifacts"), experiment="e", run_name="r"
    )
    first = Tracker(target, tmp_path, parameters={"a": {"b": 1}}, tags={"fingerprint": "f"})
    first.metrics(1, {"loss": 3.0})
    first.close("KILLED")
    history = [(1, {"loss": 3.0}), (2, {"loss": 2.0}), (2, {"validation/grid/skill": 0.5})]
    second = Tracker(target, tmp_path, parameters={"a": {"b": 1}}, tags={}, history=history)
    second.metrics(3, {"loss": 1.0})
    second.close()
    assert second.run_id == first.run_id and second.failures == 0
    client = MlflowClient(target.uri)
    run = client.get_run(str(second.run_id))
    assert run.info.status == "FINISHED" and run.data.params == {"a.b": "1"} and run.data.tags["fingerprint"] == "f"
    losses = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss")]
    assert sorted(losses) == [(1, 3.0), (2, 2.0), (3, 1.0)]
    assert run.data.metrics["validation/grid/skill"] == 0.5


def test_a_server_that_comes_back_gets_what_it_missed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """No server at the start: its folder is a file. When that is gone, the run of before is there once and whole."""
    (tmp_path / "mlflow").write_text("")
    target = TrackingTarget(
        uri=f"sqlite:///{tmp_path}/mlflow/a.db", artifacts=str(tmp_path / "artifacts"), experiment="e", run_name="r"
    )
    tracker = Tracker(target, tmp_path, parameters={"a": 1}, tags={}, history=[(1, {"loss": 9.0})])
    for step in (2, 3):
        tracker.metrics(step, {"loss": 1.0 * step})
    while not tracker.failures:
        time.sleep(0.05)
    (tmp_path / "mlflow").unlink()
    tracker.metrics(4, {"loss": 4.0})
    tracker.close()
    client = MlflowClient(target.uri)
    run = client.get_run(str(tracker.run_id))
    assert run.info.status == "FINISHED" and run.data.params == {"a": "1"}
    losses = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss")]
    assert sorted(losses) == [(1, 9.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    assert len(client.search_runs([run.info.experiment_id])) == 1
    assert capfd.readouterr().out.splitlines()[-1].endswith("is back; 4 records of the time without it are written")


def test_a_server_lost_between_two_batches_gets_each_record_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second call fails: what the first one brought is not sent again, and nothing of the second is lost."""
    got: list[int] = []
    calls: list[int] = []

    class Client:
        def log_batch(self, run_id: str, metrics: list[Any]) -> None:
            calls.append(len(metrics))
            if len(calls) == 2:
                raise ConnectionError("gone")
            got.extend(metric.step for metric in metrics if metric.key.startswith("m"))

        def set_terminated(self, run_id: str, status: str) -> None:
            got.append(-1)

    def opened(tracker: Tracker) -> None:
        tracker._client, tracker._run_id = Client(), "7"

    monkeypatch.setattr(Tracker, "_open", opened)
    monkeypatch.setattr("sci_gpt.train.tracker._FLUSH_SECONDS", 0.1)
    target = TrackingTarget(uri="http://nowhere", artifacts="a", experiment="e", run_name="r")
    tracker = Tracker(target, tmp_path, parameters={}, tags={})
    for step in range(4):  # 600 metrics each: one record to a call
        tracker.metrics(step, {f"m{k}": 0.0 for k in range(600)})
    while not tracker.failures:
        time.sleep(0.01)
    tracker.metrics(4, {f"m{k}": 0.0 for k in range(600)})
    tracker.close()
    assert got == [step for step in range(5) for _ in range(600)] + [-1] and tracker.failures == 1
