"""Fused attention: the same numbers as plain XLA, by interpretation, and who gets which kernel."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from tiny_decoders import CONFIGS, GPT2, LLAMA, params_of, tokens_of

from minillm_jax.axes import MESH_AXES
from minillm_jax.methods.accumulate import gradients
from minillm_jax.models import head, hidden_states, kernels, logits
from minillm_jax.models.kernels import choose, pack, take
from minillm_jax.objectives import reduce
from minillm_jax.sharding import batch_sharding, make_mesh, place
from minillm_jax.types import InputError

ATOL = 1e-5  # float32; the kernels add up in another order
# Padding on the left, on the right, on both sides, nowhere, and nothing else.
MASK = np.array([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 0, 0], [1] * 6, [0] * 6])
MASK = MASK.astype(bool)
SCALED = dataclasses.replace(GPT2, attention_scale=1.0)  # learned positions, no grouped heads


interpreted = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="Splash is interpreted on a CPU alone"
)


def read(config, mask, tokens):
    """Logits and their gradient at the real slots."""

    def loss(params):
        hidden = hidden_states(config, params, tokens, mask)
        scores = logits(head(config, params), hidden)
        real = jnp.where(mask[:, :, None], scores, 0.0)
        return jnp.mean(jnp.square(real)), (real, hidden)

    gradient, (real, hidden) = jax.jit(jax.grad(loss, has_aux=True))(params_of(config))
    assert np.isfinite(hidden).all()
    return real, gradient


def compare(config, mask, tokens, kernel):
    plain = read(dataclasses.replace(config, attention="xla"), mask, tokens)
    found = read(dataclasses.replace(config, attention=kernel), mask, tokens)
    for a, b in zip(*map(jax.tree.leaves, (found, plain)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=ATOL)


@pytest.fixture
def default_precision():
    """Not that of `conftest`: Mosaic multiplies bfloat16 in one way alone."""
    with jax.default_matmul_precision("default"):
        yield


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 128, so that few slots are several of them."""
    monkeypatch.setattr(kernels, "_BLOCK", 128)


@interpreted
@pytest.mark.parametrize(
    "config", [LLAMA, CONFIGS["mistral"], SCALED], ids="llama mistral gpt2".split()
)
def test_splash_reads_what_xla_reads(config):
    compare(config, MASK, tokens_of(*MASK.shape), "splash")


# One backward kernel for two blocks, two for three; a window across blocks; slots that fill none.
@interpreted
@pytest.mark.parametrize(("slots", "window"), [(200, None), (300, 140)])
def test_splash_reads_several_blocks(small_blocks, slots, window):
    config = dataclasses.replace(LLAMA, layers=1, windows=(window,), max_positions=slots)
    mask = np.arange(slots)[None] >= 37
    compare(config, mask, tokens_of(1, slots), "splash")


@interpreted
def test_splash_is_split_over_rows_and_heads():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    config = dataclasses.replace(LLAMA, layers=1, attention="splash")
    tokens, mask = tokens_of(8, 6), np.resize(MASK, (8, 6))
    forward = jax.jit(functools.partial(hidden_states, config))
    alone = forward(params_of(config), tokens, mask)
    with jax.set_mesh(mesh):
        given = place((np.asarray(tokens), mask), batch_sharding(mesh))
        program = forward.lower(params_of(config), *given)
        assert "manual_axes" in program.as_text()
        split = program.compile()(params_of(config), *given)
    real = mask[:, :, None]
    np.testing.assert_allclose(split * real, alone * real, rtol=0, atol=ATOL)


def test_packing_moves_the_real_slots_to_the_front_and_back():
    slots = jnp.broadcast_to(jnp.arange(6), MASK.shape)
    order, back = pack(jnp.asarray(MASK))
    np.testing.assert_array_equal(order[2], [1, 2, 3, 0, 4, 5])
    np.testing.assert_array_equal(take(jnp.asarray(MASK), order), np.sort(MASK, axis=1)[:, ::-1])
    np.testing.assert_array_equal(take(take(slots, order), back), slots)


