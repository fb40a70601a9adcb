"""GPT-2: learned positions, and q, k and v in one `Conv1D`."""

from minillm_jax.models.config import DecoderConfig
from minillm_jax.models.families._hf import Attributes, Family, Weight, linear, norm


def _config(hf: Attributes) -> DecoderConfig:
    # Left out: all that is for classification.
    hf.ignore("n_ctx", "reorder_and_upcast_attn", "summary_type")
    hf.ignore("summary_use_proj", "summary_activation", "summary_proj_to_labels")
    hf.ignore("summary_first_dropout", "n_special", "output_past", "predict_special_tokens")
    hf.expect(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False)
    width = hf.take("n_embd", int, 768)
    return DecoderConfig(
        vocab_size=hf.take("vocab_size", int, 50257),
        layers=hf.take("n_layer", int, 12),
        width=width,
        heads=hf.take("n_head", int, 12),
        mlp_width=hf.take("n_inner", int, 4 * width),
        max_positions=hf.take("n_positions", int, 1024),
        norm="layer",
        norm_eps=hf.take("layer_norm_epsilon", float, 1e-5),
        activation=hf.activation("activation_function", "gelu_new"),
        positions="learned",
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        tied_head=hf.take("tie_word_embeddings", bool, True),
        dropout=hf.take("resid_pdrop", float, 0.1),
        embed_dropout=hf.take("embd_pdrop", float, 0.1),
        attention_dropout=hf.take("attn_pdrop", float, 0.1),
    )


_QKV = ("layers/attn/q", "layers/attn/k", "layers/attn/v")

FAMILY = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    prefix="transformer.",
    layers="n_layer",
    config=_config,
    weights=(
        Weight("transformer.wte.weight", ("embed/tokens",)),
        Weight("transformer.wpe.weight", ("embed/positions",)),
        *norm("transformer.h.{}.ln_1", "layers/attn_norm"),
        *linear("transformer.h.{}.attn.c_attn", *_QKV, transpose=False),
        *linear("transformer.h.{}.attn.c_proj", "layers/attn/o", transpose=False),
        *norm("transformer.h.{}.ln_2", "layers/mlp_norm"),
        *linear("transformer.h.{}.mlp.c_fc", "layers/mlp/up", transpose=False),
        *linear("transformer.h.{}.mlp.c_proj", "layers/mlp/down", transpose=False),
        *norm("transformer.ln_f", "final_norm"),
        Weight("lm_head.weight", ("head/weight",)),
    ),
    buffers=(r".*h\.\d+\.attn\.(masked_)?bias",),
)
