"""Small accumulators for what scrolls by: averages and rates. No objective is computed here."""

import math
import time
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np


class MovingAverage:
    """Mean of the last `window` finite values; NaN before the first."""

    def __init__(self, window: int):
        self._values: deque[float] = deque(maxlen=window)

    def add(self, value: float) -> float:
        """Take one value and return the mean; a non-finite value is left out."""
        if math.isfinite(value):
            self._values.append(float(value))
        return self.value

    @property
    def value(self) -> float:
        """The mean of what is in the window."""
        return sum(self._values) / len(self._values) if self._values else math.nan


class Ema:
    """Exponential moving average without the bias of a zero start (Kingma & Ba 2015, section 3)."""

    def __init__(self, decay: float):
        self._decay, self._sum, self._weight = decay, 0.0, 0.0

    def add(self, value: float) -> float:
        """Take one value and return the average; a non-finite value is left out."""
        if math.isfinite(value):
            self._sum = self._decay * self._sum + (1 - self._decay) * value
            self._weight = self._decay * self._weight + (1 - self._decay)
        return self.value

    @property
    def value(self) -> float:
        """The average so far; NaN before the first value."""
        return self._sum / self._weight if self._weight else math.nan


class Rate:
    """Amount per second over the last `window` updates.

    The first interval, which holds the compilation, counts only until there is a second one.
    """

    def __init__(self, window: int = 20, clock: Callable[[], float] = time.monotonic):
        self._clock, self._last = clock, clock()
        self._intervals: deque[tuple[float, float]] = deque(maxlen=window)  # amount, seconds
        self._updates = 0

    def add(self, amount: float) -> float:
        """Count `amount` as done since the previous call and return the rate."""
        now = self._clock()
        if self._updates == 1:
            self._intervals.clear()
        self._intervals.append((amount, now - self._last))
        self._last, self._updates = now, self._updates + 1
        return self.value

    @property
    def settled(self) -> bool:
        """Whether there is an interval without compilation to tell the rest by."""
        return self._updates > 1

    @property
    def value(self) -> float:
        """Amount per second; NaN before the first update."""
        seconds = sum(seconds for _, seconds in self._intervals)
        return sum(amount for amount, _ in self._intervals) / seconds if seconds > 0 else math.nan


def smooth(values: Sequence[float] | np.ndarray, window: int) -> np.ndarray:
    """Centred moving average of `window` values, cut off at both ends; NaN counts as absent."""
    values = np.asarray(values, np.float64)
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    index = np.arange(len(values))
    low = np.maximum(index - window // 2, 0)
    high = np.minimum(index + window // 2 + 1, len(values))
    number = counts[high] - counts[low]
    return np.where(number > 0, (sums[high] - sums[low]) / np.maximum(number, 1), np.nan)
