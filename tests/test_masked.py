"""Masked documents: what is hidden leaks nowhere, is asked for per value, and is the same in every layout."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sci_gpt.data.curriculum import Curriculum
from sci_gpt.data.loader import Corpus, attention_cost, plan_step
from sci_gpt.data.order import keyed
from sci_gpt.data.store import Store
from sci_gpt.model.init import initialize
from sci_gpt.model.inputs import ModelInputs, PayloadInputs, to_inputs
from sci_gpt.model.loss import valid_weights, weighted_sums
from sci_gpt.model.shapes import SHAPES
from sci_gpt.model.transformer import ModelSettings, SciGPT, build_model
from sci_gpt.recipes import parts
from sci_gpt.train.feed import Place, StepReader, StepRows
from sci_tokenizers.masked import interpolated, masked_tokens, tubes
from sci_tokenizers.packing import Batch, PackingError, collate
from sci_tokenizers.sample import Sample, masked_name
from sci_tokenizers.table import TOKENIZERS, make_tokenizer
from sci_tokenizers.tokenizer import TokenizerSettings
from sci_tokenizers.tokens import Tokens
from toy_samples import toy_sample, toy_statistics
from toy_store import toy_config, write_store

SETTINGS = TokenizerSettings(grid_patch=4, trace_samples=5)
FRAMES, CONTEXT = 24, 8
TARGETS = ("unit_weight", "hidden_values", "hidden_valid")


def masked(modality: str, sample: Sample, *, known: bool = False) -> Tokens:
    """The masked document of a window."""
    statistics = toy_statistics(sample) if known else None
    tokenizer = make_tokenizer(modality, SETTINGS)
    return masked_tokens(tokenizer, sample, key=5, num_context=CONTEXT, leads=(1, 3), statistics=statistics)


def window(modality: str) -> Sample:
    """FRAMES frames."""
    return toy_sample(modality, FRAMES * make_tokenizer(modality, SETTINGS).frame_times)


@pytest.mark.parametrize("known", [True, False], ids=["known source", "unseen source"])
@pytest.mark.parametrize("modality", TOKENIZERS)
def test_no_input_knows_what_is_hidden(modality: str, known: bool) -> None:
    """Other hidden values, and others of them missing, change no bit of the batch but the targets and their weight."""
    sample = window(modality)
    tokens = masked(modality, sample, known=known)
    assert tokens.masked is not None and not tokens.valid[tokens.masked.hidden].any()
    tokenizer = make_tokenizer(modality, SETTINGS)
    cells = tokenizer.cells(tokens.masked.hidden, sample.values.shape)
    valid = np.where(cells, ~sample.valid, sample.valid)
    values = np.where(cells, sample.values * 0.5 + 17.0, sample.values).astype(np.float32)
    other = masked(modality, replace(sample, values=np.where(valid, values, 0.0), valid=valid), known=known)
    if modality == "trace":  # an onset that is hidden weighs less, as one that is asked ahead does
        other = replace(other, importance=tokens.importance)
    one, two = (collate([[t]], t.num_tokens).payloads[modality] for t in (tokens, other))
    for field in fields(PayloadInputs):
        same = np.array_equal(getattr(one, field.name), getattr(two, field.name), equal_nan=True)
        assert same == (field.name not in TARGETS), field.name


@pytest.mark.parametrize("modality", TOKENIZERS)
def test_truth_is_what_encoding_the_whole_gives(modality: str) -> None:
    """Decoded, a hidden value is the sample's own, within half a bin for series."""
    sample = window(modality)
    tokens = masked(modality, sample)
    assert tokens.masked is not None
    tokenizer = make_tokenizer(modality, SETTINGS)
    whole, valid = tokenizer.rescaled(tokens, sample)
    back = tokenizer.decode(tokens, whole)
    np.testing.assert_array_equal(tokens.masked.truth[tokens.masked.valid], whole[tokens.masked.valid])
    assert tokens.masked.valid.sum() == (valid & tokens.masked.hidden[:, :, None, None]).sum()
    error = np.abs(back - sample.values)[sample.valid].max()
    assert error <= (0.3 if modality == "series" else 1e-3)


def test_tubes() -> None:
    """About a third is hidden, every slot keeps a frame of its context, and the key decides."""
    for slots in (1, 6):
        hidden = tubes(FRAMES, slots, num_context=CONTEXT, key=3)
        assert 0.3 <= hidden.mean() <= 0.5 and not hidden[:CONTEXT].all(axis=0).any()
        np.testing.assert_array_equal(hidden, tubes(FRAMES, slots, num_context=CONTEXT, key=3))
        assert (hidden != tubes(FRAMES, slots, num_context=CONTEXT, key=4)).any()


