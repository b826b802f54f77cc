"""The feed: a rank's rows of a step, samples that cannot be read, absent modalities, reading ahead."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch

from sci_gpt.data.curriculum import Curriculum
from sci_gpt.data.store import MOST_OPEN, Store
from sci_gpt.errors import DataError
from sci_gpt.model.init import initialize
from sci_gpt.model.transformer import SciGPT
from sci_gpt.recipes import parts
from sci_gpt.train.feed import Place, Prefetch, StepReader, StepRows
from sci_gpt.train.objective import NextFrame
from sci_tokenizers.sample import MODALITIES
from toy_store import toy_config, write_store


@pytest.fixture(scope="module")
def curriculum(tmp_path_factory: pytest.TempPathFactory) -> Curriculum:
    folder = tmp_path_factory.mktemp("feed")
    config = toy_config(write_store(folder / "store"), folder / "run")
    return parts.curriculum(config, Store.open(config.data))


def reader(
    curriculum: Curriculum, *, rank: int = 0, world: int = 1, accumulation: int = 1, rows: int = 3, threads: int = 1
) -> StepReader:
    settings = curriculum.corpora[0].tokenizers[0].settings
    of_rows = copy(curriculum)
    of_rows.phases = (replace(curriculum.phases[0], rows=rows),)
    place = Place(rank=rank, world=world, accumulation=accumulation)
    return StepReader(of_rows, place, settings=settings, threads=threads)


@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (2, 1), (1, 3), (2, 2), (5, 1)])
def test_all_ranks_together_eat_each_sample_of_the_step_once(
    curriculum: Curriculum, world: int, accumulation: int
) -> None:
    whole = reader(curriculum)(0, 10)
    steps = [reader(curriculum, rank=rank, world=world, accumulation=accumulation)(0, 10) for rank in range(world)]
    assert sorted(n for step in steps for n in step.samples) == list(range(10, whole.next_sample))
    assert sorted(whole.samples) == list(range(10, whole.next_sample))
    for rank, step in enumerate(steps):
        assert len(step.batches) == accumulation
        assert (step.first, step.next_sample, step.num_tokens) == (10, whole.next_sample, whole.num_tokens)
        assert [sorted(dealt) for dealt in step.dealt] == [sorted(other.samples) for other in steps]
        assert sorted(step.dealt[rank]) == sorted(step.samples) and len(step.keys) == len(step.samples)


def test_a_modality_that_a_rank_lacks_still_reaches_every_parameter(curriculum: Curriculum) -> None:
    lacking = next(
        batch
        for n in range(0, 400, 7)
        for batch in reader(curriculum, rows=1)(0, n).batches
        if any(not len(payload.index) for payload in batch.payloads.values())
    )
    assert tuple(sorted(lacking.payloads)) == tuple(sorted(MODALITIES))
    settings: Any = curriculum.corpora[0].tokenizers[0].settings
    config = toy_config(curriculum.store.path, Path("unused"))
    model = SciGPT(parts.model_shape(config), parts.model_settings(config))
    initialize(model, 0)
    objective = NextFrame(settings=settings, device=torch.device("cpu"))
    inputs = objective.inputs(lacking)
    torch.stack(list(objective.sums(model(inputs), inputs).values())).sum().backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []
    for name in MODALITIES:
        expected = 0.0 if not len(lacking.payloads[name].index) else 1.0
        assert objective.weights(inputs)[name] >= expected


def test_a_sample_that_cannot_be_read_weighs_nothing_and_moves_no_other(
    curriculum: Curriculum, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = reader(curriculum)(0, 0)
    broken = whole.samples[2]
    read: Callable[[int], Any] = curriculum.corpora[0].document

    def document(n: int) -> Any:
        if n == broken:
            raise DataError("shard-00000.tar: station/train-1: checksum differs")
        return read(n)

    monkeypatch.setattr(curriculum.corpora[0], "document", document)
    step = reader(curriculum)(0, 0)
    assert step.passed_over == 1 and step.next_sample == whole.next_sample
    assert step.samples == tuple(n for n in whole.samples if n != broken)
    said = capsys.readouterr().err
    assert f"warning: sample {broken} (" in said and "station/train-1: checksum differs" in said
    for name, payload in step.batches[0].payloads.items():
        assert np.isfinite(payload.values).all(), name


@pytest.mark.parametrize("broken", [None, 3])
def test_threads_read_the_same_in_the_same_order(
    curriculum: Curriculum, monkeypatch: pytest.MonkeyPatch, broken: int | None
) -> None:
    """Also where earlier documents take longer than later ones, and one cannot be read."""
    read: Callable[[int], Any] = curriculum.corpora[0].document

    def document(n: int) -> Any:
        time.sleep(0.002 * (30 - n % 30))
        if n == broken:
            raise DataError("no such shard")
        return read(n)

    one, several = reader(curriculum), reader(curriculum, threads=4)
    expected = one(0, 0)
    monkeypatch.setattr(curriculum.corpora[0], "document", document)
    found = several(0, 0)
    kept = [n for n in expected.samples if n != broken]
    assert list(found.samples) == kept and found.passed_over == len(expected.samples) - len(kept)
    assert list(found.keys) == [key for n, key in zip(expected.samples, expected.keys, strict=True) if n != broken]
    assert (found.first, found.next_sample, found.dealt) == (expected.first, expected.next_sample, expected.dealt)
    if broken is None:
        for name, payload in expected.batches[0].payloads.items():
            np.testing.assert_array_equal(found.batches[0].payloads[name].values, payload.values)


class Counted:
    """A reader that remembers what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def __call__(self, step: int, n: int) -> StepRows:
        self.asked.append((step, n))
        if n >= 90:
            raise DataError("no such shard")
        return StepRows(
            first=n, next_sample=n + 3, batches=(), samples=(), keys=(), dealt=((),), num_tokens=0, passed_over=0
        )


