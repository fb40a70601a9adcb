"""The weight files of an HF folder: which there are, and safetensors read with numpy alone.

A safetensors file is a header in JSON and raw little-endian arrays. A tensor is read by a plain
read when it is its turn: the library would map the file, and the pages of a mapped file stay in
the memory of the process beside the arrays made of them.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from minillm_jax.models import torchfiles
from minillm_jax.models.weights import Tensor
from minillm_jax.types import InputError

_FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_WHOLE, _WHOLE_BIN = "model.safetensors", "pytorch_model.bin"
_MAX_HEADER = 100_000_000  # bytes; the limit of the format's own library


def read(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a folder by name, from one file or from shards with their index.

    Only headers are read. Raises `InputError` for files that are missing, damaged, or do not hold
    what the index says.
    """
    for name, reader in ((_WHOLE, _safetensors), (_WHOLE_BIN, torchfiles.read)):
        if (folder / f"{name}.index.json").is_file():
            return _indexed(folder / f"{name}.index.json", reader)
        if (folder / name).is_file():
            return reader(folder / name)
    raise InputError(f"no {_WHOLE} in {folder}; give the folder that has it")


def _indexed(index: Path, reader: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(f, str) for f in files.values()):
        raise InputError(f"{index} has no weight_map; fetch it again")
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(files.values())):
        if Path(file).name != file or Path(file).suffix not in (".safetensors", ".bin"):
            raise InputError(
                f"{index} names {file!r}, no weights file of its folder; fetch it again"
            )
        if not (index.parent / file).is_file():
            raise InputError(
                f"{index.parent / file} is missing, {index.name} names it; fetch it again"
            )
        found = reader(index.parent / file)
        for name in [name for name, where in files.items() if where == file]:
            if name not in found:
                raise InputError(
                    f"{index.parent / file}: no tensor {name}, though the index says so; "
                    "fetch both again"
                )
        tensors.update(found)
    return tensors


def read_json(file: Path) -> dict[str, Any]:
    """Return the JSON object in `file`; `InputError` if it is not there or none."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"no {file.name} in {file.parent}; give the folder that has it") from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read {file}: {error}; fetch it again") from error
    if not isinstance(value, dict):
        raise InputError(f"{file} is no JSON object; fetch it again")
    return value


def _safetensors(file: Path) -> dict[str, Tensor]:
    """Return the tensors of one file by name; nothing but the header is read yet.

    Raises `InputError` for a file that is cut short or not of this format.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(_MAX_HEADER, size - 8):
                raise ValueError(f"a header of {length:,} bytes in a file of {size:,}")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        start = 8 + length
        tensors = {name: _tensor(file, start, size, entry) for name, entry in header.items()}
        end = start + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if end != size:
            raise ValueError(f"its {size:,} bytes should be {end:,}")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{file} is damaged ({error}); fetch it again") from error
    return tensors


def _tensor(file: Path, start: int, size: int, entry: dict[str, Any]) -> Tensor:
    first, last = entry["data_offsets"]
    kind, shape = entry["dtype"], tuple(entry["shape"])
    if not all(type(number) is int and number >= 0 for number in (first, last, *shape)):
        raise ValueError(f"impossible sizes {entry['shape']}, {entry['data_offsets']}")
    if start + last > size:
        raise ValueError(f"its {size:,} bytes should be {start + last:,} or more")
    dtype = np.dtype(_FLOATS.get(kind, np.uint8))
    count = math.prod(shape)
    if last - first != count * dtype.itemsize and kind in _FLOATS:
        raise ValueError(f"{last - first:,} bytes for {shape} of {kind}")

    def values() -> np.ndarray:
        found = np.fromfile(file, dtype, count, offset=start + first)
        if found.size != count:
            raise ValueError("the file has become shorter")
        return found.reshape(shape)

    return Tensor(file, shape, values, kind)
