"""The heap of a long run: tensors of ever other sizes leave no memory behind."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from sci_gpt.train import heap

# Four tensors of 0.2 to 20 MB at a time, beside small pieces that stay, as a run's records do; prints MB.
CHURN = """
import random
import psutil, torch
from sci_gpt.train import heap
said = heap.steady()
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
step = heap.after_each_step(lambda: calls.append(1))
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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has another heap")
def test_tensors_of_other_sizes_leave_nothing_behind() -> None:
    """Beyond the small pieces, 24 MB of 500; as glibc has it the process grows by a third."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", CHURN], env=environment, capture_output=True, text=True, check=True, timeout=300
    )
    said, first, last = done.stdout.split()
    assert said == "True" and float(last) < 1.1 * float(first)


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES", "LD_PRELOAD"])
def test_an_environment_that_sets_the_heap_is_left_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "")
    assert not heap.steady()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has another heap")
def test_what_is_free_goes_back_every_hundred_steps() -> None:
    """40 MB in pieces of 64 kB, of which every second one is freed: nothing of it lies at the heap's end."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", HOLES], env=environment, capture_output=True, text=True, check=True, timeout=300
    )
    calls, before, at_99, at_100 = map(float, done.stdout.split())
    assert calls == 100 and at_99 == pytest.approx(before, abs=2) and at_100 < before - 15


def test_the_check_of_each_step_is_left_as_it_is_where_the_heap_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")

    def check() -> None:
        pass

    assert heap.after_each_step(check) is check
