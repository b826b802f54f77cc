"""Forecasts of tables: a DataFrame in, a long DataFrame of quantiles out, in its own units, names and times."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import obspy
import pandas as pd
import pytest
import xarray as xr

from sci_gpt.errors import ConfigError, DataError, UnlikeTrainingWarning
from sci_gpt.model.init import initialize
from sci_gpt.model.transformer import build_model
from sci_gpt.recipes import parts
from sci_gpt.recipes.film import Notes
from sci_gpt.recipes.film_series import SeriesFilm
from sci_gpt.recipes.load import LoadedModel, load_model
from sci_tokenizers.sample import Sample
from sci_tokenizers.variables import UnitError, UnknownVariableError
from toy_model import make_run

LEVELS = (0.1, 0.5, 0.9)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A model that was never trained but is not at its initial weights, on the toy store's three sources."""
    return load_model(make_run(tmp_path_factory.mktemp("model")).output)


def table(num_rows: int = 40, *, freq: str = "h", start: str = "2024-02-28T00:00") -> pd.DataFrame:
    """A station's table: smooth temperature in K and a wind speed."""
    steps = np.arange(num_rows)
    values = {"air_temperature": 283.0 + 6.0 * np.sin(steps / 4.0), "wind_speed": 4.0 + np.cos(steps / 3.0)}
    return pd.DataFrame(values, index=pd.date_range(start, periods=num_rows, freq=freq, name="time"))


def median(forecast: pd.DataFrame, variable: str) -> np.ndarray:
    """Median by lead."""
    rows = forecast[(forecast["variable"] == variable) & (forecast["quantile"] == 0.5)]
    return rows.sort_values("lead")["value"].to_numpy()


def test_a_table_gives_a_long_table_of_the_times_that_follow(model: LoadedModel) -> None:
    out = model.forecast(table(40), 2)
    assert list(out.columns) == ["time", "lead", "variable", "quantile", "value", "unit"]
    assert len(out) == 2 * 2 * 3
    assert list(out["time"].unique()) == list(pd.to_datetime(["2024-02-29T16:00", "2024-02-29T17:00"]))
    assert set(out["unit"]) == {"K", "m s-1"}
    spread = out.pivot_table(index=["variable", "lead"], columns="quantile", values="value").to_numpy()
    assert (np.diff(spread, axis=1) >= 0).all(), "quantiles must not cross"


def test_a_table_equals_the_predictor_on_a_sample_made_by_hand(model: LoadedModel) -> None:
    data = table(40)
    seconds = data.index.astype("datetime64[s]").astype(np.int64).to_numpy() + 0.0
    seconds = np.concatenate([seconds, seconds[-1] + 3600.0 * np.arange(1, 3)])[
        -24:
    ]  # 24 = frames of the station's windows
    starts = np.datetime64("2024-01-01", "s").astype(np.int64)
    values = np.zeros((24, 2, 1, 1), np.float32)
    values[:22, :, 0, 0] = data.to_numpy()[-22:]
    valid = np.zeros(values.shape, bool)
    valid[:22] = True
    nowhere = np.full((1, 1), np.nan, np.float32)
    sample = Sample(
        key="hand",
        source="unseen",
        modality="series",
        variables=("air_temperature", "wind_speed"),
        levels=(np.nan, np.nan),
        values=values,
        valid=valid,
        time=seconds,
        year_phase=((seconds - starts) / (366 * 86400.0)).astype(np.float32),
        day_phase=((seconds / 86400.0) % 1.0).astype(np.float32),
        step_seconds=3600.0,
        latitude=nowhere,
        longitude=nowhere,
        elevation=nowhere,
    )
    expected = model.predictor.quantiles([sample], num_context=22, leads=(1, 2), levels=LEVELS)[0]
    out = model.forecast(data, 2)
    for v, name in enumerate(("air_temperature", "wind_speed")):
        got = out[out["variable"] == name].pivot(index="quantile", columns="lead", values="value").to_numpy()
        np.testing.assert_allclose(got, np.maximum(expected[:, :, 0, v, 0, 0], 0.0), rtol=1e-5)


def test_units_of_the_table_are_read_and_given_back(model: LoadedModel) -> None:
    kelvin = table()
    celsius = pd.DataFrame(
        {"temp (degC)": kelvin["air_temperature"] - 273.15, "wind": kelvin["wind_speed"] * 3.6}, index=kelvin.index
    )
    notes = Notes(columns={"temp (degC)": "air_temperature", "wind": "wind_speed:km h-1"})
    out = model.forecast(celsius, 2, notes=notes)
    plain = model.forecast(kelvin, 2)
    np.testing.assert_allclose(median(out, "temp") + 273.15, median(plain, "air_temperature"), atol=2e-3)
    np.testing.assert_allclose(median(out, "wind") / 3.6, median(plain, "wind_speed"), atol=2e-3)
    assert set(out["unit"]) == {"degC", "km h-1"}


