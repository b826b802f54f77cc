"""Packing: documents into rows and rows into a batch, against plain loops; what a token is asked, and when."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sci_tokenizers.packing import Batch, PackingError, collate, pack_rows
from sci_tokenizers.table import make_tokenizer
from sci_tokenizers.tokenizer import TokenizerSettings
from sci_tokenizers.tokens import Tokens
from toy_samples import altered_from, toy_sample

SETTINGS = TokenizerSettings(grid_patch=4, trace_samples=5)
CONTEXT = 4


def document(modality: str, frames: int, *, seed: int = 0, leads: tuple[int, ...] = (1,)) -> Tokens:
    """Tokens of a made-up window with CONTEXT frames of context."""
    tokenizer = make_tokenizer(modality, SETTINGS)
    sample = toy_sample(modality, frames * tokenizer.frame_times, seed=seed)
    return tokenizer.encode(sample, num_context=CONTEXT, leads=leads)


def mixed() -> tuple[list[list[Tokens]], Batch]:
    """Two rows of 100 tokens: grid 6 x 6 and series 3 x 12; two traces of 3 x 8 and a series 3 x 10."""
    rows = [
        [document("grid", 6), document("series", 12, leads=(1, 2))],
        [document("trace", 8, seed=1), document("series", 10, seed=2), document("trace", 8, seed=3)],
    ]
    return rows, collate(rows, 100, numbers=[[4, 5], [6, 7, 8]])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=14), st.integers(1, 6))
def test_rows_hold_each_document_once(lengths: list[int], rows: int) -> None:
    placed = pack_rows(lengths, rows, row_length=12)
    if placed is None:
        assert sum(lengths) > 12 * rows or rows < len(lengths)
        return
    assert sorted(number for row in placed for number in row) == list(range(len(lengths)))
    assert all(sum(lengths[number] for number in row) <= 12 for row in placed)
    assert all(row == sorted(row) for row in placed)
    assert pack_rows(lengths, rows, row_length=12) == placed


def test_best_fit_decreasing() -> None:
    """8, 6, 5, 3, 2 into rows of 12: 8; 6; 5 beside 6 (1 left); 3 beside 8 (1 left): 2 fits in no second row."""
    assert pack_rows([3, 8, 5, 6], 2, row_length=12) == [[0, 1], [2, 3]]
    assert pack_rows([3, 8, 5, 6, 2], 2, row_length=12) is None
    assert pack_rows([3, 8, 5, 6, 2], 3, row_length=12) == [[0, 1], [2, 3], [4]]


def test_a_document_longer_than_a_row_is_refused() -> None:
    with pytest.raises(PackingError, match="document 1 has 13 tokens, a row holds 12"):
        pack_rows([4, 13], 2, row_length=12)
    with pytest.raises(PackingError, match="overruns its row of 30"):
        collate([[document("series", 12)]], 30)


def test_every_token_has_its_place() -> None:
    """Frame-major documents one after the other from the row's start, then nothing."""
    rows, batch = mixed()
    assert batch.fill == (36 + 36 + 24 + 30 + 24) / 200
    number = 0
    for r, documents in enumerate(rows):
        at = 100 * r
        for tokens in documents:
            assert batch.spans[number] == (at, tokens.num_frames, tokens.num_slots)
            for f in range(tokens.num_frames):
                for s in range(tokens.num_slots):
                    here = at + f * tokens.num_slots + s
                    assert batch.document[here] == number
                    place = (batch.frame[here], batch.row[here], batch.column[here])
                    assert place == (f, tokens.row[s], tokens.column[s])
            at += tokens.num_tokens
            number += 1
        assert (batch.document[at : 100 * (r + 1)] == -1).all()
    assert batch.numbers == (4, 5, 6, 7, 8)
    assert batch.keys[0] == "toy/grid-0"


def test_questions_are_asked_from_the_last_context_frame_on() -> None:
    """Plain loops over origins f >= C - 1, leads and slots: the target is frame f + lead, its time the question."""
    rows, batch = mixed()
    for modality, payload in batch.payloads.items():
        expected = []
        first = 0
        for tokens in (tokens for row in rows for tokens in row if tokens.modality == modality):
            slots = tokens.num_slots
            worth = [
                [(tokens.weight[s] * tokens.valid[f, s]).mean() for s in range(slots)] for f in range(len(tokens.valid))
            ]
            for f in range(CONTEXT - 1, tokens.num_frames):
                for lead in (lead for lead in tokens.leads if f + lead < tokens.num_frames):
                    ahead = np.log(tokens.time[f + lead] - tokens.time[f])
                    for s in range(slots):
                        weight = tokens.importance * worth[f + lead][s] / len(tokens.leads)
                        target = first + (f + lead) * slots + s
                        expected.append((first + f * slots + s, target, lead, weight, ahead))
            first += tokens.num_tokens
        units = (
            payload.unit_token,
            payload.unit_target,
            payload.unit_lead,
            payload.unit_weight,
            payload.question[:, 0],
        )
        np.testing.assert_allclose(np.stack(units, axis=1), np.array(expected), rtol=1e-6)
        assert (payload.unit_weight == 0).any() or modality != "series"  # the toy series has whole missing tokens


