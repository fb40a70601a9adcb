"""`vocab` from hidden states against `token` on the full logits."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minillm_jax.objectives import policy as mini
from minillm_jax.objectives import reduce, token, vocab

B, N, DQ, DP, V = 4, 7, 5, 6, 11
LENGTHS = jnp.asarray([7, 3, 1, 5])
MASK = jnp.arange(N)[None] < LENGTHS[:, None]
WEIGHT = np.linspace(0.5, 2.0, B * N, dtype=np.float32).reshape(B, N)


def inputs(bias=True, vocab_q=V, vocab_p=V, dtype: Any = np.float32) -> Any:
    """Arguments of `vocab.scores`; heads of different sizes are the same in their first rows."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    q = draw(B, N, DQ), draw(V + 2, DQ)[:vocab_q], draw(V + 2)[:vocab_q] if bias else None
    p = draw(B, N, DP), draw(V + 2, DP)[:vocab_p], draw(V + 2)[:vocab_p] if bias else None
    return *q, *p, jnp.asarray(rng.integers(0, V, (B, N)), jnp.int32), MASK


def full(hidden_q, weight_q, bias_q, hidden_p, weight_p, bias_p, labels, mask, size=V):
    def logits(hidden, weight, bias):
        z = jnp.einsum("bnd,vd->bnv", reduce.keep(hidden, mask), weight[:size])
        return z if bias is None else z + bias[None, None, :size]

    q, p = logits(hidden_q, weight_q, bias_q), logits(hidden_p, weight_p, bias_p)
    p = jax.lax.stop_gradient(p)
    out = {
        "log_q": token.log_prob_of(q, labels),
        "log_p": token.log_prob_of(p, labels),
        "reverse_kl": token.reverse_kl(q, p),
        "forward_kl": token.forward_kl(q, p),
        "entropy": token.entropy(q),
        "teacher_entropy": token.entropy(p),
    }
    return {name: reduce.keep(value, mask) for name, value in out.items()}


def mixed(scores):
    """A loss that uses every score, each token with its own weight."""
    terms = [np.sin((i + 1) * WEIGHT) * scores[name] for i, name in enumerate(sorted(scores))]
    return sum(jnp.sum(term) for term in terms)


@pytest.mark.parametrize(("bias", "block"), [(True, 1), (True, 10), (False, 10), (False, 1000)])
def test_values_and_gradients_of_token(bias, block):
    with jax.enable_x64(True):
        args = inputs(bias, dtype=np.float64)
        which = (0, 1, 2) if bias else (0, 1)

        @partial(jax.jit, static_argnums=0)
        def jacobian(scores, *args):
            """Every score, and its gradient under a weight that varies from token to token."""

            def rows(*student):
                return scores(*student, *args[len(student) :])

            out, back = jax.vjp(rows, *(args[i] for i in which))
            zero = jax.tree.map(jnp.zeros_like, out)
            weight = jnp.cos(jnp.arange(B * N, dtype=jnp.float64)).reshape(B, N)
            return out, {name: back(zero | {name: weight}) for name in out}

        got, want = jacobian(partial(vocab.scores, block=block), *args), jacobian(full, *args)
        assert jax.tree.structure(got) == jax.tree.structure(want)
        for (path, a), b in zip(
            jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
        ):
            np.testing.assert_allclose(a, b, atol=1e-12, err_msg=str(path))


