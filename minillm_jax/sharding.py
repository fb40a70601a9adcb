"""The device mesh, and the one table from logical axis names to mesh axes.

Models name the axes of their arrays beside each kernel and know no mesh; `AXIS_RULES` says where
those axes go. An axis that is missing here is refused, and so are two axes of one array on the same
mesh axis: nothing becomes replicated because a name was forgotten. No model and no optimizer here.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from minillm_jax.types import Array, InputError

MESH_AXES = ("data", "fsdp", "tensor")

# Batches are split over `data` and `fsdp`; parameters over `fsdp` along the embedding (gathered
# layer by layer inside the scan) and over `tensor` along heads, MLP and vocabulary.
AXIS_RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    ("batch", ("data", "fsdp")),
    ("length", None),
    ("layers", None),
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("head_dim", None),
    ("mlp", "tensor"),
    ("vocab", "tensor"),
    ("positions", None),
    ("projection", None),
    ("norm", None),
)

# GPT-2's 50,257 rows divide by nothing useful: such an axis stays whole where it does not divide.
WHOLE_IF_UNEVEN = ("vocab",)


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, *, devices: Sequence[Any] | None = None
) -> Mesh:
    """Arrange all `devices` as data x fsdp x tensor; one axis may be -1, what the others leave.

    The last axis has the fastest links. `InputError` if the sizes do not multiply to the number
    of devices.
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
    return jax.make_mesh(tuple(sizes.values()), MESH_AXES, axis_types=auto, devices=devices)


def partition_spec(axes: Sequence[str | None], rules: Any = AXIS_RULES) -> PartitionSpec:
    """Translate the logical `axes` of one array; None stands for a dimension without a name.

    `ValueError` for an axis that `rules` does not list and for a mesh axis used twice.
    """
    table = dict(rules)
    entries = []
    owner: dict[str, str] = {}
    for axis in axes:
        if axis is not None and axis not in table:
            raise ValueError(f"logical axis {axis!r} of {tuple(axes)} is not in AXIS_RULES: add it")
        entry = None if axis is None else table[axis]
        for mesh_axis in (entry,) if isinstance(entry, str) else entry or ():
            if mesh_axis in owner:
                raise ValueError(
                    f"axes {owner[mesh_axis]!r} and {axis!r} of {tuple(axes)} both go to mesh axis"
                    f" {mesh_axis!r}: change AXIS_RULES"
                )
            owner[mesh_axis] = axis  # type: ignore
        entries.append(entry)
    return PartitionSpec(*entries)


def tree_shardings(abstract: Any, axes: Any, mesh: Mesh, rules: Any = AXIS_RULES) -> Any:
    """Return the `NamedSharding` of every array of `abstract`, whose logical `axes` mirror it.

    `InputError` if a dimension is no multiple of the mesh axes that it is split over, except those
    of `WHOLE_IF_UNEVEN`; `ValueError` if an array has no axes, or not one per dimension.
    """

    def sharding(path, array, names):
        where = jax.tree_util.keystr(path)
        if not isinstance(names, tuple) or len(names) != array.ndim:
            raise ValueError(f"{where} of shape {array.shape} has logical axes {names}")
        entries = list(partition_spec(names, rules))
        for i, (name, size, entry) in enumerate(zip(names, array.shape, entries, strict=True)):
            ways = _ways(mesh, entry)
            if size % ways == 0:
                continue
            if name not in WHOLE_IF_UNEVEN:
                raise InputError(
                    f"axis {name!r} of {where} has {size} entries, not a multiple of mesh"
                    f" {entry}={ways}: make --config.mesh.{entry} a divisor of {size}"
                )
            entries[i] = None
        return NamedSharding(mesh, PartitionSpec(*entries))

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


def _place(path: Any, array: Array, sharding: NamedSharding) -> jax.Array:
    array = np.asarray(array)
    for size, entry in zip(array.shape, sharding.spec, strict=False):
        ways = _ways(sharding.mesh, entry)
        if size % ways:
            name = jax.tree_util.keystr(path) or "array"
            raise InputError(
                f"{name} of shape {array.shape} does not split evenly over {ways} devices"
                f" ({entry}): use a batch size that is a multiple of {ways}"
            )
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _ways(mesh: Any, entry: Any) -> int:
    names = (entry,) if isinstance(entry, str) else entry or ()
    return math.prod(mesh.shape[name] for name in names)
