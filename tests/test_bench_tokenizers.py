"""The tokenizers' benchmark in small: equal work first, then a table of what was measured."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import tokenizers


def test_a_small_batch_is_timed_and_tabled() -> None:
    values = tokenizers.batch(8, 64)
    assert values.dtype == np.float32 and 0 < np.isnan(values).mean() < 0.05
    seconds = tokenizers.measure(tokenizers.calls(values), rounds=3)
    assert set(seconds) == {"encode, ours", "encode, package", "decode, ours", "decode, package", "copy", "look-up"}
    assert all(len(row) == 3 and (row > 0).all() for row in seconds.values())
    lines = tokenizers.table(seconds, values.size)
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| encode", "| decode", "| both"]


def test_rates_and_ratios_are_those_of_the_medians() -> None:
    """Three rounds of 1,000 values: 1 ms against 4 ms, 2 ms against 2 ms, a copy in 0.1 ms."""
    seconds = {
        "encode, ours": np.array([0.001, 0.001, 0.002]),
        "encode, package": np.array([0.004, 0.004, 0.004]),
        "decode, ours": np.full(3, 0.002),
        "decode, package": np.full(3, 0.002),
        "copy": np.full(3, 0.0001),
    }
    encode, decode, both = tokenizers.table(seconds, 1_000_000)[2:]
    assert encode == "| encode | 1,000 | 250 | 4.0 (2.4-4.0) | 10.0% |"
    assert decode == "| decode | 500 | 500 | 1.0 (1.0-1.0) | 5.0% |"
    assert both.startswith("| both | 333 | 167 | 2.0 ")


def test_unequal_work_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    encode = tokenizers.ChronosQuantizer.encode_context

    def off_by_one(self: tokenizers.ChronosQuantizer, values: np.ndarray) -> tuple[np.ndarray, ...]:
        ids, mask, scale = encode(self, values)
        return ids + (ids == 2049), mask, scale

    monkeypatch.setattr(tokenizers.ChronosQuantizer, "encode_context", off_by_one)
    with pytest.raises(RuntimeError, match="ids differ in"):
        tokenizers.calls(np.concatenate([tokenizers.batch(4, 32), np.tile([[1.0, 0.0]], (4, 16))]).astype(np.float32))
