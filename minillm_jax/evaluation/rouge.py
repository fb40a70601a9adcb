"""Rouge-L as LMOps measures it: the `rouge-score` package, with its stemmer, F1.

The package lower-cases and keeps only runs of a-z and 0-9: text in another script scores 0.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from minillm_jax.types import InputError


@functools.cache
def _scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer  # pulls in nltk, half a second
        from rouge_score.tokenizers import DefaultTokenizer
    except ImportError as error:
        raise InputError("Rouge-L needs rouge-score: pip install rouge-score") from error
    # A text is compared with several; its stems take longer than its common subsequences.
    stems = functools.lru_cache(4096)(DefaultTokenizer(use_stemmer=True).tokenize)
    return RougeScorer(["rougeL"], tokenizer=SimpleNamespace(tokenize=stems))


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


def self_rouge_l(groups: Sequence[Sequence[str]], others: int = 4) -> float:
    """Mean Rouge-L between the answers of a group, over all groups, in [0, 1]: low is diverse.

    The measure of Zhu et al. 2018 (Texygen, arXiv 1802.01886), with Rouge-L in place of BLEU. A
    group is a set of answers to different prompts, or of answers to one prompt. Of a large group
    each answer is compared with its next `others`, in a circle, alone. NaN without a pair.
    """
    scores = [
        rouge_l(answers[i], answers[(i + step) % len(answers)])
        for answers in groups
        for i, step in itertools.product(range(len(answers)), range(1, others + 1))
        if step < len(answers)
    ]
    return sum(scores) / len(scores) if scores else math.nan
