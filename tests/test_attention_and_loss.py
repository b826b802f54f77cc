"""The trunk sees no later frame and no other document; the loss is the plain weighted mean over what is valid."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from sci_gpt.model import attention
from sci_gpt.model.attention import Reach, attend
from sci_gpt.model.heads import GaussianPrediction, MixturePrediction
from sci_gpt.model.inputs import ModelInputs, to_inputs
from sci_gpt.model.loss import crps_gaussian, mixture_log_probability, unit_losses, valid_weights, weighted_sums
from sci_gpt.model.shapes import SHAPES
from sci_gpt.model.transformer import ModelSettings, SciGPT, build_model
from sci_tokenizers.packing import collate
from sci_tokenizers.sample import Sample
from sci_tokenizers.table import make_tokenizer
from sci_tokenizers.tokenizer import TokenizerSettings
from toy_samples import altered_from, toy_sample

SETTINGS = TokenizerSettings(grid_patch=4, trace_samples=5)
CONTEXT, ROW = 4, 110
# (modality, frames) of each document, row by row: two of one shape, and neighbours of every modality
LAYOUT = [[("grid", 6), ("series", 12), ("trace", 8)], [("series", 12), ("trace", 10), ("grid", 5)]]


@pytest.fixture(scope="module")
def model() -> SciGPT:
    """A small model with every parameter drawn, so that no path through it is closed."""
    model = build_model(SHAPES["tiny"], ModelSettings(tokenizer=SETTINGS))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def samples() -> list[list[Sample]]:
    """The raw windows of LAYOUT."""
    times = {modality: make_tokenizer(modality, SETTINGS).frame_times for modality in ("grid", "series", "trace")}
    return [
        [toy_sample(m, frames * times[m], seed=10 * r + d) for d, (m, frames) in enumerate(row)]
        for r, row in enumerate(LAYOUT)
    ]


def inputs_of(rows: list[list[Sample]], *, context_only: bool = False) -> ModelInputs:
    """The packed batch of these windows as tensors."""
    documents = [
        [make_tokenizer(x.modality, SETTINGS).encode(x, num_context=CONTEXT, leads=(1, 2)) for x in row] for row in rows
    ]
    return to_inputs(collate(documents, ROW, context_only=context_only))


def places() -> list[tuple[int, int, int, int, int]]:
    """(row, number in the row, start, frames, slots) of each document in the flat batch."""
    slots = {"grid": 6, "series": 3, "trace": 3}
    found = []
    for r, row in enumerate(LAYOUT):
        at = r * ROW
        for d, (modality, frames) in enumerate(row):
            found.append((r, d, at, frames, slots[modality]))
            at += frames * slots[modality]
    return found


@torch.no_grad()
def test_no_token_sees_a_later_frame(model: SciGPT) -> None:
    """Altering a document's raw data from frame k on leaves the trunk's output before k the same, bit by bit."""
    rows = samples()
    before = model.trunk(inputs_of(rows))
    for r, d, start, frames, slots in places():
        k = max(frames - 2, CONTEXT)  # scales come from the context's frames, which may know each other
        altered = [list(row) for row in rows]
        altered[r][d] = altered_from(rows[r][d], k * make_tokenizer(rows[r][d].modality, SETTINGS).frame_times)
        after = model.trunk(inputs_of(altered))
        cut, end = start + k * slots, start + frames * slots
        assert torch.equal(after[start:cut], before[start:cut])
        assert not torch.isclose(after[cut:end], before[cut:end]).all(dim=1).any()


@torch.no_grad()
def test_no_prediction_knows_a_later_frame(model: SciGPT) -> None:
    """Altering a document's raw data from frame k on leaves every prediction made before k the same, bit by bit: what
    the heads correct (anchor, spread) is no way around the trunk; each one made from k on changes.
    """
    rows = samples()
    inputs = inputs_of(rows)
    before, changed = model(inputs), 0
    for r, d, start, frames, slots in places():
        k = max(frames - 2, CONTEXT)
        altered = [list(row) for row in rows]
        altered[r][d] = altered_from(rows[r][d], k * make_tokenizer(rows[r][d].modality, SETTINGS).frame_times)
        after = model(inputs_of(altered))
        for modality, payload in inputs.payloads.items():
            token = payload.index[payload.unit_token]
            late = (token >= start + k * slots) & (token < start + frames * slots)
            for name, expected in vars(before[modality]).items():
                found = vars(after[modality])[name]
                if expected is None:
                    continue
                assert torch.equal(found[~late], expected[~late]), (modality, name)
            moved = vars(after[modality])["mean"] != vars(before[modality])["mean"]
            assert moved[late].flatten(1).any(dim=1).all()
            changed += int(late.sum())
    assert changed


@torch.no_grad()
def test_documents_do_not_see_each_other(model: SciGPT) -> None:
    """Altering one document leaves every other token's output the same, bit by bit."""
    rows = samples()
    before = model.trunk(inputs_of(rows))
    for r, d, start, frames, slots in places():
        altered = [list(row) for row in rows]
        altered[r][d] = altered_from(rows[r][d], 0)
        after = model.trunk(inputs_of(altered))
        own = torch.zeros(len(before), dtype=torch.bool)
        own[start : start + frames * slots] = True
        assert torch.equal(after[~own], before[~own])
        assert not torch.equal(after[own], before[own])


