"""Every evaluation task keeps its contract; a whole evaluation writes a report that opens without a network."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import ndtri

import sci_evals.evaluate
from sci_evals.arrivals import first_arrivals
from sci_evals.baselines import forecast_baselines
from sci_evals.evaluate import control_windows, evaluate, open_contest, score_model, score_models
from sci_evals.results import ANCHOR, CALIBRATED, LEARNED, TRAINED, UNTRAINED, headline
from sci_evals.scores import LeadGroup, compare, score_baseline, score_quantiles
from sci_evals.tasks import EVAL_TASKS, lead_name, task_for
from sci_evals.windowset import WindowSet, choose_starts, cut
from sci_gpt.config import EvaluateConfig, PretrainConfig
from sci_gpt.data.store import Store
from sci_gpt.errors import CheckpointError, DataError
from sci_gpt.model.calibration import Calibration
from sci_gpt.recipes.coastline import coastlines, coastlines_between
from sci_tokenizers.sample import Sample
from toy_store import toy_config, write_store


def toy_windows(name: str) -> tuple[WindowSet, WindowSet]:
    train, test, shape = EVAL_TASKS[name].toy()
    sets = []
    for samples, count in ((train, 600), (test, 120)):
        starts = choose_starts(np.array([sample.num_times for sample in samples]), shape, count=count)
        sets.append(cut(samples, shape, starts=starts))
    return sets[0], sets[1]


Document = tuple[Sample, int, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class LastValue:
    """A stand-in for a trained model: a Gaussian about the last value, of the context's own spread."""

    spread: float

    def documents(self, samples: Sequence[Sample], *, num_context: int, leads: tuple[int, ...]) -> list[Document]:
        return [(sample, num_context, leads) for sample in samples]

    def quantiles(
        self, samples: Sequence[Sample], *, num_context: int, leads: tuple[int, ...], levels: tuple[float, ...]
    ) -> list[np.ndarray]:
        return self.answers(self.documents(samples, num_context=num_context, leads=leads), levels=levels)

    def answers(self, documents: Sequence[Document], *, levels: tuple[float, ...]) -> list[np.ndarray]:
        out = []
        for sample, num_context, leads in documents:
            frame = sample.num_times // (num_context + max(leads))
            last = sample.values[num_context * frame - 1]
            scale = self.spread * (sample.values[: num_context * frame].std(axis=0) + 1e-6)
            values = np.stack([last + z * scale for z in ndtri(np.asarray(levels))])
            out.append(np.broadcast_to(values[:, None, None], (len(levels), len(leads), frame, *last.shape)))
        return out


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What evaluation asks of a loaded model."""

    predictor: LastValue
    fingerprint: str
    step: int = 24

    def untrained(self, *, trunk: bool) -> Loaded:
        assert not trunk, "an untrained model needs none"
        return replace(self, predictor=LastValue(spread=30.0))

    def anchor(self) -> Loaded:
        return replace(self, predictor=LastValue(spread=2.0))


@pytest.mark.parametrize("name", EVAL_TASKS)
def test_contract_of_every_task(name: str) -> None:
    train, test = toy_windows(name)
    task = EVAL_TASKS[name]()
    assert type(task_for(test.modality, float(np.median(test.step_seconds)))) is EVAL_TASKS[name]
    groups = task.lead_groups(test)
    assert sorted(lead for group in groups for lead in group.leads) == sorted(test.shape.leads)
    bootstrap = task.bootstrap(test, EvaluateConfig(bootstrap=100))
    assert bootstrap.blocks.shape == bootstrap.regions.shape == (test.num_windows,)
    assert len(np.unique(bootstrap.blocks)) > 1
    for block in np.unique(bootstrap.blocks):
        assert len({bootstrap.regions[i] for i in np.flatnonzero(bootstrap.blocks == block)}) == 1

    forecasts = forecast_baselines(train, test)
    baselines = {key: score_baseline(test, forecast) for key, forecast in forecasts.items()}
    assert len(baselines) >= 3
    scale = np.nanstd(test.truth, axis=(0, 1, 2, 4, 5))[None, None, None, :, None, None]
    sure = np.stack(
        [np.nan_to_num(test.truth) + 1e-3 * z * scale for z in ndtri(np.asarray(sci_evals.evaluate.LEVELS))]
    )
    models = {"oracle": score_quantiles(test, list(np.moveaxis(sure, 1, 0)))} | baselines
    rows = compare(test, models, baselines=baselines, lead_groups=groups, bootstrap=bootstrap)
    assert all(row.skill > 0.9 for row in rows if row.model == "oracle")
    assert all(row.skill <= 1e-12 for row in rows if row.model in baselines and row.channel != "all")
    for row in rows:
        assert row.high >= row.skill - 1e-9 or row.model in baselines


def test_no_task_for_unknown_data() -> None:
    with pytest.raises(DataError, match="no evaluation task takes 'point cloud'"):
        task_for("point cloud", 1.0)


def test_daily_leads_are_pooled_to_three_days() -> None:
    _, test = toy_windows("daily series")
    assert EVAL_TASKS["daily series"]().lead_groups(test) == [
        LeadGroup(name="1-3 d", leads=(1, 2, 3)),
        LeadGroup(name="5 d", leads=(5,)),
    ]


def test_blocks_are_groups_by_ninety_days() -> None:
    _, test = toy_windows("daily series")
    two = replace(test, groups=tuple("AB"[i % 2] for i in range(test.num_windows)))
    blocks = EVAL_TASKS["daily series"]().bootstrap(two, EvaluateConfig()).blocks
    for block in np.unique(blocks):
        own = np.flatnonzero(blocks == block)
        assert len({two.groups[i] for i in own}) == 1
        assert np.ptp(two.origin[own]) < 90 * 86400.0
    assert len(np.unique(blocks)) >= 2 * np.ptp(two.origin) // (90 * 86400.0)


@pytest.mark.parametrize(
    ("leads", "seconds", "name"),
    [
        ((1, 2, 3), 86400.0, "1-3 d"),
        ((6,), 3600.0, "6 h"),
        ((1, 2, 4), 0.5, "0.5-2 s"),
        ((1,), 2629746.0, "1 mo"),
        ((2,), 31556952.0, "2 y"),
        ((4,), 604800.0, "28 d"),
        ((1, 4), 0.0, "1-4 frames"),
    ],
)
def test_leads_are_named_in_usual_units(leads: tuple[int, ...], seconds: float, name: str) -> None:
    assert lead_name(leads, seconds) == name


def test_controls_are_scored_on_some_of_the_windows() -> None:
    assert len(control_windows(5000)) == 256
    np.testing.assert_array_equal(control_windows(5), np.arange(5))
    assert len(control_windows(400)) == 200


def test_models_scored_together_score_as_each_alone() -> None:
    """Windows are encoded once for all of them, in chunks; a control is scored on its own windows alone."""
    _, test = toy_windows("daily series")
    models = {"narrow": LastValue(spread=0.5), "wide": LastValue(spread=3.0)}
    some = control_windows(test.num_windows)[5:]
    assert 64 < test.num_windows and 0 < len(some) < test.num_windows
    together = score_models(models, test, only={"wide": some})
    for name, windows in (("narrow", test), ("wide", test.take(some))):
        alone = score_model(models[name], windows)
        np.testing.assert_array_equal(together[name].weight, alone.weight)
        for metric, total in alone.total.items():
            np.testing.assert_array_equal(together[name].total[metric], total)


def test_coastlines_lie_where_land_ends() -> None:
    lines = coastlines()
    points = np.concatenate(lines)
    assert np.abs(points[:, 0]).max() <= 180.0 + 1e-6 and points[:, 1].min() > -90 and points[:, 1].max() < 84
    # Cape Agulhas, Cabo de Sao Roque, Nordkapp: within 1.5 degrees of a coast; the middle of the Pacific far from any.
    for longitude, latitude, near in ((20.0, -34.8, 1.5), (-35.3, -5.5, 1.5), (25.8, 71.2, 1.5)):
        assert np.hypot(points[:, 0] - longitude, points[:, 1] - latitude).min() < near
    assert np.hypot(points[:, 0] + 130.0, points[:, 1] + 20.0).min() > 10.0
    shifted = np.concatenate(coastlines_between(180.0, 360.0))
    assert np.hypot(shifted[:, 0] - (360 - 35.3), shifted[:, 1] + 5.5).min() < 1.5


def test_arrivals_are_those_of_the_travel_time_tables() -> None:
    # Jeffreys and Bullen, surface focus: 30 degrees, P 6 min 10 s, S 11 min 7 s (iasp91 within 3 s).
    event = {"origin": "2020-01-01T00:00:00", "latitude": 0.0, "longitude": 0.0, "depth_km": 0.0}
    arrivals = first_arrivals(event, 0.0, longitude=30.0)
    start = 1577836800.0
    assert arrivals["P"] - start == pytest.approx(370.0, abs=3.0)
    assert arrivals["S"] - start == pytest.approx(667.0, abs=4.0)
    assert first_arrivals(event, float("nan"), longitude=30.0) == {}
    assert first_arrivals({"origin": "2020-01-01T00:00:00"}, 0.0, longitude=30.0) == {}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("evals") / "store")


@pytest.fixture(scope="module")
def evaluation(store: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[PretrainConfig, Path, dict[str, Any]]:
    run = tmp_path_factory.mktemp("evals") / "run"
    run.mkdir()
    log = [{"step": step, "losses": {"grid": 1 / step, "series": 2 / step, "trace": None}} for step in range(1, 40)]
    log.append({"step": 40, "validation": {"grid": {"skill": 0.1}, "series": {"skill": -0.1}}})
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    config = toy_config(store, run, evaluate={"windows": 40, "bootstrap": 100, "shuffled_run": str(run)})
    loaded = Loaded(predictor=LastValue(spread=1.0), fingerprint=Store.open(store).fingerprint)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sci_evals.evaluate, "load_model", lambda uri: loaded)
        return config, run, evaluate(config, run)


def test_evaluation_scores_every_source_and_control(
    evaluation: tuple[PretrainConfig, Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    config, run, result = evaluation
    rows = result["rows"]
    for model in ("trained", "untrained", "anchor", "trained over anchor", "time-shuffled"):
        assert {row["source"] for row in rows if row["model"] == model} == {"field", "station", "quake"}
    assert {row["metric"] for row in rows} == {"crps", "mae", "scaled crps"}
    # The stand-in untrained model is thirty times too wide: it must score worse than the other.
    skill = {(row["model"], row["source"]): row["skill"] for row in rows if row["metric"] == "crps"}
    for source in ("field", "station", "quake"):
        assert skill[UNTRAINED, source] < skill[TRAINED, source] < 1
    # What was learned: the trained model's score against the anchor's, on the same windows.
    score = {(r["model"], r["source"], r["region"], r["channel"], r["lead"], r["metric"]): r for r in rows}
    learned = [row for key, row in score.items() if key[0] == LEARNED and row["score"] is not None]
    assert learned
    for row in learned:
        same = (row["source"], row["region"], row["channel"], row["lead"], row["metric"])
        trained, anchor = score[(TRAINED, *same)], score[(ANCHOR, *same)]
        assert (row["baseline"], row["num_windows"]) == (ANCHOR, trained["num_windows"])
        assert row["skill"] == pytest.approx(1 - trained["score"] / anchor["score"])
    assert result["left_out"] == {}
    json.dumps(result, allow_nan=False)


def test_evaluation_writes_its_numbers(evaluation: tuple[PretrainConfig, Path, dict[str, Any]]) -> None:
    config, run, result = evaluation
    content = json.loads((run / "report" / "evaluation.json").read_text())
    assert content["step"] == 24, "whose scores these are"
    covered = {(row["model"], row["source"]) for row in content["coverage"] if row["nominal"] == 0.9}
    for source in ("field", "station", "quake"):
        assert (TRAINED, source) in covered
        assert ((CALIBRATED, source) in covered) == (source not in content["uncalibrated"])
    fitted = Calibration.read(run / "report" / "calibration.json")
    assert fitted.belongs_to(24, Store.open(config.data).fingerprint)
    assert set(fitted.sources) == {"field", "station", "quake"} - set(content["uncalibrated"]) != set()
    assert len(content["rows"]) == len(result["rows"])
    with (run / "report" / "evaluation.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["skill"] for row in table] == [str(row["skill"]) for row in content["rows"]]


def test_report_opens_without_a_network(evaluation: tuple[PretrainConfig, Path, dict[str, Any]]) -> None:
    _, run, result = evaluation
    page = Path(result["report"]).read_text(encoding="utf-8")
    pictures = sorted((run / "report").glob("*.png"))
    assert {path.stem for path in pictures} >= {"skill", "coverage", "training", "00-field", "01-station"}
    assert page.count("data:image/png;base64,") == len(pictures)
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "<script" not in page and "@import" not in page and "url(" not in page
    for word in (
        "untrained",
        "time-shuffled",
        "Coverage",
        "calibrated over trained",
        "Licence",
        "Natural Earth",
        "interval",
    ):
        assert word in page


def test_headlines_are_the_pooled_rows() -> None:
    _, test = toy_windows("daily series")
    task = EVAL_TASKS["daily series"]()
    scores = score_quantiles(test, [np.zeros((45, *test.truth.shape[1:]))] * test.num_windows)
    rows = compare(
        test,
        {TRAINED: scores},
        baselines={"b": scores},
        lead_groups=task.lead_groups(test),
        bootstrap=task.bootstrap(test, EvaluateConfig(bootstrap=100)),
    )
    assert [row.channel for row in headline(rows)] == ["all"] * 4


def test_a_model_of_another_store_is_refused(store: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    loaded = Loaded(predictor=LastValue(spread=1.0), fingerprint="fedcba9876543210")
    monkeypatch.setattr(sci_evals.evaluate, "load_model", lambda uri: loaded)
    with pytest.raises(CheckpointError, match=r"fedcba987654.*0123456789ab"):
        evaluate(toy_config(store, tmp_path), tmp_path)


def test_windows_longer_than_the_test_split_leave_a_source_out(store: Path, tmp_path: Path) -> None:
    config = toy_config(store, tmp_path)
    entry = config.mixture[0].model_copy(update={"frames": 500})
    assert open_contest(Store.open(store), entry, config=config) == (None, None)
