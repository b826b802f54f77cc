"""What tokens keep: the report against plain computations, refusals of builds, the command, and gaps that stay gaps."""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from mlflow.tracking import MlflowClient

from sci_gpt.config import PretrainConfig
from sci_gpt.config_file import show_config
from sci_gpt.data.store import Store
from sci_gpt.errors import ConfigError, DataError
from sci_gpt.recipes.token_page import draw, metrics, table_of
from sci_gpt.recipes.token_report import BANDS, _Pool, _verdict, entropy_bits, refusals, token_report
from sci_launch import cli
from sci_tokenizers.quantizer import PAD
from sci_tokenizers.series import SeriesTokenizer
from sci_tokenizers.table import make_tokenizer
from sci_tokenizers.tokenizer import TokenizerSettings
from sci_tokenizers.variables import VARIABLES, forward_transform, inverse_transform
from test_data_build import config_of, quiet, tree
from toy_store import toy_config, write_store

PRESSURE = "air_pressure_at_mean_sea_level"
CONTEXT, FRAMES = 6, 24


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> PretrainConfig:
    """A run on a toy store whose stations have one window each, with a fixed context."""
    folder = tmp_path_factory.mktemp("tokens")
    write_store(folder / "store", times={"station": [FRAMES] * 5})
    entry = {"stride": 4, "weight": 1}
    mixture = [
        {"source": "field", "frames": 16, "context_frames": [2, 6], **entry},
        {"source": "station", "frames": FRAMES, "context_frames": [CONTEXT, CONTEXT], **entry},
        {"source": "quake", "frames": 30, "context_frames": [4, 15], **entry},
    ]
    return toy_config(folder / "store", folder / "run", mixture=mixture)


def test_every_number_of_a_series_equals_a_plain_computation(config: PretrainConfig) -> None:
    store = Store.open(config.data)
    (found,) = (row for row in token_report(config, store) if row.source == "station")
    settings = TokenizerSettings(grid_patch=4)
    tokenizer = SeriesTokenizer(settings)
    assert (found.windows, found.frames, found.tokens_per_sample) == (5, FRAMES, 2 * FRAMES)
    assert found.tokens_per_second > 0
    width = 30.0 / 4092
    for v, row in enumerate(found.channels):
        errors, ids, widths, values, beyond = [], [], [], [], []
        steps: list[float] = []
        for index in range(5):
            sample = store.read("station", "train", index=index, start=0, stop=FRAMES)
            tokens = tokenizer.encode(sample, num_context=CONTEXT, leads=(1,), statistics=store.statistics["station"])
            name, scale, last = sample.variables[v], float(tokens.scale[v, 0]), None
            widths.append(width * scale)
            for f in range(FRAMES):
                if not sample.valid[f, v, 0, 0]:
                    last = None
                    continue
                value = float(sample.values[f, v, 0, 0])
                moved = float(forward_transform(np.array(value), name))
                scaled = (moved - float(tokens.offset[f, v, 0, 0])) / scale
                centre = width * round(max(-15.0, min(15.0, scaled)) / width)
                back = inverse_transform(np.array(centre * scale + float(tokens.offset[f, v, 0, 0])), name)
                errors.append(abs(float(back) - value))
                ids.append(round(centre / width))
                values.append(moved)
                beyond.append(abs(scaled) > 15.0 + width / 2)
                steps += [] if last is None else [moved - last]
                last = moved
        assert row.use is not None
        assert row.unit == VARIABLES[name].unit
        assert row.num_values == len(values)
        assert row.max_error == pytest.approx(max(errors), rel=1e-2)
        assert row.mean_error == pytest.approx(np.mean(errors), rel=1e-2)
        assert row.use.bin_width == pytest.approx(np.mean(widths), rel=1e-5)
        assert row.use.bin_over_step == pytest.approx(np.mean(widths) / np.std(steps), rel=1e-5)
        counts = Counter(ids)
        bits = -sum(n / len(ids) * math.log2(n / len(ids)) for n in counts.values())
        assert row.use.entropy_bits == pytest.approx(bits, abs=1e-6)
        assert (row.use.ids_used, row.use.ids, sum(row.use.bands)) == (len(counts), 4093, len(values))
        assert row.use.clipped == pytest.approx(np.mean(beyond))
        top = [beyond[i] for i in sorted(range(len(values)), key=values.__getitem__)[-math.ceil(len(values) / 100) :]]
        assert row.use.clipped_top == pytest.approx(np.mean(top))


