"""Folders in and out: nothing is lost, nothing is guessed, nothing is left half-written."""

import dataclasses
import errno
import json

import jax
import ml_dtypes
import numpy as np
import pytest
from golden import make
from refusals import refused
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from minillm_jax import hosts, models
from minillm_jax.models import hf
from minillm_jax.models.families._hf import dtype_name
from minillm_jax.types import InputError


@pytest.fixture
def folder(tmp_path):
    """A LLaMA with every odd attribute, as transformers wrote it."""
    make.write_folder("llama_odd", tmp_path / "model")
    return tmp_path / "model"


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def edit_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def assert_equal_trees(found, wanted):
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_the_tree_is_that_of_the_decoder(folder):
    checkpoint = hf.load(folder)
    abstract = models.abstract_params(checkpoint.config)
    shapes = jax.tree.map(lambda leaf: leaf.shape, abstract)
    assert jax.tree.map(np.shape, checkpoint.params) == shapes
    assert checkpoint.path == folder
    kernel = load_file(folder / "model.safetensors")["model.layers.1.self_attn.k_proj.weight"]
    np.testing.assert_array_equal(checkpoint.params["layers"]["attn"]["k"]["kernel"][1], kernel.T)


def test_what_is_saved_is_what_is_loaded(folder, tmp_path):
    first = hf.load(folder)
    hf.save(tmp_path / "saved", first.config, first.params, first.hf_config)
    second = hf.load(tmp_path / "saved")
    assert second.config == first.config
    assert_equal_trees(second.params, first.params)
    old, new = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "saved"))
    assert_equal_trees(new, old)
    with safe_open(tmp_path / "saved/model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt", "minillm_jax": "1"}
    assert second.hf_config["torch_dtype"] == "float32"
    assert second.hf_config["architectures"] == ["LlamaForCausalLM"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "saved"]


def test_the_dtype_is_chosen_by_the_caller_and_kept_by_save(folder, tmp_path):
    wide, narrow = hf.load(folder), hf.load(folder, dtype=ml_dtypes.bfloat16)
    rounded = jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16), wide.params)
    assert_equal_trees(narrow.params, rounded)
    hf.save(tmp_path / "saved", narrow.config, narrow.params, narrow.hf_config)
    again = hf.load(tmp_path / "saved")  # bfloat16 on disk, float32 in memory
    assert dtype_name(again.hf_config) == again.hf_config["torch_dtype"] == "bfloat16"
    assert again.params["final_norm"]["scale"].dtype == np.float32
    assert_equal_trees(again.params, jax.tree.map(lambda leaf: leaf.astype(np.float32), rounded))


