"""The decoder by itself: padding, causality, windows, every odd kind of layer, rotary by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoders import CONFIGS, GPT2, LLAMA, params_of, tokens_of

from minillm_jax.models import (
    RopeScaling,
    abstract_params,
    extend,
    head,
    hidden_states,
    init_cache,
    init_params,
    logical_axes,
    logits,
    unstack,
    with_temperature,
)
from minillm_jax.models.attention import attend, rotary_angles, rotary_frequencies, rotate

ATOL = 3e-6  # float32, three layers of width 16; as in test_cache
SOME = ["llama", "opt_350m", "gptj", "gpt_neo"]  # where a test need not see every kind


@pytest.fixture(params=CONFIGS, name="config")
def _config(request):
    return CONFIGS[request.param]


def test_padding_on_either_side_or_none_gives_the_same_states(config):
    params, tokens = params_of(config), tokens_of(2, 6)
    forward = jax.jit(lambda tokens, mask: hidden_states(config, params, tokens, mask))
    plain = forward(tokens, jnp.ones((2, 6), bool))
    assert plain.shape == (2, 6, config.embed_width)
    for before, after in ((3, 0), (0, 3), (2, 1)):
        sides = ((0, 0), (before, after))
        padded = forward(
            jnp.pad(tokens, sides, constant_values=9), jnp.pad(jnp.ones((2, 6), bool), sides)
        )
        assert np.isfinite(padded).all()
        np.testing.assert_allclose(padded[:, before : before + 6], plain, atol=ATOL, rtol=0)


def test_the_logit_scale_multiplies_every_logit_read_at_once_or_through_the_cache(config):
    params, tokens, mask = params_of(config), tokens_of(2, 6), jnp.ones((2, 6), bool)

    def read(config):
        at_once = hidden_states(config, params, tokens, mask)
        cache = init_cache(config, 2, 6, jnp.float32)
        cached, _ = extend(config, unstack(config, params), tokens, mask, cache)
        return [logits(head(config, params), hidden) for hidden in (at_once, cached)]

    scaled = read(dataclasses.replace(config, logit_scale=2.5))
    for plain, found in zip(read(config), scaled, strict=True):
        np.testing.assert_allclose(found, 2.5 * plain, atol=ATOL, rtol=1e-5)


def test_a_temperature_in_the_weights_divides_every_logit(config):
    params, tokens, mask = params_of(config), tokens_of(2, 6), jnp.ones((2, 6), bool)

    def read(params):
        return logits(head(config, params), hidden_states(config, params, tokens, mask))

    colder = with_temperature(config, params, 0.4)
    np.testing.assert_allclose(read(colder), read(params) / 0.4, atol=ATOL, rtol=1e-5)
    assert jax.tree.structure(colder) == jax.tree.structure(params)


def test_a_decoder_that_has_no_place_for_a_temperature_says_so():
    config = dataclasses.replace(LLAMA, norm_first=False)
    with pytest.raises(ValueError, match="no norm or projection"):
        with_temperature(config, params_of(config), 0.4)


def test_the_logit_scale_is_exact_in_bfloat16():
    """1 / 0.6 is 1.664 as a bfloat16: a teacher at temperature 0.6 would be at 0.601."""
    params, tokens, mask = params_of(LLAMA), tokens_of(8, 16), jnp.ones((8, 16), bool)

    def read(config):
        at_once = hidden_states(config, params, tokens, mask, dtype=jnp.bfloat16)
        cache, weights = init_cache(config, 8, 16, jnp.bfloat16), unstack(config, params)
        cached, _ = extend(config, weights, tokens, mask, cache, dtype=jnp.bfloat16)
        assert at_once.dtype == cached.dtype == jnp.bfloat16
        return [np.asarray(hidden, np.float64) for hidden in (at_once, cached)]

    scaled = read(dataclasses.replace(LLAMA, logit_scale=1 / 0.6))
    for plain, found in zip(read(LLAMA), scaled, strict=True):
        np.testing.assert_allclose((found * plain).sum() / (plain**2).sum(), 1 / 0.6, rtol=3e-4)
        np.testing.assert_allclose(found, plain / 0.6, rtol=2**-8)


def test_tokens_in_the_padding_change_nothing(config):
    params, tokens = params_of(config), tokens_of(3, 7)
    mask = jnp.array([[0, 0, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0, 0], [0] * 7], bool)
    other = jnp.where(mask, tokens, tokens_of(3, 7, seed=6))
    assert (other != tokens).any()

    def loss(params, tokens):
        hidden = jnp.where(mask[:, :, None], hidden_states(config, params, tokens, mask), 0.0)
        return jnp.sum(hidden**2), hidden

    graded = jax.jit(jax.grad(loss, has_aux=True))
    for a, b in zip(
        *map(jax.tree.leaves, (graded(params, tokens), graded(params, other))), strict=True
    ):
        assert np.isfinite(a).all()
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", SOME)
def test_a_query_sees_its_own_slot_and_nothing_later(name):
    config, mask = CONFIGS[name], jnp.ones((1, 6), bool)
    params = params_of(config)

    def state(table, slot):
        own = {**params, "embed": {**params["embed"], "tokens": table}}
        return hidden_states(config, own, jnp.arange(6)[None], mask)[0, slot].sum()

    graded = jax.jit(jax.grad(state))
    for slot in (0, 3):
        gradient = graded(params["embed"]["tokens"], slot)
        assert (gradient[slot + 1 :] == 0.0).all()
        assert (gradient[slot] != 0.0).any()


def test_a_window_bounds_how_far_a_query_sees():
    config = dataclasses.replace(CONFIGS["gpt_neo"], layers=1, windows=(3,))
    mask = jnp.arange(7)[None] >= 1  # left padding: the window counts tokens, not slots

    def state(table, params):
        own = {**params, "embed": {**params["embed"], "tokens": table}}
        return hidden_states(config, own, jnp.arange(7)[None], mask)[0, 5].sum()

    params = params_of(config)
    gradient = jax.grad(state)(params["embed"]["tokens"], params)
    np.testing.assert_array_equal((gradient != 0).any(-1)[:7], [0, 0, 0, 1, 1, 1, 0])


@pytest.mark.parametrize("name", SOME[:2])
def test_remat_gives_the_same_gradient_and_is_in_the_program(name):
    config, tokens, mask = CONFIGS[name], tokens_of(2, 6), jnp.ones((2, 6), bool)
    params = params_of(config)

    def loss(params, remat):
        return jnp.sum(hidden_states(config, params, tokens, mask, remat=remat) ** 2)

    graded = jax.jit(jax.grad(loss), static_argnums=1)
    kinds = ("none", "dots", "full")
    once, *others = (jax.tree.leaves(graded(params, remat)) for remat in kinds)
    for other in others:
        for a, b in zip(once, other, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4)
    programs = [str(jax.make_jaxpr(loss, static_argnums=1)(params, remat)) for remat in kinds]
    assert ["prevent_cse=False" in program for program in programs] == [False, True, True]


def test_every_parameter_has_one_logical_axis_per_dimension(config):
    axes = logical_axes(config)
    jax.tree.map(_check_axes, abstract_params(config), axes)
    assert {names[0] for names in jax.tree.leaves(axes["layers"], is_leaf=_is_names)} == {"layers"}
    assert axes["layers"]["mlp"]["down"]["kernel"] == ("layers", "mlp", "embed")
    assert axes["embed"]["tokens"][0] == "vocab"


def _is_names(x):
    return isinstance(x, tuple)


def _check_axes(x, names):
    assert isinstance(names, tuple) and len(names) == x.ndim and all(names)
    assert len(set(names)) == len(names)


def test_layers_start_different_and_branch_outputs_small():
    config = dataclasses.replace(LLAMA, width=64, mlp_width=64)
    params = init_params(config, jax.random.key(0))
    shapes = [
        jax.tree.map(lambda x: (x.shape, x.dtype), p) for p in (params, abstract_params(config))
    ]
    assert shapes[0] == shapes[1]
    layers = params["layers"]
    assert (layers["attn"]["q"]["kernel"][0] != layers["attn"]["q"]["kernel"][1]).any()
    np.testing.assert_allclose(layers["mlp"]["up"]["kernel"].std(), 0.02, rtol=0.05)
    np.testing.assert_allclose(layers["mlp"]["down"]["kernel"].std(), 0.02 / 6**0.5, rtol=0.05)


@pytest.mark.parametrize("rate", ["dropout", "embed_dropout", "attention_dropout"])
def test_dropout_only_with_a_key_and_the_same_with_the_same_key(rate):
    config = dataclasses.replace(GPT2, **{rate: 0.5})
    params, tokens, mask = params_of(GPT2), tokens_of(2, 6), jnp.ones((2, 6), bool)
    plain = hidden_states(GPT2, params, tokens, mask)
    np.testing.assert_array_equal(hidden_states(config, params, tokens, mask), plain)
    drop = jax.jit(lambda key: hidden_states(config, params, tokens, mask, dropout_key=key))
    a, b, c = (drop(jax.random.key(i)) for i in (1, 1, 2))
    np.testing.assert_array_equal(a, b)
    assert (a != c).any() and (a != plain).any()


@pytest.mark.parametrize("name", SOME)
def test_bfloat16_stays_near_and_gives_float32_logits(name):
    config, tokens, mask = CONFIGS[name], tokens_of(2, 6), jnp.ones((2, 6), bool)
    params = params_of(config)
    exact, low = (
        jax.jit(lambda dtype=dtype: hidden_states(config, params, tokens, mask, dtype=dtype))()
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(jnp.float32), exact, atol=0.25)
    assert logits(head(config, params), low).dtype == jnp.float32


def test_head_is_the_embedding_when_tied_and_adds_its_bias():
    params = params_of(CONFIGS["gptj"])
    hidden = jax.random.normal(jax.random.key(3), (2, 5, 16))
    expected = hidden @ params["head"]["weight"].T + params["head"]["bias"][None, None]
    top = head(CONFIGS["gptj"], params)
    np.testing.assert_allclose(logits(top, hidden), expected, atol=1e-6)
    np.testing.assert_allclose(logits(top, hidden[:, 0]), expected[:, 0], atol=1e-6)
    params = params_of(CONFIGS["opt_350m"])
    tied = head(CONFIGS["opt_350m"], params)
    assert tied.weight is params["embed"]["tokens"] and tied.bias is None
    assert logits(tied, hidden[0, 0, :8]).shape == (23,)


def test_attend_by_hand():
    """Two query heads on one kv head; the second query may see nothing."""
    q = jnp.array([[1.0, 0.0], [0.0, 0.0]])[None, None, :, None] * jnp.ones((1, 1, 2, 2, 2))
    k = jnp.log(jnp.array([[1.0, 1.0], [3.0, 1.0], [9.0, 1.0]]))[None, None]
    v = jnp.array([[0.0, 3.0], [4.0, 6.0], [9.0, 9.0]])[None, None]
    mask = jnp.array([[[True, True, False], [False, False, False]]])
    y = attend(q, k, v, mask, 2.0)  # weights exp(2 log 3) = 9 to 1, and one half each
    np.testing.assert_allclose(y[0, 0, :, 0], [[3.6, 5.7], [2.0, 4.5]], rtol=1e-6)
    np.testing.assert_allclose(y[0, 0, :, 1], [[13 / 3, 6.0]] * 2, rtol=1e-6)
    for t in (0, 1):  # one query alone goes another way on a CPU
        alone = attend(q[:, :, :, t : t + 1], k, v, mask[:, t : t + 1], 2.0)
        np.testing.assert_allclose(alone, y[:, :, :, t : t + 1], rtol=1e-6)
    slope = jax.grad(lambda q: attend(q, k, v, mask, 2.0).sum())(q)
    assert np.isfinite(slope).all() and (slope[:, :, :, 1] == 0.0).all()


def test_rotary_turns_pairs_by_hand():
    config = dataclasses.replace(LLAMA, head_dim=6, rope_dim=4, rope_theta=100.0)
    np.testing.assert_allclose(rotary_frequencies(config), [1.0, 0.1], rtol=1e-7)
    angles = rotary_angles(config, jnp.array([[2]]))
    x = jnp.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])[None, None, None]
    c, s = np.cos([2.0, 0.2]), np.sin([2.0, 0.2])
    halves = [c[0] - 3 * s[0], 2 * c[1] - 4 * s[1], 3 * c[0] + s[0], 4 * c[1] + 2 * s[1], 5, 6]
    np.testing.assert_allclose(rotate(x, angles, False).ravel(), halves, rtol=1e-6)
    pairs = [c[0] - 2 * s[0], 2 * c[0] + s[0], 3 * c[1] - 4 * s[1], 4 * c[1] + 3 * s[1], 5, 6]
    np.testing.assert_allclose(rotate(x, angles, True).ravel(), pairs, rtol=1e-6)


def test_rotary_scaling_by_hand():
    """Wavelengths 2 pi, 200 pi and 20000 pi against a context of 1000: kept, blended, divided."""
    config = dataclasses.replace(LLAMA, head_dim=6, rope_theta=1e6)
    linear = dataclasses.replace(config, rope_scaling=RopeScaling(kind="linear", factor=4.0))
    np.testing.assert_allclose(rotary_frequencies(linear), [0.25, 0.0025, 0.000025], rtol=1e-6)
    scaling = RopeScaling(kind="llama3", factor=8.0, original_max_positions=1000)
    blend = (1000 / (200 * np.pi) - 1.0) / 3.0
    expected = [1.0, 0.01 * (blend + (1 - blend) / 8), 0.0001 / 8]
    actual = rotary_frequencies(dataclasses.replace(config, rope_scaling=scaling))
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_heads": 3}, "multiple of kv_heads"),
        ({"rope_dim": 5}, "rope_dim"),
        ({"windows": (1,)}, "windows"),
        ({"windows": (0, 0, 0)}, "windows"),
        ({"layers": 0}, "layers"),
        ({"dropout": 1.0}, "dropout"),
        ({"attention_dropout": -0.1}, "attention_dropout"),
        ({"parallel_residual": True, "norm_first": False}, "norm_first"),
    ],
)
def test_a_config_that_fits_no_decoder_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(LLAMA, **change)


def test_learned_positions_refuse_a_sequence_longer_than_their_table():
    tokens = tokens_of(1, 33)
    with pytest.raises(ValueError, match="33 slots.*32 positions"):
        hidden_states(GPT2, params_of(GPT2), tokens, tokens >= 0)
