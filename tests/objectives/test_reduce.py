import jax
import jax.numpy as jnp
import numpy as np

from minillm_jax.objectives import reduce

VALUES = jnp.asarray([[1.0, 2.0, jnp.nan], [4.0, jnp.inf, 9.0], [7.0, 7.0, 7.0]])
MASK = jnp.asarray([[1, 1, 0], [1, 0, 0], [0, 0, 0]], bool)


def test_totals_by_hand():
    assert reduce.total(VALUES, MASK) == (7, 3)
    assert reduce.total(VALUES, MASK, "sequence") == (7, 2)


def test_sums_of_rows_by_hand():
    found = reduce.row_sums(VALUES, MASK)
    for row, values, mask in zip(found, VALUES, MASK, strict=True):
        assert row == reduce.total(values[None], mask[None]).sum


def test_mean_does_not_depend_on_the_padding():
    """A mean over all slots would (the KL of Tunix and others)."""
    wide = jnp.pad(VALUES, ((0, 0), (0, 5))), jnp.pad(MASK, ((0, 0), (0, 5)))
    for per in ("token", "sequence"):
        assert reduce.mean(reduce.total(*wide, per)) == reduce.mean(reduce.total(VALUES, MASK, per))


def test_parts_add_up_to_the_whole():
    parts = [{"loss": reduce.total(VALUES[i : i + 1], MASK[i : i + 1])} for i in range(3)]
    both = reduce.add(reduce.add(parts[0], parts[1]), parts[2])
    assert reduce.mean(both)["loss"] == 7 / 3
    assert reduce.mean({"loss": reduce.total(VALUES, MASK)})["loss"] == np.float32(7 / 3)


def test_nothing_counted_is_zero():
    assert reduce.mean(reduce.total(VALUES, jnp.zeros_like(MASK))) == 0


def test_keep_stops_the_gradient_of_nan():
    grad = jax.grad(lambda x: jnp.sum(jnp.exp(reduce.keep(x, MASK)) * MASK))(VALUES)
    np.testing.assert_allclose(grad, np.where(MASK, np.exp(np.asarray(VALUES)), 0), rtol=1e-6)
    cube = reduce.keep(jnp.broadcast_to(VALUES[..., None], (3, 3, 2)), MASK)
    np.testing.assert_array_equal(cube[..., 1], np.where(MASK, VALUES, 0))


def test_effective_sample_size():
    mask = jnp.asarray([[1, 1, 0]], bool)
    assert reduce.effective_sample_size(jnp.asarray([[2.0, 2.0, jnp.nan]]), mask) == 1
    assert reduce.effective_sample_size(jnp.asarray([[1.0, 0.0, 5.0]]), mask) == 0.5
    np.testing.assert_allclose(
        reduce.effective_sample_size(jnp.asarray([[1.0, 3.0, 5.0]]), mask), 16 / 20
    )
    assert reduce.effective_sample_size(jnp.zeros((1, 3)), mask) == 0
