"""Rules of quality: which spans hold, which windows they cost, against plain loops over every window."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import obspy
import pytest

from sci_gpt.data.quality import CLIPPED_TIMES, LEAST_TIMES, RULES, SPAN, find_spans, left_out, runs
from sci_gpt.data.source import SourceSettings
from sci_gpt.data.source_trace import stream_samples
from sci_gpt.data.store import Store
from sci_gpt.data.windows import Windows, WindowSpec
from sci_gpt.errors import DataError
from sci_tokenizers.sample import Sample
from test_data_splits import series
from test_data_store import same, write

NAMES = [rule.name for rule in RULES]


def of_modality(sample: Sample, modality: str) -> Sample:
    names = {"trace": "digitizer_counts_vertical", "series": "air_temperature"}
    return replace(sample, modality=modality, variables=(names[modality],))  # type: ignore[arg-type]


def with_spans(modality: str = "series") -> Sample:
    """500 times: 60..100 missing, 150..200 constant with a hole, 300..312 at the record's maximum, 420 out of range."""
    sample = of_modality(series("s/a/0"), modality)
    values, valid = sample.values.copy(), sample.valid.copy()
    valid[60:100] = False
    values[150:200] = 281.5
    valid[160:170] = False
    values[300:312] = values.max() + 5.0
    values[420] = 400.0 if modality == "series" else values[420]
    return replace(sample, values=np.where(valid, values, 0.0).astype(np.float32), valid=valid)


def spans_of(sample: Sample) -> dict[str, list[tuple[int, int]]]:
    found: dict[str, list[tuple[int, int]]] = {name: [] for name in NAMES}
    for rule, start, stop in find_spans(sample):
        found[NAMES[rule]].append((start, stop))
    return found


def test_spans_are_found_where_they_are() -> None:
    found = spans_of(with_spans())
    assert found["missing"] == [(60, 100), (160, 170)]
    # What is missing changes nothing: a value after a gap is compared with the last one before it.
    assert found["constant"] == [(59, 100), (150, 200), (300, 312)]
    assert found["clipped"] == [], "a station that keeps a value is no recorder at its limit"
    assert found["out_of_range"] == [(420, 421)]
    assert spans_of(with_spans("trace"))["clipped"] == [(300, 312)]
    assert find_spans(series("s/a/0")) == []


def test_short_spans_and_quiet_records_are_not_noted() -> None:
    sample = series("s/a/0")
    values = sample.values.copy()
    values[100 : 100 + LEAST_TIMES - 1] = 280.0
    assert find_spans(replace(sample, values=values)) == []
    values[100 : 100 + LEAST_TIMES] = 280.0
    assert spans_of(replace(sample, values=values))["constant"] == [(100, 100 + LEAST_TIMES)]
    quiet = np.random.default_rng(1).integers(-2, 3, values.shape).astype(np.float32)
    quiet[40 : 40 + CLIPPED_TIMES] = 2.0
    assert spans_of(of_modality(replace(sample, values=quiet), "trace"))["clipped"] == []


def test_one_channel_that_moves_is_not_constant() -> None:
    sample = with_spans()
    both = replace(
        sample,
        variables=("air_temperature", "wind_speed"),
        levels=(np.nan, np.nan),
        values=np.concatenate([sample.values, np.abs(series("s/b/0", seed=3).values - 280.0)], axis=1),
        valid=np.concatenate([sample.valid, np.ones_like(sample.valid)], axis=1),
    )
    found = spans_of(both)
    assert found["constant"] == [] and found["missing"] == [] and found["out_of_range"] == [(420, 421)]


def plain_verdict(sample: Sample, start: int, stop: int) -> str | None:
    """The rules in words, on the window's own values."""
    window = sample.window(start, stop)
    values, last, changed = window.values[window.valid], None, []
    if not len(values):
        return "missing"
    for value, known in zip(sample.values.ravel().tolist(), sample.valid.ravel().tolist(), strict=True):
        changed.append(known and last is not None and value != last)
        last = value if known else last
    if not any(changed[start + 1 : stop]):
        return "constant"
    top = sample.values == sample.values[sample.valid].max()
    share = top[start:stop].sum() / (stop - start)
    if sample.modality == "trace" and top.sum() >= CLIPPED_TIMES and share >= 0.01:
        return "clipped"
    return "out_of_range" if sample.modality == "series" and (values > 350.0).any() else None


