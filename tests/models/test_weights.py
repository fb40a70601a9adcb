"""From files to arrays: kept layers alone, straight to devices, and weights that are no good."""

import json
import struct

import jax
import ml_dtypes
import numpy as np
import pytest
from golden import make
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding
from refusals import refused
from safetensors.numpy import load_file, save_file

from minillm_jax import models
from minillm_jax.models import hf, placing
from minillm_jax.types import InputError

CASES = ["llama_odd", "gpt2", "gptj", "opt_350m", "qwen3"]


@pytest.fixture
def folder(tmp_path):
    make.write_folder("llama_odd", tmp_path / "model")
    return tmp_path / "model"


def assert_equal_trees(found, wanted):
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def sharded(config):
    """Every last axis that divides by two is split, so that layers arrive in parts."""
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])

    def split(leaf):
        axes = [None] * leaf.ndim
        axes[-1] = None if leaf.shape[-1] % 2 else "x"
        return NamedSharding(mesh, PartitionSpec(*axes))

    return jax.tree.map(split, models.abstract_params(config))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("llama_odd", np.float32), ("gpt2", ml_dtypes.bfloat16), ("opt_350m", ml_dtypes.bfloat16)],
)
def test_what_reaches_the_devices_is_what_the_host_reads(name, dtype, tmp_path):
    make.write_folder(name, tmp_path)
    stored = hf.open_model(tmp_path)
    host = stored.read(dtype)
    shardings = sharded(stored.config)
    for wanted in (shardings, jax.tree.map(lambda _: SINGLE, shardings)):
        found = stored.read(dtype, wanted)
        assert jax.tree.map(lambda leaf: leaf.sharding, found) == wanted
        assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {np.dtype(dtype)}
        assert_equal_trees(found, host)


SINGLE = SingleDeviceSharding(jax.devices()[3])


@pytest.mark.parametrize("name", CASES)
def test_only_the_kept_layers_are_read(name, tmp_path, monkeypatch):
    make.write_folder(name, tmp_path)
    whole = hf.keep_layers(hf.load(tmp_path), [0, 2])
    stored = hf.open_model(tmp_path)
    opened = []
    for tensor_name, tensor in stored.tensors.items():
        object.__setattr__(
            tensor, "read", lambda n=tensor_name, r=tensor.read: opened.append(n) or r()
        )
    kept = stored.keep([0, 2])
    assert not opened
    assert (kept.config, kept.hf_config) == (whole.config, whole.hf_config)
    assert_equal_trees(kept.read(), whole.params)
    numbers = {part for name in opened for part in name.split(".") if part.isdigit()}
    assert numbers == {"0", "2"} and len(opened) == len(set(opened))
    assert_equal_trees(kept.keep([1]).read(), hf.keep_layers(whole, [1]).params)
    assert_equal_trees(hf.load(tmp_path, keep=[0, 2]).params, whole.params)


@pytest.mark.parametrize("kept", [[], [0, 3], [-1, 0], [1, 0], [0, 0]])
def test_layers_that_are_not_in_the_file_cannot_be_kept(folder, kept):
    with pytest.raises(InputError, match="kept layers .* from 0 to 2"):
        hf.open_model(folder).keep(kept)


@pytest.mark.parametrize("kept", [(), (0, 2)])
def test_layers_taken_from_the_devices_share_no_memory(folder, kept):
    stored = hf.open_model(folder)
    teacher = stored.read(np.float32, sharded(stored.config))
    small = stored.keep(kept) if kept else stored
    shardings = sharded(small.config)
    student = placing.take_layers(teacher, kept, shardings)
    assert jax.tree.map(lambda leaf: leaf.sharding, student) == shardings
    assert_equal_trees(student, small.read())
    jax.tree.map(lambda leaf: leaf.delete(), student)
    assert_equal_trees(teacher, stored.read())


def edit(folder, name, change):
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = change(tensors[name])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_weights_that_are_not_finite_are_refused_by_name(folder, dtype, value):
    name = "model.layers.1.mlp.up_proj.weight"
    edit(folder, name, lambda array: array.astype(dtype))
    hf.load(folder)

    def spoil(array):
        array[-1, -1] = value
        return array

    edit(folder, name, spoil)
    refused(folder, "model.safetensors", name, "NaN or infinity")