def test_ties_do_not_dilute_what_is_clipped_of_the_largest_values() -> None:
    """993 dry hours and 7 of rain, all of them clipped: of the 10 largest 7 are, whatever the quantile's value is."""
    bins, pool = SeriesTokenizer(TokenizerSettings()).quantizer.bins, _Pool()
    rain = np.concatenate([np.linspace(1.0, 5.0, 7), np.zeros(993)])
    valid = np.ones(1000, bool)
    pool.add(rain, valid, scaled=rain / 0.05, ids=bins.ids(rain / 0.05, valid), scale=0.05)
    use = pool.use(bins)
    assert use is not None
    assert use.clipped == pytest.approx(0.007) and use.clipped_top == pytest.approx(0.7)
    assert "70.0% of the largest 1 % of values are clipped" in str(_verdict(use))


def test_grids_and_traces_come_back_and_use_no_ids(config: PretrainConfig) -> None:
    for row in token_report(config, Store.open(config.data)):
        if row.modality != "series":
            assert all(channel.use is None and channel.max_error < 1e-3 for channel in row.channels)
            assert all(channel.num_values > 1000 and channel.step_std for channel in row.channels)


def test_entropy_of_known_shares() -> None:
    assert entropy_bits(np.array([1, 1, 2, 0])) == pytest.approx(1.5)  # 2 x 1/4 x 2 bits + 1/2 x 1 bit
    assert entropy_bits(np.full(8, 5)) == pytest.approx(3.0)
    assert entropy_bits(np.array([0, 7])) == entropy_bits(np.zeros(3, int)) == 0.0


