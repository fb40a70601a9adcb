"""Mistral: LLaMA with a window on the keys of every layer."""

from dataclasses import replace

from minillm_jax.models.config import DecoderConfig
from minillm_jax.models.families import _llama, llama
from minillm_jax.models.families._hf import Attributes


def _config(hf: Attributes) -> DecoderConfig:
    fields = _llama.common(hf)
    # A missing window is the default of transformers, a null one is none (from version 0.2 on).
    window = hf.take("sliding_window", int, 4096, null=None)
    return DecoderConfig(
        **fields,
        kv_heads=hf.take("num_key_value_heads", int, 8, null=0),
        head_dim=hf.take("head_dim", int, 0),
        windows=(window,) * fields["layers"],
    )


FAMILY = replace(
    llama.FAMILY, model_type="mistral", architecture="MistralForCausalLM", config=_config
)
