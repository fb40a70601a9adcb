"""Models of transformers: a folder with `config.json` and weights, or a GGUF file.

Written as safetensors without torch; remote code is not run. The files are read by `shards`,
`torchfiles` and `gguf`, their tensors go through `weights`.
"""

import collections
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes  # noqa: F401  registers bfloat16 with numpy, which safetensors needs
import numpy as np
from numpy.typing import DTypeLike
from safetensors import SafetensorError
from safetensors.numpy import save_file

from minillm_jax import hosts
from minillm_jax.models import gguf, shards
from minillm_jax.models.config import DecoderConfig
from minillm_jax.models.weights import (
    Checkpoint,
    Stored,
    check,
    disassemble,
    keep_layers,
    read_config,
)
from minillm_jax.types import InputError, Params

FORMAT_VERSION = 1  # of the folders written here, in the metadata of model.safetensors
SHARD_BYTES = 5 * 10**9  # of one file of weights, as transformers writes them
_WEIGHTS = "model.safetensors"

__all__ = ["Checkpoint", "Stored", "keep_layers", "load", "open_model", "save"]


def open_model(path: str | os.PathLike[str]) -> Stored:
    """Look at an HF folder or a GGUF file: the model's description, without its weights.

    Raises `InputError` for whatever is not the complete model of a supported family.
    """
    path = Path(path).expanduser()
    if path.is_file():
        if path.suffix in (".safetensors", ".bin"):
            raise InputError(f"{path} is one file of a model; give its folder")
        return check(*gguf.read(path), path)
    if not path.is_dir():
        raise InputError(f"no model at {path}; give a local HF folder or GGUF file")
    hf_config = shards.read_json(path / "config.json")
    read_config(hf_config, path)  # before the weights: it says which models there are
    return check(hf_config, shards.read(path), path)


def load(
    path: str | os.PathLike[str],
    dtype: DTypeLike = np.float32,
    *,
    keep: Sequence[int] = (),
    shardings: Params | None = None,
) -> Checkpoint:
    """Read a model with the parameters in `dtype`, of only the layers `keep` where some are named.

    On the host, or with `shardings` (a tree like the parameters) straight to the devices. Raises
    `InputError` as `open_model` does, and for weights that cannot be read.
    """
    stored = open_model(path)
    if keep:
        stored = stored.keep(keep)
    return Checkpoint(stored.config, stored.read(dtype, shardings), stored.hf_config, stored.path)


def save(
    path: str | os.PathLike[str],
    config: DecoderConfig,
    params: Params,
    hf_config: Mapping[str, Any],
    *,
    everywhere: bool = False,
) -> None:
    """Write `params` as a folder that transformers loads; it appears complete or not at all.

    The parameters may be on devices: the host holds one leaf of them and one file's tensors. Of
    several processes, all of which must call this, the first writes; or with `everywhere` each one.
    `hf_config` is that of the checkpoint the parameters come from. Raises `InputError` when it
    does not describe `config`, when `path` exists with anything in it, and when the disk is full.
    """
    path = Path(path).expanduser()
    hf_config = {**hf_config}
    family, described = read_config(hf_config, path)
    if described.layers != config.layers:
        hf_config[family.layers] = config.layers
        described = family.read(hf_config)
    if described != dataclasses.replace(config, attention=described.attention):  # none is stored
        raise InputError(f"cannot write {path}: its config.json would describe another model")
    writes = everywhere or hosts.is_main()
    if writes and path.exists() and not (path.is_dir() and not any(path.iterdir())):
        # Where nothing is to be gathered the first may have written before another one is here.
        raise InputError(f"{path} is there already and not empty; remove it or choose another")
    hf_config.pop("dtype", None)
    hf_config["torch_dtype"] = str(jax.tree.leaves(params)[0].dtype)  # read by 4.x and 5.x
    hf_config["architectures"] = [family.architecture]
    tensors = disassemble(config, params, family)
    if not writes:
        return collections.deque(tensors, 0).clear()  # takes part in gathering them
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            _write(part, tensors)
            text = json.dumps(hf_config, indent=2, sort_keys=True) + "\n"
            (part / "config.json").write_text(text, encoding="utf-8")
            for file in part.glob("*.safetensors"):
                file.chmod(0o644)  # made private, as is the folder
            part.chmod(0o755)
            os.replace(part, path)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"cannot write {path}: {error}; free some space there or choose another folder"
        ) from error


def _write(folder: Path, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    """Write one file of weights, or several of at most `SHARD_BYTES` with their index."""
    metadata = {"format": "pt", "minillm_jax": str(FORMAT_VERSION)}
    shards: list[list[str]] = []
    held: dict[str, np.ndarray] = {}
    size = total = 0

    def flush():
        save_file(held, folder / f"{len(shards)}.part", metadata)
        shards.append(list(held))
        held.clear()

    for name, tensor in tensors:
        if held and size + tensor.nbytes > SHARD_BYTES:
            flush()
            size = 0
        held[name] = tensor
        size, total = size + tensor.nbytes, total + tensor.nbytes
    flush()
    if len(shards) == 1:
        (folder / "0.part").rename(folder / _WEIGHTS)
        return
    files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for number, file in enumerate(files):
        (folder / f"{number}.part").rename(folder / file)
    where = {name: file for file, names in zip(files, shards, strict=True) for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / f"{_WEIGHTS}.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
