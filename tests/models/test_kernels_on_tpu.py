"""Splash compiled by the TPU compiler for chips that are not here: it lowers, and needs less."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from tiny_decoders import LLAMA

from minillm_jax.models import abstract_params, hidden_states, logical_axes
from minillm_jax.planning.counting import counter
from minillm_jax.sharding import batch_sharding, make_mesh, tree_shardings


@pytest.fixture(params=["v5e:2x2", "v5p:2x2x1"])
def mesh(request, monkeypatch):
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed: pip install libtpu")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # it only compiles
    devices = topologies.get_topology_desc(request.param, "tpu").devices
    return make_mesh(data=2, tensor=2, devices=devices)


@pytest.mark.parametrize("width", [64, 128])
def test_splash_compiles_forward_and_backward_and_holds_no_scores(mesh, width):
    model = dataclasses.replace(LLAMA, heads=24, kv_heads=12, head_dim=width)

    def compiled(attention):
        config = dataclasses.replace(model, attention=attention)
        abstract = abstract_params(config)
        homes = tree_shardings(abstract, logical_axes(config), mesh)
        rows = batch_sharding(mesh)
        params = jax.tree.map(lambda x, s: x.update(sharding=s), abstract, homes)
        tokens = jax.ShapeDtypeStruct((8, 512), jnp.int32, sharding=rows)
        mask = jax.ShapeDtypeStruct((8, 512), bool, sharding=rows)

        def loss(params, tokens, mask):
            hidden = hidden_states(config, params, tokens, mask, dtype=jnp.bfloat16)
            return jnp.sum(jnp.square(jnp.where(mask[:, :, None], hidden, 0.0)))

        # That of `conftest` is none that Mosaic has for bfloat16.
        with jax.set_mesh(mesh), jax.default_matmul_precision("default"):
            return jax.jit(jax.grad(loss)).lower(params, tokens, mask).compile()

    splash, plain = compiled("auto"), compiled("xla")
    splash_text, plain_text = (program.as_text() or "" for program in (splash, plain))
    # Forward, and one kernel for all gradients.
    assert splash_text.count('custom_call_target="tpu_custom_call"') == 2
    assert "tpu_custom_call" not in plain_text
    scores = ",512,512]"  # of any dtype, as part of a layer's
    assert scores in plain_text and scores not in splash_text
    # A plan counts 2 + 5 products of scores in the kernels (what it makes of several blocks is in
    # `tests/planning/test_counting.py`), and 2 + 4 in the text of plain layers.
    counted = [
        sum(work.times * work.flops for work in counter(text, 4).work())
        for text in (splash_text, plain_text)
    ]
    product = 2 * model.layers * (8 // 2) * (24 // 2) * 512**2 * width
    assert counted[0] - counted[1] == product
    # Of arrays that the chip cannot keep beside its cores, or there is nothing to compare.
    needs: list[Any] = [program.memory_analysis() for program in (splash, plain)]
    assert needs[0].temp_size_in_bytes < needs[1].temp_size_in_bytes / 1.5
