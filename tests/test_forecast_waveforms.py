"""Forecasts of waveforms: a Stream in, a trace per channel and quantile at the working rate out."""

from __future__ import annotations

from typing import Any

import numpy as np
import obspy
import pytest

from sci_gpt.errors import ConfigError, DataError
from sci_gpt.recipes.load import LoadedModel, load_model
from sci_tokenizers.sample import Sample
from toy_model import make_run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A model that was never trained but is not at its initial weights, on the toy store's three sources."""
    return load_model(make_run(tmp_path_factory.mktemp("model")).output)


def record(
    rate: float = 40.0, *, seconds: float = 40.0, channel: str = "BHZ", location: str = "00", start: float = 1e9
) -> obspy.Trace:
    """A decaying wave in counts."""
    time = np.arange(round(seconds * rate)) / rate
    counts = 300.0 * np.sin(2 * np.pi * 0.8 * time) + 40.0 * np.random.default_rng(2).standard_normal(len(time))
    header = {"network": "XX", "station": "ABC", "location": location, "channel": channel, "sampling_rate": rate}
    return obspy.Trace(counts.astype(np.int32), header | {"starttime": obspy.UTCDateTime(start)})


def holed(where: slice | int, value: float = np.nan) -> obspy.Trace:
    """The record with values that are not finite there."""
    trace = record()
    trace.data = trace.data.astype(np.float64)
    trace.data[where] = value
    return trace


def test_a_stream_gives_one_trace_per_channel_and_quantile_at_the_working_rate(model: LoadedModel) -> None:
    out = model.forecast(obspy.Stream([record(), record(channel="BHN"), record(channel="BHE")]), 5)
    assert len(out) == 9
    assert {trace.stats.location for trace in out} == {"10", "50", "90"}
    assert {trace.stats.channel for trace in out} == {"BHZ", "BHN", "BHE"}
    for trace in out:
        assert trace.stats.sampling_rate == pytest.approx(10.0)
        assert trace.stats.npts == 5
        # The record's last sample at 10 Hz is that at 39.9 s.
        assert trace.stats.starttime == obspy.UTCDateTime(1e9) + 40.0
    low, high = (out.select(location=code, channel="BHZ")[0].data for code in ("10", "90"))
    assert (high >= low).all()


def test_a_horizon_within_a_frame_is_cut(model: LoadedModel) -> None:
    stream = obspy.Stream([record()])
    short, long = model.forecast(stream, 3)[0], model.forecast(stream, 5)[0]
    assert short.stats.npts == 3
    np.testing.assert_array_equal(short.data, long.data[:3])


def test_the_record_itself_is_not_changed(model: LoadedModel) -> None:
    stream = obspy.Stream([record()])
    before = stream.copy()
    model.forecast(stream, 1)
    assert stream == before


def test_a_gap_cuts_off_what_lies_before_it(model: LoadedModel) -> None:
    late = record(start=1e9 + 100.0)
    alone = model.forecast(obspy.Stream([late]), 5)
    for stream in (obspy.Stream([record(), late]), obspy.Stream([record(), late]).merge()):
        np.testing.assert_array_equal(model.forecast(stream, 5)[1].data, alone[1].data)


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (obspy.Stream([]), "the stream holds no trace"),
        (obspy.Stream([record(), record(location="10")]), "locations '00' and '10' would collide"),
        (obspy.Stream([record(channel="BHX")]), "BHX"),
        (obspy.Stream([record(seconds=1.0)]), "time steps are shorter than the context of 20"),
        (obspy.Stream([record(), record(channel="BHN", start=2e9)]), "share no time"),
        (obspy.Stream([holed(slice(None))]), r"no value of XX\.ABC\.00\.BHZ from .* is finite; leave it out"),
    ],
)
def test_a_stream_that_cannot_be_forecast_is_refused(model: LoadedModel, stream: obspy.Stream, message: str) -> None:
    with pytest.raises(DataError, match=message):
        model.forecast(stream, 1)


def test_what_is_not_finite_is_a_gap(model: LoadedModel) -> None:
    """The forecast is that of what follows it; where nothing does, of what stands before."""
    whole = record()
    after = whole.slice(whole.stats.starttime + 20.025, None)
    after.data = after.data.astype(np.float64)
    expected = model.forecast(obspy.Stream([after]), 5)
    for value in (np.nan, np.inf):
        found = model.forecast(obspy.Stream([holed(800, value)]), 5)
        for one, two in zip(found, expected, strict=True):
            assert one.stats.starttime == two.stats.starttime
            np.testing.assert_array_equal(one.data, two.data)
    assert model.forecast(obspy.Stream([holed(slice(1200, None))]), 5)[0].stats.starttime == obspy.UTCDateTime(1e9) + 30


def test_seismometers_go_through_the_model_together(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of one length in one call, with the forecasts that each has alone; a shorter one by itself."""
    stream = obspy.Stream()
    for number, seconds in enumerate((40.0, 6.0, 40.0, 40.0)):
        trace = record(seconds=seconds)
        trace.stats.station, trace.data = f"S{number}", trace.data + 100 * number
        stream.append(trace)
    alone = [model.forecast(obspy.Stream([trace]), 5) for trace in stream]
    calls, quantiles = [], model.predictor.quantiles

    def counted(samples: list[Sample], **words: Any) -> list[np.ndarray]:
        calls.append(len(samples))
        return quantiles(samples, **words)

    monkeypatch.setattr(model.predictor, "quantiles", counted)
    together = model.forecast(stream, 5)
    assert calls == [3, 1]
    expected = [trace for part in alone for trace in part]
    for one, two in zip(together, expected, strict=True):
        assert one.id == two.id
        np.testing.assert_allclose(one.data, two.data, rtol=1e-5, atol=1e-3)


def test_traces_out_of_order_are_put_in_order(model: LoadedModel) -> None:
    """Pieces of a record, the later one first: the same forecast as of the record whole."""
    whole = record()
    late, early = (
        whole.slice(*ends) for ends in ((whole.stats.starttime + 20, None), (None, whole.stats.starttime + 19.975))
    )
    for one, two in zip(model.forecast(obspy.Stream([late, early]), 5), model.forecast(obspy.Stream([whole]), 5)):
        assert one.stats.starttime == two.stats.starttime
        np.testing.assert_array_equal(one.data, two.data)


def test_a_quantile_without_a_location_code_is_refused(model: LoadedModel) -> None:
    with pytest.raises(ConfigError, match=r"quantile 0\.025 has no two-digit location code"):
        model.forecast(obspy.Stream([record()]), 1, quantiles=(0.025, 0.5))