def test_the_largest_numbers_are_finite(folder):
    def largest(array):
        return np.full_like(array, np.finfo(np.float32).max)

    edit(folder, "model.norm.weight", largest)
    hf.load(folder)


@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.bool_])
def test_integers_are_refused_by_name(folder, dtype):
    edit(folder, "model.norm.weight", lambda array: array.astype(dtype))
    refused(folder, "model.safetensors", "model.norm.weight is of", "not of floats")


def test_integers_beside_the_weights_are_buffers(tmp_path):
    make.write_folder("gpt2", tmp_path)
    plain = hf.load(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["h.0.attn.bias"] = np.ones((1, 1, 4, 4), np.bool_)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert_equal_trees(hf.load(tmp_path).params, plain.params)


@pytest.mark.parametrize(
    ("name", "buffer"),
    [
        ("opt", "decoder.version"),
        ("gptj", "transformer.h.1.attn.masked_bias"),
        ("gpt_neo", "transformer.h.2.attn.attention.bias"),
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
    ],
)
def test_constants_of_old_checkpoints_are_left_out(name, buffer, tmp_path):
    make.write_folder(name, tmp_path)
    hf.load(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, buffer: np.full(1, np.nan)}, tmp_path / "model.safetensors")
    hf.load(tmp_path)


def in_shards(folder):
    """Cut the weights into two shards with their index; return the names of the first."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    write_index(folder, {name: file for file, part in parts.items() for name in part})
    return parts["a.safetensors"]


def write_index(folder, weight_map):
    text = json.dumps({"weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)


def test_a_truncated_shard_is_named(folder):
    in_shards(folder)
    shard = folder / "b.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4])
    refused(folder, str(shard), "damaged", "bytes should be", "fetch it again")


def test_a_shard_that_the_index_names_must_be_there(folder):
    in_shards(folder)
    (folder / "b.safetensors").unlink()
    refused(folder, "b.safetensors is missing", "index.json names it", "fetch it again")


@pytest.mark.parametrize(
    "file", ["../a.safetensors", "/a.safetensors", "sub/a.safetensors", "..", "", "config.json"]
)
def test_an_index_names_nothing_outside_of_its_folder(folder, file):
    names = in_shards(folder)
    (folder / "a.safetensors").rename(folder.parent / "a.safetensors")
    write_index(folder, dict.fromkeys(names, file))
    refused(folder, "index.json names", repr(file), "fetch it again")


@pytest.mark.parametrize("index", [{}, {"weight_map": None}, {"weight_map": {"a": 1}}])
def test_an_index_without_a_map_is_refused(folder, index):
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "index.json has no weight_map")


def raw(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def one(**changes):
    entry = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], **changes}
    return raw({"a": entry}, b"\0" * 16)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (struct.pack("<Q", 2**63) + b"{}", "a header of 9,223,372,036,854,775,808 bytes"),
        (struct.pack("<Q", 200_000_000) + b"{}", "a header of 200,000,000 bytes in a file of 10"),
        (raw(b"{"), "damaged"),
        (raw([]), "damaged"),
        (raw({"a": 1}), "damaged"),
        (raw(b"[" * 100_000), "damaged"),
        (one(shape=[2, -2]), "impossible sizes"),
        (one(shape=[2, 2.0]), "impossible sizes"),
        (one(shape=[2, 3]), "16 bytes for (2, 3) of F32"),
        (one(data_offsets=[0, 2**40]), "bytes should be"),
        (one(data_offsets=[16, 0]), "bytes for"),
        (one(data_offsets=[-16, 0]), "impossible sizes"),
        (one() + b"\0", "bytes should be"),
        (raw({"a": {"dtype": "F32"}}), "damaged"),
    ],
)
def test_a_header_that_cannot_be_is_refused_at_once(folder, content, said):
    (folder / "model.safetensors").write_bytes(content)
    refused(folder, "model.safetensors is damaged", said, "fetch it again")


def test_a_file_that_shrinks_while_it_is_read_is_named(folder):
    stored = hf.open_model(folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(InputError, match="cannot read tensor .*become shorter.*; fetch"):
        stored.read()