def test_a_context_of_one_frame_stays_whole() -> None:
    """Of a context of one frame nothing is hidden, under any key: the scales come from it."""
    for key in range(50):
        assert not tubes(FRAMES, 3, num_context=1, key=key)[0].any()
    short = tubes(2, 1, num_context=1, key=0)  # no key can hide more than its last frame
    assert not short[0].any()


def test_the_anchor_is_a_line() -> None:
    valid = np.array([0, 1, 0, 0, 1, 0], bool)
    line, steps = interpolated(np.array([0.0, 2, 0, 0, 8, 0]), valid)
    np.testing.assert_allclose(line, [2, 2, 4, 6, 8, 8])
    np.testing.assert_allclose(steps, [1, 0, 2 / 3, 2 / 3, 0, 1])
    assert interpolated(np.zeros(3), np.zeros(3, bool))[1].tolist() == [3, 3, 3]


@pytest.mark.parametrize("modality", TOKENIZERS)
def test_only_hidden_values_are_asked_each_by_its_weight(modality: str) -> None:
    tokens = masked(modality, window(modality))
    assert tokens.masked is not None
    inputs = to_inputs(collate([[tokens]], tokens.num_tokens))
    payload = inputs.payloads[modality]
    frame, slot = np.nonzero(tokens.masked.hidden)
    np.testing.assert_array_equal(payload.unit_token.numpy(), frame * tokens.num_slots + slot)
    assert payload.question[:, 0].isnan().all() and (payload.unit_lead == 0).all()
    share = (tokens.masked.valid * tokens.weight).mean(axis=(2, 3))[frame, slot]
    np.testing.assert_allclose(payload.unit_weight.numpy(), share * tokens.importance, rtol=1e-5)
    weights = valid_weights(inputs)
    assert weights[modality] == 0.0 and weights[masked_name(modality)] == pytest.approx(
        float(payload.unit_weight.sum())
    )
    assert not inputs.groups[0].causal


def small_model() -> SciGPT:
    """A tiny model with its initial weights."""
    model = build_model(SHAPES["tiny"], ModelSettings(tokenizer=SETTINGS))
    initialize(model, seed=1)
    return model


def test_a_hidden_frame_sees_later_ones() -> None:
    tokens = masked("series", window("series"))
    inputs = to_inputs(collate([[tokens]], tokens.num_tokens))
    model = small_model()
    before = model.trunk(inputs)
    features = inputs.features.clone()
    features[-3:, 0] += 0.3
    moved = (model.trunk(replace(inputs, features=features)) - before).abs()
    assert moved[:3].max() > 0


def test_it_learns_beyond_its_anchor() -> None:
    """Noisy waves hidden in part: on windows held out the loss falls below the start, where the head is its anchor."""
    made = [masked("series", toy_sample("series", FRAMES, seed=s, missing=0.0)) for s in range(300)]
    held, *steps = (to_inputs(collate([made[s : s + 10]], 10 * made[0].num_tokens)) for s in range(0, 300, 10))
    model, name = small_model(), masked_name("series")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def loss(of: ModelInputs) -> torch.Tensor:
        return weighted_sums(model(of), of, settings=SETTINGS)[name] / valid_weights(of)[name]

    start = float(loss(held).detach())
    for step in steps * 2:
        optimizer.zero_grad()
        loss(step).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    end = float(loss(held).detach())
    assert end < start - 0.02, (start, end)


def test_the_samples_number_says_what_is_hidden(tmp_path: Path) -> None:
    """Share 0 reads what it read before; at 0.5 half the samples are masked, and a corpus made anew hides the same."""
    store = Store.open(write_store(tmp_path / "store"))
    config = toy_config(tmp_path / "store", tmp_path / "run")
    specs = parts.window_specs(config)

    def corpus(share: float, seed: int = 3) -> Corpus:
        chosen = tuple(replace(spec, masked=share) for spec in specs)
        return Corpus(store, chosen, seed=seed, settings=parts.tokenizer_settings(config))

    plain, half, again, other = corpus(0.0), corpus(0.5), corpus(0.5), corpus(0.5, seed=4)
    found = [half.masked(n) for n in range(400)]
    assert 160 <= sum(found) <= 240 and found != [other.masked(n) for n in range(400)]
    assert not any(plain.masked(n) for n in range(400))
    hiding = [n for n in range(400) if found[n]][:6]
    for n in hiding:
        one, two = half.document(n).masked, again.document(n).masked
        assert one is not None and two is not None
        np.testing.assert_array_equal(one.hidden, two.hidden)
    free = next(n for n in range(400) if not found[n])
    np.testing.assert_array_equal(plain.document(free).anchor, half.document(free).anchor)
    same = {half.document(n).masked.hidden.tobytes() for n in hiding}  # type: ignore[union-attr]
    assert len(same) == len(hiding)