def test_what_a_head_corrects_is_of_the_token_that_asks() -> None:
    """Plain loops: a unit's anchor and spread are those of its own frame, slot and lead, not of another's."""
    rows = [
        [document("grid", 6, leads=(1, 2)), document("series", 12, leads=(1, 3))],
        [document("trace", 10, seed=1, leads=(1, 2)), document("series", 10, seed=2, leads=(1, 3))],
    ]
    batch = collate(rows, 100)
    several = 0
    for modality, payload in batch.payloads.items():
        anchors, spreads = [], []
        for tokens in (tokens for row in rows for tokens in row if tokens.modality == modality):
            several += tokens.anchor.shape[-1] > 1
            for f in range(CONTEXT - 1, tokens.num_frames):
                for number, _ in ((n, lead) for n, lead in enumerate(tokens.leads) if f + lead < tokens.num_frames):
                    own = number if tokens.anchor.shape[-1] > 1 else 0  # one for all leads where nothing is forecast
                    for s in range(tokens.num_slots):
                        anchors.append(tokens.anchor[f, s, :, :, own])
                        spreads.append(tokens.anchor_spread[f, s, :, :, own])
        np.testing.assert_array_equal(payload.unit_anchor, np.stack(anchors))
        np.testing.assert_array_equal(payload.unit_spread, np.stack(spreads))
    assert several == 3  # both series and the trace forecast themselves, lead by lead


def test_payloads_are_the_documents_tokens() -> None:
    rows, batch = mixed()
    for modality, payload in batch.payloads.items():
        documents = [tokens for row in rows for tokens in row if tokens.modality == modality]
        values = np.concatenate([tokens.payload.reshape(-1, *tokens.payload.shape[2:]) for tokens in documents])
        np.testing.assert_array_equal(payload.values, values)
        assert (batch.document[payload.index] >= 0).all()
        assert len(np.unique(payload.index)) == len(payload.index) == len(values)


def test_a_forecast_holds_nothing_after_the_context() -> None:
    """The batch of a window whose future is altered is the same, bit by bit, but for which answers there would be."""
    tokenizer = make_tokenizer("series", SETTINGS)
    sample = toy_sample("series", 12)
    one, two = (
        collate([[tokenizer.encode(x, num_context=CONTEXT, leads=(1, 5))]], 40, context_only=True)
        for x in (sample, altered_from(sample, CONTEXT))
    )
    assert one.spans == ((0, CONTEXT, 3),)
    assert sorted(set(one.payloads["series"].unit_lead.tolist())) == [1, 5]
    np.testing.assert_array_equal(one.features, two.features)
    for name in (
        "values",
        "valid",
        "unit_anchor",
        "unit_spread",
        "memory",
        "ids",
        "variable",
        "log_scale",
        "unit_token",
        "unit_lead",
        "question",
    ):
        np.testing.assert_array_equal(
            getattr(one.payloads["series"], name), getattr(two.payloads["series"], name), name
        )
    # asked from the last context frame: tokens 9, 10, 11
    assert sorted(set(one.payloads["series"].unit_token.tolist())) == [9, 10, 11]


def test_narrow_documents_are_padded_with_missing_variables() -> None:
    """A grid of one variable beside one of two: its tokens' second variable is nobody's, missing, without weight."""
    wide = document("grid", 6)
    tokenizer = make_tokenizer("grid", SETTINGS)
    sample = toy_sample("grid", 6, seed=1)
    cut = type(sample)(
        **{**vars(sample), "variables": sample.variables[:1], "levels": sample.levels[:1]}
        | {"values": sample.values[:, :1], "valid": sample.valid[:, :1]}
    )
    narrow = tokenizer.encode(cut, num_context=CONTEXT, leads=(1,))
    payload = collate([[wide, narrow]], 80).payloads["grid"]
    assert (payload.variable[:36] >= 0).all()
    assert (payload.variable[36:, 1] == -1).all()
    assert not payload.valid[36:, 1].any()
    assert (payload.weight[36:, 1] == 0).all()
