"""The products and the attention in C++ against plain ones, when they are used, and how they are
compiled."""

import dataclasses
import os
import platform as system
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh
from tiny_decoders import LLAMA, params_of

from minillm_jax.axes import MESH_AXES
from minillm_jax.models import attention, head, logits, native, unstack
from minillm_jax.rollout import Warp, generate
from minillm_jax.sharding import make_mesh

COMPILED = native._library() is not None
needs_compiler = pytest.mark.skipif(not COMPILED, reason="no C++ compiler on this machine")


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def close(found, expected, scale=1.0):
    """Within what the order of a float32 sum can change."""
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * scale)


@needs_compiler
@pytest.mark.parametrize("rows", [1, 2, 5, 7, 8, 9, 17, 33])
@pytest.mark.parametrize("inward, outward", [(1, 1), (16, 24), (31, 47), (48, 48), (400, 100)])
def test_a_product_is_that_of_numpy(rows, inward, outward):
    kernels, x = normal(0, 3, inward, outward), normal(1, rows, inward)
    found = native.dot(x, native.pack(kernels, 1))
    expected = np.asarray(x, np.float64) @ np.asarray(kernels[1], np.float64)
    close(found, expected, scale=inward**0.5)


@needs_compiler
def test_a_row_has_the_same_bits_alone_and_among_others():
    """And rows that are not real are 0, whatever stands in them."""
    kernel, x = native.pack(normal(0, 1, 900, 100), 0), normal(1, 21, 900)
    real = jnp.arange(21) % 3 > 0
    whole = native.dot(x, kernel)
    some = native.dot(x.at[::3].set(jnp.nan), native.only(kernel, real))
    np.testing.assert_array_equal(some, jnp.where(real[:, None], whole, 0))
    for row in range(21):
        np.testing.assert_array_equal(native.dot(x[row : row + 1], kernel)[0], whole[row])


@needs_compiler
@pytest.mark.parametrize("rows", [*range(1, 9), 11, 33])
@pytest.mark.parametrize("words, width", [(1, 1), (23, 16), (97, 33), (1000, 577), (48, 384)])
def test_scores_are_those_of_numpy(rows, words, width):
    weight, x = normal(0, words, width), normal(1, rows, width)
    expected = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    close(native.scores(x, weight), expected, scale=width**0.5)


@needs_compiler
def test_scores_of_a_row_have_the_same_bits_alone_and_among_others():
    """In panels of every size, and wherever a thread begins with its words."""
    weight, x = normal(0, 400, 900), normal(1, 21, 900)
    whole = native.scores(x, weight)
    for count in (*range(1, 10), 16):
        for first in range(0, 22 - count, count):
            these = slice(first, first + count)
            np.testing.assert_array_equal(native.scores(x[these], weight), whole[these])


@needs_compiler
def test_logits_have_the_gradient_of_a_product():
    """They are the one call that a loss may reach."""
    weight, x = normal(0, 23, 16), normal(1, 5, 16)

    def loss(product):
        return jax.grad(lambda x, w: jnp.sum(jnp.tanh(product(x, w))), (0, 1))(x, weight)

    for found, expected in zip(loss(native.scores), loss(lambda x, w: x @ w.T), strict=True):
        close(found, expected)


def attended(q, k, v, mask, scale):
    """Attention in float64; 0 where nothing is seen."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scores = np.einsum("bkgth,bksh->bkgts", q, k) * scale
    seen = np.asarray(mask)[:, None, None]
    scores = np.where(seen, scores, -np.inf)
    most = scores.max(-1, keepdims=True, initial=-1e300)
    weights = np.exp(scores - most)
    total = weights.sum(-1, keepdims=True)
    return np.einsum("bkgts,bksh->bkgth", weights / np.where(total > 0, total, 1), v)


@needs_compiler
@pytest.mark.parametrize("steps", [1, 6, native.FEW])
@pytest.mark.parametrize("width", [1, 6, 16, 20, 64, 80])
@pytest.mark.parametrize("groups", [1, 3])
def test_attention_is_that_of_float64(steps, width, groups):
    slots, filled = 37, 29
    q = normal(0, 3, 2, groups, steps, width)
    k, v = normal(1, 3, 2, slots, width), normal(2, 3, 2, slots, width)
    mask = jax.random.bernoulli(jax.random.key(3), 0.6, (3, steps, slots))
    mask = mask.at[0, :, :9].set(False).at[2].set(False) & (jnp.arange(slots)[None, None] < filled)
    expected = attended(q, k, v, mask, 0.3)
    # What is beyond the filled slots is not read.
    k, v = (x.at[:, :, filled:].set(jnp.nan) for x in (k, v))
    found = native.attend(q, k, v, mask, 0.3, jnp.int32(filled))
    close(found, expected)
    assert (found[2] == 0).all()
    plain = attention.attend(q, jnp.nan_to_num(k), jnp.nan_to_num(v), mask, 0.3)
    close(found[:2], plain[:2])


@needs_compiler
def test_weights_far_apart_are_as_exact():
    """Of scores 0 to 100 apart: what the exponential of its own gives is float32's."""
    slots = 101
    q, k = jnp.ones((1, 1, 1, 1, 1)), -jnp.arange(slots, dtype=jnp.float32).reshape(1, 1, slots, 1)
    v = jnp.eye(slots)[None, None]
    mask = jnp.ones((1, 1, slots), bool)
    q = jnp.broadcast_to(q, (1, 1, 1, 1, slots)).at[..., 1:].set(0)
    k = jnp.concatenate([k, jnp.zeros((1, 1, slots, slots - 1))], -1)
    found = native.attend(q, k, v, mask, 1.0, jnp.int32(slots))[0, 0, 0, 0]
    expected = np.exp(-np.arange(slots, dtype=np.float64))
    expected /= expected.sum()
    np.testing.assert_allclose(found[:86], expected[:86], rtol=5e-7)
    assert (found[86:] < 1e-37).all()


