"""Near-identical pieces in two splits are refused; records that only share a season, a tide or a forcing are not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sci_gpt.data import near_duplicates
from sci_gpt.data.duplicates import DuplicateGuard
from sci_gpt.data.near_duplicates import MOST_LAGS, NearDuplicates
from sci_gpt.errors import DataError
from sci_tokenizers.sample import Sample

HOUR = 3600.0
VARIABLES = ("air_temperature", "wind_speed", "relative_humidity", "mole_fraction_of_carbon_dioxide_in_air")


def record(key: str, values: np.ndarray, *, valid: np.ndarray | None = None) -> Sample:
    """A piece of (times,), (times, variables) or (times, variables, rows, columns)."""
    while values.ndim < 4:
        values = values[..., None]
    times, channels, rows, columns = values.shape
    place = np.zeros((rows, columns), np.float32)
    latitude, longitude = (axis.astype(np.float32) for axis in np.indices((rows, columns)))
    grid = rows * columns > 1
    return Sample(
        key=key,
        source=key.split("/")[0],
        modality="grid" if grid else "series",
        variables=VARIABLES[:channels],
        levels=(float("nan"),) * channels,
        values=values.astype(np.float32),
        valid=np.ones(values.shape, bool) if valid is None else valid.reshape(values.shape),
        time=np.arange(times) * HOUR,
        year_phase=np.zeros(times, np.float32),
        day_phase=np.zeros(times, np.float32),
        step_seconds=HOUR,
        latitude=latitude if grid else place,
        longitude=longitude if grid else place,
        elevation=place,
    )


def weather(seed: int, times: int, *, cycle: int = 24) -> np.ndarray:
    """Hours of a station: the same daily cycle for all, and weather of its own, an AR(1)."""
    random = np.random.default_rng(seed)
    noise = np.zeros(times)
    for t in range(1, times):
        noise[t] = 0.95 * noise[t - 1] + 0.5 * random.standard_normal()
    return 285.0 + 4.0 * np.sin(2 * np.pi * np.arange(times) / cycle) + noise


def refusal(train: list[Sample], test: list[Sample]) -> str | None:
    """What the check says, None where it lets them pass."""
    guard = NearDuplicates()
    for split, samples in (("train", train), ("test", test)):
        for sample in samples:
            guard.add(sample, split)
    try:
        guard.check()
    except DataError as error:
        return str(error)
    return None


COPIES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "rescaled": lambda x: x * 1.8,
    "another offset": lambda x: x - 273.15,
    "Fahrenheit, to a tenth": lambda x: np.round((x - 273.15) * 1.8 + 32.0, 1),
    "rounded to half a degree": lambda x: np.round(2 * x) / 2,
    "packed in 16 bits": lambda x: np.round((x - x.mean()) / 0.01).astype(np.int16) * 0.01,
    "turned over": lambda x: -0.1 * x,
    "first hours gone": lambda x: x[7:],
    "last hours gone": lambda x: x[:-13],
    "one week of it, in Fahrenheit": lambda x: (x[200:368] - 273.15) * 1.8 + 32.0,
    "a part among other weather": lambda x: np.concatenate([weather(5, 300), x[100:400] + 1.0, weather(6, 300)]),
}


@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES)
def test_an_altered_copy_in_another_split_is_refused(copy: Callable[[np.ndarray], np.ndarray]) -> None:
    original, others = weather(1, 700), [record(f"s/o{seed}/0", weather(seed, 700)) for seed in (2, 3)]
    said = refusal([others[0], record("s/a/0", original)], [others[1], record("copy/a/0", copy(original))])
    assert said is not None
    assert said.startswith("'s/a/0' (train) and 'copy/a/0' (test) are nearly the same: air_temperature at times")
    assert said.endswith("leave one of the two out")


def test_the_guard_of_a_build_refuses_an_altered_copy_between_any_two_splits(tmp_path: Path) -> None:
    original = record("s/a/0", weather(1, 700))
    copy = replace(original, key="s/b/0", values=np.round(original.values * 1.8, 1))
    for split, other in (("train", "test"), ("train", "valid"), ("valid", "test"), ("test", "train")):
        guard = DuplicateGuard()
        for number, (sample, where) in enumerate(((original, split), (copy, other))):
            worker = DuplicateGuard()  # each piece is seen by a process of its own
            worker.add(record(f"s/x{number}/0", weather(2 + number, 200)), where)
            worker.add(sample, where)
            worker.save(tmp_path / "seen.npz")
            guard.merge(DuplicateGuard.load(tmp_path / "seen.npz"))
        with pytest.raises(DataError, match=r"'s/(a|b)/0' \(\w+\) and 's/(a|b)/0' \(\w+\) are nearly the same") as said:
            guard.check()
        assert f"'s/a/0' ({split})" in str(said.value) and f"'s/b/0' ({other})" in str(said.value)
    guard = DuplicateGuard()
    guard.add(original, "train")
    guard.add(copy, "train")
    guard.check()


def test_the_message_says_which_times_are_which() -> None:
    original = weather(1, 700)
    said = refusal([record("s/a/0", original)], [record("s/b/0", 2.0 * original[50:650])]) or ""
    first, last, other_first, other_last = (
        int(n) for part in said.split("at ")[1:3] for n in part.removeprefix("times ").split(" ")[0].split("..")
    )
    assert (first - other_first, last - other_last) == (50, 50), said
    assert last - first >= 100


def test_missing_values_hide_no_copy() -> None:
    original = weather(1, 700)
    gaps = np.random.default_rng(0).random(700) > 0.03
    gaps[300:340] = False
    copy = record("s/b/0", original * 1.8, valid=gaps)
    assert refusal([record("s/a/0", original)], [replace(copy, values=np.where(copy.valid, copy.values, 0.0))])


def test_a_record_that_begins_with_years_of_nothing_is_compared() -> None:
    times = near_duplicates.MOST_FITTED + 700
    values, valid = weather(1, times), np.arange(times) >= near_duplicates.MOST_FITTED + 50
    original = record("s/a/0", np.where(valid, values, 0.0), valid=valid)
    assert refusal([original], [record("s/b/0", 2.0 * values[-500:])])


def test_a_grid_is_compared_through_its_cells() -> None:
    """As E1_north_america.nc and A1B_north_america.nc: some of the years are the same, then they part."""
    random = np.random.default_rng(3)
    place = 15.0 * random.standard_normal((1, 1, 12, 16))

    def years(count: int) -> np.ndarray:
        return np.asarray(280.0 + place + random.standard_normal((count, 1, 12, 16)))

    shared = years(60)
    one = record("a1b/grid/0", np.concatenate([shared, years(40)]))
    two = record("e1/grid/0", np.concatenate([shared[5:] + 0.4, years(40)]).round(1))
    assert refusal([one], [two])
    assert refusal([one], [record("e1/grid/0", years(100))]) is None
    assert refusal([one], [record("e1/grid/0", shared[20:44] * 1.8 - 459.67)]), "24 times of 16 cells are enough"


INDEPENDENT: dict[str, Callable[[int], np.ndarray]] = {
    "two simulations": lambda seed: weather(seed, 3000, cycle=365),
    "monthly, mostly season": lambda seed: weather(seed, 600, cycle=12),
    "hourly, mostly the day": lambda seed: 285.0 + 4.0 * (np.arange(2000) % 24 > 11) + 0.1 * noise(seed, 2000),
    "white noise": lambda seed: noise(seed, 3000),
    "random walk": lambda seed: np.cumsum(noise(seed, 3000)),
    "rounded walk": lambda seed: np.round(np.cumsum(0.3 * noise(seed, 3000))),
    "rain: spikes among zeros": lambda seed: np.where(noise(seed, 3000) > 1.6, np.abs(noise(seed + 50, 3000)), 0.0),
    "steps": lambda seed: np.cumsum(np.where(noise(seed, 3000) > 2.0, noise(seed + 50, 3000), 0.0)),
    "constant": lambda seed: np.full(3000, 280.0),
    "nearly constant": lambda seed: 280.0 + 1e-4 * noise(seed, 3000),
    "a ramp": lambda seed: (1.0 + seed) * np.arange(3000.0),
    "the sun": lambda seed: 1361.0 * np.maximum(0.0, np.cos(2 * np.pi * np.arange(3000.0) / 24)),
    "a tide": lambda seed: np.cos(2 * np.pi * np.arange(3000.0) / 12.42) + np.cos(2 * np.pi * np.arange(3000.0) / 24.0),
    "smooth waves": lambda seed: np.convolve(noise(seed, 3000), np.hanning(41) * np.cos(0.4 * np.arange(41)), "same"),
    "missing": lambda seed: np.full(3000, np.nan),
}


def noise(seed: int, times: int) -> np.ndarray:
    """White noise."""
    return np.random.default_rng(1000 + seed).standard_normal(times)


@pytest.mark.parametrize("make", INDEPENDENT.values(), ids=INDEPENDENT)
def test_records_that_are_not_copies_pass(make: Callable[[int], np.ndarray]) -> None:
    pieces = []
    for seed in range(6):
        values = make(seed)
        valid = np.isfinite(values)
        pieces.append(record(f"s/{seed}/0", np.where(valid, values, 0.0), valid=valid))
    assert refusal(pieces[:3], pieces[3:]) is None


def test_other_days_of_one_station_pass() -> None:
    values = np.stack([weather(1, 4000), 5.0 + np.abs(noise(1, 4000)), 50.0 + weather(3, 4000) - 285.0], axis=1)
    assert refusal([record("s/a/0", values[:2500])], [record("s/a/1", values[2500:])]) is None


def test_a_forcing_that_simulations_share_is_no_copy_and_most_of_the_channels_are() -> None:
    """Three channels and a fourth, the same in both: a scenario's carbon dioxide. With three of four it is a copy."""
    forcing = 340.0 + np.cumsum(0.1 + 0.05 * noise(1, 800))
    one, two = (np.stack([*(weather(10 * k + s, 800) for s in range(3)), forcing], axis=1) for k in (1, 2))
    assert refusal([record("m/a/0", one)], [record("m/b/0", two)]) is None
    two[:, :2] = one[:, :2] + 1.0
    assert refusal([record("m/a/0", one)], [record("m/b/0", two)]) is not None