@pytest.mark.parametrize("flexible", [False, True], ids=["by itself", "flex"])
@pytest.mark.parametrize("radius", [None, 1])
@torch.no_grad()
def test_a_document_full_of_nan_moves_no_others_predictions(
    model: SciGPT, flexible: bool, radius: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the whole model, heads too, by both kernels, bit by bit; its own predictions show it."""
    monkeypatch.setattr(attention, "has_kernel", lambda device: flexible)
    monkeypatch.setattr(model, "settings", replace(model.settings, radius=radius))
    inputs = inputs_of(samples())
    before = model(inputs)
    for _, _, start, frames, slots in places():
        own = torch.zeros(len(inputs.frame), dtype=torch.bool)
        own[start : start + frames * slots] = True
        after = model(filled_with_nan(inputs, own))
        for modality, payload in inputs.payloads.items():
            mine = own[payload.index[payload.unit_token]]
            known = {name: value for name, value in vars(before[modality]).items() if value is not None}
            for name, expected in known.items():
                found = vars(after[modality])[name]
                assert torch.equal(found[~mine], expected[~mine])
            assert vars(after[modality])["mean"][mine].isnan().flatten(1).any(dim=1).all()


def filled_with_nan(inputs: ModelInputs, own: torch.Tensor) -> ModelInputs:
    """The batch with NaN for every number of these tokens' payload."""
    payloads = {}
    for modality, payload in inputs.payloads.items():
        mine = own[payload.index]
        spoilt = {
            name: getattr(payload, name).masked_fill(mine.view(-1, *[1] * (getattr(payload, name).dim() - 1)), math.nan)
            for name in ("values", "last", "memory", "volatility")
        }
        valid = payload.valid | mine.view(-1, *[1] * (payload.valid.dim() - 1))
        payloads[modality] = replace(payload, valid=valid, **spoilt)
    return replace(inputs, payloads=payloads)


@torch.no_grad()
def test_place_in_the_batch_does_not_matter(model: SciGPT) -> None:
    """A document alone in a batch gives what it gives among others (kernels may sum in another order)."""
    rows = samples()
    whole = model.trunk(inputs_of(rows))
    for r, d, start, frames, slots in places():
        alone = model.trunk(inputs_of([[rows[r][d]]]))[: frames * slots]
        torch.testing.assert_close(alone, whole[start : start + frames * slots], rtol=1e-4, atol=1e-5)


def test_attention_equals_a_plain_masked_softmax() -> None:
    """Reference: a dense T x T matrix in float64; token i sees j of its own document with frame(j) <= frame(i)."""
    inputs = inputs_of(samples())
    document = torch.full((2 * ROW,), -1)
    for number, (_, _, start, frames, slots) in enumerate(places()):
        document[start : start + frames * slots] = number
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2 * ROW, 2, 8, generator=generator) for _ in range(3))
    seen = (document[:, None] == document[None]) & (inputs.frame[:, None] >= inputs.frame[None])
    scores = torch.einsum("ihc,jhc->hij", q.double(), k.double()) / math.sqrt(8)
    share = scores.masked_fill(~seen, -math.inf).softmax(dim=-1)
    expected = torch.einsum("hij,jhc->ihc", share, v.double())
    expected[document < 0] = 0.0
    order, laid = inputs.by_document()
    assert sorted(order.tolist()) == torch.nonzero(document >= 0)[:, 0].tolist()
    for pieces in (1, 4, 11):  # 11: more than some documents have frames
        found = attend(q, k, v=v, reach=Reach.of(inputs), pieces=pieces)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
        found = attend(q[order], k[order], v=v[order], reach=Reach.of(laid), pieces=pieces)
        torch.testing.assert_close(found.double(), expected[order], rtol=1e-5, atol=1e-5)