@needs_compiler
def test_shapes_that_do_not_match_are_refused():
    kernel = native.pack(normal(0, 1, 16, 24), 0)
    for x, packed in (
        (normal(1, 2, 15), kernel),
        (normal(1, 2, 16), dataclasses.replace(kernel, features=1000)),
        (normal(1, 2, 16), dataclasses.replace(kernel, real=jnp.ones(3, bool))),
    ):
        with pytest.raises(jax.errors.JaxRuntimeError, match="shapes do not match"):
            jax.block_until_ready(native.dot(x, packed))
    with pytest.raises(jax.errors.JaxRuntimeError, match="shapes do not match"):
        jax.block_until_ready(native.scores(normal(1, 2, 15), normal(0, 7, 16)))
    with pytest.raises(jax.errors.JaxRuntimeError, match="shapes do not match"):
        cache = normal(0, 2, 1, 9, 4)
        q, mask = normal(1, 2, 1, 1, 1, 4), jnp.ones((2, 1, 8), bool)
        jax.block_until_ready(native.attend(q, cache, cache, mask, 1.0, jnp.int32(9)))


def program(dtype="float32"):
    """The text of a program that unpacks a model and computes logits of two states."""
    params = params_of(LLAMA)

    def read(hidden):
        weights = unstack(LLAMA, params, dtype)
        return jax.tree.leaves(weights), logits(head(LLAMA, weights.outer), hidden)

    return jax.jit(read).lower(normal(0, 2, LLAMA.width).astype(dtype)).as_text()


@needs_compiler
def test_it_is_used_in_float32_on_one_cpu_alone():
    assert "minillm_pack" in program() and "minillm_scores" in program()
    assert "minillm" not in program("bfloat16")
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        assert "minillm_pack" in program()
    with jax.set_mesh(make_mesh(devices=jax.devices()[:2])):
        assert "minillm" not in program()
    with native.without():
        assert "minillm" not in program()
    assert "minillm_pack" in program()
    one = jnp.ones(1)
    assert native.usable(one)
    for platform in ("gpu", "tpu"):
        device = AbstractDevice(device_kind=platform, num_cores=1, platform=platform)
        mesh = AbstractMesh((1, 1, 1), MESH_AXES, abstract_device=device)
        with jax.sharding.use_abstract_mesh(mesh):
            assert not native.usable(one)


@needs_compiler
def test_a_program_traced_without_is_not_taken_for_one_with():
    params, prompt = params_of(LLAMA), jnp.ones((2, 3), jnp.int32)

    def lowered():
        return generate.lower(
            LLAMA, params, prompt, prompt > 0, jax.random.key(0), slots=4, warp=Warp(), eos_id=3,
            pad_id=0, vocab=LLAMA.vocab_size,
        ).as_text()  # fmt: skip

    for _ in range(2):
        with native.without():
            assert "minillm_dot" not in lowered()
        assert "minillm_dot" in lowered()


@needs_compiler
@pytest.mark.parametrize("what", [jnp.nan, jnp.inf])
def test_what_is_no_number_is_not_hidden(what):
    q, cache = normal(0, 1, 1, 1, 1, 20), normal(1, 1, 1, 9, 20)
    mask = jnp.ones((1, 1, 9), bool)
    for keys in (cache.at[:, :, 4].set(what), jnp.full_like(cache, what)):
        found = native.attend(q, keys, cache, mask, 1.0, jnp.int32(9))
        assert (
            jnp.isnan(found).all() and jnp.isnan(attention.attend(q, keys, cache, mask, 1.0)).all()
        )
    assert jnp.isnan(native.scores(jnp.full((2, 5), what), jnp.zeros((3, 5)))).all()


@needs_compiler
@pytest.mark.parametrize("slots, ended", [(5, ()), (9, (0, 3))])
def test_generation_gives_the_same_tokens(slots, ended):
    params = params_of(LLAMA)
    prompt = jax.random.randint(jax.random.key(1), (4, 5), 0, LLAMA.vocab_size)
    mask = jnp.arange(5)[None] >= jnp.array([[0], [2], [4], [1]])
    mask &= ~jnp.isin(jnp.arange(4), jnp.array(ended, int))[:, None]

    def answers():
        return generate(
            LLAMA, params, prompt, mask, jax.random.key(2), slots=slots, warp=Warp(), eos_id=3,
            pad_id=0, vocab=LLAMA.vocab_size, with_states=True,
        )  # fmt: skip

    fast = answers()
    with native.without():
        plain = answers()
    np.testing.assert_array_equal(fast.tokens, plain.tokens)
    np.testing.assert_array_equal(fast.mask, plain.mask)
    np.testing.assert_allclose(fast.hidden, plain.hidden, atol=1e-5)
    assert not any(fast.mask[row].any() for row in ended)


