"""Decode loops have programs of their own, but not inside another one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minillm_jax.rollout.compiled import compiler_options, decoding


def test_the_products_of_a_cpu_are_not_those_of_ynnpack():
    x, kernel = jnp.ones((8, 576)), jnp.ones((576, 1536))

    def compiled(options):
        product = jax.jit(lambda x, kernel: 2 * (x @ kernel), compiler_options=options)
        return product.lower(x, kernel).compile().as_text() or ""

    if "ynn_fusion" not in compiled(None):
        pytest.skip("this XLA hands no products to YNNPACK")
    assert "ynn_fusion" not in compiled(compiler_options())


def test_within_another_program_it_is_a_part_of_that():
    scaled = decoding(static_argnames=("by",))(lambda x, by: (x @ x) * by)
    x = jax.random.normal(jax.random.key(0), (8, 8))
    alone = scaled(x, by=3)
    np.testing.assert_allclose(alone, 3 * (x @ x), rtol=1e-5)
    within = jax.jit(lambda x: scaled(x, by=3))
    np.testing.assert_allclose(within(x), alone, rtol=1e-5)
    assert jax.eval_shape(within, x).shape == (8, 8)
    assert "dot_general" in scaled.lower(x, by=3).as_text()
