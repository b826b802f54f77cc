"""Spikes: a step whose loss stands far above the losses before it is named, with the rows that brought most of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from statistics import median

WINDOW = 50  # losses that a new one is compared with
_FEWEST = 20  # before that nothing is called a spike
_TIMES = 10.0  # robust standard deviations above the median
_TO_DEVIATION = 1.4826  # median absolute deviation -> standard deviation of a normal distribution
_LEAST = 0.02  # of the median's size: where losses hardly vary, a hair above them is no spike


class Spikes:
    """Losses of the last steps, and whether a new one is a spike.

    A spike is above median + 10 x 1.4826 x MAD of the last 50 finite losses (at least 20), and at least 2 % of the
    median's size above it. MAD is the median distance from the median; a few spikes in the window do not move it.

    Args:
        losses: of the steps before, oldest first: a run that goes on knows what the checkpoint's run knew.
    """

    def __init__(self, losses: Iterable[float | None] = ()) -> None:
        self._losses = deque((loss for loss in losses if loss is not None), maxlen=WINDOW)

    def add(self, loss: float | None) -> float | None:
        """Take a step's loss; the limit it is above where it is a spike, else None. A loss that is no number is not
        kept: it has a warning of its own."""
        limit = self.limit()
        if loss is not None:
            self._losses.append(loss)
        return limit if loss is not None and limit is not None and loss > limit else None

    def limit(self) -> float | None:
        """Above this a loss is a spike; None while too few are known."""
        if len(self._losses) < _FEWEST:
            return None
        middle = median(self._losses)
        deviation = _TO_DEVIATION * median(abs(loss - middle) for loss in self._losses)
        return middle + max(_TIMES * deviation, _LEAST * abs(middle))
