"""LLaMA 1 to 3 and everything that ships as `llama`, SmolLM2 among them."""

from minillm_jax.models.config import DecoderConfig
from minillm_jax.models.families import _llama
from minillm_jax.models.families._hf import Attributes, Family


def _config(hf: Attributes) -> DecoderConfig:
    bias = hf.take("attention_bias", bool, False)
    hf.ignore("is_llama_config", "max_sequence_length")
    hf.expect(rope_interleaved=False)
    return DecoderConfig(
        **_llama.common(hf),
        kv_heads=hf.take("num_key_value_heads", int, 0),
        head_dim=hf.take("head_dim", int, 0),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=hf.take("mlp_bias", bool, False),
    )


FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    prefix="model.",
    layers="num_hidden_layers",
    config=_config,
    weights=_llama.WEIGHTS,
    buffers=(r".*\.rotary_emb\.inv_freq",),
)
