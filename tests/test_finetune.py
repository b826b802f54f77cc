"""Finetuning: the best weights are kept, later parts stay unseen, models save and load, verdicts follow intervals."""

from __future__ import annotations

import json
import math
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import obspy
import pandas as pd
import pytest
import torch
import xarray as xr

import sci_gpt
from sci_evals import finetune_report
from sci_evals.finetune_report import Difference
from sci_gpt.errors import ConfigError
from sci_gpt.model.widen import is_table
from sci_gpt.recipes import adapt as adapting
from sci_gpt.recipes.adapt import AdaptSettings, Examples, adapt, from_scratch, introduce
from sci_gpt.recipes.film import Notes
from sci_gpt.recipes.finetune import Request, prepare
from sci_gpt.recipes.public import Model
from sci_gpt.recipes.save import save_model
from sci_launch import cli
from sci_tokenizers.variables import BUILT_IN, VARIABLE_INDEX, VARIABLE_NAMES, VARIABLES
from test_forecast import table
from toy_model import make_run

SHORT: dict[str, Any] = {"max_steps": 4, "validate_every": 2, "rows_per_step": 2}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder on the toy store's three sources."""
    return make_run(tmp_path_factory.mktemp("model")).output


@pytest.fixture(scope="module")
def model(run: Path) -> Model:
    """Its model."""
    loaded = sci_gpt.load_model(run)
    assert isinstance(loaded, Model)
    return loaded


@pytest.fixture(autouse=True)
def own_table() -> Generator[None]:
    """What a test declares, the next one does not know."""
    yield
    for name in VARIABLE_NAMES[len(BUILT_IN) :]:
        del VARIABLES[name], VARIABLE_INDEX[name]
    del VARIABLE_NAMES[len(BUILT_IN) :]


