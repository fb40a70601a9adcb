"""Every family against transformers: golden logits always, live torch where it is installed."""

import functools
import json
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
from golden import make

from minillm_jax import models
from minillm_jax.models import hf
from minillm_jax.models.families import FAMILIES, family_of
from minillm_jax.models.families._hf import Attributes, dtype_name
from minillm_jax.types import InputError

ATOL = 1e-5
CASES = sorted(make.CASES)
live = pytest.mark.filterwarnings("ignore")  # those of torch and transformers


@functools.partial(jax.jit, static_argnums=0)
def forward(config, params, tokens, mask):
    hidden = models.hidden_states(config, params, tokens, mask)
    return models.logits(models.head(config, params), hidden)


def our_logits(checkpoint, tokens, mask):
    tokens = np.asarray(tokens, np.int32)
    return np.asarray(forward(checkpoint.config, checkpoint.params, tokens, mask))


def assert_same(found, wanted, mask):
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[mask], wanted[mask], rtol=0, atol=ATOL)


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_the_golden_ones(name, tmp_path):
    golden = make.write_folder(name, tmp_path)
    assert golden["mask"][0, 0] == golden["mask"][2, -1] == False  # noqa: E712  both sides padded
    logits = our_logits(hf.load(tmp_path), golden["tokens"], golden["mask"])
    assert_same(logits, golden["logits"], golden["mask"])


@live
@pytest.mark.parametrize("name", CASES)
def test_logits_equal_those_of_torch_there_and_back(name, tmp_path):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = make.build(name, seed=7)
    make.save(model, tmp_path / "theirs")
    tokens, mask = make.batch()
    wanted = make.torch_logits(model, tokens, mask)

    checkpoint = hf.load(tmp_path / "theirs")
    assert_same(our_logits(checkpoint, tokens, mask), wanted, mask)

    hf.save(tmp_path / "ours", checkpoint.config, checkpoint.params, checkpoint.hf_config)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    np.testing.assert_array_equal(make.torch_logits(again, tokens, mask)[mask], wanted[mask])


# Every name of a rate, and three rates, so that no place can be taken for another.
_BRANCH, _EMBED, _ATTENTION = 0.2, 0.1, 0.3
RATES = {
    "gpt2": {"resid_pdrop": _BRANCH, "embd_pdrop": _EMBED, "attn_pdrop": _ATTENTION},
    "gptj": {"resid_pdrop": _BRANCH, "embd_pdrop": _EMBED, "attn_pdrop": _ATTENTION},
    "gpt_neo": {
        "resid_dropout": _BRANCH, "embed_dropout": _EMBED, "attention_dropout": _ATTENTION
    },
    "opt": {"dropout": _BRANCH, "attention_dropout": _ATTENTION},
    "opt_350m": {"dropout": _BRANCH, "attention_dropout": _ATTENTION},
}  # fmt: skip


@live
@pytest.mark.parametrize("name", CASES)
def test_dropout_is_where_torch_has_it(name, tmp_path, monkeypatch):
    """With an affine map for the noise, training mode is deterministic on both sides."""
    torch = pytest.importorskip("torch")
    rates = RATES.get(name, {"attention_dropout": _ATTENTION})
    model = make.build(name, seed=7, attention="eager", **rates)
    make.save(model, tmp_path)

    def affine(x, rate):
        return x * (1 - rate) + 0.1 * rate

    def theirs(x, p=0.5, training=True, inplace=False):
        return affine(x, p) if training else x

    def ours(self, x, deterministic=None, rng=None):
        return x if self.deterministic else affine(x, self.rate)

    monkeypatch.setattr(torch.nn.functional, "dropout", theirs)
    monkeypatch.setattr(nn.Dropout, "__call__", ours)
    tokens, _ = make.batch()
    mask: Any = np.ones_like(tokens, bool)
    plain = make.torch_logits(model, tokens, mask)
    wanted = make.torch_logits(model.train(), tokens, mask)
    assert np.abs(plain - wanted).max() > 0.01
    read = hf.load(tmp_path)
    key = jax.random.key(0)
    given: Any = tokens, mask
    hidden = models.hidden_states(read.config, read.params, *given, dropout_key=key)
    assert_same(
        np.asarray(models.logits(models.head(read.config, read.params), hidden)), wanted, mask
    )


@live
@pytest.mark.parametrize("name", ["llama_odd", "qwen2", "gpt2", "gpt_neo"])
def test_an_export_with_layers_taken_out_loads_in_transformers(name, tmp_path):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    golden = make.write_folder(name, tmp_path / "theirs")
    small = hf.keep_layers(hf.load(tmp_path / "theirs"), [0, 2])
    hf.save(tmp_path / "ours", small.config, small.params, small.hf_config)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    wanted = make.torch_logits(model, golden["tokens"], golden["mask"])
    assert_same(our_logits(small, golden["tokens"], golden["mask"]), wanted, golden["mask"])