def test_a_large_model_is_written_in_shards(folder, tmp_path, monkeypatch):
    checkpoint = hf.load(folder)
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(checkpoint.params)]
    monkeypatch.setattr(hf, "SHARD_BYTES", sum(sizes) // 3)
    params = jax.tree.map(jax.device_put, checkpoint.params)
    hf.save(tmp_path / "new", checkpoint.config, params, checkpoint.hf_config)
    files = sorted(file.name for file in (tmp_path / "new").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert not (tmp_path / "new" / "model.safetensors").exists()
    index = json.loads((tmp_path / "new" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes)
    assert_equal_trees(hf.load(tmp_path / "new").params, checkpoint.params)
    for file in files:
        tensors = load_file(tmp_path / "new" / file)
        largest = max(tensor.nbytes for tensor in tensors.values())
        held = sum(tensor.nbytes for tensor in tensors.values())
        assert held <= max(largest, hf.SHARD_BYTES)


def test_shards_are_read_through_their_index(folder):
    whole = hf.load(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    index = {name: file for file, part in files.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert_equal_trees(hf.load(folder).params, whole.params)

    save_file({name: tensors[name] for name in names[3::2]}, folder / "b.safetensors")
    refused(folder, "b.safetensors", names[1])
    (folder / "b.safetensors").unlink()
    refused(folder, "b.safetensors is missing", "fetch it again")


def test_a_missing_tensor_is_named(folder):
    edit_tensors(folder, lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight"))
    refused(folder, str(folder), "no tensor model.layers.2.mlp.up_proj.weight", "(24, 16)")


def test_a_tensor_too_many_is_named(folder):
    edit_tensors(folder, lambda tensors: tensors.update({"score.weight": np.ones((2, 16))}))
    refused(folder, "model.safetensors", "score.weight has no place in a LlamaForCausalLM")


def test_a_layer_too_many_is_named(folder):
    edit_config(folder, num_hidden_layers=2)
    refused(folder, "model.layers.2.", "(and 15 more)")


def test_a_misshapen_tensor_is_named(folder):
    name = "model.layers.1.self_attn.o_proj.weight"
    edit_tensors(folder, lambda tensors: tensors.update({name: tensors[name][:, :-1].copy()}))
    refused(folder, "model.safetensors", name, "(16, 23)", "not (16, 24)", "config.json")


def test_a_config_with_another_head_width_is_refused(folder):
    edit_config(folder, head_dim=8)
    refused(folder, "q_proj.weight", "(24, 16)", "not (32, 16)")


def test_a_copy_of_tied_weights_is_accepted_only_if_it_is_one(tmp_path):
    make.write_folder("llama", tmp_path)
    plain = hf.load(tmp_path)

    def add(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    edit_tensors(tmp_path, add)
    assert_equal_trees(hf.load(tmp_path).params, plain.params)
    edit_tensors(tmp_path, lambda tensors: tensors["lm_head.weight"].__setitem__((0, 0), 9.0))
    refused(tmp_path, "lm_head.weight differs from model.embed_tokens.weight", "tie_word_embedd")


def test_buffers_of_old_checkpoints_are_ignored_and_bare_names_completed(folder):
    plain = hf.load(folder)

    def age(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)
        tensors["layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.float32)

    edit_tensors(folder, age)
    assert "layers.1.input_layernorm.weight" in load_file(folder / "model.safetensors")
    assert_equal_trees(hf.load(folder).params, plain.params)


def test_what_is_no_model_is_refused_in_one_line(folder, tmp_path):
    refused(tmp_path / "nowhere", "no model at", "nowhere")
    refused(folder / "model.safetensors", "give its folder")
    edit_config(folder, model_type="bert")
    refused(folder, str(folder), "model_type 'bert'")
    (folder / "config.json").write_text("{")
    refused(folder, "config.json", "fetch it again")
    (folder / "config.json").write_text("[]")
    refused(folder, "config.json is no JSON object")
    (folder / "config.json").unlink()
    refused(folder, "no config.json in", str(folder))


def test_damaged_weights_are_refused(folder):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for part in (whole[:-5], whole[:100], b"", b"no model at all"):
        file.write_bytes(part)
        refused(folder, str(file), "damaged", "fetch it again")
    file.unlink()
    refused(folder, "no model.safetensors in")


def test_a_full_disk_leaves_nothing_behind(folder, tmp_path, monkeypatch):
    checkpoint = hf.load(folder)

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hf, "save_file", full)
    with pytest.raises(InputError, match="No space left on device.*free some space"):
        hf.save(tmp_path / "out", checkpoint.config, checkpoint.params, checkpoint.hf_config)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_save_overwrites_nothing_and_refuses_a_wrong_model(folder, tmp_path):
    checkpoint = hf.load(folder)
    config, params, hf_config = checkpoint.config, checkpoint.params, checkpoint.hf_config
    with pytest.raises(InputError, match="is there already and not empty; remove it"):
        hf.save(folder, config, params, hf_config)
    kernel = dataclasses.replace(config, attention="splash")  # how it is read, which none stores
    hf.save(tmp_path / "read by a kernel", kernel, params, hf_config)
    assert hf.open_model(tmp_path / "read by a kernel").config == config
    with pytest.raises(InputError, match="another model"):
        hf.save(tmp_path / "out", config, params, {**hf_config, "rms_norm_eps": 0.5})
    with pytest.raises(InputError, match="params/final_norm/scale is nothing"):
        fewer = {name: leaf for name, leaf in params.items() if name != "final_norm"}
        hf.save(tmp_path / "out", config, fewer, hf_config)
    with pytest.raises(InputError, match="params/lora is unknown"):
        hf.save(
            tmp_path / "out", config, {**params, "lora": params["final_norm"]["scale"]}, hf_config
        )
    assert not (tmp_path / "out").exists()


def test_a_process_that_comes_later_than_the_first_has_written_goes_on(folder, monkeypatch):
    checkpoint = hf.load(folder)
    monkeypatch.setattr(hosts, "is_main", lambda: False)
    hf.save(folder, checkpoint.config, checkpoint.params, checkpoint.hf_config)
    assert_equal_trees(hf.load(folder).params, checkpoint.params)


def test_kept_layers_are_copied_and_counted(folder, tmp_path):
    checkpoint = hf.load(folder)
    small = hf.keep_layers(checkpoint, [0, 2])
    assert (small.config.layers, small.hf_config["num_hidden_layers"]) == (2, 2)
    assert checkpoint.hf_config["num_hidden_layers"] == 3
    kernel = checkpoint.params["layers"]["mlp"]["down"]["kernel"]
    np.testing.assert_array_equal(small.params["layers"]["mlp"]["down"]["kernel"], kernel[[0, 2]])
    hf.save(tmp_path / "small", small.config, small.params, small.hf_config)
    again = hf.load(tmp_path / "small")
    assert again.config == small.config
    assert_equal_trees(again.params, small.params)


@pytest.mark.parametrize("kept", [[], [0, 3], [-1, 0], [1, 0], [0, 0]])
def test_layers_that_are_not_there_cannot_be_kept(folder, kept):
    with pytest.raises(InputError, match="kept layers .* from 0 to 2"):
        hf.keep_layers(hf.load(folder), kept)


def greedy(checkpoint, prompt, count):
    """Return the continuation by the full forward pass, one argmax at a time."""
    config, params = checkpoint.config, jax.device_put(checkpoint.params)
    tokens = np.zeros((1, len(prompt) + count), np.int32)
    tokens[0, : len(prompt)] = prompt
    slots = np.arange(tokens.shape[1])[None]

    @jax.jit
    def step(tokens, mask, last):
        hidden = models.hidden_states(config, params, tokens, mask)
        return models.logits(models.head(config, params), hidden[0, last]).argmax()

    for length in range(len(prompt), tokens.shape[1]):
        tokens[0, length] = step(tokens, slots < length, length - 1)
    return tokens[0, len(prompt) :]


def test_stories260k_continues_as_in_transformers(shared):
    golden = np.load(make.HERE / "stories260K.npz")
    checkpoint = hf.load(shared / "models/stories260K")
    found = greedy(checkpoint, golden["prompt"], len(golden["answer"]))
    np.testing.assert_array_equal(found, golden["answer"])


@pytest.mark.filterwarnings("ignore")
def test_stories260k_without_a_layer_continues_as_its_export_in_transformers(shared, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    small = hf.keep_layers(hf.load(shared / "models/stories260K"), [0, 1, 3, 4])
    hf.save(tmp_path / "out", small.config, small.params, small.hf_config)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    prompt = np.load(make.HERE / "stories260K.npz")["prompt"]
    wanted = model.generate(
        torch.tensor(prompt)[None], do_sample=False, max_new_tokens=48, eos_token_id=None
    )
    np.testing.assert_array_equal(greedy(small, prompt, 48), wanted[0, len(prompt) :].numpy())