def test_absent_rows_are_missing_values_and_rows_before_the_context_do_not_matter(model: LoadedModel) -> None:
    whole = table(60)
    gaps = whole.copy()
    gaps.iloc[[45, 50, 51]] = np.nan
    pd.testing.assert_frame_equal(model.forecast(gaps.dropna(), 2), model.forecast(gaps, 2))
    pd.testing.assert_frame_equal(model.forecast(whole.tail(30), 2), model.forecast(whole, 2))
    assert not np.allclose(
        median(model.forecast(gaps, 2), "wind_speed"), median(model.forecast(whole, 2), "wind_speed")
    )


def test_a_silent_sensor_has_no_forecast_and_the_other_keeps_its_own(model: LoadedModel) -> None:
    data = table()
    data["wind_speed"] = np.nan
    out = model.forecast(data, 1)
    assert out[out["variable"] == "wind_speed"]["value"].isna().all()
    assert out[out["variable"] == "air_temperature"]["value"].notna().all()


def test_forecasts_stay_within_the_valid_range_of_the_variable(model: LoadedModel) -> None:
    data = table()
    data["wind_speed"] = np.abs(np.random.default_rng(3).standard_normal(len(data))) * 0.2
    out = model.forecast(data, 2, quantiles=(0.01, 0.5))
    assert (out[out["variable"] == "wind_speed"]["value"] >= 0).all()


@pytest.mark.parametrize(
    ("freq", "start", "expected"),
    [
        ("MS", "2020-01-01", ["2023-05-01", "2023-06-01"]),
        ("YS", "1960-01-01", ["2000-01-01", "2001-01-01"]),
        ("15min", "2024-02-28T23:00", ["2024-02-29T09:00", "2024-02-29T09:15"]),
    ],
)
def test_the_next_times_follow_the_calendar(model: LoadedModel, freq: str, start: str, expected: list[str]) -> None:
    out = model.forecast(table(40, freq=freq, start=start), 2)
    assert list(out["time"].unique()) == list(pd.to_datetime(expected))


def test_a_zone_is_kept(model: LoadedModel) -> None:
    data = table()
    out = model.forecast(data.tz_localize("America/New_York"), 1)
    assert str(out["time"].dt.tz) == "America/New_York"
    assert out["time"].iloc[0] == pd.Timestamp("2024-02-29T16:00", tz="America/New_York")


def test_a_trained_source_is_scaled_by_its_own_statistics_and_must_have_its_channels(model: LoadedModel) -> None:
    data = table()
    known = model.forecast(data, 2, notes=Notes(source="station"))
    assert not np.allclose(median(known, "air_temperature"), median(model.forecast(data, 2), "air_temperature"))
    with pytest.raises(ConfigError, match=r"source 'statoin' is not one .*nearest: 'station'"):
        model.forecast(data, 1, notes=Notes(source="statoin"))
    other = data.rename(columns={"wind_speed": "relative_humidity"})
    with pytest.raises(ConfigError, match=r"source 'station' has no channel 'relative_humidity'"):
        model.forecast(other, 1, notes=Notes(source="station"))


def test_the_nearest_source_is_by_step_then_by_variables_then_by_lead(model: LoadedModel) -> None:
    entries = {entry.source: entry for entry in model.config.mixture}
    station = model.sources["station"]
    sources = dict(model.sources) | {
        "daily": replace(station, step_seconds=86400.0),
        "snow": replace(station, step_seconds=86400.0),
        "long": replace(station, step_seconds=86400.0),
    }
    mixture = [*entries.values()]
    mixture += [entries["station"].model_copy(update={"source": name}) for name in ("daily", "snow")]
    mixture.append(entries["station"].model_copy(update={"source": "long", "leads": (1, 5)}))
    temperature = model.statistics["station"]["air_temperature"]
    statistics = dict(model.statistics) | {
        "daily": {"air_temperature@85000": temperature},
        "snow": {"surface_snow_amount": temperature},
        "long": {"air_temperature": temperature},
    }
    phase = model.config.phases[0].model_copy(update={"mixture": tuple(mixture)})
    config = model.config.model_copy(update={"phases": (phase,)})
    wide = replace(model, sources=sources, config=config, statistics=statistics)

    def nearest(data: pd.DataFrame) -> str:
        return wide.entry(SeriesFilm(data, notes=Notes(), options={}).contexts[0]).source

    assert nearest(table(freq="2h")) == "station"
    assert nearest(table(freq="D").drop(columns="wind_speed")) == "long"
    snow = table(freq="D").rename(columns={"wind_speed": "surface_snow_amount"}).drop(columns="air_temperature")
    assert nearest(snow) == "snow"


