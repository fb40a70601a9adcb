"""Several runs of one measurement as one figure: the mean over seeds and the deviation."""

import math
from collections.abc import Mapping, Sequence

DEVIATION = "_deviation"


def deviation(values: Sequence[float]) -> float:
    """Standard deviation between `values`, with n - 1; NaN for fewer than two."""
    if len(values) < 2:
        return math.nan
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


def over_seeds(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of every figure over the runs and, of several runs, its deviation as `NAME_deviation`.

    All runs must have the same figures.
    """
    found: dict[str, float] = {}
    for key in runs[0]:
        values = [run[key] for run in runs]
        found[key] = sum(values) / len(values)
        if len(values) > 1:
            found[key + DEVIATION] = deviation(values)
    return found
