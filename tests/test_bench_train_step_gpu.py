"""The GPU benchmark of the training step, on a CPU: its tiny run, its figures by hand, its refusals."""

from __future__ import annotations

import re

import pytest
import torch

from benchmarks import results, train_step_gpu
from benchmarks.train_step import Contestant
from benchmarks.train_step_gpu import CASES, Case, Measured
from sci_gpt.model.flex import BLOCK
from sci_gpt.model.flops import training_flops, work_of
from sci_gpt.model.inputs import to_inputs
from sci_gpt.model.shapes import SHAPES
from sci_gpt.model.transformer import ModelSettings, build_model
from sci_tokenizers.packing import collate
from sci_tokenizers.tokenizer import TokenizerSettings

CPU = torch.device("cpu")


def test_the_tiny_run_goes_through_and_writes_no_section(capsys: pytest.CaptureFixture[str]) -> None:
    before = results.RESULTS.read_bytes()
    train_step_gpu.main(["--tiny", "--steps", "1", "--checkpointing", "full"])
    assert results.RESULTS.read_bytes() == before
    told = capsys.readouterr().out
    (row,) = [line for line in told.splitlines() if line.startswith("| tiny")]
    name, parameters, size, kept, tokens, rate, share, peak = (cell.strip() for cell in row.strip("|").split("|"))
    assert (name, size, kept, peak) == ("tiny", "2 x 128", "full", "no device: CPU")
    assert int(parameters.replace(",", "")) > 0 and int(tokens.replace(",", "")) > 0
    product = float(re.findall(r"\(([0-9.e-]+) TFLOP/s measured", told)[0])
    assert float(share.rstrip("%")) / 100 == pytest.approx(float(rate) / product, rel=2e-3, abs=1e-4)
    (largest,) = [line for line in told.splitlines() if line.startswith("- Largest")]
    shares = [int(x) for x in re.findall(r"` (\d+)%", largest)]
    assert len(shares) == train_step_gpu.KERNELS and shares == sorted(shares, reverse=True) and sum(shares) <= 100


def test_figures_are_per_second_and_of_the_measured_rate() -> None:
    """1,000 tokens and 4 TFLOP in half a second are 2,000 tokens/s and 8 TFLOP/s, half of 16; 3 GiB."""
    trained = Contestant(name="350M", step=lambda: 0.0, tokens=1000, parameters=7, flops=4e12)
    one = Measured(case=CASES["350M"], trained=trained, seconds=0.5, peak=3 * 2**30, kernels=[("mm", 0.5)])
    lines = train_step_gpu.table([one], product=16e12)
    assert lines[2] == "| 350M | 7 | 8 x 4,096 | none | 2,000 | 8 | 50.00% | 3.0 |"
    assert lines[-1] == "- Largest of 350M: `mm` 50%."


def test_attention_counts_the_blocks_that_are_visited() -> None:
    """A row of one document of two blocks: three of the four pairs of blocks hold a pair that is seen."""
    model = build_model(SHAPES["tiny"], ModelSettings(tokenizer=TokenizerSettings()))
    inputs = to_inputs(collate([[train_step_gpu.document(2 * BLOCK, 0, num_context=8)]], 2 * BLOCK))
    whole = training_flops(model, work_of(inputs))
    assert train_step_gpu.flops_of(model, inputs) == sum(whole.values()) - whole["attention"] / 4


def test_rows_are_full_and_of_several_documents() -> None:
    case = Case(name="tiny", shape=SHAPES["tiny"], row_length=128, rows=3)
    inputs, tokens = train_step_gpu.packed_inputs(case, CPU)
    assert tokens == 3 * 128 == sum(group.index.numel() for group in inputs.groups)
    assert sum(len(group.index) for group in inputs.groups) == 3 * train_step_gpu.DOCUMENTS


def test_a_machine_without_a_gpu_is_told_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        train_step_gpu.main([])
    assert stopped.value.code == 2
    assert "a GPU is needed and torch sees none here" in (told := capsys.readouterr().err) and "--tiny" in told
    with pytest.raises(SystemExit):
        train_step_gpu.main(["--tiny", "--rows", "0"])
    assert "--rows is 1 or more, got 0" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cases, device, _ = train_step_gpu.chosen(["--sizes", "1.3B", "--rows", "2"])
    assert [(one.name, one.rows, one.row_length) for one in cases] == [("1.3B", 2, 4096)] and device.type == "cuda"
