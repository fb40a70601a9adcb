"""What has ended, or is padding, is not multiplied: counted in the products of a CPU, in C++."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minillm_jax.models import native, unstack
from minillm_jax.rollout import Mixing, Warp, collect, generate
from minillm_jax.rollout.mixed import scored_at_once, throw_coins
from tests.toy_models import prompts, toy

VOCAB, EOS, SLOTS = 7, 0, 12
STUDENT, Q = toy(0, vocab=VOCAB)
TEACHER, P = toy(1, vocab=VOCAB, layers=3, width=24)
PROMPT, MASK = prompts(8, 5, VOCAB)

pytestmark = pytest.mark.skipif(native._library() is None, reason="no C++ compiler here")


class Counts:
    """Sums by kind and width; what is added comes from several threads."""

    def __init__(self):
        self.added = []

    def add(self, kind, width, n):
        self.added.append((kind, width, int(n)))

    def of(self, kind):
        jax.effects_barrier()
        widths = {width for name, width, _ in self.added if name == kind}
        return {w: sum(n for k, at, n in self.added if (k, at) == (kind, w)) for w in widths}


@pytest.fixture
def counts(monkeypatch):
    """Rows that products multiply, and products of the head, by the width of the model."""
    found, dot, scores = Counts(), native.dot, native.scores

    def counted_dot(x, kernel):
        if kernel.tiles.shape[1] == x.shape[1] and x.shape[1] in (STUDENT.width, TEACHER.width):
            jax.debug.callback(partial(found.add, "rows", x.shape[1]), jnp.sum(kernel.real))
        return dot(x, kernel)

    def counted_scores(x, words):
        jax.debug.callback(partial(found.add, "heads", x.shape[1]), 1)
        return scores(x, words)

    jax.clear_caches()  # programs without the counts
    monkeypatch.setattr(native, "dot", counted_dot)
    monkeypatch.setattr(native, "scores", counted_scores)
    yield found
    jax.clear_caches()


def products(config, params):
    """Products of a token with kernels that read states of the model's width."""
    layers = unstack(config, params, "float32").layers
    kernels = jax.tree.leaves(layers, is_leaf=lambda leaf: isinstance(leaf, native.Packed))
    packed = [leaf for leaf in kernels if isinstance(leaf, native.Packed)]
    return sum(leaf.tiles.shape[1] == config.width for leaf in packed)


def test_generation_multiplies_no_more_than_the_tokens(counts):
    found = generate(
        STUDENT, Q, PROMPT, MASK, jax.random.key(2), slots=SLOTS, warp=Warp(), eos_id=EOS,
        pad_id=0, vocab=VOCAB,
    )  # fmt: skip
    written = int(found.mask.sum())
    assert written < found.mask.size and not MASK.all()
    read = int(MASK.sum()) + written - len(PROMPT)  # nobody reads the last token of a row
    assert counts.of("rows") == {STUDENT.width: products(STUDENT, Q) * read}


def test_a_collection_multiplies_no_more_and_asks_the_teacher_when_its_coin_is_up(counts):
    key = jax.random.key(4)
    mixing = Mixing(slots=SLOTS, alpha=0.3, chunk=3, eos_id=EOS, pad_id=EOS, vocab=VOCAB)
    found = collect(STUDENT, TEACHER, Q, P, PROMPT, MASK, key, mixing)
    written, longest = int(found.response_mask.sum()), int(found.response_mask.sum(1).max())
    assert written < found.response_mask.size
    ended = int(jnp.any(found.response_mask & (found.response == EOS), axis=1).sum())
    prompt = int(MASK.sum())
    assert counts.of("rows") == {
        STUDENT.width: products(STUDENT, Q) * (prompt + written - ended),
        TEACHER.width: products(TEACHER, P) * (prompt + written),
    }
    coins = np.asarray(throw_coins(key, mixing))[:longest]
    assert 0 < coins.sum() < len(coins)
    slices = -(-longest // scored_at_once(SLOTS, len(PROMPT)))  # log p of all tokens
    assert counts.of("heads") == {STUDENT.width: longest, TEACHER.width: coins.sum() + slices}
