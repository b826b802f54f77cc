"""ChronosQuantizer against the package whose tokenizer it is: ids, masks, scales and decoded values, on any input."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from chronos.chronos import ChronosConfig, MeanScaleUniformBins
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sci_tokenizers.quantizer import EOS, PAD, QuantizerError, row_sums
from sci_tokenizers.series import ChronosQuantizer

ODD = (0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 1e-38, 1e20, -1e20, 1.5e20, -1.5e20, 3.4e38, 15.0, -15.0)
TRIALS = settings(max_examples=150, deadline=None, derandomize=True)


def both(num_tokens: int = 4096, limit: float = 15.0, **sizes: Any) -> tuple[ChronosQuantizer, MeanScaleUniformBins]:
    """Ours and the package's tokenizer of the same sizes."""
    ours = ChronosQuantizer(num_tokens, limit, **sizes)
    config = ChronosConfig(
        tokenizer_class="MeanScaleUniformBins",
        tokenizer_kwargs={"low_limit": -limit, "high_limit": limit},
        context_length=ours.context_length,
        prediction_length=ours.prediction_length,
        n_tokens=num_tokens,
        n_special_tokens=2,
        pad_token_id=PAD,
        eos_token_id=EOS,
        use_eos_token=ours.use_eos,
        model_type="seq2seq",
        num_samples=20,
        temperature=1.0,
        top_k=50,
        top_p=1.0,
    )
    return ours, MeanScaleUniformBins(-limit, limit, config)