@pytest.mark.parametrize("name", CASES)
def test_no_weight_may_be_swapped_unseen(name, tmp_path):
    """The golden logits depend on every tensor, so that a wrong name cannot pass."""
    golden = make.write_folder(name, tmp_path)
    checkpoint = hf.load(tmp_path)
    logits = our_logits(checkpoint, golden["tokens"], golden["mask"])

    def check(tree, path=""):
        for key, leaf in tree.items():
            if isinstance(leaf, dict):
                check(leaf, f"{path}/{key}")
                continue
            if path.endswith("/k") and key == "bias" and checkpoint.config.positions == "learned":
                continue  # without rotation it adds the same to every score of a query
            tree[key] = leaf[..., ::-1]
            other = our_logits(checkpoint, golden["tokens"], golden["mask"])
            assert np.abs(other - logits)[golden["mask"]].max() > 100 * ATOL, (path, key)
            tree[key] = leaf

    check(checkpoint.params)


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3}},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **LLAMA3}},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", "type": "x", **LLAMA3}},
    ],
)
def test_rope_is_read_in_every_spelling(spelling):
    attributes = Attributes(spelling)
    rope = attributes.rope()
    attributes.finish("test")
    assert rope["rope_theta"] == 5e5
    assert (rope["rope_scaling"].kind, rope["rope_scaling"].factor) == ("llama3", 8.0)
    assert rope["rope_scaling"].original_max_positions == 8192


@pytest.mark.parametrize(
    "spelling", [{"rope_theta": 7}, {"rope_parameters": {"rope_theta": 7, "rope_type": "default"}}]
)
def test_plain_rope_is_read_in_both_spellings(spelling):
    assert Attributes(spelling).rope() == {"rope_theta": 7.0, "rope_scaling": None}
    assert Attributes({}).rope()["rope_theta"] == 10000.0


def test_dtype_is_read_in_both_spellings():
    assert dtype_name({"dtype": "bfloat16"}) == dtype_name({"torch_dtype": "bfloat16"})
    assert dtype_name({}) is None


LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 40,
    "max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"clip_qkv": 8.0}, "attribute clip_qkv = 8.0"),
        ({"quantization_config": {"bits": 4}}, "attribute quantization_config"),
        ({"attention_dropout": "x"}, "attribute attention_dropout must be float, not 'x'"),
        ({"hidden_act": "mish"}, "hidden_act = 'mish'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type 'yarn'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "x": 1}}, "x = 1"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor is missing"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers must be int, not 'two'"),
        ({"num_hidden_layers": None}, "num_hidden_layers is missing"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be int"),
        ({"num_attention_heads": 0}, "impossible sizes"),
        ({"num_key_value_heads": 3}, "impossible sizes"),
        ({"model_type": "bert"}, "model_type 'bert' is not supported; choose one of gpt2, "),
        ({"model_type": None}, "no model_type"),
    ],
)
def test_what_a_config_says_beyond_the_table_is_refused(change, said):
    with pytest.raises(InputError) as caught:
        family_of({**LLAMA, **change}).read({**LLAMA, **change})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_harmless_and_default_attributes_are_accepted():
    plain = family_of(LLAMA).read(LLAMA)
    harmless = {"eos_token_id": 3, "use_cache": False, "attention_dropout": 0.0, "clip_qkv": None}
    assert family_of(LLAMA).read({**LLAMA, **harmless}) == plain
    assert not plain.tied_head  # the default of transformers


def test_null_is_not_missing_where_transformers_tells_them_apart():
    mistral = {**LLAMA, "model_type": "mistral", "num_key_value_heads": 2}
    assert family_of(mistral).read(mistral).windows == (4096, 4096)
    assert family_of(mistral).read({**mistral, "sliding_window": None}).windows is None


def test_layers_are_kept_with_their_windows_or_not_at_all():
    windows = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    old = {**LLAMA, "model_type": "qwen2", "num_key_value_heads": 2, **windows}
    new = {**old, "layer_types": ["full_attention", "sliding_attention"]}
    family = family_of(old)
    assert family.read(old) == family.read(new)
    assert family.read(family.keep(new, [1])).windows == (4,)
    with pytest.raises(InputError, match=r"layers \[1\] of a qwen2 model"):
        family.keep(old, [1])


def test_families_import_neither_jax_nor_flax():
    import ast
    import pathlib

    import minillm_jax.models.families as package

    for file in pathlib.Path(package.__path__[0]).glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in getattr(node, "names", ())]
            names.append(getattr(node, "module", None) or "")
            assert not any(name.split(".")[0] in ("jax", "flax") for name in names), file


def test_every_family_has_a_golden_model():
    covered = {
        json.loads(str(np.load(make.HERE / f"{n}.npz")["config"]))["model_type"] for n in CASES
    }
    assert covered == set(FAMILIES)
