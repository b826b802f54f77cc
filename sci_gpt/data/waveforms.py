"""Causal filtering and decimation of waveforms to the working rate: nothing after a sample changes it."""

from __future__ import annotations

import math

import numpy as np
from scipy import signal

from sci_gpt.errors import DataError

LOWEST_RATE, HIGHEST_RATE = 5.0, 20.0
_MEMORY_SHARE = 0.9  # of the low-pass's impulse response: what is later than that moves a value little


def decimation(rate_hz: float, target_hz: float) -> int:
    """Samples of the record per sample kept.

    Exact where the rate is a multiple of the target; otherwise the factor that comes nearest to the target within 5 to
    20 Hz; 1 where the record is slower than that.
    """
    factor = round(rate_hz / target_hz)
    if factor >= 1 and abs(rate_hz - factor * target_hz) < 1e-4 * rate_hz:
        return factor
    options = [k for k in range(1, math.ceil(rate_hz / LOWEST_RATE) + 1) if LOWEST_RATE <= rate_hz / k <= HIGHEST_RATE]
    return min(options, key=lambda k: abs(math.log(rate_hz / k / target_hz)), default=1)


def working_rate(
    data: np.ndarray, rate_hz: float, *, target_hz: float = 10.0, high_pass_hz: float | None = None
) -> tuple[np.ndarray, float]:
    """One continuous record at the working rate, filtered causally.

    A one-pass Chebyshev low-pass (order 8, 0.05 dB, at 0.8 of the new Nyquist frequency, the filter of
    `scipy.signal.decimate`) and, where asked, a one-pass Butterworth high-pass (order 2) that takes the offset of the
    digitizer away. Both start in the steady state of the first sample, so a constant record gives a constant from its
    first sample on: 0 after the high-pass, else 0.05 dB less than itself.

    Args:
        data: (samples,), any real type, no gap.
        rate_hz: sampling rate.
        target_hz: working rate; see `decimation` for rates that do not divide.
        high_pass_hz: corner of the high-pass, None for none.

    Returns:
        float64 (ceil(samples / factor),) and the new rate; sample k is at the time of sample k * factor of the record.

    Raises:
        DataError: an empty record, values that are not finite, or a corner above the Nyquist frequency.
    """
    values = np.asarray(data, np.float64)
    if not values.size or not np.isfinite(values).all():
        wrong = int((~np.isfinite(values)).sum())
        raise DataError(
            f"a waveform is finite and not empty, got {values.size} samples, {wrong} of them not finite; cut it "
            "at these"
        )
    factor = decimation(rate_hz, target_hz)
    if high_pass_hz is not None:
        if not 0 < high_pass_hz < rate_hz / 2:
            raise DataError(f"the high-pass corner {high_pass_hz} Hz must lie within 0..{rate_hz / 2} Hz")
        values = _one_pass(signal.butter(2, high_pass_hz, "highpass", fs=rate_hz, output="sos"), values)
    if factor > 1:
        values = _one_pass(_low_pass(factor), values)
    return values[::factor], rate_hz / factor


def flags_at_working_rate(flags: np.ndarray, rate_hz: float, *, target_hz: float = 10.0) -> np.ndarray:
    """Which samples at the working rate a flagged sample of the record is in: see `working_rate`, same lengths.

    The causal low-pass carries each raw value forward: a kept sample is flagged where a raw one is that lies within
    nine tenths of the filter's memory before it, or after the sample kept before. (A high-pass has a longer, fainter
    memory, which does not count.)

    Args:
        flags: bool (samples,).
        rate_hz, target_hz: as in `working_rate`.

    Returns:
        bool (ceil(samples / factor),).
    """
    factor = decimation(rate_hz, target_hz)
    if factor == 1:
        return flags.copy()
    impulse = np.zeros(64 * factor)
    impulse[0] = 1.0
    response = np.cumsum(np.abs(signal.sosfilt(_low_pass(factor), impulse)))
    memory = max(factor, int(np.searchsorted(response, _MEMORY_SHARE * response[-1])) + 1)
    before = np.concatenate([[0], np.cumsum(flags)])
    kept = np.arange(0, len(flags), factor)
    return np.asarray(before[kept + 1] > before[np.maximum(kept + 1 - memory, 0)])


def _low_pass(factor: int) -> np.ndarray:
    return np.asarray(signal.cheby1(8, 0.05, 0.8 / factor, output="sos"))


def _one_pass(sections: np.ndarray, values: np.ndarray) -> np.ndarray:
    state = signal.sosfilt_zi(sections) * values[0]
    filtered, _ = signal.sosfilt(sections, values, zi=state)
    return np.asarray(filtered)
