"""Pickles of torch: read where torch is, refused in one line where it is not or they hold more."""

import json
import os
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from golden import make
from refusals import refused
from safetensors.numpy import load_file

from minillm_jax.models import hf


@pytest.fixture(params=["gptj", "opt"])
def folder(request, tmp_path):
    make.write_folder(request.param, tmp_path / "model")
    return tmp_path / "model"


def pickled(folder, dtype=None, **options):
    """Put pickles in the place of the safetensors; return the tensors."""
    torch = pytest.importorskip("torch")
    arrays = load_file(folder / "model.safetensors")
    tensors = {name: torch.tensor(array) for name, array in arrays.items()}
    if dtype:
        tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items()}
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin", **options)
    return tensors


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_is_the_model_that_the_safetensors_are(folder, zipped):
    wanted = hf.load(folder)
    pickled(folder, _use_new_zipfile_serialization=zipped)
    found = hf.load(folder)
    assert found.config == wanted.config
    jax.tree.map(np.testing.assert_array_equal, found.params, wanted.params)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", ["bfloat16", "float16", "float64"])
def test_every_kind_of_float_is_read(folder, kind, zipped):
    dtype = np.dtype(ml_dtypes.bfloat16 if kind == "bfloat16" else kind)
    wide = hf.load(folder).params
    wanted = jax.tree.map(lambda leaf: leaf.astype(dtype).astype(np.float32), wide)
    pickled(folder, kind, _use_new_zipfile_serialization=zipped)
    jax.tree.map(np.testing.assert_array_equal, hf.load(folder).params, wanted)


def test_tensors_that_lie_transposed_or_share_memory_are_read(folder):
    torch = pytest.importorskip("torch")
    wanted = hf.load(folder)
    tensors = pickled(folder)
    for name, tensor in tensors.items():
        tensors[name] = tensor.t().contiguous().t() if tensor.ndim == 2 else tensor
    table = next(name for name in tensors if "wte" in name or "embed_tokens" in name)
    if wanted.config.tied_head:
        tensors["lm_head.weight"] = tensors[table]
    torch.save(tensors, folder / "pytorch_model.bin")
    jax.tree.map(np.testing.assert_array_equal, hf.load(folder).params, wanted.params)


def test_shards_are_read_through_their_index(folder):
    torch = pytest.importorskip("torch")
    wanted = hf.load(folder)
    tensors = pickled(folder)
    (folder / "pytorch_model.bin").unlink()
    weight_map = {}
    for i in range(2):
        file = f"pytorch_model-0000{i + 1}-of-00002.bin"
        part = {name: tensors[name] for name in sorted(tensors)[i::2]}
        torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    jax.tree.map(np.testing.assert_array_equal, hf.load(folder).params, wanted.params)
    (folder / file).unlink()
    refused(folder, f"{file} is missing", "fetch it again")


def test_safetensors_are_preferred(folder):
    wanted = hf.load(folder)
    (folder / "pytorch_model.bin").write_bytes(b"not looked at")
    jax.tree.map(np.testing.assert_array_equal, hf.load(folder).params, wanted.params)


def test_integers_and_missing_tensors_are_refused_by_name(folder):
    torch = pytest.importorskip("torch")
    tensors = pickled(folder)
    name = min(tensors)
    torch.save({**tensors, name: tensors[name].long()}, folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin", name, "is of int64, not of floats")
    torch.save({n: t for n, t in tensors.items() if n != name}, folder / "pytorch_model.bin")
    refused(folder, f"no tensor {name}")
    torch.save({**tensors, name: tensors[name] * float("nan")}, folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin", name, "NaN or infinity")


class Malice:
    """Writes a file when it is unpickled by anything that runs what it reads."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused(folder, tmp_path, zipped):
    torch = pytest.importorskip("torch")
    tensors = pickled(folder)
    file, trace = folder / "pytorch_model.bin", tmp_path / "trace"
    torch.save({**tensors, "x": Malice(trace)}, file, _use_new_zipfile_serialization=zipped)
    refused(folder, str(file), "more than tensors", "safetensors")
    assert not trace.exists()


def test_what_is_no_dict_of_tensors_is_refused(folder):
    torch = pytest.importorskip("torch")
    pickled(folder)
    for value in ([1.0], {"a": 1}, {1: torch.ones(1)}, torch.ones(2)):
        torch.save(value, folder / "pytorch_model.bin")
        refused(folder, "pytorch_model.bin is no dict of tensors")


def test_a_damaged_pickle_is_refused(folder):
    pickled(folder)
    file = folder / "pytorch_model.bin"
    whole = file.read_bytes()
    for part in (whole[:-100], whole[:1000], b"", b"no model at all"):
        file.write_bytes(part)
        refused(folder, "pytorch_model.bin")
    file.write_bytes(whole[:-100])
    refused(folder, "is damaged", "fetch it again")


def test_without_torch_the_cure_is_a_line_of_pip(folder, monkeypatch):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    refused(
        folder,
        "pytorch_model.bin was pickled by torch, which is not installed",
        "`pip install torch --index-url https://download.pytorch.org/whl/cpu`",
    )
