"""Each rule of a sample trips on a sample that breaks it, whether made whole or as other times of the same place."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sci_tokenizers.sample import Sample, SampleError
from test_data_store import same, stretch

WHOLE = stretch(0, times=6)
FILM = ("values", "valid", "time", "year_phase", "day_phase")
PLACE = np.zeros((3, 4), np.float32)


def broken(name: str, value: float) -> np.ndarray:
    """An array of the sample with its third entry replaced."""
    array: np.ndarray = getattr(WHOLE, name).copy()
    array[2] = value
    return array


# what is replaced, a word of the complaint
FILM_BREAKS: list[tuple[dict[str, Any], str]] = [
    ({"values": broken("values", np.nan)}, "values must be finite"),
    ({"values": broken("values", np.inf)}, "values must be finite"),
    ({"values": WHOLE.values.astype(np.float64)}, "values are float32 and valid bool, got float64"),
    ({"valid": WHOLE.valid.astype(np.uint8)}, "valid bool, got float32 and uint8"),
    ({"valid": WHOLE.valid[:5]}, r"valid has shape \(6, 2, 3, 4\), got \(5, 2, 3, 4\)"),
    ({"time": broken("time", 0.0)}, "time must increase, but step 1 -> 2 goes -1"),
    ({"time": WHOLE.time[:5]}, r"have shape \(6,\), got \(\(5,\)"),
    ({"year_phase": WHOLE.year_phase[:5]}, r"have shape \(6,\), got"),
    ({"day_phase": WHOLE.day_phase[:, None]}, r"have shape \(6,\), got"),
]
PLACE_BREAKS: list[tuple[dict[str, Any], str]] = [
    ({"modality": "film"}, "modality is one of"),
    ({"variables": ("air_temperature", "no_such_thing")}, "no_such_thing"),
    ({"variables": ("air_temperature",)}, "2 variables, got names"),
    ({"levels": (1.0,)}, "2 variables, got names"),
    ({"values": WHOLE.values[:, 0]}, r"values are \(time, variable, row, column\)"),
    ({"longitude": PLACE[:2]}, r"longitude has shape \(3, 4\), got \(2, 4\)"),
    ({"latitude": PLACE + 91}, "latitude is within -90..90 degrees, got 91"),
    ({"step_seconds": 0.0}, "step_seconds must be positive"),
    ({"modality": "series"}, "a series has one place, got 3 x 4"),
]


@pytest.mark.parametrize(("change", "complaint"), FILM_BREAKS + PLACE_BREAKS)
def test_a_sample_that_breaks_a_rule_is_refused(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises((SampleError, ValueError), match=complaint):
        replace(WHOLE, **change)


@pytest.mark.parametrize(("change", "complaint"), FILM_BREAKS)
def test_other_times_of_a_place_keep_the_rules_too(change: dict[str, Any], complaint: str) -> None:
    film = {name: getattr(WHOLE, name) for name in FILM} | change
    with pytest.raises(SampleError, match=complaint):
        WHOLE.filmed(film.pop("values"), film.pop("valid"), **film)


def test_other_times_of_a_place_are_what_a_new_sample_would_be() -> None:
    other = stretch(1, times=4)
    film = {name: getattr(other, name) for name in FILM}
    found = WHOLE.filmed(film.pop("values"), film.pop("valid"), **film)
    expected: Sample = replace(WHOLE, **{name: getattr(other, name) for name in FILM})
    same(found, expected)
    assert found.key == WHOLE.key and found.variables == WHOLE.variables and found.num_times == 4
    assert WHOLE.num_times == 6


def test_other_times_have_the_shape_of_the_place() -> None:
    film = {name: getattr(WHOLE, name) for name in FILM}
    with pytest.raises(SampleError, match=r"a time has shape \(2, 3, 4\), got \(1, 3, 4\)"):
        WHOLE.filmed(film.pop("values")[:, :1], film.pop("valid")[:, :1], **film)