def test_a_place_is_told_to_the_model(model: LoadedModel) -> None:
    data = table()
    here = model.forecast(data, 1, notes=Notes(place=(47.5, 8.6, 420.0)))
    assert not np.allclose(median(here, "wind_speed"), median(model.forecast(data, 1), "wind_speed"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda data: data.rename(columns={"wind_speed": "wind_sped"}),
            r"'wind_sped' is not in the variable table; nearest",
        ),
        (lambda data: data.assign(wind_speed=1e6), r"40 of 40 values lie outside 0\.\.150 m s-1 .*name the right unit"),
        (lambda data: data * np.nan, r"table: none of the last 22 time steps holds a valid value"),
        (lambda data: data.head(2), r"table: 2 time steps are shorter than the context of 3"),
        (lambda data: data.head(1), r"a table of 1 rows has no step"),
        (lambda data: pd.concat([data, data.tail(1)]), r"time 2024-02-29 15:00:00 stands in more than one row"),
        (lambda data: data.reset_index(drop=True), r"no column of .* holds times; name one, as --time COL"),
        (
            lambda data: data.set_index(data.index.delete(5).insert(5, data.index[5] + pd.Timedelta("25min"))),
            r"lies between",
        ),
        (lambda data: data[[]], r"no column of \[\] holds numbers"),
        (
            lambda data: data.astype({"wind_speed": object}).replace(
                {"wind_speed": {data["wind_speed"].iloc[3]: "n/a?"}}
            ),
            r"column 'wind_speed', read as wind_speed, holds 'n/a\?' at 2024-02-28 03:00:00, which is no number; empty",
        ),
        (
            lambda data: data.assign(wind_speed="calm").rename(columns={"wind_speed": "wind_speed [km h-1]"}),
            r"holds 'calm' at 2024-02-28 00:00:00 \(and 39 more such cells\)",
        ),
        (
            lambda data: data[["air_temperature", "wind_speed", "wind_speed"]],
            r"column 'wind_speed' stands 2 times in the table; rename or drop",
        ),
        (lambda data: data.set_axis([1, 2], axis="columns"), r"'1' is not in the variable table"),
        (
            lambda data: pd.concat([data, data.iloc[[20]].set_index(data.index[[20]] + pd.Timedelta("5min"))]),
            r"rows at 2024-02-28 20:00:00 and 2024-02-28 20:05:00 stand for one and the same step of .*drop one of",
        ),
    ],
)
def test_a_table_that_cannot_be_forecast_is_refused(model: LoadedModel, change: object, message: str) -> None:
    assert callable(change)
    with pytest.raises((DataError, UnknownVariableError), match=message):
        model.forecast(change(table()), 1)


def test_numbers_held_as_objects_or_words_are_numbers_and_other_words_are_left_out(model: LoadedModel) -> None:
    data = table()
    plain = model.forecast(data, 1)
    pd.testing.assert_frame_equal(model.forecast(data.astype(object), 1), plain)
    pd.testing.assert_frame_equal(model.forecast(data.astype(str).assign(station="Bern"), 1), plain)
    gaps = data.astype({"wind_speed": object})
    gaps.iloc[3, 1], gaps.iloc[4, 1] = None, " "
    assert model.forecast(gaps, 1)["value"].notna().all()
    with pytest.raises(DataError, match=r"holds 'calm' at .*empty cells that are missing"):
        notes = Notes(columns={"wind": "wind_speed"})
        model.forecast(pd.DataFrame({"wind": ["calm", *data["wind_speed"][1:]]}, index=data.index), 1, notes=notes)