def test_eager_and_compiled_forms_agree(model: SciGPT, monkeypatch: pytest.MonkeyPatch) -> None:
    """The passes written for a CPU and what a compiler is given: outputs and gradients equal to rounding."""
    inputs = inputs_of(samples())

    def outcome() -> list[torch.Tensor]:
        model.zero_grad()
        out = model.trunk(inputs)
        (out * torch.arange(out.shape[1])).sum().backward()
        return [out.detach(), *(p.grad for p in model.blocks.parameters() if p.grad is not None)]

    eager = outcome()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for one, other in zip(eager, outcome(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))
    assert len(eager) == 1 + len(list(model.blocks.parameters()))


@torch.no_grad()
def test_a_last_layer_for_the_last_frames_alone_predicts_the_same(model: SciGPT) -> None:
    """A packed batch of every modality, of documents with several slots and of one with a single slot."""
    rows = samples()
    station = toy_sample("series", 12, seed=7)
    one = replace(
        station,
        variables=station.variables[:1],
        levels=station.levels[:1],
        values=station.values[:, :1],
        valid=station.valid[:, :1],
    )
    inputs = inputs_of([rows[0] + [one], rows[1]], context_only=True)
    assert {group.slots for group in inputs.groups} == {1, 3, 6} and len(inputs.groups[0].index) > 1
    fast, full = model(inputs, last_frames=True), model(inputs)
    assert fast.keys() == full.keys() == {"grid", "series", "trace"}
    for modality, prediction in full.items():
        for name, expected in vars(prediction).items():
            torch.testing.assert_close(vars(fast[modality])[name], expected, rtol=1e-4, atol=1e-5)
    whole, last = model.trunk(inputs), model.trunk(inputs, last_frames=True)
    torch.testing.assert_close(last[inputs.last_frames], whole[inputs.last_frames], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_last_frames_are_refused_where_earlier_ones_are_asked(model: SciGPT) -> None:
    with pytest.raises(ValueError, match=r"units ask before the last frame of their document; collate with context_on"):
        model(inputs_of(samples()), last_frames=True)


@pytest.mark.parametrize("modality", ["grid", "trace"])
def test_continuous_loss_is_the_weighted_mean_over_valid_values(modality: str) -> None:
    """Plain loops over units, variables and values; whatever stands in a missing value's place does not count."""
    payload = inputs_of(samples()).payloads[modality]
    generator = torch.Generator().manual_seed(2)
    shape = (len(payload.unit_token), *payload.values.shape[1:])
    prediction = GaussianPrediction(
        mean=torch.randn(shape, generator=generator), log_spread=0.3 * torch.randn(shape, generator=generator)
    )
    crps = crps_gaussian(prediction.mean, prediction.log_spread, truth=payload.values[payload.unit_target])
    crps = crps / payload.unit_spread.exp()  # in spreads of the anchor
    expected = []
    for unit, target in enumerate(payload.unit_target.tolist()):
        total = weight = 0.0
        for place in np.ndindex(*shape[1:]):
            if payload.valid[(target, *place)]:
                total += float(payload.weight[(target, *place)]) * float(crps[(unit, *place)])
                weight += float(payload.weight[(target, *place)])
        expected.append(total / weight if weight else 0.0)
    found = unit_losses(prediction, payload, settings=SETTINGS)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-6)
    garbage = replace(payload, values=torch.where(payload.valid, payload.values, 1e6))
    assert torch.equal(unit_losses(prediction, garbage, settings=SETTINGS), found)


