"""How much host memory it takes to read a model, measured in a process of its own."""

import json
import os
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from minillm_jax.models import abstract_params
from minillm_jax.models.families import family_of
from tests.compiling import xla_flags

MB = 1 << 20
CONFIG = {
    "model_type": "llama",
    "vocab_size": 16384,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
LAYER_MB = 2 * (4 * 1024**2 + 3 * 1024 * 2816) / MB
SCRIPT = """
import json, sys
import jax, jax.numpy as jnp, ml_dtypes
from minillm_jax.models import abstract_params, hf, logical_axes
from minillm_jax.sharding import make_mesh, tree_shardings

folder, tiny, fsdp = sys.argv[1], sys.argv[2], int(sys.argv[3])
mesh = make_mesh(fsdp=fsdp)

def read(folder):
    stored = hf.open_model(folder)
    abstract = abstract_params(stored.config)
    shardings = tree_shardings(abstract, logical_axes(stored.config), mesh)
    params = jax.block_until_ready(stored.read(ml_dtypes.bfloat16, shardings))
    wanted = jax.tree.leaves(shardings)
    for leaf, sharding in zip(jax.tree.leaves(params), wanted, strict=True):
        assert leaf.dtype == jnp.bfloat16 and leaf.sharding == sharding, leaf.sharding
    return params

def memory(name):  # VmHWM is the peak; that of getrusage includes the process before exec
    with open("/proc/self/status") as status:
        lines = [line.split() for line in status if line.startswith(name)]
    return 1024 * int(lines[0][1])

read(tiny)  # what the libraries take is there before the measurement
before = memory("VmRSS")
params = read(folder)
size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
print(json.dumps({"size": size, "peak": memory("VmHWM") - before}))
"""


def write(folder, suffix, **changes):
    """A folder of made-up bfloat16 weights in several shards, none of them held together."""
    hf_config = {**CONFIG, **changes}
    family = family_of(hf_config)
    config = family.read(hf_config)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hf_config))
    noise = np.random.default_rng(0).integers(0x3C00, 0x3D00, 1 << 22, np.uint16)

    def made_up(shape):
        return np.resize(noise, shape).view(ml_dtypes.bfloat16)

    index, shard = {}, {}

    def flush():
        name = f"model-{len(set(index.values())):05}.{suffix}"
        if suffix == "bin":
            torch = pytest.importorskip("torch")
            bits = {n: torch.from_numpy(array.view(np.int16)) for n, array in shard.items()}
            torch.save({n: b.view(torch.bfloat16) for n, b in bits.items()}, folder / name)
        else:
            save_file(shard, folder / name, {"format": "pt"})
        index.update(dict.fromkeys(shard, name))
        shard.clear()

    leaves, _ = jax.tree.flatten_with_path(abstract_params(config))
    shapes = {"/".join(key.key for key in path): leaf.shape for path, leaf in leaves}
    for weight in family.weights:
        if weight.leaves[0] not in shapes:
            continue
        for name, _ in weight.names(config.layers):
            shard[name] = made_up(weight.shape(shapes))
        if sum(array.nbytes for array in shard.values()) > 60 * MB:
            flush()
    flush()
    whole = "pytorch_model.bin" if suffix == "bin" else "model.safetensors"
    (folder / f"{whole}.index.json").write_text(json.dumps({"weight_map": index}))
    return len(set(index.values()))


@pytest.mark.skipif(sys.platform != "linux", reason="the memory of a process is read from /proc")
@pytest.mark.parametrize(
    ("suffix", "devices"), [("safetensors", 1), ("safetensors", 4), ("bin", 1)]
)
def test_a_bfloat16_model_is_read_within_its_size_and_a_fifth(tmp_path, suffix, devices):
    assert write(tmp_path / "model", suffix) > 3
    write(tmp_path / "tiny", suffix, num_hidden_layers=1, hidden_size=32, vocab_size=64)
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            SCRIPT,
            str(tmp_path / "model"),
            str(tmp_path / "tiny"),
            str(devices),
        ],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(devices)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["size"] > 300 * MB
    assert found["peak"] < 1.2 * found["size"] + LAYER_MB * MB, found