def test_notes_that_do_not_fit_are_refused(model: LoadedModel) -> None:
    with pytest.raises(ConfigError, match=r"column 'temp' is not in the data, which hold"):
        model.forecast(table(), 1, notes=Notes(columns={"temp": "air_temperature"}))
    with pytest.raises(UnitError, match=r"'hPa' does not convert"):
        model.forecast(table(), 1, notes=Notes(columns={"wind_speed": "wind_speed:hPa"}))
    with pytest.raises(ConfigError, match=r"time column 'when' is not in the table"):
        model.forecast(table(), 1, notes=Notes(time="when"))
    with pytest.raises(ConfigError, match=r"a level is a number of Pa or m, as in air_temperature@85000, got 'x'"):
        model.forecast(table(), 1, notes=Notes(columns={"air_temperature": "air_temperature@x"}))


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"horizon": 3}, r"horizon 3 is beyond 2 steps of 3600 s, the largest lead trained for 'station'.*at most 2"),
        ({"horizon": 0}, r"horizon is at least 1 step, got 0"),
        ({"num_samples": 8}, r"num_samples=8, seed=None: .*marginal quantiles, no trajectories"),
        ({"seed": 1}, r"seed=1 without num_samples"),
        ({"quantiles": (0.9, 0.1)}, r"ascending levels between 0 and 1, got \[0\.9, 0\.1\]"),
        ({"quantiles": (0.5, 1.0)}, r"ascending levels between 0 and 1"),
        ({"quantiles": ()}, r"ascending levels between 0 and 1, got \[\]"),
        ({"quantiles": 0.5}, r"ascending levels between 0 and 1, as in \(0\.1, 0\.5, 0\.9\), got 0\.5"),
        ({"quantiles": "0.5"}, r"as in .*got '0\.5'"),
        ({"quantiles": None}, r"as in .*got None"),
        ({"horizon": 1.5}, r"horizon is a whole number, got 1\.5 of type float"),
        ({"horizon": "2"}, r"horizon is a whole number, got '2' of type str"),
        ({"horizon": None}, r"horizon is a whole number, got None"),
        ({"num_samples": 2.5}, r"num_samples is a whole number"),
    ],
)
def test_what_the_model_cannot_give_is_refused(model: LoadedModel, wanted: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model.forecast(table(), **({"horizon": 1} | wanted))  # type: ignore[arg-type]


def test_another_kind_of_object_is_refused(model: LoadedModel) -> None:
    with pytest.raises(DataError, match=r"a forecast takes xarray\.Dataset, .*got numpy\.ndarray"):
        model.forecast(np.zeros(10), 1)


def test_a_modality_that_the_model_never_saw_is_refused(model: LoadedModel) -> None:
    """Each of the three: a model of the other two says what it knows and what to do."""
    steps = np.arange(40)
    places = {"time": table(40).index, "lat": np.linspace(60, 40, 8), "lon": np.linspace(-20, 10, 12)}
    film = xr.DataArray(np.full((40, 8, 12), 280.0), places, ("time", "lat", "lon"), name="air_temperature")
    header = {"station": "ABC", "channel": "BHZ", "sampling_rate": 40.0}
    given = {
        "grid": film.assign_attrs(units="K").to_dataset(),
        "series": table(40),
        "trace": obspy.Stream([obspy.Trace(np.tile(steps, 40) % 7, header)]),
    }
    for modality, data in given.items():
        others = {name: facts for name, facts in model.sources.items() if facts.modality != modality}
        known = ", ".join(sorted(facts.modality for facts in others.values()))
        with pytest.raises(ConfigError, match=rf"trained on {known}, and .* is of modality '{modality}': take a model"):
            replace(model, sources=others).forecast(data, 1)


def test_rows_out_of_order_are_sorted(model: LoadedModel) -> None:
    """A table's rows are a set: shuffled, the forecast is the same."""
    pd.testing.assert_frame_equal(
        model.forecast(table().sample(frac=1.0, random_state=1), 2), model.forecast(table(), 2)
    )


def test_the_untrained_model_is_the_start_of_the_same_run(model: LoadedModel, tmp_path: Path) -> None:
    untrained = model.untrained()
    assert (untrained.step, untrained.fingerprint, untrained.statistics) == (0, model.fingerprint, model.statistics)
    names = dict(model.model.named_parameters())
    moved = [
        name for name, p in untrained.model.named_parameters() if not np.allclose(p.detach(), names[name].detach())
    ]
    assert len(moved) == len(names)
    start = build_model(parts.model_shape(model.config), parts.model_settings(model.config))
    initialize(start, model.config.seed)  # as the training begins
    for name, parameter in start.named_parameters():
        np.testing.assert_array_equal(parameter.detach(), dict(untrained.model.named_parameters())[name].detach())


def test_a_step_unlike_all_training_is_said(model: LoadedModel) -> None:
    """Monthly values for a model of hourly ones: a forecast, and a warning that names both steps."""
    with pytest.warns(UnlikeTrainingWarning, match="station 3600 s"):
        model.forecast(table(40, freq="MS", start="2020-01-01"), 1)
