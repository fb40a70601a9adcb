"""Tiny decoders, one per odd kind of layer, with parameters away from their initial values."""

import dataclasses

import jax

from minillm_jax.models import DecoderConfig, RopeScaling, init_params

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


def params_of(config, seed=0):
    """Random parameters with norms and biases moved off 1 and 0, and kernels large enough to tell."""
    params = init_params(config, jax.random.key(seed))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    moved = [x + 0.2 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, moved)


def tokens_of(rows, columns, seed=5):
    return jax.random.randint(jax.random.key(seed), (rows, columns), 0, 23)