def test_a_part_too_short_to_be_judged_is_let_pass() -> None:
    original = weather(1, 700)
    assert refusal([record("s/a/0", original)], [record("s/b/0", 2.0 * original[100:150])]) is None


def test_what_repeats_itself_costs_no_more_than_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every day is like every other day: the candidates are many, the judged ones are not."""
    judged = 0
    judge = near_duplicates._is_one_record

    def counted(*tracks: object, **where: object) -> bool | None:
        nonlocal judged
        judged += 1
        return judge(*tracks, **where)  # type: ignore[arg-type]

    monkeypatch.setattr(near_duplicates, "_is_one_record", counted)
    day = np.sin(2 * np.pi * np.arange(8000) / 24)
    one, two = (record(f"s/{seed}/0", 10.0 * day + 0.2 * noise(seed, 8000)) for seed in (1, 2))
    assert refusal([one], [two]) is None
    assert 0 < judged <= MOST_LAGS * (8000 // near_duplicates.CHUNK_TIMES + 1)


def test_a_large_split_is_looked_up_at_evenly_spread_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """However much is held out, so many windows are looked up; a long copy among other records is found by a few."""
    monkeypatch.setattr(near_duplicates, "MOST_LOOKED_UP", 60)
    original = weather(1, 3000)
    others = [record(f"s/x{number}/0", weather(10 + number, 1000)) for number in range(6)]
    guard = NearDuplicates()
    guard.add(record("s/a/0", original), "train")
    for other in [*others[:3], record("s/b/0", 2.0 * original), *others[3:]]:
        guard.add(other, "test")
    looked_up = [
        place
        for scale in near_duplicates.SCALES
        for _, place in guard._candidates(guard._marks["test", scale], guard._marks["train", scale])
    ]
    assert 0 < len(looked_up) <= 60 * len(near_duplicates.SCALES) * near_duplicates.NEIGHBOURS
    with pytest.raises(DataError, match="'s/a/0' .* and 's/b/0' .* are nearly the same"):
        guard.check()
