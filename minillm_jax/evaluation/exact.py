"""Exact match of an answer with a reference, after the normalisation of SQuAD but for articles.

Source: Rajpurkar et al. 2016 (arXiv 1606.05250), section 6; the reference code of MiniLLM keeps
"a", "an" and "the", which SQuAD drops.
"""

import string
from collections.abc import Sequence

_DROPPED = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """Lower case, no ASCII punctuation, one space between words."""
    return " ".join(text.lower().translate(_DROPPED).split())


def exact_match(answer: str, references: str | Sequence[str]) -> float:
    """1.0 if the answer equals one of the references once both are `normalised`, else 0.0.

    Raises ValueError without a reference.
    """
    if isinstance(references, str):
        references = [references]
    if not references:
        raise ValueError("exact_match needs at least one reference")
    return float(normalised(answer) in {normalised(reference) for reference in references})