def test_the_next_step_is_read_ahead_and_each_step_once() -> None:
    counted = Counted()
    ahead = Prefetch(counted)
    assert [ahead.get(step, 3 * step)[0].first for step in range(3)] == [0, 3, 6]
    assert ahead.get(3, 30)[0].first == 30  # a jump is read anew
    ahead.close()
    assert counted.asked[:5] == [(0, 0), (1, 3), (2, 6), (3, 9), (3, 30)] and len(set(counted.asked)) == len(
        counted.asked
    )


def test_the_first_step_is_read_before_it_is_asked_for() -> None:
    read = Event()

    def reader(step: int, n: int) -> StepRows:
        read.set()
        return Counted()(step, n)

    ahead = Prefetch(reader)
    ahead.begin(4, 12)
    assert read.wait(30)
    assert ahead.get(4, 12)[0].next_sample == 15
    ahead.close()


def test_an_error_of_the_reader_reaches_the_step_that_needs_it() -> None:
    ahead = Prefetch(Counted())
    assert ahead.get(0, 87)[0].next_sample == 90
    with pytest.raises(DataError, match="no such shard"):
        ahead.get(1, 90)
    ahead.close()


def test_memory_does_not_grow_with_the_samples_read(tmp_path: Path) -> None:
    """Reading threads take 15,000 samples after a warm-up of 5,000, from more shards than a store keeps open."""
    times = {"field": [60] * 20, "station": [300] * 25, "quake": [600] * 25}
    store = write_store(tmp_path / "store", times=times, shard_bytes=8192)
    assert len(list(store.glob("*/train/*.tar"))) > MOST_OPEN
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("memory_worker.py")), str(store)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*command, "5000", "20000"], capture_output=True, text=True, check=False, env=environment, timeout=240
    )
    assert done.returncode == 0, done.stderr
    warm, end = json.loads(done.stdout)
    assert warm["samples"] >= 5000 and end["samples"] >= 20000
    assert end["bytes"] < 1.02 * warm["bytes"]