def on(platform, **sizes):
    """The mesh of a machine that is not here."""
    device = AbstractDevice(device_kind=platform, num_cores=1, platform=platform)
    shape = tuple(sizes.get(name, 1) for name in MESH_AXES)
    auto = (AxisType.Auto,) * len(MESH_AXES)
    mesh = AbstractMesh(shape, MESH_AXES, auto, abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def test_auto_goes_by_the_devices_of_the_mesh_and_falls_back(default_precision, monkeypatch):
    model = dataclasses.replace(LLAMA, head_dim=64)
    many = (8, kernels.SPLASH_FROM, jnp.bfloat16)
    with on("cpu"):
        assert choose(model, *many) == "xla"
    with on("tpu", data=4, tensor=2):
        assert choose(model, *many) == "splash"
        assert choose(model, 8, kernels.SPLASH_FROM - 1, jnp.bfloat16) == "xla"
        assert choose(model, 6, *many[1:]) == "xla"  # rows do not split
        mixed = dataclasses.replace(model, windows=(None, 256, None))
        assert choose(mixed, *many) == "xla"
        assert choose(dataclasses.replace(mixed, windows=(None, 512, 999)), *many) == "splash"
        dropping = dataclasses.replace(model, attention_dropout=0.1)
        assert choose(dropping, *many) == "splash"
        assert choose(dropping, *many, dropout=True) == "xla"
        with jax.default_matmul_precision("highest"):
            assert choose(model, *many) == "xla"
            assert choose(model, *many[:2], jnp.float32) == "splash"
    with on("tpu", tensor=4):
        assert choose(model, *many) == "xla"  # two key-value heads over four
    with on("gpu", data=4):
        monkeypatch.setattr(kernels, "_capability", lambda: (0, 0))  # no GPU is here to ask
        assert choose(model, *many) == "xla"
        monkeypatch.setattr(kernels, "_capability", lambda: (8, 0))
        assert choose(model, *many) == "cudnn"
        assert choose(model, 6, *many[1:]) == "xla"
        assert choose(model, *many[:2], jnp.float32) == "xla"
        wide = dataclasses.replace(model, head_dim=256)
        assert choose(wide, *many) == "xla"
        monkeypatch.setattr(kernels, "_capability", lambda: (9, 0))
        assert choose(wide, *many) == "cudnn"


@pytest.mark.parametrize(
    ("kernel", "platform", "change", "culprit"),
    [
        ("cudnn", "cpu", {}, "for GPUs"),
        ("cudnn", "gpu", {}, "bfloat16 or float16, not float32"),
        ("splash", "gpu", {}, "for TPUs"),
        ("splash", "tpu", {"kv_heads": 1}, "1 key-value heads do not split over 2"),
        ("splash", "tpu", {"windows": (None, 3, 3)}, "different windows"),
        ("splash", "cpu", {"attention_dropout": 0.1}, "no dropout of the weights"),
    ],
)
def test_a_kernel_asked_for_by_name_says_what_it_cannot(kernel, platform, change, culprit):
    model = dataclasses.replace(LLAMA, attention=kernel, **change)
    with on(platform, tensor=2), pytest.raises(InputError, match=culprit) as caught:
        choose(model, 8, 16, jnp.float32, dropout=True)
    assert f"config.attention={kernel}" in str(caught.value)


@pytest.mark.parametrize("config", [LLAMA, CONFIGS["mistral"]], ids=["llama", "mistral"])
def test_cudnn_is_asked_for_what_xla_reads(config, monkeypatch):
    """Its call with jax's own reference in its place, for no such GPU is needed for that."""
    monkeypatch.setattr(kernels, "_cudnn_limit", lambda *_: "")
    reference = jax.nn.dot_product_attention
    called = []

    def stand_in(*arrays, implementation, **options):
        called.append(implementation)
        return reference(*arrays, **options, implementation="xla")

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    compare(config, MASK, tokens_of(*MASK.shape), "cudnn")
    assert set(called) == {"cudnn"}


@pytest.mark.parametrize("window", [None, 100])
def test_cudnn_lowers_forward_and_backward_without_a_mask(window, monkeypatch):
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    q = jax.ShapeDtypeStruct((2, 256, 8, 64), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((2, 256, 2, 64), jnp.bfloat16)

    def loss(q, k, v):
        return kernels.attend_packed("cudnn", q, k, v, 0.5, window).astype(jnp.float32).sum()

    graded = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    text = graded.trace(q, k, k).lower(lowering_platforms=("cuda",)).as_text()
    for name in ("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"):
        assert f"@{name}(" in text
    assert f'\\"sliding_window_length\\": {window or 0}' in text.replace("\\22", '\\"')
    assert "Bias" not in text and "CAUSAL" in text


@pytest.mark.parametrize("sizes", [(8, 1, 1), (4, 1, 2), (2, 2, 2)], ids=str)
def test_cudnn_is_handed_the_rows_and_heads_of_each_device(sizes, monkeypatch):
    """Its own partitioner, left in the program, fails where some axes are divided already."""
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    mesh = make_mesh(*sizes)

    def sums(params, x, window):
        y = (x * params).astype(jnp.bfloat16)
        out = kernels.attend_packed("cudnn", y, y, y, 0.5, None).astype(jnp.float32)
        values = out.sum((2, 3))
        return {"loss": reduce.total(values, jnp.ones_like(values, bool))}

    with jax.set_mesh(mesh):
        x = jax.ShapeDtypeStruct((16, 256, 4, 64), jnp.float32, sharding=batch_sharding(mesh))
        graded = jax.jit(lambda x: gradients(sums, jnp.float32(2), x, 2))
        text = graded.trace(x).lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmaxBackward" in text
    assert "CustomSPMDPartitioning" not in text
    rows, heads = 8 // (sizes[0] * sizes[1]), 4 // sizes[2]
    assert f"tensor<{rows}x256x{heads}x64xbf16>" in text