# How it is compiled.


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Nothing compiled yet, and a cache of its own."""
    monkeypatch.setenv("MINILLM_CACHE", str(tmp_path / "cache"))
    native._library.cache_clear()
    yield tmp_path
    native._library.cache_clear()


@needs_compiler
def test_it_is_compiled_once_and_kept(fresh, monkeypatch):
    kept = native._compiled()
    assert kept.parent == fresh / "cache" and list(kept.parent.iterdir()) == [kept]
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("compiled again"))
    assert native._compiled() == kept
    # Another machine that shares the folder has a file of its own.
    monkeypatch.setattr(native, "_processor", lambda: "another")
    with pytest.raises(pytest.fail.Exception, match="compiled again"):
        native._compiled()


@needs_compiler
def test_without_a_place_to_keep_it_is_for_this_process(fresh, monkeypatch):
    (fresh / "cache").write_text("no folder")
    built = native._compiled()
    assert built.is_file() and fresh not in built.parents

    def nobody():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(native.fetch, "cache", nobody)
    assert native._compiled().is_file()


@needs_compiler
def test_a_relative_cache_keeps_it_too(fresh, monkeypatch):
    """By its whole path: a name without a folder is looked for among the system's libraries."""
    monkeypatch.chdir(fresh)
    monkeypatch.setenv("MINILLM_CACHE", ".")
    kept = native._compiled()
    assert kept.is_absolute() and os.listdir(".") == [kept.name]


def script(path, lines):
    path.write_text(f"#!/bin/sh\n{lines}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@needs_compiler
def test_another_compiler_is_tried_and_options_are_read(fresh, monkeypatch):
    monkeypatch.setenv("CXX", script(fresh / "broken", "exit 1"))
    assert native._compiled().is_file()
    real = next(name for name in native._COMPILERS if shutil.which(name))
    monkeypatch.setenv("CXX", f"{real} -DUNUSED=1")
    monkeypatch.setattr(native, "_COMPILERS", ())
    assert native._compiled().is_file()


@needs_compiler
@pytest.mark.parametrize("vectors", ["x86-64-v3", "x86-64"])
def test_machines_with_shorter_vectors_have_the_same_products(fresh, monkeypatch, vectors):
    """In a process of its own, for names of XLA's cannot be given twice."""
    if system.machine() != "x86_64":
        pytest.skip("no x86-64")
    real = next(found for name in native._COMPILERS if (found := shutil.which(name)))
    instead = f'set -- $(echo "$@" | sed s/-march=native/-march={vectors}/)'
    monkeypatch.setenv("CXX", script(fresh / "older", f'{instead}\nexec {real} "$@"'))
    names = "numpy or float64 or same_bits or far_apart or no_number or same_tokens"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, __file__, "-k", names], capture_output=True, text=True, check=False,
        cwd=Path(__file__).parents[2],
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")},
    )  # fmt: skip
    assert done.returncode == 0 and " skipped" not in done.stdout, done.stdout[-2000:]


def test_a_compiler_that_fails_is_told_once_and_xla_is_used(fresh, monkeypatch, capfd):
    monkeypatch.setenv(
        "CXX", script(fresh / "broken", "echo 'x.cc:1: error: no such thing' >&2; exit 1")
    )
    monkeypatch.setattr(native, "_COMPILERS", ())  # the others
    assert native._library() is None and native._library() is None
    assert not native.usable(jnp.ones(1))
    said = capfd.readouterr().err
    assert said.count("decoding goes by XLA alone, which is slower") == 1
    assert "no such thing" in said and "native.cc" in said
    assert list((fresh / "cache").iterdir()) == []


def test_no_compiler_is_told(fresh, monkeypatch, capfd):
    monkeypatch.setenv("PATH", str(fresh))
    monkeypatch.delenv("CXX", raising=False)
    assert native._library() is None
    assert "install g++ or clang++" in capfd.readouterr().err


@needs_compiler
def test_a_compiler_that_knows_its_machine_by_another_name(fresh, monkeypatch):
    real = next(found for name in native._COMPILERS if (found := shutil.which(name)))
    refuse = 'for x; do [ "$x" = -march=native ] && exit 1; done'
    leave_out = 'set -- $(echo "$@" | sed s/-mcpu=native//)'
    monkeypatch.setenv("CXX", script(fresh / "arm", f'{refuse}\n{leave_out}\nexec {real} "$@"'))
    assert native._compiled().is_file()


def test_it_can_be_switched_off(fresh, monkeypatch, capfd):
    monkeypatch.setenv("MINILLM_NATIVE", "0")
    assert native._library() is None and not (fresh / "cache").exists()
    assert capfd.readouterr().err == ""
