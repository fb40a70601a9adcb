"""How good the answers of a model are."""

from minillm_jax.evaluation.rouge import mean_rouge_l, rouge_l
from minillm_jax.evaluation.text import describe, distinct_n, loops, repetition, words

__all__ = ["describe", "distinct_n", "loops", "mean_rouge_l", "repetition", "rouge_l", "words"]
