"""Windows: an update that reads no further than its rows reach is the update."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minillm_jax.methods import divergence, minillm, sft
from minillm_jax.methods.accumulate import lengths, spread
from minillm_jax.methods.on_policy import OnPolicy
from minillm_jax.models import decoder
from minillm_jax.objectives import vocab
from minillm_jax.objectives.policy import PRESETS
from minillm_jax.train_state import TrainState
from tests.methods import test_minillm as mini
from tests.methods.test_sft import batch

MICRO = 4


def made(kind, windows) -> Any:
    """A method of each file of `methods/`."""
    common = {"micro_batches": MICRO, "windows": windows}
    if kind == "sft":
        return sft.method(mini.STUDENT, mini.SGD, lambda _: 0.1, vocab=mini.VOCAB, **common)
    models = mini.STUDENT, mini.TEACHER, mini.SGD, lambda _: 0.1
    if kind == "minillm":
        return minillm.method(*models, policy=PRESETS["corrected"], mixing=mini.MIXING, **common)
    reads = OnPolicy(0.0, 4, eos_id=0, pad_id=0, vocab=mini.VOCAB)
    return divergence.method(*models, divergence="jsd", on_policy=reads, kd_ratio=0.5, **common)


def start() -> Any:
    zero = [jnp.zeros((), jnp.int32) for _ in range(3)]
    params = jax.tree.map(jnp.copy, mini.Q)
    return TrainState(zero[0], params, mini.SGD.init(params), zero[1], zero[2])


@pytest.mark.parametrize("kind", ["sft", "divergence", "minillm"])
def test_windows_change_no_update(kind, monkeypatch):
    given = mini.rollout() if kind == "minillm" else batch()
    tokens = np.asarray(lengths(given))
    most = given.prompt.shape[1] + given.response.shape[1]
    windows = (int(np.sort(tokens)[len(tokens) // 4]), int(tokens.max()), most)
    rows = spread(tokens, MICRO)
    arranged = jax.tree.map(lambda x: x[rows], given)
    want, metrics = made(kind, ()).update(start(), mini.P, given)
    read, forward = [], decoder.Decoder.__call__

    @functools.wraps(forward)
    def watched(self, tokens, *rest, **options):
        read.append(tokens.shape[1])
        return forward(self, tokens, *rest, **options)

    asked, loss_sum = [], vocab.loss_sum

    def in_blocks(*args, **options):
        asked.append(options["short"])
        return loss_sum(*args, block=4, **options)  # a position of the rows of a micro-batch

    monkeypatch.setattr(decoder.Decoder, "__call__", watched)
    monkeypatch.setattr(vocab, "loss_sum", in_blocks)
    got, found = made(kind, windows).update(start(), mini.P, arranged)
    assert set(read) == set(windows)  # each is traced; which one runs: test_accumulate
    assert all(asked)
    for name, value in metrics.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    scale = float(jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(want.opt_state[0].trace))))
    chex.assert_trees_all_close(got.opt_state[0].trace, want.opt_state[0].trace, atol=1e-5 * scale)