def ulps(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """How many float32 numbers lie between; 0 for two NaN."""
    places = []
    for values in (ours, theirs):
        bits = np.ascontiguousarray(values, np.float32).view(np.int32).astype(np.int64)
        places.append(np.where(bits < 0, -(bits & 0x7FFFFFFF), bits))
    return np.where(np.isnan(ours) & np.isnan(theirs), 0, np.abs(places[0] - places[1]))


def compare(values: np.ndarray, ours: ChronosQuantizer, theirs: MeanScaleUniformBins) -> int:
    """Encode and decode contexts with both; all is equal where the scales are. Returns the number of ids compared."""
    ids, mask, scale = ours.encode_context(values)
    # A copy: the package's tokenizer may see memory that it must not write.
    their_ids, their_mask, their_scale = (
        part.numpy() for part in theirs.context_input_transform(torch.from_numpy(values.copy()))
    )
    assert ids.shape == their_ids.shape and (mask == their_mask).all()
    assert ulps(scale, their_scale).max(initial=0) <= 2
    # torch adds in another order on other processors: a scale's last digit, and with it one id in 1e5 by one.
    same = scale == their_scale
    assert (ids[same] == their_ids[same]).all()
    assert np.abs(ids[~same] - their_ids[~same]).max(initial=0) <= 1
    assert (ids != their_ids).sum() <= max(1, 1e-5 * ids.size) * (not same.all())
    decoded = theirs.output_transform(torch.from_numpy(their_ids)[:, None], torch.from_numpy(their_scale)).numpy()
    assert ulps(ours.decode(their_ids, their_scale), decoded[:, 0]).max(initial=0) <= 2
    return ids.size


def near_boundaries(limit: float, num_tokens: int, *, ulp: int) -> np.ndarray:
    """All float32 numbers within `ulp` of a boundary of the package's bins."""
    below = above = both(num_tokens, limit)[1].boundaries.numpy()
    found = [below]
    for _ in range(ulp):
        below, above = np.nextafter(below, np.float32(-np.inf)), np.nextafter(above, np.float32(np.inf))
        found += [below, above]
    return np.concatenate(found)


@pytest.fixture(scope="module", autouse=True)
def subnormals() -> Iterator[None]:
    """As they are: a test before, which trains, may have had them flushed to 0 in this process."""
    torch.set_flush_denormal(False)
    yield


floats = st.one_of(st.floats(width=32), st.sampled_from(ODD), st.floats(-20.0, 20.0, width=32))
sizes = st.tuples(st.integers(1, 5), st.integers(1, 90))


@TRIALS
@given(
    values=hnp.arrays(np.float32, sizes, elements=floats),
    num_tokens=st.sampled_from([8, 64, 1000, 4096, 2**18]),
    limit=st.sampled_from([1e-3, 0.7, 3.0, 15.0, 1e5]),
    context=st.integers(1, 100),
    eos=st.booleans(),
)
def test_any_context(values: np.ndarray, num_tokens: int, limit: float, context: int, eos: bool) -> None:
    compare(values, *both(num_tokens, limit, context_length=context, use_eos=eos))


@TRIALS
@given(
    values=hnp.arrays(np.float32, st.tuples(st.integers(1, 4), st.just(7)), elements=floats),
    scale=hnp.arrays(np.float32, 4, elements=st.one_of(floats, st.sampled_from([1.0, 1e-40, 2.0]))),
    limit=st.sampled_from([0.7, 15.0]),
    eos=st.booleans(),
)
def test_any_labels_on_any_scale(values: np.ndarray, scale: np.ndarray, limit: float, eos: bool) -> None:
    ours, theirs = both(256, limit, prediction_length=7, use_eos=eos)
    scale = scale[: len(values)]
    ids, mask = ours.encode_labels(values, scale)
    their_ids, their_mask = theirs.label_input_transform(torch.from_numpy(values.copy()), torch.from_numpy(scale))
    np.testing.assert_array_equal(ids, their_ids.numpy())
    np.testing.assert_array_equal(mask, their_mask.numpy())


def test_ten_million_values_of_every_size() -> None:
    """Rows with 1 % missing, scales over 40 powers of ten, heavy tails, lengths around lanes, pieces and levels."""
    rng = np.random.default_rng(0)
    ours, theirs = both(context_length=40_000)
    compared = 0
    for length in [*range(1, 70), 127, 511, 512, 513, 1000, 2047, 4096, 8200, 33_000] * 2 + [512] * 8:
        rows = max(40, 70_000 // length)
        values = rng.standard_t(3, (rows, length)) * 10.0 ** rng.uniform(-20, 20, (rows, 1))
        values[rng.random(values.shape) < 0.01] = np.nan
        compared += compare(values.astype(np.float32), ours, theirs)
    assert compared >= 10_000_000


@pytest.mark.parametrize(("num_tokens", "limit"), [(4096, 15.0), (1024, 15.0), (513, 3.3), (2**18, 0.7), (8, 1e19)])
def test_on_and_beside_every_boundary(num_tokens: int, limit: float) -> None:
    """Each float32 within 3 of a boundary, as a label on scales that are powers of two."""
    values = near_boundaries(limit, num_tokens, ulp=3)
    ours, theirs = both(num_tokens, limit, prediction_length=len(values), use_eos=False, context_length=10**6)
    scale = np.array([1.0, 2.0**-30, 2.0**40], np.float32)
    rows = values * scale[:, None]
    ids, _ = ours.encode_labels(rows, scale)
    their_ids, _ = theirs.label_input_transform(torch.from_numpy(rows), torch.from_numpy(scale))
    np.testing.assert_array_equal(ids, their_ids.numpy())
    assert len(np.unique(ids)) == num_tokens - 2, "every bin, and the id below all of them"


def test_a_hundred_thousand_contexts_within_two_of_a_boundary() -> None:
    """Contexts whose own scale is a power of two to the last digit, so that x / scale is beside a boundary.

    With |x| in [1, 2) a row of x and 2 - |x| has a mean |x| of 1 exactly, with |x| in [2, 4) one of x, 4 - |x| and two
    zeros, and so on: all are whole multiples of x's last digit, and so are their sums.
    """
    values = near_boundaries(15.0, 4096, ulp=2)
    values = values[(np.abs(values) >= 1.0) & (np.abs(values) < 16.0)]
    count = 2.0 ** (np.floor(np.log2(np.abs(values))) + 1)
    rows = np.where(np.arange(16) < count[:, None], 0.0, np.nan).astype(np.float32)
    rows[:, 0], rows[:, 1] = values, count - np.abs(values)
    ours, theirs = both()
    compared = 0
    for power in (-100, -31, 0, 1, 24, 90):
        unit = np.float32(2.0**power)
        assert (ours.encode_context(rows * unit)[2] == unit).all()
        compare(rows * unit, ours, theirs)
        compared += len(rows)
    assert compared >= 100_000


@pytest.mark.parametrize(
    "row",
    [
        [3.0] * 8,
        [np.nan] * 8,
        [0.0] * 8,
        [-0.0, np.nan] * 4,
        [1e-45] * 8,
        [1e-44, np.nan, 3e-45, -1e-40] * 2,
        [np.inf, 1.0, -np.inf, np.nan] * 2,
        [3e38] * 8,
        [1e30] + [1e-30] * 7,
    ],
)
def test_rows_of_one_kind(row: list[float]) -> None:
    """Constant, all missing, zero, subnormal, infinite and overflowing rows; alone and beside a common one."""
    common = [1.0, -2.0, 3.0, np.nan, 5.0, 6.0, 7.0, 8.0]
    for values in ([row], [common, row]):
        compare(np.asarray(values, np.float32), *both())


def test_what_comes_out() -> None:
    """The last values of a long context, whole numbers and float64 in, dtypes and shapes out; empty rows."""
    ours, theirs = both(context_length=6)
    long = np.arange(20.0).reshape(2, 10)
    ids, mask, scale = ours.encode_context(long)
    assert ids.shape == mask.shape == (2, 7)
    assert [str(part.dtype) for part in (ids, mask, scale)] == ["int32", "bool", "float32"]
    assert scale.tolist() == [6.5, 16.5], "the means of 4..9 and of 14..19"
    assert (ids[:, -1] == EOS).all() and mask[:, -1].all()
    np.testing.assert_array_equal(ours.encode_context(long.astype(int))[0], ids)
    compare(long[:, ::-1], ours, theirs)
    assert ours.encode_context(np.zeros((3, 0)))[0].tolist() == [[EOS]] * 3
    assert ours.encode_context(np.zeros((0, 4)))[0].shape == (0, 5)
    samples = np.repeat(ids[:, None], 3, axis=1)
    np.testing.assert_array_equal(ours.decode(samples, scale)[:, 1], ours.decode(ids, scale))
    for kind in (np.uint16, np.int8, ">i4"):
        decoded = ours.decode(np.minimum(ids, 100).astype(kind), scale)
        assert decoded.dtype == np.float32
        np.testing.assert_array_equal(decoded, ours.decode(np.minimum(ids, 100), scale))


def test_a_scale_is_the_packages_to_the_last_digit() -> None:
    """On x86, whose order of adding `row_sums` follows; two thirds of the rows differ in any other order."""
    rng = np.random.default_rng(2)
    same = []
    for length in (5, 40, 777, 9000):
        values = rng.random((200, length), np.float32)
        theirs = torch.nansum(torch.from_numpy(values), dim=-1).numpy()
        assert ulps(row_sums(values), theirs).max() <= 2
        same.append((row_sums(values) == theirs).mean())
    if platform.machine() == "x86_64":
        assert same == [1.0] * 4


def test_bad_input() -> None:
    ours = ChronosQuantizer(64, prediction_length=3)
    rows, scale = np.zeros((2, 3), np.float32), np.ones(2, np.float32)
    with pytest.raises(QuantizerError, match=r"a context: real numbers \(batch, time\), got float32 of shape \(3,\)"):
        ours.encode_context(rows[0])
    with pytest.raises(QuantizerError, match="got complex64"):
        ours.encode_context(rows.astype(np.complex64))
    with pytest.raises(QuantizerError, match=r"prediction_length 3\), got shape \(2, 2\)"):
        ours.encode_labels(rows[:, :2], scale)
    with pytest.raises(QuantizerError, match=r"one real number per row, \(2,\), got float32 of shape \(1,\)"):
        ours.encode_labels(rows, scale[:1])
    with pytest.raises(QuantizerError, match=r"scale: .* of shape \(2, 1\)"):
        ours.decode(np.zeros((2, 3), int), scale[:, None])
    with pytest.raises(QuantizerError, match="ids are 0 to 63, got 64 .and 1 more near it"):
        ours.decode(np.array([[3, 64], [63, 99]]), scale)
    with pytest.raises(QuantizerError, match="got -1 .and 0 more"):
        ours.decode(np.array([[3, -1], [63, 0]], np.int32), scale)
    with pytest.raises(QuantizerError, match="ids are integers .* got float32"):
        ours.decode(rows, scale)
    for sizes in ({"num_tokens": 7}, {"num_tokens": 2**20}, {"limit": 0.0}, {"limit": np.nan}, {"limit": 1e30}):
        with pytest.raises(QuantizerError, match="8 to 262144 ids and a limit within"):
            ChronosQuantizer(**sizes)
    with pytest.raises(QuantizerError, match="at least 1, got 0 and 64"):
        ChronosQuantizer(context_length=0)


def test_a_masked_array_is_missing_where_it_is_masked() -> None:
    """As NaN there, in contexts and labels, of numbers and of integers; an array whose mask is all False is whole."""
    quantizer = ChronosQuantizer(prediction_length=6)
    values = np.random.default_rng(3).standard_normal((2, 6)).astype(np.float32)
    hidden = np.zeros(values.shape, bool)
    hidden[0, 2:4] = hidden[1, 5] = True
    holed = np.where(hidden, np.float32(np.nan), values)
    by_mask, by_nan = quantizer.encode_context(np.ma.masked_array(values, hidden)), quantizer.encode_context(holed)
    for found, expected in zip(by_mask, by_nan, strict=True):
        np.testing.assert_array_equal(found, expected)
    scale = np.ones(2, np.float32)
    ids, mask = quantizer.encode_labels(np.ma.masked_array(values, hidden), scale)
    assert not mask[:, :6][hidden].any() and mask[:, :6][~hidden].all() and (ids[:, :6][hidden] == PAD).all()
    whole = np.ma.masked_array([[1, 2, 3]], mask=[[False, True, False]])
    assert quantizer.encode_context(whole)[1].tolist() == [[True, False, True, True]]
    assert quantizer.encode_context(np.ma.masked_array(values))[1].all()