def station(num_rows: int = 200, *, seed: int = 0) -> pd.DataFrame:
    """An hourly table with a header's unit, a code for missing values and a second column."""
    noise = np.random.default_rng(seed).normal(size=(2, num_rows))
    steps = np.arange(num_rows)
    temp = 11.0 + 6.0 * np.sin(2 * np.pi * steps / 24) + noise[0].cumsum() * 0.2
    temp[[3, num_rows // 2]] = -9999.0
    stamps = pd.date_range("2024-03-01", periods=num_rows, freq="h").strftime("%Y-%m-%dT%H:%M")
    return pd.DataFrame({"when": stamps, "temp (°C)": temp, "wind_speed": 4.0 + abs(noise[1])})


def quiet(line: str) -> None:
    """Takes no notice."""


def request(**words: object) -> Request:
    """A short finetuning of the station's temperature."""
    return Request.of(**{"target": "temp (°C)", "name": "roof", **SHORT, **words})


def test_the_best_weights_of_the_validation_are_kept(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = prepare(model, station(), request=request(), say=quiet).examples
    found: list[dict[str, torch.Tensor]] = []
    losses = iter([5.0, 3.0, 4.0, 4.5, 4.4])  # at the start, then after 2, 4, 6 and 8 steps: the best is after 2

    def measured(self: adapting._Documents) -> float:
        found.append({name: tensor.clone() for name, tensor in self.model.state_dict().items()})
        return next(losses)

    monkeypatch.setattr(adapting._Documents, "valid_loss", measured)
    settings = AdaptSettings(max_steps=20, validate_every=2, rows_per_step=2, patience=3)
    adapted = adapt(model, examples, settings=settings, say=quiet)
    assert (adapted.best_step, adapted.steps) == (2, 8), "three validations without a new best end it"
    for name, tensor in adapted.model.model.state_dict().items():
        assert torch.equal(tensor, found[1][name]), name
    assert any(not torch.equal(found[1][name], found[-1][name]) for name in found[1]), "it went on learning"


def test_the_same_seed_gives_the_same_bits_and_the_start_is_not_changed(model: Model) -> None:
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    examples = prepare(model, station(), request=request(), say=quiet).examples
    one, two, other = (adapt(model, examples, settings=AdaptSettings(seed=s, **SHORT), say=quiet) for s in (0, 0, 1))
    assert one.history[1:] == two.history[1:] and one.history[1:] != other.history[1:]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.model.state_dict().items())


def test_a_frozen_trunk_stays_and_heads_learn(model: Model) -> None:
    examples = prepare(model, station(), request=request(), say=quiet).examples
    settings = AdaptSettings(freeze=True, **SHORT)
    weights = introduce(model, examples).model.state_dict()
    documents = adapt(model, examples, settings=replace(settings, patience=9), say=quiet)
    learned = documents.model.model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in learned.items() if name.startswith("blocks."))


def test_later_parts_change_nothing_that_training_reads(model: Model) -> None:
    """Statistics, prior, windows and weights come from the training part; the test part may hold anything."""
    data = station()
    first = prepare(model, data, request=request(missing=(-9999.0,), units={"temp (°C)": "degC"}), say=quiet)
    kept = sum(len(sample.time) for sample in first.blocks.train)
    spoilt, tested = data.copy(), data.copy()
    spoilt.loc[kept:, "temp (°C)"] += 15.0
    last = len(data) - sum(len(sample.time) for sample in first.blocks.test)
    tested.loc[last:, "temp (°C)"] += 15.0
    words = request(missing=(-9999.0,), units={"temp (°C)": "degC"})
    changed = [prepare(model, one, request=words, say=quiet) for one in (spoilt, tested)]
    own = [introduce(model, one.examples).statistics["roof"] for one in (first, *changed)]
    rows = [{name: row.to_json() for name, row in one.items()} for one in own]
    assert rows[0] == rows[1] == rows[2], "statistics and prior are of the training part"
    assert rows[0]["air_temperature"]["prior"] is not None
    runs = [adapt(model, one.examples, settings=AdaptSettings(**SHORT), say=quiet) for one in (first, changed[1])]
    assert runs[0].history[1:] == runs[1].history[1:], "no step and no stopping saw the test part"


def test_no_target_of_one_part_is_a_value_of_another(model: Model) -> None:
    blocks = prepare(model, station(), request=request(), say=quiet).blocks
    gap = blocks.spec.context_frames[1]
    train, valid, test = (np.concatenate([s.time for s in part]) for part in (blocks.train, blocks.valid, blocks.test))
    assert train[-1] < valid[0] and valid[-1] < test[0]
    assert valid[gap] - train[-1] > gap * 3600.0 and test[gap] - valid[-1] > gap * 3600.0


def test_a_new_variable_has_a_row_and_the_others_answer_to_the_bit(model: Model) -> None:
    before = model.forecast(table(40), 2)
    data = station().rename(columns={"temp (°C)": "mud"})
    examples = prepare(model, data, request=request(target="mud", variables=("mud:NTU:interval",)), say=quiet).examples
    known = introduce(model, examples)
    assert known.model.settings.num_variables == len(BUILT_IN) + 1
    assert known.forecast(table(40), 2).equals(before)
    bias = known.model.state_dict()["embed.series.variable_bias"][VARIABLE_INDEX["mud"]]
    assert float(bias.abs().sum()) > 0


def test_saved_models_of_different_variables_live_in_one_process(model: Model, tmp_path: Path) -> None:
    """The rows of a saved model stand by name: what another model declared before does not move them."""
    answers = {}
    for number, name in enumerate(("mud", "salt")):
        data = station(seed=number).rename(columns={"temp (°C)": name})
        words = request(target=name, variables=(f"{name}:g:interval",), name=f"{name}-station")
        tuned, _ = model.finetune(data, say=quiet, **_words(words))
        with torch.no_grad():  # a row that learning has moved far, unlike every new row
            for parameter, tensor in tuned.model.named_parameters():
                if is_table(parameter):
                    tensor[VARIABLE_INDEX[name]] += 1.0 + number
        save_model(tuned, tmp_path / name, origin={}, card="")
        answers[name] = (data, tuned.forecast(data, 1, notes=Notes(source=f"{name}-station")))
        assert json.loads((tmp_path / name / "model.json").read_text())["variables"] == [*BUILT_IN, name]
    for name in VARIABLE_NAMES[len(BUILT_IN) :]:
        del VARIABLES[name], VARIABLE_INDEX[name]
    del VARIABLE_NAMES[len(BUILT_IN) :]
    loaded = {name: sci_gpt.load_model(tmp_path / name) for name in ("salt", "mud")}
    for name, (data, answer) in answers.items():
        again = loaded[name].forecast(data, 1, notes=Notes(source=f"{name}-station"))
        pd.testing.assert_frame_equal(again, answer, rtol=1e-6)


def _words(asked: Request) -> dict[str, object]:
    assert asked.words is not None
    return {"target": asked.words.target, "variables": asked.variables, "name": asked.name, **SHORT}


def test_embeddings_are_one_vector_per_context_and_do_not_know_the_future(model: Model) -> None:
    data = table(60)
    whole = model.embed(data, every=1, num_context=16)
    assert whole.documents.shape == (60 - 16 + 1, model.model.shape.width)
    assert whole.slots.shape == (45, 2, model.model.shape.width)
    np.testing.assert_allclose(whole.slots.mean(axis=1), whole.documents, rtol=1e-6)
    early = model.embed(data.iloc[:40], every=1, num_context=16)
    assert np.array_equal(early.time, whole.time[: len(early.time)])
    np.testing.assert_allclose(early.documents, whole.documents[: len(early.documents)], rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match="does not fit 60 times"):
        model.embed(data, num_context=61)


def test_a_region_of_a_grid_and_a_record_are_finetuned(model: Model) -> None:
    rng = np.random.default_rng(0)
    field = xr.DataArray(
        280 + rng.normal(size=(90, 8, 12)).cumsum(axis=0).astype(np.float32) * 0.3,
        dims=("time", "lat", "lon"),
        coords={
            "time": pd.date_range("2020-01-01", periods=90),
            "lat": ("lat", np.linspace(40, 47, 8), {"units": "degrees_north"}),
            "lon": ("lon", np.linspace(0, 11, 12), {"units": "degrees_east"}),
        },
        name="air_temperature",
        attrs={"units": "K"},
    )
    tuned, result = model.finetune(field, say=quiet, name="region", **SHORT)
    assert tuned.sources["region"].modality == "grid" and result.prepared.target == "air_temperature"
    header = {"network": "XX", "station": "ABC", "channel": "HHZ", "sampling_rate": 10.0}
    wave = np.convolve(rng.normal(size=3000), np.ones(5), "same").astype(np.float32)
    tuned, result = model.finetune(obspy.Stream([obspy.Trace(wave, header)]), say=quiet, name="well", **SHORT)
    assert tuned.sources["well"].modality == "trace" and len(result.adapted.history) > 1
    given = []

    def watched(start: Model, examples: Examples, **words: Any) -> Any:
        given.append((start.step, examples, words["settings"]))
        return adapt(start, examples, **words)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune_report, "adapt", watched)
        comparison = finetune_report.compare(model, result, settings=AdaptSettings(**SHORT), say=quiet)
    assert given == [(0, result.prepared.examples, AdaptSettings(**SHORT))], "from scratch, as the finetuning"
    assert {"AR(32)", finetune_report.SCRATCH} <= {row["name"] for row in comparison.rows}