def per_token(scores, extras, mask):
    """MiniLLM's loss plus a term in everything else, nonlinear in the scores."""
    policy = mini.PRESETS["corrected"]
    loss = mini.losses(policy, scores["log_q"], scores["reverse_kl"], extras, mask)["loss"]
    return loss + scores["forward_kl"] ** 2 + scores["entropy"] * scores["teacher_entropy"]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_loss_sum_is_the_loss_of_the_scores(bias):
    with jax.enable_x64(True):
        args = inputs(bias, dtype=np.float64)
        base = jax.jit(full)(*args)
        targets = mini.prepare(
            mini.PRESETS["corrected"], base["log_p"], base["log_q"] - 0.1, base["log_q"], MASK
        )

        def slow(*args):
            return 3 * reduce.total(per_token(full(*args), targets, MASK), MASK).sum

        def fast(*args):
            value, scores = vocab.loss_sum(per_token, *args, extras=targets, block=8)
            return 3 * value, scores

        which = (0, 1, 2) if bias else (0, 1)
        want = jax.jit(jax.value_and_grad(slow, which))(*args)
        (value, scores), grads = jax.jit(jax.value_and_grad(fast, which, has_aux=True))(*args)
        np.testing.assert_allclose(value, want[0], rtol=1e-12)
        np.testing.assert_allclose(jax.jit(fast)(*args)[0], want[0], rtol=1e-12)
        for a, b in zip(grads, want[1], strict=True):
            np.testing.assert_allclose(a, b, atol=1e-11)
        for name, values in scores.items():
            np.testing.assert_allclose(values, base[name], atol=1e-12, err_msg=name)


def sums(name):
    """The two entry points as a scalar of the same arguments."""
    if name == "scores":
        return lambda *args, **options: mixed(vocab.scores(*args, **options))

    def loss(scores, weight, mask):
        return weight * jnp.stack([scores[key] ** 2 for key in sorted(scores)]).sum(0)

    return lambda *args, **options: vocab.loss_sum(loss, *args, extras=WEIGHT, **options)[0]


both = pytest.mark.parametrize("entry", ["scores", "loss_sum"])


@both
def test_padding_may_hold_anything(entry):
    args = inputs()
    run = jax.jit(jax.value_and_grad(lambda *a: sums(entry)(*a, block=8), argnums=(0, 1, 2)))
    want = run(*args)
    hidden = [jnp.where(MASK[..., None], args[i], jnp.nan) for i in (0, 3)]
    labels = jnp.where(MASK, args[6], 10**6)
    got = run(hidden[0], *args[1:3], hidden[1], *args[4:6], labels, MASK)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.any(got[1][0][~MASK])


@both
def test_the_teacher_gets_no_gradient(entry):
    for grad in jax.jit(jax.grad(sums(entry), argnums=(3, 4, 5)))(*inputs()):
        assert not np.any(grad)


@pytest.mark.parametrize(
    ("entry", "sizes", "vocab_size"),
    [
        ("scores", (V, V + 2), None),
        ("scores", (V + 2, V), None),
        ("loss_sum", (V + 2, V + 1), V),
    ],
)
def test_padded_vocabularies_are_cut(entry, sizes, vocab_size):
    args, same = inputs(True, *sizes), inputs(True, V, V)
    run = jax.jit(
        jax.value_and_grad(lambda *a: sums(entry)(*a, vocab_size=vocab_size), argnums=(0, 1, 2))
    )
    (value, grads), (want, reference) = run(*args), run(*same)
    np.testing.assert_allclose(value, want, rtol=1e-6)
    for a, b in zip(grads[1:], reference[1:], strict=True):
        np.testing.assert_allclose(a[:V], b, rtol=1e-5, atol=1e-6)
        assert not np.any(a[V:])


def test_a_vocabulary_larger_than_the_heads_is_refused():
    with pytest.raises(ValueError, match="vocab_size=12, but the heads have 11"):
        vocab.scores(*inputs(True, V, V + 2), vocab_size=V + 1)


def test_teacher_equal_to_student_is_exactly_zero():
    head = inputs()[:3]
    out = vocab.scores(*head, *head, *inputs()[6:])
    for name in ("reverse_kl", "forward_kl"):
        assert not np.any(out[name])


def test_large_logits_stay_finite():
    args = list(inputs())
    args[1], args[4] = 200 * args[1], 200 * args[4]
    value, grads = jax.jit(jax.value_and_grad(sums("scores"), argnums=(0, 1)))(*args)
    assert np.isfinite(value) and all(np.all(np.isfinite(grad)) for grad in grads)


def test_bfloat16_states_with_float32_weights():
    args = list(inputs())
    exact = vocab.scores(*args)
    args[0], args[3] = args[0].astype(jnp.bfloat16), args[3].astype(jnp.bfloat16)
    grads = jax.jit(jax.grad(sums("loss_sum"), argnums=(0, 1, 2)))(*args)
    assert [grad.dtype for grad in grads] == [jnp.bfloat16, jnp.float32, jnp.float32]
    out = vocab.scores(*args)
    assert out["reverse_kl"].dtype == jnp.float32
    np.testing.assert_allclose(out["reverse_kl"], exact["reverse_kl"], rtol=0.1, atol=0.1)


