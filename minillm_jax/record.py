"""What a checkpoint says of itself: format, settings, arrays by name with their sums, a seal.

    {"format": 2, "settings": ..., "extra": ..., "arrays": {"state": {NAME: DTYPE[SHAPE]}, ...},
     "sums": {"state": {NAME: uint32}, ...}, "sha256": of all the rest}

A sum covers the bits of an array wherever they lie, so it is the same on every mesh, and computed
on the devices: what was in their memory when it was saved is what is there when it is restored.
"""

import hashlib
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from minillm_jax.named import arrays_by_name, by_name
from minillm_jax.types import InputError

FORMAT = 2  # 1 had neither arrays nor sums nor a seal; it is read, unchecked


class Damaged(Exception):
    """A checkpoint is not what was saved."""


def record(settings: Any, extra: Any, items: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a checkpoint of the trees `items`; every process must call it."""
    return sealed(
        {
            "format": FORMAT,
            "settings": settings,
            "extra": extra,
            "arrays": {name: arrays_by_name(tree) for name, tree in items.items()},
            "sums": {name: sums(tree) for name, tree in items.items()},
        }
    )


def sealed(run: Mapping[str, Any]) -> dict[str, Any]:
    """The same with its seal."""
    rest = {name: value for name, value in run.items() if name != "sha256"}
    text = json.dumps(rest, sort_keys=True)
    return rest | {"sha256": hashlib.sha256(text.encode()).hexdigest()}


def check(run: Any, where: str) -> dict[str, Any]:
    """The record as it was written, of this format or an older one.

    Raises:
        Damaged: it is not.
        InputError: it is of a newer format.
    """
    if not isinstance(run, dict) or not isinstance(run.get("format"), int):
        raise Damaged("its record is not one")
    if run["format"] == 1 and "sha256" not in run:
        return run
    if sealed(run) != run:
        raise Damaged("its record does not fit its sha256")
    if run["format"] > FORMAT:
        raise InputError(
            f"{where} is of format {run['format']}, and this minillm_jax reads formats up to"
            f" {FORMAT}: go on with the version that wrote it, or a newer one"
        )
    return run


def steps(directory: epath.PathLike) -> list[int]:
    """The steps of which a directory has a checkpoint, whole or not."""
    found = epath.Path(directory).glob("*")
    return sorted(int(path.name) for path in found if path.name.isdigit())


def adopt(directory: Path, settings: dict[str, Any]):
    """Give the checkpoints of a directory to a run of other settings."""
    for step in steps(directory):
        file = directory / str(step) / "run" / "metadata"
        run = json.loads(file.read_text(encoding="utf-8"))
        run = sealed(run | {"settings": settings})
        file.write_text(json.dumps(run), encoding="utf-8")


def verify(run: Mapping[str, Any], items: Mapping[str, Any]):
    """Compare trees that were restored with their sums; every process must call it.

    Raises:
        Damaged: naming the first array that differs.
    """
    for name, tree in items.items():
        saved = run.get("sums", {}).get(name)
        found = sums(tree) if saved else {}
        wrong = [array for array in found if found[array] != saved.get(array)]
        if wrong:
            raise Damaged(f"{name} {wrong[0]} is not what was saved, by its checksum")


def sums(tree: Any) -> dict[str, int]:
    """The sum of the bits of every array of a tree, by name."""
    leaves, together = by_name(tree), {}
    for name, leaf in leaves.items():  # those of the same devices in one program
        devices = frozenset(leaf.sharding.device_set) if isinstance(leaf, jax.Array) else None
        together.setdefault(devices, []).append(name)
    found = {}
    for names in together.values():
        found |= zip(names, _sums([leaves[name] for name in names]), strict=True)
    return {name: int(np.asarray(value)) for name, value in found.items()}


@jax.jit
def _sums(leaves: list[jax.Array]) -> list[jax.Array]:
    return [_sum(leaf) for leaf in leaves]


def _sum(x: jax.Array) -> jax.Array:
    """sum_i bits_i w_i mod 2^32, with odd weights w_i of the places i.

    An odd number has an inverse modulo 2^32, so a change of any one word changes the sum.
    """
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == bool:
        x = x.astype(jnp.uint8)
    word = jnp.dtype(f"uint{8 * min(x.dtype.itemsize, 4)}")
    bits = jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32)
    iota = partial(jax.lax.broadcasted_iota, jnp.uint32, bits.shape)
    place = jnp.zeros(bits.shape, jnp.uint32)
    for axis in range(bits.ndim):
        place = place * jnp.uint32(0x9E3779B1) + iota(axis)
    place = (place ^ (place >> 15)) * jnp.uint32(0x85EBCA6B)
    return jnp.sum(bits * (place | 1), dtype=jnp.uint32)
