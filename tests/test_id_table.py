"""A series' id is embedded by its value and by a row of a table: what the row changes, and models without a table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sci_gpt.data.store import Store
from sci_gpt.errors import CheckpointError
from sci_gpt.model.init import initialize
from sci_gpt.model.inputs import ModelInputs
from sci_gpt.model.shapes import SHAPES
from sci_gpt.model.transformer import ModelSettings, SciGPT, build_model
from sci_gpt.recipes import parts
from sci_gpt.recipes.load import load_model
from sci_gpt.train.checkpoint import MANIFEST, STATE, file_sha256, sealed
from sci_gpt.train.resume import where_to_go_on
from test_attention_and_loss import SETTINGS, inputs_of, samples
from toy_model import make_run

TABLE = "embed.series.id_table"


@pytest.fixture(scope="module")
def inputs() -> ModelInputs:
    """A packed batch of all modalities."""
    return inputs_of(samples())


def made(*, id_table: bool) -> SciGPT:
    """A small model as it is before training."""
    model = build_model(SHAPES["tiny"], ModelSettings(tokenizer=SETTINGS, id_table=id_table))
    initialize(model, 3)
    return model


def test_a_new_model_computes_what_one_without_a_table_does(inputs: ModelInputs) -> None:
    """The table starts at 0, and every other parameter is drawn as without it."""
    with_table, without = made(id_table=True), made(id_table=False)
    table = with_table.get_parameter(TABLE)
    assert table.shape == (SETTINGS.series_ids, SHAPES["tiny"].width) and not table.any()
    assert with_table.num_parameters - without.num_parameters == table.numel()
    assert torch.equal(with_table.trunk(inputs), without.trunk(inputs))


def test_a_row_moves_the_tokens_of_its_id_alone(inputs: ModelInputs) -> None:
    """Moving the row of one id moves the embeddings of the valid tokens that have it, by just that."""
    model = made(id_table=True)
    payload = inputs.payloads["series"]
    chosen = int(payload.ids[payload.valid[:, 0, 0]][0])
    with torch.no_grad():
        before = model.embed["series"](payload)
        model.get_parameter(TABLE)[chosen] += 0.25
        model.get_parameter(TABLE)[0] += 1.0  # PAD: what is missing has no row
        after = model.embed["series"](payload)
    here = (payload.ids == chosen) & payload.valid[:, 0, 0]
    assert here.any() and not here.all()
    assert torch.allclose(after[here], before[here] + 0.25, atol=1e-6)
    assert torch.equal(after[~here], before[~here])


def test_the_table_learns_what_the_value_does_not_say(inputs: ModelInputs) -> None:
    """A gradient reaches the rows of the ids that are there, and no other."""
    model = made(id_table=True)
    payload = inputs.payloads["series"]
    model.embed["series"](payload).square().sum().backward()
    gradient = model.get_parameter(TABLE).grad
    assert gradient is not None
    moved = gradient.abs().sum(dim=1) > 0
    assert set(moved.nonzero().ravel().tolist()) == set(payload.ids[payload.valid[:, 0, 0]].tolist())


@pytest.mark.parametrize("wrong", [-1, SETTINGS.series_ids])
def test_an_id_out_of_range_is_named(inputs: ModelInputs, wrong: int) -> None:
    payload = inputs.payloads["series"]
    ids = payload.ids.clone()
    ids[2] = wrong
    with pytest.raises(ValueError, match=rf"id {wrong} is not within 0\.\.4095, .*series_ids"):
        made(id_table=True).embed["series"](replace(payload, ids=ids))


def test_a_model_saved_before_there_was_a_table_loads_and_goes_on(tmp_path: Path) -> None:
    """Its configuration lacks the key: that means false, for loading as for resuming; true is refused by name."""
    config = make_run(tmp_path, model={"size": "tiny", "id_table": False})
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    state = json.loads((checkpoint / STATE).read_text())
    del state["config"]["model"]["id_table"], state["identity"]["model"]["id_table"]
    _rewrite(checkpoint, state)
    model = load_model(checkpoint)
    assert not model.config.model.id_table
    assert TABLE not in dict(model.model.named_parameters())
    store = Store.open(config.data)
    assert where_to_go_on(config.output, parts.identity(config, store)).checkpoint == checkpoint
    asked = config.model_copy(update={"model": config.model.model_copy(update={"id_table": True})})
    with pytest.raises(CheckpointError, match="model.id_table is False there and True here"):
        where_to_go_on(config.output, parts.identity(asked, store))


def _rewrite(checkpoint: Path, state: object) -> None:
    """Another state.json, under its digest in the manifest."""
    (checkpoint / STATE).write_text(json.dumps(state))
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    manifest["state_sha256"] = file_sha256(checkpoint / STATE)
    (checkpoint / MANIFEST).write_text(json.dumps(sealed(manifest)))
