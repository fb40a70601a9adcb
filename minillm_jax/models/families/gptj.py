"""GPT-J: attention and MLP side by side, interleaved rotation of the first features."""

from minillm_jax.models.config import DecoderConfig
from minillm_jax.models.families._hf import Attributes, Family, Weight, linear, norm


def _config(hf: Attributes) -> DecoderConfig:
    hf.ignore("summary_type", "summary_use_proj", "rotary")
    hf.ignore("summary_activation", "summary_proj_to_labels", "summary_first_dropout")
    hf.expect(scale_attn_weights=True)
    width = hf.take("n_embd", int, 4096)
    return DecoderConfig(
        vocab_size=hf.take("vocab_size", int, 50400),
        layers=hf.take("n_layer", int, 28),
        width=width,
        heads=hf.take("n_head", int, 16),
        mlp_width=hf.take("n_inner", int, 4 * width),
        max_positions=hf.take("n_positions", int, 2048),
        norm="layer",
        norm_eps=hf.take("layer_norm_epsilon", float, 1e-5),
        parallel_residual=True,
        activation=hf.activation("activation_function", "gelu_new"),
        rope_dim=hf.take("rotary_dim", int, 64),
        rope_interleaved=True,
        mlp_bias=True,
        head_bias=True,
        tied_head=hf.take("tie_word_embeddings", bool, False),
        dropout=hf.take("resid_pdrop", float, 0.0),
        embed_dropout=hf.take("embd_pdrop", float, 0.0),
        attention_dropout=hf.take("attn_pdrop", float, 0.0),
    )


FAMILY = Family(
    model_type="gptj",
    architecture="GPTJForCausalLM",
    prefix="transformer.",
    layers="n_layer",
    config=_config,
    weights=(
        Weight("transformer.wte.weight", ("embed/tokens",)),
        *norm("transformer.h.{}.ln_1", "layers/attn_norm"),
        *linear("transformer.h.{}.attn.q_proj", "layers/attn/q"),
        *linear("transformer.h.{}.attn.k_proj", "layers/attn/k"),
        *linear("transformer.h.{}.attn.v_proj", "layers/attn/v"),
        *linear("transformer.h.{}.attn.out_proj", "layers/attn/o"),
        *linear("transformer.h.{}.mlp.fc_in", "layers/mlp/up"),
        *linear("transformer.h.{}.mlp.fc_out", "layers/mlp/down"),
        *norm("transformer.ln_f", "final_norm"),
        Weight("lm_head.weight", ("head/weight",)),
        Weight("lm_head.bias", ("head/bias",)),
    ),
    buffers=(r".*h\.\d+\.attn\.(masked_)?bias", r".*h\.\d+\.attn\.embed_positions"),
)
