"""Micro-batches: gradients and metrics are those of the whole batch, by hand and however cut."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minillm_jax.methods.accumulate import dropout_keys, gradients, spread
from minillm_jax.objectives import reduce
from minillm_jax.sharding import batch_sharding, make_mesh, replicated

ATOL = 1e-6
ROWS, SLOTS = 8, 5
RNG = np.random.default_rng(0)
X = RNG.normal(size=(ROWS, SLOTS)).astype(np.float32)
# Unequal lengths, so that a mean of micro-batch means is wrong; one micro-batch of 2 is empty.
MASK = np.arange(SLOTS)[None] < np.array([5, 1, 2, 4, 0, 0, 3, 1])[:, None]
PARAMS = {"w": jnp.float32(1.5), "v": jnp.float32(-0.5)}


def loss_sums(params, batch, window):
    x, mask = (leaf[:, :window] for leaf in batch)
    values = params["w"] * x + params["v"] * jnp.square(x)
    return {
        "loss": reduce.total(values, mask),
        "per_sequence": reduce.total(values, mask, "sequence"),
        "window": reduce.Pair(jnp.float32(window or SLOTS), jnp.float32(1)),
    }


@partial(jax.jit, static_argnums=0)
def run(micro_batches, batch):
    return gradients(loss_sums, PARAMS, batch, micro_batches)


@pytest.mark.parametrize("micro_batches", [1, 2, 4, 8])
def test_gradient_and_metrics_are_those_of_the_whole_batch(micro_batches):
    grads, metrics = run(micro_batches, (X, MASK))
    x = X[MASK].astype(np.float64)
    np.testing.assert_allclose(grads["w"], x.mean(), atol=ATOL)
    np.testing.assert_allclose(grads["v"], np.square(x).mean(), atol=ATOL)
    value = 1.5 * x.sum() - 0.5 * np.square(x).sum()
    np.testing.assert_allclose(metrics["loss"], value / 16, atol=ATOL)
    np.testing.assert_allclose(metrics["per_sequence"], value / 6, atol=ATOL)


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_a_batch_without_tokens_gives_zeros(micro_batches):
    grads, metrics = run(micro_batches, (X, np.zeros_like(MASK)))
    metrics.pop("window")
    assert all(leaf == 0 for leaf in jax.tree.leaves((grads, metrics)))


def test_micro_batches_that_do_not_divide_are_refused():
    with pytest.raises(TypeError, match="reshape"):
        run(3, (X, MASK))


def on_a_mesh(sums, batch, *sizes):
    """Gradients over two micro-batches, the metrics, and the text of the program."""
    mesh = make_mesh(*sizes)
    rows, whole = batch_sharding(mesh), replicated(mesh)
    homes = jax.tree.map(lambda x: rows if x.ndim > 1 else whole, batch)
    params = {"w": jnp.linspace(-1, 1, SLOTS)[None], "v": jnp.float32(-0.5)}
    with jax.set_mesh(mesh):
        params, placed = jax.device_put((params, batch), (whole, homes))
        program = (
            jax.jit(lambda params, batch: gradients(sums, params, batch, 2))
            .lower(params, placed)
            .compile()
        )
        return *jax.device_get(program(params, placed)), program.as_text() or ""


@pytest.mark.optimized
@pytest.mark.parametrize("sizes", [(4, 1, 2), (4, 2, 1)], ids=str)
def test_devices_along_data_send_their_gradients_once(sizes):
    batch = jnp.asarray(X), jnp.asarray(MASK)
    alone, metrics, _ = on_a_mesh(loss_sums, batch, 1, 8, 1)
    grads, found, text = on_a_mesh(loss_sums, batch, *sizes)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=ATOL), grads, alone)
    np.testing.assert_allclose(found["loss"], metrics["loss"], atol=ATOL)
    sent = [line for line in text.splitlines() if " all-reduce(" in line]
    over_data = [line for line in sent if "psum" in line]
    assert over_data and not any("/while/" in line for line in over_data)
    if sizes[1] == 1:  # nothing else is split
        assert not any("/while/" in line for line in sent)


def test_devices_along_data_have_keys_of_their_own():
    def sums(params, batch, window):
        x, key = batch
        values = params["v"] * x[:, :1] * jax.random.uniform(key[0], (len(x), 1))
        return {"loss": reduce.total(values, jnp.ones_like(values, bool))}

    keys = dropout_keys(3, jnp.int32(5), 2)
    assert keys is not None
    _, metrics, _ = on_a_mesh(sums, (jnp.ones((ROWS, 1)), keys), 4, 1, 2)
    own = [jax.random.uniform(jax.random.fold_in(key, i), (1, 1)) for key in keys for i in range(4)]
    np.testing.assert_allclose(metrics["loss"], -0.5 * np.mean(own), atol=ATOL)


def test_a_micro_batch_is_read_as_far_as_its_longest_row():
    tokens, order = MASK.sum(axis=1), spread(MASK.sum(axis=1), 4)
    assert [sorted(tokens[order[i::4]]) for i in range(4)] == [[0, 0], [1, 1], [2, 3], [4, 5]]
    whole, metrics = run(4, (X, MASK))
    assert metrics["window"] == SLOTS
    cut = jax.jit(
        lambda batch, tokens, parts: gradients(
            loss_sums, PARAMS, batch, parts, windows=(1, 3, SLOTS), tokens=tokens
        ),
        static_argnums=2,
    )
    # Rows (5, 0), (1, 0), (2, 3), (4, 1) as they come; two by two in their order; all at once.
    as_they_come = np.arange(ROWS)
    for rows, parts, mean in ((as_they_come, 4, 3.5), (order, 4, 2.5), (order, 1, 5)):
        grads, found = cut((X[rows], MASK[rows]), tokens[rows], parts)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=ATOL), grads, whole)
        np.testing.assert_allclose(found["loss"], metrics["loss"], atol=ATOL)
        assert found["window"] == mean
