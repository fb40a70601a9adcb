"""The logical axis names of arrays, and the one table from them to the axes of the mesh.

Models name the axes of their arrays beside each kernel, and of activations where the compiler must
not choose (`constrain`); they know no mesh. An axis that is missing here is refused, and so are two
axes of one array on the same mesh axis: nothing becomes replicated because a name was forgotten.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from minillm_jax.types import InputError

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

# The same for a model that is not trained and fits without: no kernel is gathered while it reads.
TENSOR_RULES = tuple((name, None if to == "fsdp" else to) for name, to in AXIS_RULES)

# GPT-2's 50,257 rows divide by nothing useful, and grouped heads may be fewer than the devices of
# an axis: such an axis stays whole where it does not divide.
WHOLE_IF_UNEVEN = ("vocab", "kv_heads")


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


def fitting_spec(
    axes: Sequence[str | None],
    shape: Sequence[int],
    mesh: Any,
    *,
    where: str = "array",
    rules: Any = AXIS_RULES,
    units: Mapping[str, int] | None = None,
) -> PartitionSpec:
    """Return the spec of an array of this `shape` on `mesh`.

    Args:
        units: entries of an axis that stay together, such as `head_dim` of "heads" where all heads
            lie in one dimension; 1 by default.

    Raises:
        InputError: a dimension is no multiple of the mesh axes that it is split over, and not one
            of `WHOLE_IF_UNEVEN`.
    """
    entries = list(partition_spec(axes, rules))
    for i, (name, size, entry) in enumerate(zip(axes, shape, entries, strict=True)):
        count, ways = size // (units or {}).get(name or "", 1), ways_of(mesh, entry)
        if count % ways == 0:
            continue
        if name not in WHOLE_IF_UNEVEN:
            raise InputError(
                f"axis {name!r} of {where} has {count} entries, not a multiple of mesh"
                f" {entry}={ways}: set --config.mesh.{entry}={nearest(count, ways, mesh)}"
            )
        entries[i] = None
    return PartitionSpec(*entries)


def nearest(count: int, ways: int, mesh: Any) -> str:
    """The size of a mesh axis that divides `count` and the devices and is nearest to `ways`.

    In words, with what is left to the other axes, as the devices have to be used up.
    """
    sizes = [n for n in range(1, mesh.size + 1) if count % n == 0 and mesh.size % n == 0]
    near = min(sizes, key=lambda n: (abs(n - ways), n))
    rest = mesh.size // near
    return f"{near}" if rest == 1 else f"{near}, so that the other axes multiply to {rest}"


def kept_whole(sizes: Mapping[str, int], mesh: Any) -> list[str]:
    """What does not divide of the logical axes that may stay whole, a line each.

    `sizes` are entries by logical axis, such as {"vocab": 50257}.
    """
    found = []
    for name in WHOLE_IF_UNEVEN:
        entry = str(dict(AXIS_RULES)[name])
        ways = mesh.shape[entry]
        if name in sizes and sizes[name] % ways:
            near = nearest(sizes[name], ways, mesh)
            found.append(
                f"{sizes[name]} entries of axis {name!r} are no multiple of mesh {entry}={ways}:"
                " every device has them whole along that axis; the nearest that divides is"
                f" {entry}={near}"
            )
    return found


def constrain(x: Any, *axes: str | None, units: Mapping[str, int] | None = None) -> Any:
    """Lay `x` out by the logical `axes` of its dimensions, on the mesh in use; without one, as is.

    A dimension that does not divide stays whole: rows of a batch that is smaller than the devices.
    `units` as for `fitting_spec`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    sizes = units or {}
    entries = [
        entry if size // sizes.get(name or "", 1) % ways_of(mesh, entry) == 0 else None
        for name, size, entry in zip(axes, x.shape, local_spec(axes), strict=True)
    ]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*entries))


def platform() -> str:
    """Return "cpu", "gpu" or "tpu", that of the mesh in use; without one, the default backend's.

    A program can be compiled for devices that are not here.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def parts(axis: str, size: int) -> int:
    """Parts into which the mesh in use splits a dimension of a logical axis; 1: it stays whole."""
    mesh = jax.sharding.get_abstract_mesh()
    ways = 1 if mesh.empty else ways_of(mesh, local_spec((axis,))[0])
    return ways if size % ways == 0 else 1


def ways_of(mesh: Any, entry: Any) -> int:
    """Parts into which an entry of a `PartitionSpec` divides a dimension."""
    names = (entry,) if isinstance(entry, str) else entry or ()
    return math.prod(mesh.shape[name] for name in names)


def local_spec(axes: Sequence[str | None]) -> PartitionSpec:
    """`partition_spec` for the mesh in use, without the mesh axes of which one part is at hand.

    Those are the axes of a `jax.shard_map` around: what it calls sees its own part alone.
    """
    apart = jax.sharding.get_abstract_mesh().manual_axes

    def left(entry: Any) -> Any:
        names = (entry,) if isinstance(entry, str) else entry or ()
        return tuple(name for name in names if name not in apart) or None

    spec = partition_spec(axes)
    return PartitionSpec(*map(left, spec)) if apart else spec


def largest(x: Any) -> jax.Array:
    """The largest entry of `x`, in a `jax.shard_map` that of all parts."""
    apart = jax.sharding.get_abstract_mesh().manual_axes
    top = jnp.max(x)
    return jax.lax.pmax(top, apart) if apart else top