def test_series_loss_skips_missing_answers() -> None:
    payload = inputs_of(samples()).payloads["series"]
    units = len(payload.unit_token)
    prediction = MixturePrediction(
        log_weight=torch.log_softmax(torch.zeros(units, 2), dim=-1),
        mean=torch.tensor([[-0.5, 0.5]]).expand(units, 2),
        log_spread=torch.zeros(units, 2),
    )
    found = unit_losses(prediction, payload, settings=SETTINGS)
    answered = payload.valid[payload.unit_target, 0, 0]
    assert (found[~answered] == 0).all()
    assert (found[answered] > 0).all()
    assert 0 < answered.sum() < units


def test_a_units_weight_counts_in_the_sum() -> None:
    inputs = inputs_of(samples())
    payload = inputs.payloads["trace"]
    shape = (len(payload.unit_token), *payload.values.shape[1:])
    prediction = GaussianPrediction(mean=torch.zeros(shape), log_spread=torch.zeros(shape))
    sums = weighted_sums({"trace": prediction}, inputs, settings=SETTINGS)
    expected = (unit_losses(prediction, payload, settings=SETTINGS) * payload.unit_weight).sum()
    torch.testing.assert_close(sums["trace"], expected)
    assert valid_weights(inputs)["trace"] == pytest.approx(float(payload.unit_weight.sum()))


def test_a_value_counts_by_its_area_wherever_it_lies() -> None:
    """A plain sum over values, whose patches are full, ragged, gappy or at a pole: no patch's weight is its own."""
    inputs = inputs_of(samples())
    payload = inputs.payloads["grid"]
    shape = (len(payload.unit_token), *payload.values.shape[1:])
    prediction = GaussianPrediction(mean=torch.zeros(shape), log_spread=torch.zeros(shape))
    truth, target = payload.values[payload.unit_target], payload.unit_target
    weight = (payload.weight[target] * payload.valid[target]).double()
    crps = crps_gaussian(prediction.mean, prediction.log_spread, truth=truth).double() / payload.unit_spread.exp()
    values_of_a_token = 2 * payload.values[0].numel()  # each is asked for at two leads
    expected = float((torch.where(weight > 0, crps, 0.0) * weight).sum()) / values_of_a_token
    assert float(weighted_sums({"grid": prediction}, inputs, settings=SETTINGS)["grid"]) == pytest.approx(expected)
    counts = weight.sum(dim=(1, 2))
    assert float(counts.max() / counts.min()) > 1.5


def test_bins_probabilities_sum_to_one() -> None:
    settings = TokenizerSettings(series_ids=64, series_limit=3.0)
    centres = torch.linspace(-3.0, 3.0, 61, dtype=torch.float64)
    prediction = MixturePrediction(
        log_weight=torch.log(torch.tensor([[0.2, 0.8]], dtype=torch.float64)).expand(61, 2),
        mean=torch.tensor([[-2.9, 0.4]], dtype=torch.float64).expand(61, 2),
        log_spread=torch.tensor([[-1.0, -2.0]], dtype=torch.float64).expand(61, 2),
    )
    logs = mixture_log_probability(prediction, centres, width=settings.series_bin_width, limit=3.0)
    assert float(logs.exp().sum()) == pytest.approx(1.0, abs=1e-9)