@both
def test_a_mesh_changes_nothing(entry):
    """Rows over two devices, the vocabulary over two; neither heads nor logits are gathered."""
    if len(jax.devices()) < 4:
        pytest.skip("needs 4 devices")
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model"))

    def put(x, *axes):
        spec = jax.sharding.PartitionSpec(*axes)
        return jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))

    q_h, q_w, q_b, p_h, p_w, p_b, labels, mask = inputs(True, V + 1, V + 1)
    spread = (
        *(put(q_h, "data"), put(q_w, "model"), put(q_b, "model")),
        *(put(p_h, "data"), put(p_w, "model"), put(p_b, "model")),
        *(put(labels, "data"), put(mask, "data")),
    )
    run = jax.jit(jax.value_and_grad(lambda *a: sums(entry)(*a, block=8), argnums=(0, 1, 2)))
    want = run(q_h, q_w, q_b, p_h, p_w, p_b, labels, mask)
    compiled = run.lower(*spread).compile()
    got = compiled(*spread)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert [grad.sharding.spec[0] for grad in got[1]] == ["data", "model", "model"]
    assert "all-gather" not in str(compiled.as_text())


@pytest.mark.optimized
@both
def test_no_array_of_the_whole_vocabulary_persists(entry):
    """Compiled for 64 positions in blocks of 4 of them, no buffer is as large as [B, N, V]."""
    rows, positions, size = 2, 64, 512
    args = (
        *(jnp.zeros((rows, positions, 4)), jnp.zeros((size, 4)), None) * 2,
        *(jnp.zeros((rows, positions), jnp.int32), jnp.ones((rows, positions), bool)),
    )

    def loss(scores, _, mask):
        return scores["reverse_kl"] - scores["log_q"]

    def run(*args):
        if entry == "loss_sum":
            return vocab.loss_sum(loss, *args, block=8)[0]
        out = vocab.scores(*args, block=8)
        return jnp.sum(loss(out, None, None))

    compiled = jax.jit(jax.grad(run, argnums=(0, 1))).lower(*args).compile()
    used = compiled.memory_analysis()
    assert used is not None and used.temp_size_in_bytes < rows * positions * size * 4 / 2


@pytest.mark.parametrize("kd_ratio", [0.0, 0.3, 1.0])
def test_mixed_cross_entropy_is_that_of_the_full_logits(kd_ratio):
    """With a teacher, and for a share of 0 without one: values and gradients of `token.corpus`."""
    with jax.enable_x64(True):
        args: tuple = inputs(dtype=np.float64)
        teacher: tuple = args[3:6] if kd_ratio else (None, None, None)
        weight = jnp.asarray(WEIGHT, jnp.float64)

        def loss(scores, weight, mask):
            return weight * vocab.mixed_cross_entropy(scores, kd_ratio)

        def blocks(*q):
            given: Any = (loss, *q, *teacher, *args[6:], weight)
            return vocab.loss_sum(*given, block=8)[0]

        def recomputed(*q):
            scores = vocab.scores(*q, *teacher, *args[6:], block=8)
            return jnp.sum(jnp.where(MASK, loss(scores, weight, MASK), 0))

        def logits(hidden, weight, bias):
            return jnp.einsum("bnd,vd->bnv", hidden, weight) + bias[None, None]

        def full(*q):
            values = token.corpus(logits(*q), logits(*args[3:6]), args[6], kd_ratio)
            return reduce.total(weight * values, MASK).sum

        want = jax.jit(jax.value_and_grad(full, (0, 1, 2)))(*args[:3])
        for found in (blocks, recomputed):
            got = jax.jit(jax.value_and_grad(found, (0, 1, 2)))(*args[:3])
            for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
                np.testing.assert_allclose(a, b, atol=1e-11)
        if not kd_ratio:
            assert set(vocab.scores(*args[:3], *teacher, *args[6:])) == {"log_q"}
