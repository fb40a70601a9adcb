"""GPT-Neo: GPT-2 with unscaled attention, of which some layers see a window."""

from minillm_jax.models.config import DecoderConfig
from minillm_jax.models.families._hf import Attributes, Family, Weight, linear, norm


def _config(hf: Attributes) -> DecoderConfig:
    hf.ignore("classifier_dropout", "summary_type")
    hf.ignore("summary_use_proj", "summary_activation", "summary_proj_to_labels")
    hf.ignore("summary_first_dropout", "attention_layers")
    window = hf.take("window_size", int, 256)
    types = hf.take("attention_types", list, [[["global", "local"], 12]])
    width = hf.take("hidden_size", int, 2048)
    return DecoderConfig(
        vocab_size=hf.take("vocab_size", int, 50257),
        layers=hf.take("num_layers", int, 24),
        width=width,
        heads=hf.take("num_heads", int, 16),
        mlp_width=hf.take("intermediate_size", int, 4 * width),
        max_positions=hf.take("max_position_embeddings", int, 2048),
        norm="layer",
        norm_eps=hf.take("layer_norm_epsilon", float, 1e-5),
        activation=hf.activation("activation_function", "gelu_new"),
        positions="learned",
        attention_scale=1.0,
        windows=tuple(
            window if kind == "local" else None for kinds, n in types for kind in kinds * n
        ),
        out_bias=True,
        mlp_bias=True,
        tied_head=hf.take("tie_word_embeddings", bool, True),
        dropout=hf.take("resid_dropout", float, 0.0),
        embed_dropout=hf.take("embed_dropout", float, 0.0),
        attention_dropout=hf.take("attention_dropout", float, 0.0),
    )


FAMILY = Family(
    model_type="gpt_neo",
    architecture="GPTNeoForCausalLM",
    prefix="transformer.",
    layers="num_layers",
    config=_config,
    weights=(
        Weight("transformer.wte.weight", ("embed/tokens",)),
        Weight("transformer.wpe.weight", ("embed/positions",)),
        *norm("transformer.h.{}.ln_1", "layers/attn_norm"),
        *linear("transformer.h.{}.attn.attention.q_proj", "layers/attn/q"),
        *linear("transformer.h.{}.attn.attention.k_proj", "layers/attn/k"),
        *linear("transformer.h.{}.attn.attention.v_proj", "layers/attn/v"),
        *linear("transformer.h.{}.attn.attention.out_proj", "layers/attn/o"),
        *norm("transformer.h.{}.ln_2", "layers/mlp_norm"),
        *linear("transformer.h.{}.mlp.c_fc", "layers/mlp/up"),
        *linear("transformer.h.{}.mlp.c_proj", "layers/mlp/down"),
        *norm("transformer.ln_f", "final_norm"),
        Weight("lm_head.weight", ("head/weight",)),
    ),
    buffers=(r".*h\.\d+\.attn\.attention\.(masked_)?bias",),
)
