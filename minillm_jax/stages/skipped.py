"""Batches whose loss or gradient was not finite, kept so that the update can be replayed."""

import dataclasses
import io
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from minillm_jax import hosts
from minillm_jax.named import by_name
from minillm_jax.objectives.top_k import Cut
from minillm_jax.reporting.writers import write_bytes
from minillm_jax.rollout import Rollout, Taught
from minillm_jax.types import InputError, Sequences

MOST = 10  # files that are kept of a stage, the newest
KINDS = (Sequences, Taught, Cut, Rollout)  # told apart by their fields


def keep_batch(folder: Path, step: int, batch: Any):
    """Write the batch that `update` read as `folder/STEP.npz`, an array for every leaf by name.

    All processes must call it. Raises `InputError` if it cannot be written.
    """
    arrays: Any = {name: hosts.fetch(leaf) for name, leaf in by_name(batch).items()}
    if not hosts.is_main():
        return
    held = io.BytesIO()
    np.savez(held, **arrays)
    write_bytes(folder / f"{step}.npz", held.getvalue())
    numbers = sorted(int(file.stem) for file in folder.glob("*.npz"))
    for old in numbers[:-MOST]:
        (folder / f"{old}.npz").unlink()


def read_batch(file: Path) -> Any:
    """The batch in `file`, host arrays in the tree that `method.update` takes.

    Raises:
        InputError: it is not what `keep_batch` has written.
    """
    try:
        with np.load(file, allow_pickle=False) as found:
            arrays = {name: _as_written(found[name]) for name in found.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{file} cannot be read ({error}): replay another batch") from error
    text = arrays.pop("1", None)  # (rows, blocks of text)
    rows: dict[str, Any] = {name.removeprefix("0."): array for name, array in arrays.items()}
    for kind in KINDS:
        if {field.name for field in dataclasses.fields(kind)} == rows.keys():
            return kind(**rows) if text is None else (kind(**rows), text)
    raise InputError(f"{file} is no batch of a training stage: replay another one")


def _as_written(array: np.ndarray) -> np.ndarray:
    # numpy knows no bfloat16 and writes its bytes.
    return array.view(ml_dtypes.bfloat16) if array.dtype.kind == "V" else array
