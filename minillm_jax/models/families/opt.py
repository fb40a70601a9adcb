"""OPT: learned positions from row 2 on; the 350m has its norms after and narrow embeddings."""

from minillm_jax.models.config import DecoderConfig
from minillm_jax.models.families._hf import Attributes, Family, Weight, linear, norm


def _config(hf: Attributes) -> DecoderConfig:
    hf.ignore("init_std", "prefix")
    hf.expect(activation_dropout=0.0, layerdrop=0.0)
    hf.expect(layer_norm_elementwise_affine=True, _remove_final_layer_norm=False)
    width = hf.take("hidden_size", int, 768)
    bias = hf.take("enable_bias", bool, True)
    return DecoderConfig(
        vocab_size=hf.take("vocab_size", int, 50272),
        layers=hf.take("num_hidden_layers", int, 12),
        width=width,
        embed_width=hf.take("word_embed_proj_dim", int, width),
        heads=hf.take("num_attention_heads", int, 12),
        mlp_width=hf.take("ffn_dim", int, 3072),
        max_positions=hf.take("max_position_embeddings", int, 2048),
        norm="layer",
        norm_first=hf.take("do_layer_norm_before", bool, True),
        activation=hf.activation("activation_function", "relu"),
        positions="learned",
        position_offset=2,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        tied_head=hf.take("tie_word_embeddings", bool, True),
        dropout=hf.take("dropout", float, 0.1),
        attention_dropout=hf.take("attention_dropout", float, 0.0),
    )


FAMILY = Family(
    model_type="opt",
    architecture="OPTForCausalLM",
    prefix="model.",
    layers="num_hidden_layers",
    config=_config,
    weights=(
        Weight("model.decoder.embed_tokens.weight", ("embed/tokens",)),
        Weight("model.decoder.embed_positions.weight", ("embed/positions",)),
        *linear("model.decoder.project_in", "embed/project_in"),
        *norm("model.decoder.layers.{}.self_attn_layer_norm", "layers/attn_norm"),
        *linear("model.decoder.layers.{}.self_attn.q_proj", "layers/attn/q"),
        *linear("model.decoder.layers.{}.self_attn.k_proj", "layers/attn/k"),
        *linear("model.decoder.layers.{}.self_attn.v_proj", "layers/attn/v"),
        *linear("model.decoder.layers.{}.self_attn.out_proj", "layers/attn/o"),
        *norm("model.decoder.layers.{}.final_layer_norm", "layers/mlp_norm"),
        *linear("model.decoder.layers.{}.fc1", "layers/mlp/up"),
        *linear("model.decoder.layers.{}.fc2", "layers/mlp/down"),
        *norm("model.decoder.final_layer_norm", "final_norm"),
        *linear("model.decoder.project_out", "project_out"),
        Weight("lm_head.weight", ("head/weight",)),
    ),
    buffers=(r"(model\.)?decoder\.version",),
)
