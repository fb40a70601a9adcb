"""An update that reads each distinct token once is the update."""

from dataclasses import replace
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minillm_jax.methods import divergence, minillm, sft
from minillm_jax.methods.corpus import CorpusLoss
from minillm_jax.methods.on_policy import OnPolicy
from minillm_jax.models import decoder
from minillm_jax.objectives.policy import PRESETS
from tests.methods import test_minillm as mini
from tests.methods.test_sft import batch
from tests.methods.test_windows import start

KINDS = "sft", "divergence", "minillm", "corpus"


def made(kind, micro_batches, **more) -> Any:
    """A method of each file of `methods/`."""
    common = {"micro_batches": micro_batches, "ragged": True} | more
    if kind == "sft":
        return sft.method(mini.STUDENT, mini.SGD, lambda _: 0.1, vocab=mini.VOCAB, **common)
    models = mini.STUDENT, mini.TEACHER, mini.SGD, lambda _: 0.1
    if kind in ("minillm", "corpus"):
        common["corpus"] = CorpusLoss(0.5, 0.5) if kind == "corpus" else None
        return minillm.method(*models, policy=PRESETS["corrected"], mixing=mini.MIXING, **common)
    share = common.pop("share", 0.0)
    reads = OnPolicy(share, 4, eos_id=0, pad_id=0, vocab=mini.VOCAB)
    return divergence.method(*models, divergence="jsd", on_policy=reads, kd_ratio=0.5, **common)


def rows(kind) -> Any:
    """A batch whose prompts begin alike, with blocks of text of unequal length."""
    given = mini.rollout() if kind in ("minillm", "corpus") else batch()
    prompt, mask = np.array(given.prompt), np.asarray(given.prompt_mask)
    for row, real in zip(prompt, mask, strict=True):
        row[np.flatnonzero(real)[:1]] = 3
    given = replace(given, prompt=prompt)
    if kind != "corpus":
        return given
    text = np.arange(len(prompt) * 6).reshape(-1, 6) % (mini.VOCAB - 1) + 1
    text[:, 0] = 3
    return given, np.where(np.arange(6)[None] < 2 + np.arange(len(prompt))[:, None] % 4, text, -1)


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_reading_each_token_once_changes_no_update(kind, micro_batches, monkeypatch):
    method, given = made(kind, micro_batches), rows(kind)
    want, metrics = method.update(start(), mini.P, given)
    read, begin = [], decoder.Decoder.start

    def watched(self, tokens, *rest):
        read.append(tokens.shape)
        return begin(self, tokens, *rest)

    monkeypatch.setattr(decoder.Decoder, "start", watched)
    most = method.most(given)
    got, found = method.update(start(), mini.P, given, most=most)
    sizes = most if isinstance(most, tuple) else (most,)
    assert set(read) == {(1, size) for size in sizes if size}
    for name, value in metrics.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    scale = float(jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(want.opt_state[0].trace))))
    chex.assert_trees_all_close(got.opt_state[0].trace, want.opt_state[0].trace, atol=1e-5 * scale)


def test_what_is_not_known_before_is_not_told():
    assert made("divergence", 1, share=0.5).most is None  # the student may write
    assert made("sft", 1, windows=(4, 8)).most is None
    assert made("sft", 1, ragged=False).most is None
    for kind in ("sft", "divergence"):  # each row has a dropout of its own
        assert made(kind, 1).most and made(kind, 1, dropout_seed=0).most is None


def test_rows_and_text_are_read_in_one_share_of_their_slots():
    method, (given, text) = made("corpus", 1), rows("corpus")
    slots = given.prompt.size + given.response.size
    most, blocks = method.most((given, text))
    assert most / slots == blocks / text.size < 1
    short = np.where(np.arange(6)[None] < 2, text, -1)
    assert method.most((given, short))[0] == most  # text that needs less is read as they are
    full = np.arange(text.size).reshape(text.shape)  # nothing to leave out, and no row waits for it
    assert method.most((given, full)) == (most, None)
