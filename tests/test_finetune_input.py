"""Tables that a finetuning is given: what is guessed is said; what is not understood is one clear line, exit code 2."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from sci_gpt.recipes.rows import parse_variable
from sci_gpt.recipes.table_guess import TableWords, read_table
from sci_gpt.recipes.table_words import fitting_units, missing_codes
from sci_launch import cli
from test_finetune import own_table, run, station

__all__ = ["own_table", "run"]  # fixtures

TEMP = ("--target", "temp (°C)")


def csv(data: pd.DataFrame) -> str:
    """Its text."""
    return data.to_csv(index=False)


def changed(**columns: object) -> str:
    """The station's table with other columns."""
    return csv(station().assign(**columns))


BAD = [
    ("no time", csv(station().drop(columns="when")), TEMP, "holds times in ISO 8601"),
    ("time of words", changed(when="yesterday"), ("--time", "when", *TEMP), "'yesterday', which is no time"),
    ("no such time", csv(station()), ("--time", "date", *TEMP), "time column 'date' is not in the table"),
    ("twice", csv(station().iloc[[*range(60), 59, *range(60, 200)]]), TEMP, "stands in rows 60 and 61"),
    ("unsorted", csv(station().iloc[[*range(60), 70, 65, *range(80, 200)]]), TEMP, "times are not ascending: row 62"),
    ("text", changed(note="fine"), ("--target", "note"), "target 'note' is no column of numbers (it holds 'fine')"),
    ("no such target", csv(station()), ("--target", "tmep"), "column 'tmep' is not in the table"),
    ("few rows", csv(station(40)), TEMP, "40 times are too few"),
    ("unknown", changed(mud=1.0), ("--target", "mud"), "declare it, as --variable mud:UNIT:ratio"),
    ("unit", csv(station()), (*TEMP, "--units", "temp=hPa"), "'hPa' does not convert"),
    ("ambiguous", csv(station()), ("--target", "wind_speed"), "say which unit, as --units wind_speed=UNIT"),
    ("kind", csv(station()), (*TEMP, "--variable", "mud:NTU:colour"), "kind is one of ratio, interval, accumulated"),
    ("taken", csv(station()), (*TEMP, "--variable", "wind_speed:NTU:ratio"), "give the new one another name"),
    ("no target", csv(station()), (), "name the column to forecast, as --target COL"),
    ("a known name", csv(station()), (*TEMP, "--name", "station"), "knows a source 'station' already"),
    ("horizon", csv(station()), (*TEMP, "--horizon", "99"), "horizon is 1 to"),
    ("rate", csv(station()), (*TEMP, "--learning-rate", "-1"), "learning_rate is a positive number"),
    ("not a csv", "\x00\x01", TEMP, "is not in the table, which holds"),
]


@pytest.mark.parametrize(("text", "words", "line"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_bad_input_is_one_line(
    text: str,
    words: tuple[str, ...],
    line: str,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("roof.csv").write_text(text)
    assert cli.main(["finetune", str(run), "roof.csv", *words]) == 2
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1
    assert not Path("runs").exists(), "nothing is left behind"


@pytest.mark.parametrize(
    "stamps",
    [
        ["2024-01-01", "2024-01-02", "2024-01-03"],
        ["2024/01/01", "2024/01/02", "2024/01/03"],
        [20240101, 20240102, 20240103],
        ["2024-01-01T00:00:00Z", "2024-01-02T00:00:00Z", "2024-01-03T00:00:00Z"],
    ],
)
def test_times_are_guessed(stamps: list[object]) -> None:
    said: list[str] = []
    data = pd.DataFrame({"wind_speed": [1.0, 2.0, 3.0], "date": stamps})
    words = TableWords(target="wind_speed", units={"wind_speed": "m s-1"})
    read = read_table(data, words, say=said.append)
    assert [str(stamp.date()) for stamp in read.table.index] == ["2024-01-01", "2024-01-02", "2024-01-03"]
    assert read.words.time == "date" and "time column is 'date'" in said[0]


def test_a_column_of_values_is_no_time() -> None:
    data = pd.DataFrame({"station": [20240101, 20240102], "wind_speed": [1.0, 2.0]})
    with pytest.raises(Exception, match="holds times"):
        read_table(data, TableWords(target="wind_speed"), say=lambda line: None)


@pytest.mark.parametrize(
    ("values", "codes"),
    [
        ([1.0, 2.0, -9999.0], [-9999.0]),
        ([1.0, 2.0, 1e20, 9.96921e36], [1e20, 9.96921e36]),
        ([990.0, 999.0, 1013.0], []),  # a pressure of 999 hPa
        ([-99.0, 50.0, 120.0], []),  # within the reach of the others
        ([np.nan, 3.0, 4.0, -999.0, -9999.0], [-999.0, -9999.0]),
    ],
)
def test_missing_codes_are_far_from_the_others(values: list[float], codes: list[float]) -> None:
    assert sorted(missing_codes(np.array(values))) == sorted(codes)


def test_a_unit_is_guessed_only_where_one_fits() -> None:
    assert fitting_units("air_pressure_at_mean_sea_level", np.array([990.0, 1030.0])) == ["hPa"]
    assert fitting_units("air_temperature", np.array([5.0, 30.0])) == ["degC", "degF"]
    assert fitting_units("air_temperature", np.array([270.0, 300.0])) == ["K"]
    assert fitting_units("air_temperature", np.array([1e6])) == []


def test_a_kind_decides_range_and_transform() -> None:
    ratio, rain, level = (parse_variable(f"x:u:{kind}") for kind in ("ratio", "accumulated", "interval"))
    assert (ratio.minimum, ratio.transform) == (0.0, "none")
    assert (rain.minimum, rain.transform, rain.piles_up) == (0.0, "log1p", True)
    assert level.minimum == -np.inf
    assert parse_variable("x:u:ratio:asinh").transform == "asinh"
