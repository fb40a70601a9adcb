"""Text statistics of answers: diversity, repetition, loops and length. No model is involved.

An answer is a sequence of units, token ids or words (`words`); an end-of-sequence token is not
part of it. Figures of two models compare only over the same unit and the same length limit.
"""

import math
from collections.abc import Hashable, Iterable, Sequence

Answer = Sequence[Hashable]


def words(text: str) -> list[str]:
    """The whitespace-separated words of `text`, with their case and punctuation."""
    return text.split()


def ngrams(answer: Answer, n: int) -> list[tuple[Hashable, ...]]:
    """The `n`-grams of `answer` in order; none when it is shorter than `n`."""
    return [tuple(answer[i : i + n]) for i in range(len(answer) - n + 1)]


def distinct_n(answers: Iterable[Answer], n: int = 4) -> float:
    """Distinct `n`-grams over all `n`-grams of a set of answers: Dist-4 of the paper, Table 5.

    It falls with the size of the set, so compare sets of the same prompts. NaN without any n-gram.
    """
    grams = [gram for answer in answers for gram in ngrams(answer, n)]
    return len(set(grams)) / len(grams) if grams else math.nan


def repetition(answer: Answer, n: int = 4) -> float:
    """Fraction of the `n`-grams of one answer that occurred earlier in it; 0 when too short."""
    grams = ngrams(answer, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def loops(answer: Answer, n: int = 4, repeats: int = 3, limit: float = 0.3) -> bool:
    """Whether the answer is caught in a loop.

    It is when either holds:

    * it ends in one span, of any length, said at least `repeats` times in a row, the last of them
      possibly cut by the length limit, and those repeats make up at least `n` units
      (so that a closing "ha ha ha" or "..." is not a loop);
    * more than `limit` of its `n`-grams occurred earlier in it (`repetition`).
    """
    if repetition(answer, n) > limit:
        return True
    for span in range(1, len(answer) // repeats + 1):
        # A tail of period `span`: any such tail of repeats * span units holds `repeats` whole
        # spans, wherever the limit cut the last one.
        tail = max(repeats * span, n)
        if tail <= len(answer) and all(
            answer[-i] == answer[-i - span] for i in range(1, tail - span + 1)
        ):
            return True
    return False


def describe(answers: Sequence[Answer], n: int = 4) -> dict[str, float]:
    """Mean length in units, `distinct_<n>` of the set, mean `repetition`, and fraction that loops.

    All NaN for an empty set.
    """
    total = len(answers) or math.nan
    return {
        "length": sum(len(answer) for answer in answers) / total,
        f"distinct_{n}": distinct_n(answers, n),
        "repetition": sum(repetition(answer, n) for answer in answers) / total,
        "loops": sum(loops(answer, n) for answer in answers) / total,
    }
