"""Weights that torch pickled (`pytorch_model.bin`), for models that have no others.

The only place that imports torch, which is optional, and the only unpickling: torch's weights-only
loader builds tensors and plain containers and refuses whatever else a pickle asks for.
"""

import functools
import importlib.util
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np

from minillm_jax.models.weights import Tensor
from minillm_jax.types import InputError

_INSTALL = "pip install torch --index-url https://download.pytorch.org/whl/cpu"
_KINDS = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_DTYPES = {kind: np.dtype(kind) for kind in ("float64", "float32", "float16", "bfloat16")}


def check_installed(what: str):
    """Raise `InputError` with the line of pip if torch, which pickled `what`, is not installed."""
    if importlib.util.find_spec("torch") is None:
        raise InputError(
            f"{what} was pickled by torch, which is not installed; `{_INSTALL}`, or choose a model "
            "with safetensors"
        )


def read(file: Path) -> dict[str, Tensor]:
    """Return the tensors of one file by name; in the format since torch 1.6 they are mapped.

    Those of the older format are in memory as long as one of them is held.
    Raises `InputError` without torch, and for a file that is damaged or no dict of tensors.
    """
    check_installed(str(file))
    import torch

    def values(tensor: torch.Tensor) -> np.ndarray:
        kind = str(tensor.dtype).removeprefix("torch.")
        offset = _offset(tensor.data_ptr(), tensor.nbytes, mappings)
        if offset is not None and kind in _DTYPES and tensor.is_contiguous():
            # A page of the map that is touched would stay in memory beside the array.
            found = np.fromfile(file, _DTYPES[kind], tensor.numel(), offset=offset)
            return found.reshape(tuple(tensor.shape))
        # A copy: what is made of it may be donated, and the tensor may be asked for again.
        tensor = tensor.detach().contiguous().clone()
        if tensor.dtype != torch.bfloat16:
            return tensor.numpy()
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)

    try:
        mapped = zipfile.is_zipfile(file)  # the older format cannot be
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # foreign bytes in a foreign parser
        reason = " ".join(str(error).split())
        if "weights only" in reason.lower():
            raise InputError(
                f"{file} holds more than tensors, and nothing else is unpickled; "
                "choose a model with safetensors"
            ) from error
        raise InputError(f"{file} is damaged ({reason[:200]}); fetch it again") from error
    mappings = _mappings(file)
    if not isinstance(found, dict):
        raise InputError(f"{file} is no dict of tensors; choose a model with safetensors")
    tensors = {}
    for name, tensor in found.items():
        if not (isinstance(name, str) and isinstance(tensor, torch.Tensor)):
            raise InputError(f"{file} is no dict of tensors; choose a model with safetensors")
        kind = str(tensor.dtype).removeprefix("torch.")
        read_one = functools.partial(values, tensor)
        tensors[name] = Tensor(file, tuple(tensor.shape), read_one, _KINDS.get(kind, kind))
    return tensors


def _mappings(file: Path) -> list[tuple[int, int, int]]:
    """Where this process has the file mapped: (start, end, offset in the file); Linux tells."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    rows = [line.split(maxsplit=5) for line in lines]
    real = str(file.resolve())
    spans = [(row[0].split("-"), row[2]) for row in rows if len(row) == 6 and row[5] == real]
    return [(int(start, 16), int(end, 16), int(offset, 16)) for (start, end), offset in spans]


def _offset(address: int, size: int, mappings: list[tuple[int, int, int]]) -> int | None:
    """The place in the file of what is in memory at `address`, None if that is not mapped."""
    for start, end, offset in mappings:
        if start <= address and address + size <= end:
            return address - start + offset
    return None