@pytest.mark.parametrize("modality", ["series", "trace"])
@pytest.mark.parametrize(("frames", "stride"), [(8, 1), (12, 3), (30, 7), (200, 1)])
def test_windows_are_left_out_as_by_looking_at_each(tmp_path: Path, modality: str, frames: int, stride: int) -> None:
    spoiled, fine = with_spans(modality), replace(of_modality(series("s/b/0", seed=5), modality), key="s/b/0")
    samples = [replace(sample, key=f"field/{n}/0", source="field") for n, sample in enumerate((fine, spoiled, fine))]
    store = write(tmp_path / "s", samples)
    store = as_source(store, modality)
    spec = WindowSpec(source="field", frames=frames, stride=stride, context_frames=(1, 2), leads=(1,))
    windows = Windows(store, spec, split="train", frame_times=1)
    expected, cost = [], dict.fromkeys(NAMES, 0)
    for number, sample in enumerate(samples):
        for start in range(0, sample.num_times - frames + 1, stride):
            why = plain_verdict(sample, start, start + frames)
            if why is None:
                expected.append((number, start, start + frames))
            else:
                cost[why] += 1
    assert [windows.locate(k) for k in range(windows.num_windows)] == expected
    assert windows.left_out == {name: count for name, count in cost.items() if count}
    last = expected[-1]
    same(windows.read(windows.num_windows - 1), replace(samples[last[0]].window(*last[1:]), levels=(85000.0,)))


def as_source(store: Store, modality: str) -> Store:
    """The store with the manifest of one channel at one place."""
    row = store.manifest["sources"]["field"] | {"modality": modality, "shape": [1, 1, 1], "levels": [85000.0]}
    row["variables"] = ["digitizer_counts_vertical" if modality == "trace" else "air_temperature"]
    return replace(store, manifest=store.manifest | {"sources": {"field": row}})


def test_a_source_without_a_good_window_is_refused(tmp_path: Path) -> None:
    flat = replace(series("field/a/0"), values=np.full((500, 1, 1, 1), 280.0, np.float32), source="field")
    store = as_source(write(tmp_path / "s", [flat]), "series")
    spec = WindowSpec(source="field", frames=20, stride=1, context_frames=(1, 2), leads=(1,))
    with pytest.raises(DataError, match=r"source 'field', train: rules of quality leave out all 481 .*constant 481"):
        Windows(store, spec, split="train", frame_times=1)


def test_two_constant_spans_that_touch_are_two() -> None:
    spans = np.array([(0, 1, 0, 20), (0, 1, 20, 40)], SPAN)
    verdict = left_out(spans, num_times=40, need=10, step=1)
    assert (np.flatnonzero(verdict < 0) == np.arange(11, 20)).all() and (verdict[[10, 20]] == 1).all()


def records_of(data: np.ndarray, *, rate: float, **options: Any) -> list[Sample]:
    """A vertical component in counts as the reader of event records gives it."""
    header = {"network": "XX", "station": "AAA", "channel": "HHZ", "sampling_rate": rate}
    stream = obspy.Stream([obspy.Trace(data.astype(np.int32), {**header, "starttime": obspy.UTCDateTime(0)})])
    settings = SourceSettings(name="quakes", reader="obspy_records", modality="trace", files=(), options=options)
    return list(stream_samples(stream, settings, event="one", places={}))


