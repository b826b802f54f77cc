"""The training step's benchmark in small: equal parameters or a refusal, rows of what was measured, shares."""

from __future__ import annotations

import pytest
import torch

from benchmarks import train_step
from sci_gpt.model.shapes import SHAPES


def test_a_row_holds_equal_parameters_and_the_ratio_of_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds are put in place of the clock: 2 rows of 32 tokens in 0.5 and 1.0 s; a product of 1 FLOP a second."""
    monkeypatch.setattr(train_step, "CONTEXT", 8)
    monkeypatch.setattr(train_step, "seconds_of", lambda contestants, steps: [0.5, 1.0])
    monkeypatch.setattr(train_step, "matmul_rate", lambda: 1e9)
    row = train_step.compare("100k", rows=2, row_length=32, compiled=False)
    size, parameters, work, own, other, ratio, share = (cell.strip() for cell in row.strip("|").split("|"))
    mine, theirs = (int(x.replace(",", "")) for x in parameters.split(" / "))
    assert size == "100k, eager" and abs(theirs / mine - 1) <= train_step.EQUAL
    assert (own, other, ratio) == ("128", "64", "2.00")
    gflops = [float(x) for x in work.split(" / ")]
    assert [float(x.rstrip("%")) / 100 for x in share.split(" / ")] == pytest.approx(
        [gflops[0] / 0.5, gflops[1] / 1.0], abs=0.006
    )


def test_a_peer_that_cannot_be_of_equal_size_is_refused() -> None:
    ids = torch.full((1, 16), 5)
    with pytest.raises(ValueError, match="is not within 2% of our 1000"):
        train_step.gpt2(SHAPES["tiny"], ids, parameters=1000)


def test_packing_keeps_every_token_and_takes_fewer_rows() -> None:
    packed, padded = train_step.packed_and_padded(SHAPES["tiny"], row_length=64)
    assert packed.tokens == padded.tokens and packed.parameters == padded.parameters
    assert packed.flops < padded.flops  # place and time are embedded at empty positions too


def test_steps_are_timed_in_turn_and_the_profile_is_of_shares() -> None:
    calls: list[str] = []

    def step(name: str) -> train_step.Step:
        def one() -> float:
            calls.append(name)
            return float((torch.ones(64, 64) @ torch.ones(64, 64)).sum())

        return one

    both = [train_step.Contestant(name=name, step=step(name), tokens=1, parameters=1, flops=1.0) for name in ("a", "b")]
    seconds = train_step.seconds_of(both, steps=2)
    assert calls == ["a", "b"] * 4 and all(taken > 0 for taken in seconds)
    shares = train_step.profiled(both[0].step)
    assert shares == sorted(shares, key=lambda row: -row[1]) and 0 < sum(share for _, share in shares) <= 1 + 1e-9
    assert any(name == "aten::mm" for name, _ in shares)
