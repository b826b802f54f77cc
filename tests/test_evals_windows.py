"""Windows: what is context and what is future, even choice of starts, shuffling in time, samples for a model."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sci_evals.evaluate import poor_windows
from sci_evals.toy import daily_station, hourly_station, monthly_grid, trace_record
from sci_evals.transfer_data import draw
from sci_evals.windowset import WindowShape, choose_starts, cut, read_windows
from sci_gpt.data.store import Store
from sci_gpt.data.store_writer import seal
from sci_gpt.errors import DataError
from sci_gpt.recipes.studies import TransferTask
from test_data_quality import as_source, with_spans
from test_data_splits import series
from test_data_store import write

SHAPE = WindowShape(num_context=4, leads=(1, 3), frame_times=5)


def test_future_is_the_frames_at_the_leads() -> None:
    record = trace_record(seconds=20.0)
    windows = cut([record], SHAPE, starts=[np.array([7])])
    # Context: 4 frames of 5 samples; lead 1 is the frame after it, lead 3 the third.
    np.testing.assert_array_equal(windows.context[0, :, 0, 0, 0], record.values[7:27, 0, 0, 0])
    np.testing.assert_array_equal(windows.truth[0, 0, :, 0, 0, 0], record.values[27:32, 0, 0, 0])
    np.testing.assert_array_equal(windows.truth[0, 1, :, 0, 0, 0], record.values[37:42, 0, 0, 0])
    assert windows.values.shape[1] == SHAPE.num_times == 35
    assert windows.origin[0] == record.time[26]


def test_missing_values_are_nan_and_transforms_are_applied() -> None:
    station = hourly_station(days=4)
    station.valid[30, 0] = False
    windows = cut([station], WindowShape(num_context=24, leads=(7,)), starts=[np.array([0])])
    assert np.isnan(windows.truth[0, 0, 0, 0, 0, 0])
    rain = windows.truth[0, 0, 0, 1, 0, 0]
    assert windows.future[0, 0, 0, 1, 0, 0] == pytest.approx(np.log1p(rain))


def test_starts_are_even_over_all_stretches() -> None:
    shape = WindowShape(num_context=9, leads=(1,))
    starts = choose_starts(np.array([1009, 5, 2009]), shape, count=300)
    assert [len(part) for part in starts] == [100, 0, 200]
    assert max(starts[0]) + shape.num_times <= 1009
    assert max(starts[2]) + shape.num_times <= 2009
    assert np.diff(np.concatenate([starts[0], 1000 + starts[2]])).max() < 20
    everything = choose_starts(np.array([12]), shape, count=300)
    np.testing.assert_array_equal(everything[0], [0, 1, 2])


def test_shuffling_moves_values_and_not_the_calendar() -> None:
    station = daily_station(missing=0.2)
    windows = cut([station], WindowShape(num_context=30, leads=(1, 2)), starts=[np.arange(5)])
    shuffled = windows.shuffled(1)
    np.testing.assert_array_equal(shuffled.time, windows.time)
    assert not np.array_equal(shuffled.values, windows.values)
    # Channels move together, each value with its own validity.
    pairs = {
        tuple(row) for row in np.concatenate([windows.values[0, :, :, 0, 0], windows.valid[0, :, :, 0, 0]], axis=1)
    }
    moved = np.concatenate([shuffled.values[0, :, :, 0, 0], shuffled.valid[0, :, :, 0, 0]], axis=1)
    assert {tuple(row) for row in moved} < pairs


def test_samples_are_the_windows() -> None:
    grid = monthly_grid()
    windows = cut([grid], WindowShape(num_context=12, leads=(1,)), starts=[np.array([3, 20])]).take(np.array([1]))
    (sample,) = windows.samples()
    np.testing.assert_array_equal(sample.values, grid.values[20:33])
    np.testing.assert_array_equal(sample.latitude, grid.latitude)
    assert sample.source == "toy_grid"


def test_cells_weigh_by_their_area() -> None:
    windows = cut([monthly_grid()], WindowShape(num_context=12, leads=(1,)), starts=[np.array([0])])
    weights = windows.cell_weights
    assert weights.mean() == pytest.approx(1.0)
    # Rows at 50 and 20 degrees: cells of equal height, areas as the cosines of their centres.
    assert weights[0, 0] / weights[-1, 0] == pytest.approx(np.cos(np.radians(50)) / np.cos(np.radians(20)), rel=1e-6)


def test_places_are_told_apart() -> None:
    grids = [monthly_grid(west=west) for west in (0.0, 40.0)]
    again = replace(grids[0], key="toy_grid/later")
    windows = cut([*grids, again], WindowShape(num_context=12, leads=(1,)), starts=[np.array([0])] * 3)
    first, second, third = windows.place_names
    assert first == third != second


def test_no_window_is_an_error_that_says_so() -> None:
    with pytest.raises(DataError, match="no window of 35 times"):
        cut([trace_record(seconds=3.0)], SHAPE, starts=[np.zeros(0, int)])


def test_windows_of_poor_quality_are_neither_scored_nor_learned_from(tmp_path: Path) -> None:
    """Times 150..200 are constant, 420 is out of range: as in training, no window may hold 420 or be all constant."""
    good = replace(series("field/b/0", seed=5), source="field")
    store = as_source(write(tmp_path / "s", [replace(with_spans(), key="field/a/0", source="field"), good]), "series")
    shape = WindowShape(num_context=8, leads=(1, 4))
    windows = read_windows(store, "field", split="train", shape=shape, count=10**6)
    assert windows is not None
    starts = np.rint((windows.time[:, 0] - good.time[0]) / 86400.0).astype(int)
    every = np.arange(500 - 12 + 1)
    constant, beyond = (every >= 150) & (every + 12 <= 200), (every <= 420) & (420 < every + 12)
    constant |= (every == 300) | ((every >= 59) & (every + 12 <= 100))  # a gap and the value before it; a flat top
    missing = (every >= 60) & (every + 12 <= 100)
    bad = constant | beyond | missing
    assert set(starts[windows.stretch == 0]) <= set(every[~bad]) and set(starts[windows.stretch == 1]) == set(every)
    assert windows.left_out["out_of_range"] == 12 and sum(windows.left_out.values()) == bad.sum()
    assert poor_windows(windows)["field windows"].startswith(f"rules of quality leave out {bad.sum()} test windows (")
    assert poor_windows(replace(windows, left_out={})) == {}
    task = TransferTask(source="field", frames=12, context_frames=(4, 8), leads=(1, 4), max_steps=1)
    for split in ("test", "valid"):
        shutil.copytree(tmp_path / "s" / "field" / "train", tmp_path / "s" / "field" / split)
    seal(tmp_path / "s", store.manifest)
    store = Store.open(tmp_path / "s")
    drawn = draw(store, task, count=10**6, valid_share=0.25, frame_times=1, most=50)
    assert sum(drawn.left_out.values()) == bad.sum()
    taken = {round((one.time[0] - good.time[0]) / 86400) for one in (*drawn.train, *drawn.valid) if "/a/" in one.key}
    assert taken == {int(start) for start in every[~bad] if start + 12 <= 375 or start >= 375}
