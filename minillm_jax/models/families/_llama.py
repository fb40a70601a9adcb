"""What LLaMA, Mistral and Qwen name alike: most attributes, and all weights."""

from typing import Any

from minillm_jax.models.families._hf import Attributes, Weight, linear, norm


def common(hf: Attributes) -> dict[str, Any]:
    """Return the fields of `DecoderConfig` that they share."""
    return {
        "attention_dropout": hf.take("attention_dropout", float, 0.0),
        "vocab_size": hf.take("vocab_size", int),
        "layers": hf.take("num_hidden_layers", int),
        "width": hf.take("hidden_size", int),
        "heads": hf.take("num_attention_heads", int),
        "mlp_width": hf.take("intermediate_size", int),
        "max_positions": hf.take("max_position_embeddings", int),
        "norm": "rms",
        "norm_eps": hf.take("rms_norm_eps", float, 1e-6),
        "activation": hf.activation("hidden_act", "silu"),
        "gated": True,
        "tied_head": hf.take("tie_word_embeddings", bool, False),
        **hf.rope(),
    }


WEIGHTS = (
    Weight("model.embed_tokens.weight", ("embed/tokens",)),
    *norm("model.layers.{}.input_layernorm", "layers/attn_norm"),
    *linear("model.layers.{}.self_attn.q_proj", "layers/attn/q"),
    *linear("model.layers.{}.self_attn.k_proj", "layers/attn/k"),
    *linear("model.layers.{}.self_attn.v_proj", "layers/attn/v"),
    *linear("model.layers.{}.self_attn.o_proj", "layers/attn/o"),
    *norm("model.layers.{}.self_attn.q_norm", "layers/attn/q_norm"),  # Qwen3
    *norm("model.layers.{}.self_attn.k_norm", "layers/attn/k_norm"),
    *norm("model.layers.{}.post_attention_layernorm", "layers/mlp_norm"),
    *linear("model.layers.{}.mlp.gate_proj", "layers/mlp/gate"),
    *linear("model.layers.{}.mlp.up_proj", "layers/mlp/up"),
    *linear("model.layers.{}.mlp.down_proj", "layers/mlp/down"),
    *norm("model.norm", "final_norm"),
    Weight("lm_head.weight", ("head/weight",)),
)
