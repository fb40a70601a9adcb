"""The `config.json` of published models, as they stand on the Hub, and their dropout."""

import jax
import pytest

from minillm_jax import models
from minillm_jax.models.families import family_of
from minillm_jax.types import InputError

GPT2 = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
}
OPT = {
    "_remove_final_layer_norm": False,
    "activation_dropout": 0.0,
    "activation_function": "relu",
    "architectures": ["OPTForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 2,
    "do_layer_norm_before": True,
    "dropout": 0.1,
    "eos_token_id": 2,
    "init_std": 0.02,
    "layerdrop": 0.0,
    "max_position_embeddings": 2048,
    "model_type": "opt",
    "pad_token_id": 1,
    "prefix": "</s>",
    "torch_dtype": "float16",
    "transformers_version": "4.21.0.dev0",
    "use_cache": True,
    "vocab_size": 50272,
}
GPTJ = {
    "activation_function": "gelu_new",
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "gradient_checkpointing": False,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gptj",
    "n_embd": 4096,
    "n_head": 16,
    "n_inner": None,
    "n_layer": 28,
    "n_positions": 2048,
    "resid_pdrop": 0.0,
    "rotary": True,
    "rotary_dim": 64,
    "scale_attn_weights": True,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "tie_word_embeddings": False,
    "tokenizer_class": "GPT2Tokenizer",
    "vocab_size": 50400,
}
NEO = {
    "activation_function": "gelu_new",
    "attention_dropout": 0,
    "attention_layers": ["global", "local"] * 16,
    "attention_types": [[["global", "local"], 16]],
    "embed_dropout": 0,
    "gradient_checkpointing": False,
    "hidden_size": 2560,
    "intermediate_size": None,
    "layer_norm_epsilon": 1e-05,
    "max_position_embeddings": 2048,
    "model_type": "gpt_neo",
    "num_heads": 20,
    "num_layers": 32,
    "resid_dropout": 0,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "tokenizer_class": "GPT2Tokenizer",
    "vocab_size": 50257,
    "window_size": 256,
}
LLAMA_13B = {
    "hidden_act": "silu",
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "max_position_embeddings": 2048,
    "max_sequence_length": 2048,
    "model_type": "llama",
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vocab_size": 32000,
}
QWEN25 = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
QWEN3 = {
    **{name: value for name, value in QWEN25.items() if name != "use_mrope"},
    "attention_bias": False,
    "head_dim": 128,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "vocab_size": 151936,
}
XL = {"n_embd": 1600, "n_head": 25, "n_layer": 48, "output_past": True}
MEDIUM = {"n_embd": 1024, "n_head": 16, "n_layer": 24, "n_special": 0}
OPT_13B = {"ffn_dim": 20480, "hidden_size": 5120, "word_embed_proj_dim": 5120}


@pytest.mark.parametrize(
    ("hf_config", "parameters", "dropout"),
    [
        ({**GPT2, "n_embd": 768, "n_head": 12, "n_layer": 12}, 124_439_808, 0.1),
        ({**GPT2, **MEDIUM, "predict_special_tokens": True}, 354_823_168, 0.1),
        ({**GPT2, **XL}, 1_557_611_200, 0.1),
        ({**OPT, **OPT_13B, "num_attention_heads": 40, "num_hidden_layers": 40}, 12.85e9, 0.1),
        (GPTJ, 6_050_882_784, 0.0),
        (NEO, 2.65e9, 0.0),
        (LLAMA_13B, 13_015_864_320, 0.0),
        (QWEN25, 7_615_616_512, 0.0),
        (QWEN3, 8_190_735_360, 0.0),
    ],
    ids="gpt2 gpt2-medium gpt2-xl opt-13b gpt-j gpt-neo llama-13b qwen2.5-7b qwen3-8b".split(),
)
def test_the_configs_of_published_models_are_read(hf_config, parameters, dropout):
    """The sizes are right: together they are the number of parameters that is published."""
    config = family_of(hf_config).read(hf_config)
    leaves = jax.tree.leaves(models.abstract_params(config))
    found = sum(leaf.size for leaf in leaves)
    assert found == pytest.approx(parameters, rel=0.005 if isinstance(parameters, float) else 0)
    assert config.dropout == dropout


@pytest.mark.parametrize(
    ("hf_config", "change", "said"),
    [
        (OPT, {"activation_dropout": 0.1}, "activation_dropout = 0.1 is not supported"),
        (OPT, {"layerdrop": 0.1}, "layerdrop = 0.1 is not supported"),
        (QWEN25, {"use_mrope": True}, "use_mrope = True is not supported"),
    ],
)
def test_what_is_not_there_is_refused(hf_config, change, said):
    family_of(hf_config).read(hf_config)
    with pytest.raises(InputError) as caught:
        family_of(hf_config).read({**hf_config, **change})
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_dropout_is_read():
    def read(hf_config, **rates):
        config = family_of(hf_config).read({**hf_config, **rates})
        return config.dropout, config.embed_dropout, config.attention_dropout

    assert read(GPT2) == (0.1, 0.1, 0.1)
    assert read(GPT2, resid_pdrop=0.2, embd_pdrop=0.3, attn_pdrop=0.0) == (0.2, 0.3, 0.0)
    assert read(GPTJ, resid_pdrop=0.2, embd_pdrop=0.3, attn_pdrop=0.4) == (0.2, 0.3, 0.4)
    rates = {"resid_dropout": 0.2, "embed_dropout": 0.3, "attention_dropout": 0.4}
    assert read(NEO, **rates) == (0.2, 0.3, 0.4)
    assert read(OPT, dropout=0.5, attention_dropout=0.4) == (0.5, 0.0, 0.4)
    assert read(QWEN25, attention_dropout=0.4) == (0.0, 0.0, 0.4)
