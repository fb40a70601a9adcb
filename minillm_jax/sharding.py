"""The device mesh, the shardings of trees of arrays, and the way of arrays to devices and back.

`axes` has the table from logical axis names to mesh axes. No model and no optimizer here.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from minillm_jax.axes import AXIS_RULES, MESH_AXES, fitting_spec, partition_spec, ways_of
from minillm_jax.types import Array, InputError


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, *, devices: Sequence[Any] | None = None
) -> Mesh:
    """Arrange all `devices` as data x fsdp x tensor; one axis may be -1, what the others leave.

    The last axis has the fastest links. `InputError` if the sizes do not multiply to the number
    of devices, or do not follow the sides of a TPU slice.
    """
    devices = jax.devices() if devices is None else devices
    sizes: dict[str, int] = dict(zip(MESH_AXES, (data, fsdp, tensor), strict=True))
    asked = ", ".join(f"{name}={size}" for name, size in sizes.items())
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise InputError(f"mesh {asked}: every size must be at least 1, at most one of them -1")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(devices) % fixed or (not free and fixed != len(devices)):
        name = free[0] if free else "data"
        rest = math.prod(size for axis, size in sizes.items() if axis != name)
        cure = "choose sizes that multiply to the number of devices"
        if len(devices) % rest == 0:
            cure = f"set --config.mesh.{name}={len(devices) // rest}"
        raise InputError(f"mesh {asked} does not fit the {len(devices)} devices here: {cure}")
    if free:
        sizes[free[0]] = len(devices) // fixed
    # Auto: the compiler propagates shardings from the annotated inputs and outputs.
    auto = (AxisType.Auto,) * len(MESH_AXES)
    try:
        return jax.make_mesh(tuple(sizes.values()), MESH_AXES, axis_types=auto, devices=devices)
    except NotImplementedError as error:  # on a TPU's torus
        raise InputError(
            f"mesh {asked} cannot be laid on this slice: make every axis a product of some of its"
            " sides, each used once"
        ) from error


def tree_shardings(
    abstract: Any,
    axes: Any,
    mesh: Mesh,
    rules: Any = AXIS_RULES,
    units: Mapping[str, int] | None = None,
) -> Any:
    """Return the `NamedSharding` of every array of `abstract`, whose logical `axes` mirror it.

    `units` as for `axes.fitting_spec`. `InputError` if a dimension is no multiple of the mesh axes
    that it is split over; `ValueError` if an array has no axes, or not one per dimension.
    """

    def sharding(path, array, names):
        where = jax.tree_util.keystr(path)
        if not isinstance(names, tuple) or len(names) != array.ndim:
            raise ValueError(f"{where} of shape {array.shape} has logical axes {names}")
        spec = fitting_spec(names, array.shape, mesh, where=where, rules=rules, units=units)
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, abstract, axes)


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array [B, ...], its rows split over `data` and `fsdp`."""
    return NamedSharding(mesh, partition_spec(("batch",)))


def place(tree: Any, shardings: Any) -> Any:
    """Make global arrays of host arrays, each device receiving its own part alone.

    Every process passes the same whole array: weights are read by all, and batches of token ids
    are small and addressed by their global index. `shardings` may be a prefix of `tree`.
    """
    return jax.tree_util.tree_map_with_path(_place, tree, jax.tree.broadcast(shardings, tree))


def take_rows(tree: Any, rows: np.ndarray, sharding: NamedSharding) -> Any:
    """Return the given `rows` of arrays [B, ...] that lie on the devices, split by `sharding`."""
    return _taker(sharding)(tree, rows)


@functools.cache
def _taker(sharding: NamedSharding) -> Any:
    return jax.jit(lambda tree, rows: jax.tree.map(lambda x: x[rows], tree), out_shardings=sharding)


def _place(path: Any, array: Array, sharding: NamedSharding) -> jax.Array:
    array = np.asarray(array)
    for size, entry in zip(array.shape, sharding.spec, strict=False):
        ways = ways_of(sharding.mesh, entry)
        if size % ways:
            name = jax.tree_util.keystr(path) or "array"
            raise InputError(
                f"{name} of shape {array.shape} does not split evenly over {ways} devices"
                f" ({entry}): use a batch size that is a multiple of {ways}"
            )
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
