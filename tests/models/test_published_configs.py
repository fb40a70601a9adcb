"""The `config.json` of published models, as they stand on the Hub, and their dropout."""

import json
from importlib.resources import files

import jax
import pytest

from minillm_jax import models
from minillm_jax.models.families import family_of
from minillm_jax.types import InputError

PUBLISHED = json.loads(files("minillm_jax").joinpath("models/published.json").read_text("utf-8"))
GPT2, OPT = PUBLISHED["openai-community/gpt2"], PUBLISHED["facebook/opt-13b"]
GPTJ, NEO = PUBLISHED["EleutherAI/gpt-j-6b"], PUBLISHED["EleutherAI/gpt-neo-2.7B"]
QWEN25 = PUBLISHED["Qwen/Qwen2.5-7B"]

# Parameters, as their authors count them (a tied head once), and dropout.
SIZES = {
    "openai-community/gpt2": (124_439_808, 0.1),
    "openai-community/gpt2-medium": (354_823_168, 0.1),
    "openai-community/gpt2-large": (774_030_080, 0.1),
    "openai-community/gpt2-xl": (1_557_611_200, 0.1),
    "EleutherAI/gpt-j-6b": (6_050_882_784, 0.0),
    "EleutherAI/gpt-neo-2.7B": (2.65e9, 0.0),
    "facebook/opt-1.3b": (1.316e9, 0.1),
    "facebook/opt-2.7b": (2.65e9, 0.1),
    "facebook/opt-6.7b": (6.658e9, 0.1),
    "facebook/opt-13b": (12.85e9, 0.1),
    "huggyllama/llama-7b": (6_738_415_616, 0.0),
    "huggyllama/llama-13b": (13_015_864_320, 0.0),
    "Qwen/Qwen2.5-1.5B": (1_543_714_304, 0.0),
    "Qwen/Qwen2.5-7B": (7_615_616_512, 0.0),
    "Qwen/Qwen3-0.6B-Base": (596_049_920, 0.0),
    "Qwen/Qwen3-8B-Base": (8_190_735_360, 0.0),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_configs_of_published_models_are_read(name):
    """The sizes are right: together they are the number of parameters that is published."""
    parameters, dropout = SIZES[name]
    config = family_of(PUBLISHED[name]).read(PUBLISHED[name])
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
