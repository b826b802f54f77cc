"""The heap of a long run: tensors of ever other sizes leave no memory behind."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys

import pytest
import torch

from sci_gpt.train import heap

CPU = torch.device("cpu")
# Four tensors of 0.2 to 20 MB at a time, beside small pieces that stay, as a run's records do; prints MB.
CHURN = """
import random
import psutil, torch
from sci_gpt.train import heap
said = heap.steady(1e8, torch.device('cpu'))
draw, alive, stay = random.Random(1), [], []
def resident():
    return psutil.Process().memory_info().rss / 1e6
for number in range(6000):
    alive.append(torch.ones(draw.randrange(50_000, 5_000_000)))
    stay.append(torch.ones(draw.randrange(1, 2000)))
    if len(alive) > 4:
        alive.pop(draw.randrange(len(alive)))
    if number == 600:
        first = resident()
print(said, first, resident())
"""

HOLES = """
import psutil, torch
from sci_gpt.train import heap
calls = []
step = heap.after_each_step(lambda: calls.append(1), torch.device('cpu'))
pieces = [torch.ones(16_000) for _ in range(640)]
del pieces[::2]
def resident():
    return psutil.Process().memory_info().rss / 1e6
seen = [resident()]
for number in range(1, 101):
    step()
    if number in (99, 100):
        seen.append(resident())
print(len(calls), *seen)
"""


def without_settings() -> dict[str, str]:
    """The environment, without what would set a heap."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    return {name: value for name, value in kept.items() if name not in ("GLIBC_TUNABLES", "LD_PRELOAD")}


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has another heap")
def test_tensors_of_other_sizes_leave_nothing_behind() -> None:
    """Beyond the small pieces, 24 MB of 500; as glibc has it the process grows by a third."""
    environment = without_settings()
    done = subprocess.run(
        [sys.executable, "-c", CHURN], env=environment, capture_output=True, text=True, check=True, timeout=300
    )
    said, first, last = done.stdout.split()
    assert said == "True" and float(last) < 1.1 * float(first)


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES", "LD_PRELOAD"])
def test_an_environment_that_sets_the_heap_is_left_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "")
    assert not heap.steady(1e8, CPU)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has another heap")
def test_what_is_free_goes_back_every_hundred_steps() -> None:
    """40 MB in pieces of 64 kB, of which every second one is freed: nothing of it lies at the heap's end."""
    environment = without_settings()
    done = subprocess.run(
        [sys.executable, "-c", HOLES], env=environment, capture_output=True, text=True, check=True, timeout=300
    )
    calls, before, at_99, at_100 = map(float, done.stdout.split())
    assert calls == 100 and at_99 == pytest.approx(before, abs=2) and at_100 < before - 15


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has another heap")
@pytest.mark.parametrize(("need", "pad"), [(7e7, 2**28), (6e8, 1_200_000_000), (1e12, 2**31 - 1)])
def test_the_heap_grows_by_twice_what_a_step_needs(need: float, pad: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the tensors of a larger model come from the system, page by page: a third more time at 588 MB."""
    set_: dict[int, int] = {}

    class Library:
        def __init__(self, name: None) -> None: ...

        @staticmethod
        def mallopt(parameter: int, value: int) -> int:
            set_[parameter] = value
            return 1

    for name in set(os.environ) - set(without_settings()):
        monkeypatch.delenv(name)
    monkeypatch.setattr(ctypes, "CDLL", Library)
    assert heap.steady(need, CPU) and set_ == {-1: 2**31 - 1, -2: pad}
    assert not heap.steady(need, torch.device("cuda")) and len(set_) == 2


def test_the_check_of_each_step_is_left_as_it_is_where_the_heap_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")

    def check() -> None:
        pass

    assert heap.after_each_step(check, CPU) is check
