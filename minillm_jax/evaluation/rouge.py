"""Rouge-L as LMOps measures it: the `rouge-score` package, with its stemmer, F1.

The package lower-cases and keeps only runs of a-z and 0-9: text in another script scores 0.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

from minillm_jax.types import InputError


@functools.cache
def _scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer  # pulls in nltk, half a second
    except ImportError as error:
        raise InputError("Rouge-L needs rouge-score: pip install rouge-score") from error
    return RougeScorer(["rougeL"], use_stemmer=True)


def rouge_l(answer: str, references: str | Sequence[str]) -> float:
    """Rouge-L F1 in [0, 1], the best over several references (Lin 2004, section 3).

    F1 = 2PR / (P + R), with P and R the longest common subsequence of words over the words of the
    answer and of the reference. Raises ValueError without a reference.
    """
    if isinstance(references, str):
        references = [references]
    if not references:
        raise ValueError("rouge_l needs at least one reference")
    return max(_scorer().score(reference, answer)["rougeL"].fmeasure for reference in references)


def mean_rouge_l(answers: Sequence[str], references: Sequence[str | Sequence[str]]) -> float:
    """Mean of `rouge_l` over a set of answers, in [0, 1]; NaN for an empty set."""
    scores = [rouge_l(*pair) for pair in zip(answers, references, strict=True)]
    return sum(scores) / len(scores) if scores else math.nan
