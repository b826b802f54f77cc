"""The allocator of a run: jemalloc where it is installed; glibc gives back what it holds free."""

from __future__ import annotations

import ctypes.util
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sci_gpt.train import heap
from sci_launch import allocator

CPU = torch.device("cpu")
needs_jemalloc = pytest.mark.skipif(allocator.find() is None, reason=f"no jemalloc here: {allocator.INSTALL}")
# Four tensors of 0.2 to 20 MB at a time, beside small pieces that stay, as a run's records do; prints MB.
CHURN = """
import random
import psutil, torch
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
print(first, resident())
"""
HOLES = """
import psutil, torch
from sci_gpt.train import heap
calls = []
step = heap.after_each_step(lambda: calls.append(1), torch.device('cpu'))
pieces = [torch.ones(16_000) for _ in range(1280)]
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


def told(program: str, more: dict[str, str]) -> list[float]:
    """The numbers that a program prints in a process of its own, with glibc's allocator unless `more` has another."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    environment = {name: value for name, value in kept.items() if name not in allocator.CHOSEN} | more
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True, timeout=300
    )
    return [float(word) for word in done.stdout.split()]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without a GPU and with jemalloc."""
    monkeypatch.setattr(allocator, "DRIVERS", ())
    monkeypatch.setattr(allocator.sys, "platform", "linux")
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: f"lib{name}.so.2")


@needs_jemalloc
def test_tensors_of_other_sizes_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the small pieces, 24 MB of 500; with glibc's the process grows by a third."""
    monkeypatch.setattr(allocator, "DRIVERS", ())
    first, last = told(CHURN, allocator.preload({}))
    assert last < 1.1 * first


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has another heap")
def test_what_glibc_holds_free_goes_back_every_hundred_steps() -> None:
    """The same: nothing of it lies at the heap's end."""
    calls, before, at_99, at_100 = told(HOLES, {})
    assert calls == 100 and at_99 == pytest.approx(before, abs=2) and at_100 < before - 30


def test_the_check_of_each_step_is_left_as_it_is_on_a_gpu_s_host() -> None:
    def check() -> None:
        pass

    assert heap.after_each_step(check, torch.device("cuda")) is check


def test_the_prefix_comes_before_the_system(installed: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(allocator.sys, "prefix", str(tmp_path))
    assert allocator.preload({"HOME": "/home/me"})["LD_PRELOAD"] == "libjemalloc.so.2"
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libjemalloc.so.2").touch()
    assert allocator.preload({})["LD_PRELOAD"] == f"{tmp_path}/lib/libjemalloc.so.2"
    (tmp_path / "lib" / "libjemalloc.so.2").unlink()
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: None)
    assert allocator.preload({}) == {}


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES", "LD_PRELOAD"])
def test_an_environment_that_chooses_an_allocator_is_left_alone(name: str, installed: None) -> None:
    assert allocator.preload({}) and allocator.preload({name: "x"}) == {}
    assert allocator.left_alone({name: "x"}) == f"the environment chooses: {name}=x" and not allocator.left_alone({})


def test_a_gpu_s_host_and_another_system_are_left_alone(
    installed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(allocator, "DRIVERS", (tmp_path / "nvidia",))
    assert allocator.preload({})
    (tmp_path / "nvidia").mkdir()
    assert allocator.preload({}) == {}
    monkeypatch.setattr(allocator, "DRIVERS", ())
    monkeypatch.setattr(allocator.sys, "platform", "darwin")
    assert allocator.preload({}) == {}