def archive(folder: Path, kind: str) -> dict[str, Any]:
    """A build's configuration of three years of pressures: common ones, slow ones, or with one far value."""
    random = np.random.default_rng(0)
    days = np.arange(1096)
    values = 1013.0 + random.standard_normal(1096)
    if kind == "slow":  # 60 hPa in 600 days: a day's step is far smaller than what a context spans
        values = 1000.0 + 30.0 * np.sin(2 * np.pi * days / 600.0) + 0.01 * random.standard_normal(1096)
    if kind == "far":
        values[200] = 1080.0
    with (folder / "station.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["when", "p"])
        rows.writerows([(date(2000, 1, 1) + timedelta(int(d))).isoformat(), f"{v:.4f}"] for d, v in zip(days, values))
    options = {"time": "when", "step": "day", "columns": {"p": {"variable": PRESSURE, "unit": "hPa"}}}
    return tree(folder / "store", options=options)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("slow", r"a bin is 0\.\d+ of the standard deviation of one-step differences wide \(at most 0\.1\)\. Give"),
        ("far", r"of the largest 1 % of values are clipped \(at most 1%\)\. Give"),
    ],
)
def test_a_build_refuses_what_tokens_would_spoil(tmp_path: Path, kind: str, why: str) -> None:
    """Refused, nothing is left behind; allowed, it is built, kept, and refused again when it is no longer allowed."""
    mapping = archive(tmp_path, kind)
    channel = f"stations/{PRESSURE}"
    with pytest.raises(DataError, match=f"{channel}: .*{why}") as refused:
        quiet(config_of(mapping))
    assert f"tokens: {{allow: [{channel}]}}" in str(refused.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["station.csv"]
    allowed = config_of(mapping | {"tokens": {"allow": [channel]}})
    report = quiet(allowed)
    assert not report.kept and Store.open(report.path).manifest["tokens_allowed"] == [channel]
    assert quiet(allowed).kept
    with pytest.raises(DataError, match=channel):
        quiet(config_of(mapping))
    assert quiet(allowed).kept, "the store is as it was"


def test_common_series_are_built_and_leave_for_no_channel_is_refused(tmp_path: Path) -> None:
    mapping = archive(tmp_path, "common")
    with pytest.raises(
        ConfigError, match=rf"no series channel 'stations/air_presure' .*; nearest: 'stations/{PRESSURE}'"
    ):
        quiet(config_of(mapping | {"tokens": {"allow": ["stations/air_presure"]}}))
    report = quiet(config_of(mapping))
    again = quiet(config_of(mapping | {"tokens": {"allow": [f"stations/{PRESSURE}"]}}))
    assert again.kept and again.fingerprint == report.fingerprint
    assert Store.open(report.path).manifest["tokens_allowed"] == [f"stations/{PRESSURE}"]


def write_yaml(config: PretrainConfig, path: Path, **tokenizer: int) -> Path:
    """The configuration as a file, with other sizes of tokens."""
    content = yaml.safe_load(show_config(config))
    content["tokenizer"] |= tokenizer
    path.write_text(yaml.safe_dump(content))
    return path


def test_the_command_prints_draws_and_tracks(
    config: PretrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_yaml(config, tmp_path / "run.yaml")
    assert cli.main(["inspect", str(path), "--tokens"]) == 0
    said = capsys.readouterr().out
    assert "station (series): 5 windows of 24 frames, 48 tokens each" in said
    assert all(name in said for name in ("wind_speed", "bin/step", "quake (trace)", "field (grid)"))
    folder = config.output / "tokens"
    assert (folder / "tokens.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "tokens.html").read_text()
    assert "data:image/png;base64," in page and "wind_speed" in page and "<p>Nothing.</p>" in page
    assert cli.main(["inspect", str(path), "--tokens", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    saved = json.loads((folder / "tokens.json").read_text())
    assert [row["source"] for row in result["sources"]] == ["field", "station", "quake"]
    assert result["sources"][1]["channels"] == saved["sources"][1]["channels"] and result["refused"] == []
    client = MlflowClient(tracking_uri=config.tracking.uri)
    experiment = client.get_experiment_by_name("toy")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "toy-tokens" and run.info.status == "FINISHED"
    bits = result["sources"][1]["channels"][0]["use"]["entropy_bits"]
    assert run.data.metrics["tokens/station/air_temperature/entropy_bits"] == pytest.approx(bits)
    assert {item.path for item in client.list_artifacts(run.info.run_id)} >= {
        "tokens.html",
        "tokens.png",
        "tokens.json",
    }


def test_a_report_refuses_after_it_has_shown_why(config: PretrainConfig) -> None:
    """With 32 ids a bin is a scale wide; what the build allowed is shown, and passes."""
    coarse = config.model_copy(update={"tokenizer": config.tokenizer.model_copy(update={"series_ids": 32})})
    store = Store.open(config.data)
    report = token_report(coarse, store)
    assert [line.partition(":")[0] for line in refusals(report)] == ["station/air_temperature", "station/wind_speed"]
    assert table_of(report).count("REFUSED") == 2
    store.manifest["tokens_allowed"] = ["station/air_temperature", "station/wind_speed"]
    report = token_report(coarse, store)
    assert refusals(report) == [] and table_of(report).count("  allowed") == 2


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["nothing.yaml", "--tokens"], "no configuration file"),
        (["store", "--tokens"], "--tokens wants a pretraining's YAML file"),
        (["run.yaml", "--tokens", "--family", "csv"], "leave one out"),
        (["lost.yaml", "--tokens"], "nowhere"),
        (["data.yaml", "--tokens"], "data.yaml: "),
        (["coarse.yaml", "--tokens"], "station/air_temperature: a bin is "),
    ],
)
def test_bad_requests_are_one_line(
    config: PretrainConfig, tmp_path: Path, words: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = config.model_copy(update={"data": tmp_path / "nowhere"})
    write_yaml(config, tmp_path / "run.yaml")
    write_yaml(config, tmp_path / "coarse.yaml", series_ids=32)
    write_yaml(lost, tmp_path / "lost.yaml")
    (tmp_path / "store").mkdir()
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(tree(tmp_path / "store")))
    assert cli.main(["inspect", str(tmp_path / words[0]), *words[1:]]) == 2
    error = capsys.readouterr().err
    assert why in error and len(error.strip().splitlines()) == 1


def test_a_figure_of_channels_without_steps_or_ids(config: PretrainConfig) -> None:
    report = token_report(config, Store.open(config.data))
    drawn = draw(report)
    assert len(drawn.axes) == 5 and len(drawn.axes[4].images) == 2
    array = drawn.axes[4].images[0].get_array()
    assert array is not None and array.shape == (1, BANDS)
    assert all(math.isfinite(value) for value in metrics(report).values())


def test_gaps_of_a_series_are_missing_frames_and_never_values(tmp_path: Path) -> None:
    """Rows left out of a table become frames without a value, up to the payload and its mask; no other value moves."""
    mapping = archive(tmp_path, "common")
    rows = (tmp_path / "station.csv").read_text().splitlines()
    gone = {50, 51, 52, 120}
    kept = [row for day, row in enumerate(rows[1:]) if day not in gone]
    (tmp_path / "station.csv").write_text("\n".join([rows[0], *kept]) + "\n")
    store = Store.open(quiet(config_of(mapping)).path)
    sample = store.read("stations", "train", index=0, start=0, stop=200)
    assert (np.diff(sample.time) == 86400.0).all(), "a frame a day, with or without a value"
    days = np.round(sample.time / 86400.0).astype(int) - (date(2000, 1, 1) - date(1970, 1, 1)).days
    missing = np.isin(days, sorted(gone))
    assert missing.sum() == 4
    np.testing.assert_array_equal(sample.valid[:, 0, 0, 0], ~missing)
    written = np.array([float(row.split(",")[1]) * 100.0 for row in rows[1:]])
    np.testing.assert_allclose(sample.values[~missing, 0, 0, 0], written[days[~missing]], rtol=1e-6)
    tokenizer = make_tokenizer("series", TokenizerSettings())
    tokens = tokenizer.encode(sample, num_context=40, leads=(1,), statistics=store.statistics["stations"])
    assert tokens.ids is not None
    np.testing.assert_array_equal(tokens.ids[:, 0] == PAD, missing)
    np.testing.assert_array_equal(tokens.valid[:, 0, 0, 0], ~missing)
    assert not tokens.payload[missing].any()
