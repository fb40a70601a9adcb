"""Blocks of tokens on a mesh: the gradients of one device, and one sum over the devices."""

import re
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as Spec

from minillm_jax.axes import MESH_AXES
from minillm_jax.objectives import vocab
from minillm_jax.objectives.blocks import Blocks
from minillm_jax.sharding import batch_sharding, make_mesh, place

ROWS, N, D, V, BLOCK = 16, 24, 8, 32, 6  # on eight devices: two rows each, eight blocks


@pytest.fixture(scope="module")
def drawn():
    """Hidden states and heads of both models with biases, labels and a mask."""
    rng = np.random.default_rng(0)

    def model():
        shapes = (ROWS, N, D), (V, D), (V,)
        return tuple(rng.standard_normal(shape).astype(np.float32) for shape in shapes)

    labels, mask = rng.integers(0, V, (ROWS, N)), rng.random((ROWS, N)) < 0.8
    return model(), model(), labels, mask


@pytest.mark.parametrize(("platform", "blocks"), [("cpu", 8), ("gpu", 2), ("tpu", 2)])
def test_accelerators_read_larger_blocks(platform, blocks):
    device = AbstractDevice(device_kind=platform, num_cores=1, platform=platform)
    types = (AxisType.Auto,) * len(MESH_AXES)
    mesh = AbstractMesh((2, 1, 1), MESH_AXES, types, abstract_device=device)
    labels = np.zeros((16, 256), np.int32)  # 2,048 tokens of each of two devices
    with jax.sharding.use_abstract_mesh(mesh):
        assert Blocks(labels).blocks == blocks
        assert Blocks(labels, 512).blocks == 4


def _on(mesh, drawn):
    """The arrays on a mesh: rows over the devices, heads over `tensor` along V."""
    rows = batch_sharding(mesh)
    model = rows, NamedSharding(mesh, Spec("tensor")), NamedSharding(mesh, Spec("tensor"))
    return place(drawn, (model, model, rows, rows))


def _gradients(how):
    """d/d(hidden, weight, bias) of the sum of all scores, in a sweep of its own or at once."""

    def summed(values, extras: Any = None, mask: Any = None) -> Any:
        return sum(
            -x if name.startswith("log_") else x for name, x in values.items()
        )  # all positive

    def function(student, teacher, labels, mask):
        asked = (*student, *teacher, labels, mask)
        if how != "scores":
            return vocab.loss_sum(summed, *asked, block=BLOCK, short=how == "short")[0]
        return summed(vocab.scores(*asked, block=BLOCK)).sum()

    return jax.jit(jax.value_and_grad(function))


@pytest.mark.parametrize("how", ["loss_sum", "scores", "short"])
@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), (1, 1, 8)])
def test_the_head_is_summed_over_the_devices_once(how, sizes, drawn):
    if how == "short":
        drawn = *drawn[:3], drawn[3] & (np.arange(N) < 13)
    alone = _gradients("loss_sum" if how == "short" else how)(*drawn)
    mesh = make_mesh(*sizes)
    with jax.set_mesh(mesh):
        compiled = _gradients(how).lower(*_on(mesh, drawn)).compile()
        found = compiled(*_on(mesh, drawn))
        cut = Blocks(drawn[2], BLOCK)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-5), found, alone)
    inside = [
        shape
        for line in str(compiled.as_text()).splitlines()
        if (one := re.search(r"= (.*?) all-reduce\(", line)) and "while" in line
        for shape in re.findall(r"f32\[([\d,]*)\]", one[1])
    ]
    # Over `tensor` the sums over V must be in the loop: of rows, or rows of hidden states.
    own = ROWS // cut.ways * cut.width
    sums = {"", str(own), f"{own},{D}", f"{own},1", f"1,{own}"}
    assert set(inside) <= (sums if sizes[2] > 1 else set()), inside


def test_a_block_counts_the_rows_of_one_device(drawn):
    labels = drawn[2]
    for sizes, ways, blocks in (((1, 1, 8), 1, 24), ((2, 2, 2), 4, 16), ((8, 1, 1), 8, 8)):
        with jax.set_mesh(make_mesh(*sizes)):
            cut = Blocks(labels, BLOCK)
            assert (cut.ways, cut.blocks) == (ways, blocks)
            assert Blocks(labels[:15], BLOCK).ways == 1  # rows that do not divide lie anywhere
    assert Blocks(labels, BLOCK).ways == 1
    np.testing.assert_array_equal(cut.join(cut.split(labels)), labels)


@pytest.mark.parametrize("divergence", [None, lambda z_q, z_p, extras: (z_q - z_p)[:, 0]])
@pytest.mark.parametrize("longest", [0, 5, 12, 24])
def test_no_block_beyond_the_longest_row_is_read(longest, divergence, drawn):
    student, teacher, labels = *drawn[:2], drawn[2].astype(np.int32)
    mask = np.arange(N)[None] < np.minimum(np.arange(ROWS)[:, None], longest)
    mask[-1, :longest] = True
    read = []

    def loss(values: Any, extras: Any, mask: Any) -> Any:
        jax.debug.callback(lambda x: read.append(x), mask.sum())
        return sum(values.values())

    def function(student, *, short):
        options = {"block": 64, "short": short, "divergence": divergence}  # four positions
        asked: Any = (*student, *teacher, labels, mask)
        return vocab.loss_sum(loss, *asked, **options)

    graded = jax.jit(jax.value_and_grad(function, has_aux=True), static_argnames="short")
    whole = graded(student, short=False)
    jax.effects_barrier()
    assert len(read) == 6
    found = graded(student, short=True)
    jax.effects_barrier()
    assert len(read) - 6 == -(-longest // 4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-5), found, whole)
    if not divergence:  # without a gradient it is the scores
        value, _ = jax.jit(function, static_argnames="short")(student, short=True)
        np.testing.assert_allclose(value, whole[0][0], rtol=1e-5)
