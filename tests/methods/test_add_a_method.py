"""The worked example of docs/add_a_method.md, run as it stands there."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.common import base
from minillm_jax.methods import registry
from minillm_jax.objectives import divergences
from tests.methods.test_divergence import P, batch, method, start

DOC = Path(__file__).parents[2] / "docs/add_a_method.md"


@pytest.fixture
def example(monkeypatch):
    """The method of the document, among those that are shipped for as long as a test takes."""
    (source,) = re.findall(r"```python\n(.*?)```", DOC.read_text(encoding="utf-8"), re.DOTALL)
    assert "jeffreys" not in registry.METHODS
    monkeypatch.setattr(registry, "METHODS", dict(registry.METHODS))
    monkeypatch.setattr(divergences, "DIVERGENCES", dict(divergences.DIVERGENCES))
    exec(compile(source, str(DOC), "exec"), {})
    return source


def test_its_loss_is_what_it_says_and_its_gradient_moves_the_student(example):
    made = method("jeffreys", parameter=0.9)
    _, metrics = made.update(start(made), P, batch())
    want = 0.9 * metrics["reverse_kl"] + 0.1 * metrics["forward_kl"]
    np.testing.assert_allclose(metrics["loss"], want, rtol=1e-5)
    assert metrics["grad_norm"] > 0.01
    q, p = jnp.asarray([0.0, 1.0, 2.0]), jnp.asarray([1.0, 0.0, 0.5])
    value = divergences.find("jeffreys").function
    even = jax.grad(lambda z: value(z, p, 0.5))(q)
    assert np.all(np.isfinite(even)) and float(value(q, q, 0.5)) < 1e-6


def test_a_config_takes_it_with_its_settings(example):
    config = base()
    config.method = "jeffreys"
    found = registry.resolved(config).distill
    assert (found.divergence, found.on_policy, found.kd_ratio) == ("jeffreys", 0.5, 1.0)
    config.distill.on_policy = 0.25
    assert registry.resolved(config).distill.on_policy == 0.25
    assert config.distill.divergence is None
    lines = [line for line in example.splitlines() if line and not line.startswith(("from", " "))]
    assert len(lines) == 3  # a function and two entries
