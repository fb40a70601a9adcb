"""Tiny decoders, one per odd kind of layer, with parameters away from their initial values."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from minillm_jax.models import DecoderConfig, RopeScaling, abstract_params

LLAMA = DecoderConfig(
    vocab_size=23,
    layers=3,
    width=16,
    heads=4,
    kv_heads=2,
    head_dim=6,
    mlp_width=24,
    max_positions=32,
    gated=True,
)
GPT2 = DecoderConfig(
    vocab_size=23,
    layers=3,
    width=16,
    heads=2,
    mlp_width=24,
    max_positions=32,
    norm="layer",
    activation="gelu_new",
    positions="learned",
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
)
CONFIGS = {
    "llama": LLAMA,
    "gpt2": GPT2,
    "gpt_neo": dataclasses.replace(
        GPT2, qkv_bias=False, attention_scale=1.0, windows=(None, 3, None)
    ),
    "gptj": dataclasses.replace(
        GPT2,
        positions="rope",
        rope_dim=4,
        rope_interleaved=True,
        parallel_residual=True,
        qkv_bias=False,
        out_bias=False,
        tied_head=False,
        head_bias=True,
    ),
    "opt_350m": dataclasses.replace(
        GPT2, activation="relu", position_offset=2, norm_first=False, embed_width=8
    ),
    "mistral": dataclasses.replace(LLAMA, windows=(3, 3, 3), tied_head=False),
    "qwen2": dataclasses.replace(LLAMA, qkv_bias=True),
    "qwen3": dataclasses.replace(
        LLAMA, qk_norm=True, rope_scaling=RopeScaling(kind="llama3", factor=8.0)
    ),
}


@functools.cache
def params_of(config):
    """Random parameters, norms and biases away from 1 and 0, and all large enough to tell."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        centre = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(centre + 0.25 * rng.standard_normal(leaf.shape), leaf.dtype)

    return jax.tree.map_with_path(draw, abstract_params(config))


def tokens_of(rows, columns, seed=5):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 23, (rows, columns), np.int32))