def masked_curriculum(folder: Path) -> Curriculum:
    """The toy run, half of whose samples of each source are masked."""
    entries = [
        {"source": "field", "weight": 1, "frames": 16, "stride": 2, "context_frames": [2, 6], "masked": 0.5},
        {"source": "station", "weight": 1, "frames": 24, "stride": 3, "context_frames": [3, 12], "masked": 0.5},
        {"source": "quake", "weight": 1, "frames": 30, "stride": 4, "context_frames": [4, 15], "masked": 0.5},
    ]
    config = toy_config(folder / "store", folder / "run", mixture=entries)
    return parts.curriculum(config, Store.open(config.data))


def step_of(curriculum: Curriculum, n: int, *, rank: int = 0, world: int = 1) -> StepRows:
    """A rank's rows of the step that starts at sample n."""
    place = Place(rank=rank, world=world, accumulation=1)
    return StepReader(curriculum, place, settings=curriculum.corpora[0].tokenizers[0].settings)(1, n)


def hidden_places(batch: Batch) -> dict[int, list[int]]:
    """Sample number -> which of its tokens, counted from its first, ask for themselves."""
    asked = np.concatenate([p.index[p.unit_token[p.unit_lead == 0]] for p in batch.payloads.values()])
    places = {}
    for number, (start, frames, slots), causal in zip(batch.numbers, batch.spans, batch.causal, strict=True):
        inside = (asked >= start) & (asked < start + frames * slots)
        places[number] = sorted((asked[inside] - start).tolist())
        assert bool(places[number]) != causal
    return places


def test_every_layout_and_a_resumed_run_hide_the_same(tmp_path: Path) -> None:
    """One rank, three ranks, and a run begun anew at the step's first sample: a sample hides what its number says."""
    write_store(tmp_path / "store")
    curriculum, anew = masked_curriculum(tmp_path), masked_curriculum(tmp_path)
    corpus, first = curriculum.corpora[0], 7
    (whole,) = step_of(curriculum, first).batches
    alone = hidden_places(whole)
    assert {bool(places) for places in alone.values()} == {True, False}
    for other, world in ((curriculum, 3), (anew, 1)):
        steps = [step_of(other, first, rank=rank, world=world) for rank in range(world)]
        assert {n: at for step in steps for batch in step.batches for n, at in hidden_places(batch).items()} == alone
    for n, places in alone.items():
        if places:  # keyed by the seed and the number alone, whatever the sample holds
            spec, tokens = corpus.specs[corpus.order.source(n)], corpus.document(n)
            key = keyed(corpus.seed, "tubes", n)
            hidden = tubes(spec.frames, tokens.num_slots, num_context=tokens.num_context, key=key)
            assert places == np.flatnonzero(hidden).tolist()


def test_a_masked_document_costs_twice(tmp_path: Path) -> None:
    """It sees all of its tokens, a causal one half of them: rows are dealt by that."""
    write_store(tmp_path / "store")
    corpus = masked_curriculum(tmp_path).corpora[0]
    plan = plan_step(corpus, 0, rows=3, row_length=160)
    expected = [sum(corpus.length(n) ** 2 * (2 if corpus.document(n).masked else 1) for n in row) for row in plan.rows]
    assert attention_cost(corpus, plan) == expected
    assert expected != [sum(corpus.length(n) ** 2 for n in row) for row in plan.rows]


@pytest.mark.parametrize("modality", TOKENIZERS)
def test_each_objective_has_its_own_sum(modality: str) -> None:
    """A masked and a causal document in one row give, under two names, what each gives alone."""
    tokenizer, sample = make_tokenizer(modality, SETTINGS), window(modality)
    one, two = masked(modality, sample), tokenizer.encode(sample, num_context=CONTEXT, leads=(1, 3))
    model = small_model().eval()

    def sums(documents: list[Tokens]) -> tuple[dict[str, float], dict[str, float]]:
        inputs = to_inputs(collate([documents], sum(tokens.num_tokens for tokens in documents)))
        found = weighted_sums(model(inputs), inputs, settings=SETTINGS)
        return {name: float(value.detach()) for name, value in found.items()}, valid_weights(inputs)

    (hidden, hidden_weight), (ahead, ahead_weight) = sums([one]), sums([two])
    together, weight = sums([two, one])
    name = masked_name(modality)
    assert set(ahead) == {modality} and hidden[modality] == 0.0 and hidden[name] > 0.0
    assert together == pytest.approx({modality: ahead[modality], name: hidden[name]}, rel=1e-4)
    assert weight == pytest.approx({modality: ahead_weight[modality], name: hidden_weight[name]}, rel=1e-5)


def test_a_masked_document_has_no_forecast() -> None:
    tokens = masked("series", window("series"))
    with pytest.raises(PackingError, match=r"'toy/series-0' is masked .* encode the sample with its tokenizer"):
        collate([[tokens]], tokens.num_tokens, context_only=True)