def test_a_value_that_is_not_finite_ends_a_stretch() -> None:
    """Two pieces, each filtered by itself, as if the record had the gap; a record of nothing else is refused."""
    counts = np.random.default_rng(1).normal(0, 100, 30_000)
    holed = counts.copy()
    holed[14_000] = np.nan
    header = {"network": "XX", "station": "AAA", "channel": "HHZ", "sampling_rate": 100.0}
    settings = SourceSettings(name="quakes", reader="obspy_records", modality="trace", files=(), options={})
    begin = obspy.UTCDateTime(0)
    whole = obspy.Trace(holed, {**header, "starttime": begin})
    cut = [
        obspy.Trace(counts[:14_000], {**header, "starttime": begin}),
        obspy.Trace(counts[14_001:], {**header, "starttime": begin + 140.01}),
    ]
    found, expected = (
        list(stream_samples(obspy.Stream(traces), settings, event="one", places={})) for traces in ([whole], cut)
    )
    assert len(found) == len(expected) == 2
    for one, two in zip(found, expected, strict=True):
        assert one.key == two.key and one.time[0] == two.time[0]
        np.testing.assert_array_equal(one.values, two.values)
    with pytest.raises(DataError, match=r"no value of XX\.AAA\.\.HHZ from 1970.* is finite; leave it out"):
        silent = obspy.Trace(np.full(30_000, np.nan), {**header, "starttime": begin})
        list(stream_samples(obspy.Stream([silent]), settings, event="one", places={}))


@pytest.mark.parametrize("rate", [100.0, 40.0, 10.0])
def test_a_recorder_at_its_limit_is_seen_before_the_filter_rounds_it(tmp_path: Path, rate: float) -> None:
    """A wave of 0.2 Hz that from 60 to 90 s is twice what 10,000 counts can hold; 200 s."""
    seconds = np.arange(0, 200, 1 / rate)
    noise = np.random.default_rng(0).normal(0, 40, len(seconds))
    wave = np.where((seconds >= 60) & (seconds < 90), 20_000.0, 3_000.0) * np.sin(2 * np.pi * 0.2 * seconds) + noise
    (sample,) = records_of(np.clip(np.rint(wave), -10_000, 10_000), rate=rate, high_pass_hz=0.01)
    raw = np.abs(np.rint(wave)) >= 10_000
    spans = spans_of(sample)["clipped"]
    flagged = np.zeros(sample.num_times, bool)
    for start, stop in spans:
        flagged[start:stop] = True
    moments = np.arange(sample.num_times) / 10.0
    assert not flagged[moments < seconds[raw][0]].any() and not flagged[moments > seconds[raw][-1] + 1.5].any()
    assert flagged[np.isin(np.round(moments, 6), np.round(seconds[raw], 6))].mean() > 0.95
    if rate > 10.0:
        assert spans_of(replace(sample, clipped=None))["clipped"] == [], "filtered values show no flat top"
    store = as_source(write(tmp_path / "s", [replace(sample, key="field/a/0", source="field")]), "trace")
    store.manifest["sources"]["field"].update(shape=[3, 1, 1], variables=list(sample.variables), levels=[None] * 3)
    spec = WindowSpec(source="field", frames=100, stride=100, context_frames=(1, 2), leads=(1,))
    windows = Windows(store, spec, split="train", frame_times=1)
    assert windows.left_out == {"clipped": 3 + (rate > 10.0)}, "60 to 90 s, and what the filter carries beyond 90 s"
    untouched = [windows.locate(k)[1] for k in range(windows.num_windows)]
    assert [start for start in range(0, 2000, 100) if start not in untouched][:3] == [600, 700, 800]


def test_a_slow_wave_in_counts_is_not_clipped_where_it_turns() -> None:
    """Rounded to counts a wave of 20 s and 800 counts stays at its top for 32 samples in the raw record."""
    wave = np.rint(800 * np.sin(2 * np.pi * 0.05 * np.arange(0, 200, 0.01)))
    assert max(stop - start for start, stop in runs(wave == wave.max())) > CLIPPED_TIMES
    (sample,) = records_of(wave, rate=100.0)
    assert spans_of(sample)["clipped"] == []
    wave = np.rint(8000 * np.sin(2 * np.pi * 0.05 * np.arange(0, 200, 0.01)))
    (held,) = records_of(np.clip(wave, -7000, 8000), rate=100.0)
    assert spans_of(held)["clipped"], "ten times larger and cut at -7000 it comes there by ten counts a sample"
