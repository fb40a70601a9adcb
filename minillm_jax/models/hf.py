"""Folders of transformers: `config.json` and safetensors, read and written without torch.

Pickles (`pytorch_model.bin`) are not read, remote code is not run. The tensors go through
`weights`, GGUF files through `gguf`.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  registers bfloat16 with numpy, which safetensors needs
import numpy as np
from numpy.typing import DTypeLike
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from minillm_jax.models import gguf
from minillm_jax.models.config import DecoderConfig
from minillm_jax.models.weights import (
    Checkpoint,
    Tensor,
    assemble,
    disassemble,
    keep_layers,
    read_config,
)
from minillm_jax.types import InputError, Params

FORMAT_VERSION = 1  # of the folders written here, in the metadata of model.safetensors
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"

__all__ = ["Checkpoint", "keep_layers", "load", "save"]


def load(path: str | os.PathLike[str], dtype: DTypeLike = np.float32) -> Checkpoint:
    """Read an HF folder or a GGUF file, with the parameters in `dtype`.

    One tensor at a time, so the peak is the parameters and one tensor. Raises `InputError` for
    whatever is not the complete model of a supported family.
    """
    path = Path(path).expanduser()
    if path.is_file():
        if path.suffix == ".safetensors":
            raise InputError(f"{path} is one file of a model; give its folder")
        hf_config, tensors = gguf.read(path)
        return assemble(hf_config, tensors, path, dtype)
    if not path.is_dir():
        raise InputError(f"no model at {path}; give a local HF folder or GGUF file")
    hf_config = _read_json(path / "config.json")
    return assemble(hf_config, _tensors(path), path, dtype)


def save(
    path: str | os.PathLike[str],
    config: DecoderConfig,
    params: Params,
    hf_config: Mapping[str, Any],
) -> None:
    """Write `params` as a folder that transformers loads; it appears complete or not at all.

    `hf_config` is that of the checkpoint the parameters come from. Raises `InputError` when it
    does not describe `config`, when `path` exists with anything in it, and when the disk is full.
    """
    path = Path(path).expanduser()
    hf_config = {**hf_config}
    family, described = read_config(hf_config, path)
    if described.layers != config.layers:
        hf_config[family.layers] = config.layers
        described = family.read(hf_config)
    if replace(described, dropout=config.dropout) != config:
        raise InputError(f"cannot write {path}: its config.json would describe another model")
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise InputError(f"{path} is there already and not empty; remove it or choose another")
    tensors = dict(disassemble(config, params, family))
    hf_config.pop("dtype", None)
    hf_config["torch_dtype"] = str(next(iter(tensors.values())).dtype)  # read by 4.x and 5.x
    hf_config["architectures"] = [family.architecture]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            metadata = {"format": "pt", "minillm_jax": str(FORMAT_VERSION)}
            save_file(tensors, part / _WEIGHTS, metadata)
            text = json.dumps(hf_config, indent=2, sort_keys=True) + "\n"
            (part / "config.json").write_text(text, encoding="utf-8")
            (part / _WEIGHTS).chmod(0o644)  # made private, as is the folder
            part.chmod(0o755)
            os.replace(part, path)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"cannot write {path}: {error}; free some space there or choose another folder"
        ) from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"no {file.name} in {file.parent}; give the folder that has it") from error
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {file}: {error}; fetch it again") from error
    if not isinstance(value, dict):
        raise InputError(f"{file} is no JSON object; fetch it again")
    return value


def _tensors(folder: Path) -> dict[str, Tensor]:
    if (folder / _INDEX).is_file():
        files = _read_json(folder / _INDEX).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(f, str) for f in files.values()):
            raise InputError(f"{folder / _INDEX} has no weight_map; fetch it again")
    elif (folder / _WEIGHTS).is_file():
        files = {None: _WEIGHTS}
    else:
        if any(folder.glob("*.bin")):
            raise InputError(
                f"{folder} has only .bin weights, and pickles are not read; convert it with "
                "transformers: from_pretrained(folder).save_pretrained(new_folder)"
            )
        raise InputError(f"no {_WEIGHTS} in {folder}; give the folder that has it")
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(files.values())):
        found = _open(folder / file)
        for name in [name for name, where in files.items() if where == file and name]:
            if name not in found:
                raise InputError(
                    f"{folder / file}: no tensor {name}, though the index says so; fetch both again"
                )
        tensors.update(found)
    return tensors


def _open(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise InputError(f"{file} is missing; fetch it again")
    try:
        reader = safe_open(file, framework="numpy")
        return {
            name: Tensor(
                file,
                tuple(reader.get_slice(name).get_shape()),
                lambda name=name: reader.get_tensor(name),
            )
            for name in reader.keys()
        }
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file} is damaged ({error}); fetch it again") from error
