"""Qwen2 (and 2.5) and Qwen3: LLaMA with biases on q, k and v, or with norms on q and k."""

from dataclasses import replace
from typing import Any

from minillm_jax.models.config import DecoderConfig
from minillm_jax.models.families import _llama, llama
from minillm_jax.models.families._hf import Attributes


def _common(hf: Attributes) -> dict[str, Any]:
    fields = _llama.common(hf)
    sliding = hf.take("use_sliding_window", bool, False)
    window = hf.take("sliding_window", int, 4096, null=None) if sliding else None
    first = hf.take("max_window_layers", int, 28)
    layers = range(fields["layers"])
    kinds = hf.take("layer_types", list, None)
    if kinds is None:
        kinds = ["sliding_attention" if layer >= first else "full_attention" for layer in layers]
    hf.ignore("sliding_window")
    hf.expect(use_mrope=False)
    fields["kv_heads"] = hf.take("num_key_value_heads", int, 32, null=0)
    fields["windows"] = tuple(window if kind == "sliding_attention" else None for kind in kinds)
    return fields


def _qwen2(hf: Attributes) -> DecoderConfig:
    return DecoderConfig(**_common(hf), head_dim=hf.take("head_dim", int, 0), qkv_bias=True)


def _qwen3(hf: Attributes) -> DecoderConfig:
    bias = hf.take("attention_bias", bool, False)
    return DecoderConfig(
        **_common(hf),
        head_dim=hf.take("head_dim", int, 128, null=0),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
    )


QWEN2 = replace(llama.FAMILY, model_type="qwen2", architecture="Qwen2ForCausalLM", config=_qwen2)
QWEN3 = replace(llama.FAMILY, model_type="qwen3", architecture="Qwen3ForCausalLM", config=_qwen3)
