"""The worked example of docs/add_a_method.md, run as it stands there."""

import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from configs.common import base
from minillm_jax.methods import registry
from minillm_jax.objectives import divergences, vocab
from tests.objectives.test_vocab_scores import inputs

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


def test_its_loss_is_what_it_says_and_has_a_gradient(example):
    """As the update takes it: in blocks, beside the scores that all methods have."""
    args = inputs()
    found = divergences.find("jeffreys")
    value = found.checked("jeffreys", 0.9)

    def loss(*student):
        return vocab.loss_sum(
            lambda scores, extras, mask: scores["divergence"],
            *student,
            *args[3:],
            divergence=lambda z_q, z_p, _: found.function(z_q, z_p, value),
        )

    (total, scores), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*args[:3])
    want = 0.9 * scores["reverse_kl"].sum() + 0.1 * scores["forward_kl"].sum()
    np.testing.assert_allclose(total, want, rtol=1e-5)
    assert all(np.abs(grad).max() > 0.01 for grad in grads)


def test_a_config_takes_it_with_its_settings(example):
    config: Any = base()
    config.method = "jeffreys"
    found = registry.resolved(config).distill
    assert (found.divergence, found.on_policy, found.kd_ratio) == ("jeffreys", 0.5, 1.0)
    config.distill.on_policy = 0.25
    assert registry.resolved(config).distill.on_policy == 0.25
    assert config.distill.divergence is None
    lines = [line for line in example.splitlines() if line and not line.startswith(("from", " "))]
    assert len(lines) == 3  # a function and two entries