@pytest.mark.parametrize(
    ("share", "low", "high", "words"),
    [
        (0.05, 0.02, 0.09, "pretraining is worth it here: CRPS against from scratch -5.0 % [-9.0, -2.0]"),
        (0.05, -0.02, 0.09, "not shown to be worth it here"),
        (-0.05, -0.09, -0.01, "not worth it here, it does harm"),
        (0.05, math.nan, math.nan, "no verdict, the test part is one block"),
    ],
)
def test_the_verdict_follows_the_interval(share: float, low: float, high: float, words: str) -> None:
    one = Difference(other="x", score=1.0, other_score=1.0, share=share, low=low, high=high, num_blocks=9)
    ridge = replace(one, other="ridge", share=-0.1, low=-0.2, high=-0.05)
    best = replace(one, other="persistence", share=0.1, low=0.05, high=0.2)
    said = finetune_report.verdict(one, ridge, best=best, steps=(30, 20))
    assert "and better than persistence: CRPS -10.0 % [-20.0, -5.0], the best baseline." in said
    assert finetune_report.verdict(one, ridge, best=ridge, steps=(30, 20)).endswith(
        "worse than ridge: CRPS +10.0 % [+5.0, +20.0]."
    )
    untrained = finetune_report.verdict(one, ridge, best=best, steps=(0, 0))
    assert untrained.endswith("No step of the finetuning made it better on the validation part.")
    assert ("no verdict, from scratch was best before its first step" in untrained) == (low > 0)
    assert words in said and "worse than ridge: CRPS +10.0 % [+5.0, +20.0]" in said


def test_the_command_saves_what_forecast_and_mlflow_load(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    station().to_csv("roof.csv", index=False)
    words = ["finetune", str(run), "roof.csv", "--target", "temp (°C)", "--covariates", "wind_speed"]
    words += ["--units", "wind_speed=m/s"]
    assert cli.main([*words, "--max-steps", "3", "--register", "roof"]) == 0
    said = capsys.readouterr().out
    for guess in ("time column is 'when'", "-9999", "is air_temperature", "in degC, as its header says", "every 1 h"):
        assert guess in said
    report = json.loads(Path("runs/finetune-roof/finetune.json").read_text())
    names = [row["name"] for row in report["rows"]]
    assert {"finetuned", "from scratch", "pretrained, as it is", "ridge", "persistence"} <= set(names)
    assert "holds no whole season" in report["left_out"]["seasonal naive"], "22 hours of context"
    assert report["verdict"] in said and report["forecast"] in said
    picture = Path("runs/finetune-roof/finetune.png").read_bytes()
    assert picture[:4] == b"\x89PNG" and len(picture) > 20_000
    forecast = report["forecast"].split()[1:]
    assert cli.main(forecast) == 0
    written = pd.read_csv("forecast.csv")
    assert set(written["variable"]) == {"temp", "wind_speed"} and "degC" in set(written["unit"])
    registered = ["models:/roof@candidate" if word == "runs/finetune-roof" else word for word in forecast]
    assert cli.main([word.replace("forecast.csv", "again.csv") for word in registered]) == 0
    assert Path("again.csv").read_bytes() == Path("forecast.csv").read_bytes()
    assert cli.main([*words]) == 2
    assert "'runs/finetune-roof' exists" in capsys.readouterr().err


def test_from_scratch_has_the_shape_and_other_weights(model: Model) -> None:
    one, two = from_scratch(model, seed=5), from_scratch(model, seed=6)
    assert one.model.num_parameters == model.model.num_parameters
    assert not torch.equal(one.model.context.project.weight, two.model.context.project.weight)
