"""The cached forward equals the full one, however the sequence is cut and padded."""

import contextlib
import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoders import CONFIGS, LLAMA, params_of, tokens_of

from minillm_jax.models import (
    attention,
    extend,
    heads_together,
    hidden_states,
    hub,
    init_cache,
    native,
    unstack,
)
from minillm_jax.models.weights import read_config

# Of these eight lie side by side on a TPU, twice.
MANY_HEADS = {"many heads": dataclasses.replace(CONFIGS["gptj"], heads=16, kv_heads=16, head_dim=4)}
ATOL = 3e-6  # float32, three layers of width 16
MASK = jnp.array(  # left padding, then none, then a row that ends early, then no token at all
    [
        [0, 0, 0, 1, 1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        [0, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ],
    bool,
)


@functools.cache
def case(name, path="native"):
    """The config, parameters, tokens, full states and a jitted `extend` of one kind of layer.

    By the products and the attention in C++, where there is a compiler, or by XLA's.
    """
    config, tokens = (CONFIGS | MANY_HEADS)[name], tokens_of(*MASK.shape)
    params = params_of(config)
    full = jax.jit(lambda: hidden_states(config, params, tokens, MASK))()
    traced = native.without if path == "xla" else contextlib.nullcontext
    with traced():
        layers = jax.jit(lambda: unstack(config, params, "float32"))()

    @functools.partial(jax.jit, static_argnames="first")
    def step(tokens, mask, cache, advance, first=False):
        with traced():
            return extend(config, layers, tokens, mask, cache, advance=advance, first=first)

    return config, tokens, full, step


def check(hidden, full):
    assert np.isfinite(hidden).all()
    np.testing.assert_allclose(hidden[MASK], full[MASK], atol=ATOL, rtol=0)


@pytest.fixture
def as_on_a_tpu(monkeypatch):
    """Lay caches out as a TPU has them."""
    monkeypatch.setattr("minillm_jax.models.cache.platform", lambda: "tpu")


@pytest.fixture(params=["native", "xla", "side by side"])
def path(request):
    """By which products a cache is read, and how it lies."""
    if request.param == "side by side":
        request.getfixturevalue("as_on_a_tpu")
        return "xla"
    return request.param


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_chunks_and_single_steps_equal_the_full_forward(name, path, first):
    config, tokens, full, step = case(name, path)
    cache, states = init_cache(config, 4, 12), []
    for start, end in ((0, 4), (4, 8), (8, 9), (9, 10)):
        chunk = slice(start, end)
        told = first and not start
        hidden, cache = step(tokens[:, chunk], MASK[:, chunk], cache, end - start, first=told)
        states.append(hidden)
    check(jnp.concatenate(states, 1), full)
    assert cache.index == 10
    np.testing.assert_array_equal(cache.length, MASK.sum(1))
    np.testing.assert_array_equal(cache.valid, jnp.pad(MASK, ((0, 0), (0, 2))))


@pytest.mark.parametrize("name", ["llama", "gpt_neo"])
def test_a_first_chunk_reads_nothing_of_the_cache(name):
    config, tokens, full, step = case(name)
    cache = init_cache(config, 4, 12)
    cache = dataclasses.replace(cache, values=tuple(x + jnp.nan for x in cache.values))
    hidden, after = step(tokens, MASK, cache, 10, first=True)
    check(hidden, full)
    written, left = jnp.split(after.values[0], [10], axis=2)
    assert jnp.isfinite(written).all() and jnp.isnan(left).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_first_chunk_without_padding_is_the_same_scanned_or_not(name, path):
    config, tokens, full, step = case(name, path)
    params, most = params_of(config), int(MASK[:, :6].sum())
    for stacked in (None, params["layers"]):
        first, cache = extend(
            config, unstack(config, params), tokens[:, :6], MASK[:, :6],
            init_cache(config, 4, 12), first=True, most=most, stacked=stacked,
        )  # fmt: skip
        rest, _ = step(tokens[:, 6:], MASK[:, 6:], cache, 4)
        check(jnp.concatenate([first, rest], 1), full)


def test_scanned_layers_are_those_of_a_lower_precision():
    config, tokens, _, _ = case("llama")
    params, both = params_of(config), []
    layers, cache = unstack(config, params, jnp.bfloat16), init_cache(config, 4, 12, jnp.bfloat16)
    for stacked in (None, params["layers"]):
        how = {"first": True, "stacked": stacked, "dtype": jnp.bfloat16}
        found = extend(config, layers, tokens, MASK, cache, **how)
        assert {x.dtype for x in (found[0], *found[1].keys)} == {jnp.dtype(jnp.bfloat16)}
        both.append(np.asarray(found[0], np.float32)[MASK])
    np.testing.assert_allclose(*both, atol=0.05)


@pytest.mark.parametrize("name", ["llama", "gpt_neo", "gpt2"])
def test_a_long_cache_is_read_as_far_as_it_is_filled(name, monkeypatch):
    config, tokens, full, _ = case(name)
    monkeypatch.setattr(native, "usable", lambda *_: False)  # for that reads no more than it must
    monkeypatch.setattr(attention, "LONG", 12)
    reads, switch = [], jax.lax.switch

    def spy(which, branches, *operands):
        reads.append((int(which), [part.args[0] for part in branches]))
        return switch(which, branches, *operands)

    monkeypatch.setattr(jax.lax, "switch", spy)
    layers, cache, states = unstack(config, params_of(config)), init_cache(config, 4, 12), []
    for start, end in ((0, 2), (2, 5), (5, 6), (6, 7), (7, 10)):
        chunk = slice(start, end)
        hidden, cache = extend(config, layers, tokens[:, chunk], MASK[:, chunk], cache)
        states.append(hidden)
    check(jnp.concatenate(states, 1), full)
    assert {tuple(sizes) for _, sizes in reads} == {(3, 6, 9, 12)}
    assert [which for which, _ in reads[:: config.layers]] == [0, 1, 1, 2, 3]


@pytest.mark.parametrize("name", ["llama", "gpt_neo", "opt_350m", "many heads"])
def test_a_padded_chunk_is_overwritten_by_the_next(name, path):
    config, tokens, full, step = case(name, path)
    cache, states = init_cache(config, 4, 12), []
    for start, end in ((0, 3), (3, 4), (4, 8), (8, 10)):
        pad = ((0, 0), (0, 4 - (end - start)))
        chunk = jnp.pad(tokens[:, start:end], pad, constant_values=7)
        hidden, cache = step(chunk, jnp.pad(MASK[:, start:end], pad), cache, end - start)
        states.append(hidden[:, : end - start])
    check(jnp.concatenate(states, 1), full)
    assert cache.index == 10


@pytest.mark.parametrize("path, long", [("native", 10**9), ("xla", 10**9), ("xla", 12)])
def test_a_loop_carries_the_cache_without_a_copy(path, long, monkeypatch):
    """The compiled loop body holds one in-place update per cached array and copies none of them."""
    monkeypatch.setattr(attention, "LONG", long)
    if path == "xla":
        monkeypatch.setattr(native, "usable", lambda *_: False)
    config = dataclasses.replace(LLAMA, layers=2)
    params = params_of(config)

    def loop(cache):
        layers = unstack(config, params, "float32")
        tokens, mask = jnp.zeros((4, 1), jnp.int32), jnp.ones((4, 1), bool)
        return jax.lax.while_loop(
            lambda cache: cache.index < 12,
            lambda cache: extend(config, layers, tokens, mask, cache)[1],
            cache,
        )

    shape = "f32[4,2,12,6]"
    lowered = jax.jit(loop, donate_argnums=0).lower(init_cache(config, 4, 12))
    program = lowered.compile().as_text() or ""
    made = [line for line in program.splitlines() if f"= {shape}" in line]
    assert sum(" dynamic-update-slice(" in line for line in made) == 4  # 2 layers, keys and values
    assert not any(" copy(" in line for line in made)


def test_the_cache_keeps_its_dtype():
    config = CONFIGS["llama"]
    layers = unstack(config, params_of(config))
    cache = init_cache(config, 4, 12, jnp.bfloat16)
    tokens = tokens_of(4, 10)
    hidden, cache = jax.jit(lambda cache: extend(config, layers, tokens, MASK, cache))(cache)
    assert hidden.dtype == jnp.float32 and cache.keys[0].dtype == jnp.bfloat16
    np.testing.assert_allclose(hidden[MASK], case("llama")[2][MASK], atol=0.1)


def published(name):
    return read_config(hub.config(name), Path(name))[1]


@pytest.mark.parametrize(
    "name, heads, on_four",
    [
        ("openai-community/gpt2", 2, 3),  # 12 heads of 64, where a row of memory has 128
        ("facebook/opt-13b", 2, 2),  # 40 heads of 128, each with a query of its own
        ("facebook/opt-1.3b", 2, 2),  # 32 heads of 64
        ("facebook/opt-2.7b", 8, 8),  # 32 heads of 80
        ("EleutherAI/gpt-j-6b", 2, 2),  # 16 heads of 256
        ("Qwen/Qwen2.5-1.5B", 1, 1),  # 2 heads of 128, each with six queries
    ],
)
def test_heads_that_have_their_own_queries_lie_side_by_side_on_a_tpu(
    name, heads, on_four, as_on_a_tpu
):
    config = published(name)
    assert heads_together(config) == heads
    keys = jax.eval_shape(lambda: init_cache(config, 4, 12)).keys[0]
    assert keys.shape == (4, config.kv_heads // heads, 12, heads * config.head_dim)
    with jax.set_mesh(jax.make_mesh((1, 1, 4), ("data", "fsdp", "tensor"))):
        assert heads_together(config) == on_four


def test_heads_lie_apart_on_a_cpu():
    assert heads_together(published("openai-community/gpt2")) == 1
