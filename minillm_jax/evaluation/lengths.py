"""Figures by the length of the reference answer, in the buckets of the paper's section 3.3.

A length is the number of whitespace-separated words of the first reference. The paper reports that
MiniLLM gains on references of six words and more, where there is more than one way to answer.
"""

import math
from collections.abc import Mapping, Sequence

from minillm_jax.evaluation.text import words

BUCKETS: tuple[tuple[int, float], ...] = ((0, 5), (6, 10), (11, math.inf))


def name(bucket: tuple[int, float]) -> str:
    """`0-5`, `6-10`, `11-`."""
    low, high = bucket
    return f"{low}-" if high == math.inf else f"{low}-{high:.0f}"


def by_length(
    scores: Mapping[str, Sequence[float]], references: Sequence[Sequence[str]]
) -> dict[str, dict[str, float]]:
    """Mean of every score over the answers of each bucket, and how many there are as `count`.

    `scores` holds one number per answer under each name; a bucket without answers is left out.
    """
    lengths = [len(words(reference[0])) for reference in references]
    found = {}
    for bucket in BUCKETS:
        rows = [i for i, length in enumerate(lengths) if bucket[0] <= length <= bucket[1]]
        if rows:
            means = {
                key: sum(values[i] for i in rows) / len(rows) for key, values in scores.items()
            }
            found[name(bucket)] = {"count": len(rows)} | means
    return found
