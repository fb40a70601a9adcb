"""Calibration: whether a model is right as often as its confidence says.

    ECE = sum_b |B_b| / n |acc(B_b) - conf(B_b)|

over bins of equal width of the confidence, the probability of the label that the model prefers
(Naeini et al. 2015; Guo et al. 2017, arXiv 1706.04599, eq. 3). The paper (section 3.3) asks SST-2
and BoolQ as instructions and reads the probabilities of the label words; it does not say how many
bins, here 10.
"""

import numpy as np
from numpy.typing import ArrayLike

BINS = 10


def label_probabilities(nll: ArrayLike) -> np.ndarray:
    """Probability of each label among the labels, [R, C], from -log q of its words [R, C].

    The words of a label are its whole text: of several tokens the product of their probabilities.
    """
    score = -np.asarray(nll, np.float64)
    weight = np.exp(score - score.max(axis=1, keepdims=True))
    return weight / weight.sum(axis=1, keepdims=True)


def reliability(
    probabilities: ArrayLike, labels: ArrayLike, bins: int = BINS
) -> list[dict[str, float]]:
    """One object per bin that is not empty: `count`, mean `confidence`, `accuracy`, its edges.

    `probabilities` [R, C] sum to 1, `labels` [R] are the true ones. A bin includes its upper edge.
    """
    probabilities = np.asarray(probabilities, np.float64)
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == np.asarray(labels)
    which = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    return [
        {
            "low": b / bins,
            "high": (b + 1) / bins,
            "count": int((which == b).sum()),
            "confidence": float(confidence[which == b].mean()),
            "accuracy": float(right[which == b].mean()),
        }
        for b in sorted(set(which.tolist()))
    ]


def figures(probabilities: ArrayLike, labels: ArrayLike, bins: int = BINS) -> dict[str, float]:
    """`ece`, `accuracy` and mean `confidence`, all fractions."""
    found = reliability(probabilities, labels, bins)
    total = sum(b["count"] for b in found)

    def mean(value):
        return sum(b["count"] * value(b) for b in found) / total

    return {
        "ece": mean(lambda b: abs(b["accuracy"] - b["confidence"])),
        "accuracy": mean(lambda b: b["accuracy"]),
        "confidence": mean(lambda b: b["confidence"]),
    }
