"""Batches whose loss or gradient was not finite, kept so that the update can be replayed."""

import io
from pathlib import Path
from typing import Any

import jax
import numpy as np

from minillm_jax import hosts
from minillm_jax.named import by_name
from minillm_jax.reporting.writers import write_bytes

MOST = 10  # files that are kept of a stage, the newest


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


def read_batch(file: Path, like: Any) -> Any:
    """The batch in `file`, as a tree of the structure of `like`: what `method.update` takes."""
    with np.load(file, allow_pickle=False) as found:
        leaves = [found[name] for name in by_name(like)]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)
