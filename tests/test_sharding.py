"""Mesh, rules and placement on eight devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as Spec

from minillm_jax.axes import kept_whole, nearest, partition_spec
from minillm_jax.sharding import (
    batch_sharding,
    make_mesh,
    place,
    replicated,
    tree_shardings,
)
from minillm_jax.types import InputError


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [((-1, 1, 1), (8, 1, 1)), ((2, -1, 2), (2, 2, 2)), ((1, 4, -1), (1, 4, 2)), ((2, 2, 2),) * 2],
)
def test_mesh_takes_all_devices(sizes, shape):
    mesh = make_mesh(*sizes)
    assert tuple(mesh.shape.values()) == shape
    assert set(mesh.devices.flat) == set(jax.devices())
    assert all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((-1, 3, 1), "does not fit the 8 devices here: choose sizes"),
        ((-1, 16, 1), "does not fit the 8 devices here: choose sizes"),
        ((1, 2, 1), r"set --config.mesh.data=4"),
        ((4, 4, 1), r"set --config.mesh.data=2"),
        ((-1, -1, 1), "at most one of them -1"),
        ((-1, 0, 1), "at least 1"),
        ((-2, 1, 1), "at least 1"),
    ],
)
def test_mesh_that_does_not_fit_is_refused_with_the_cure(sizes, message):
    with pytest.raises(InputError, match=message) as error:
        make_mesh(*sizes)
    assert "\n" not in str(error.value)


def test_mesh_that_does_not_follow_the_sides_of_a_slice_is_one_line(monkeypatch):
    def refuse(*_, **__):  # as jax does for a TPU's torus
        raise NotImplementedError("Failed to find assignment\nfor logical axis 2")

    monkeypatch.setattr(jax, "make_mesh", refuse)
    with pytest.raises(InputError, match="mesh data=2, fsdp=2, tensor=2 cannot be laid") as error:
        make_mesh(2, 2, 2)
    assert "\n" not in str(error.value)


def test_mesh_of_some_devices():
    assert make_mesh(devices=jax.devices()[:3]).shape["data"] == 3


def test_partition_spec():
    assert partition_spec(("layers", "embed", "mlp")) == Spec(None, "fsdp", "tensor")
    assert partition_spec(("batch", None)) == Spec(("data", "fsdp"), None)
    assert partition_spec(()) == Spec()


def test_axis_without_a_rule_raises():
    with pytest.raises(ValueError, match="'mpl' of .* is not in AXIS_RULES"):
        partition_spec(("embed", "mpl"))


def test_two_axes_on_one_mesh_axis_raise():
    with pytest.raises(ValueError, match="'heads' and 'mlp' .* mesh axis 'tensor'"):
        partition_spec(("heads", "mlp"))
    with pytest.raises(ValueError, match="'batch' and 'embed' .* mesh axis 'fsdp'"):
        partition_spec(("batch", "embed"))


def _described(shape, *axes):
    return {"x": jax.ShapeDtypeStruct(shape, jnp.float32)}, {"x": axes}


def test_tree_shardings_lay_out_the_array():
    mesh = make_mesh(1, 4, 2)
    abstract, axes = _described((3, 8, 6), "layers", "embed", "mlp")
    sharding = tree_shardings(abstract, axes, mesh)["x"]
    assert sharding.spec == Spec(None, "fsdp", "tensor")
    assert sharding.shard_shape((3, 8, 6)) == (3, 2, 3)


def test_uneven_axis_is_refused_but_for_the_vocabulary():
    mesh = make_mesh(1, 4, 2)
    abstract, axes = _described((3, 6, 6), "layers", "embed", "mlp")
    with pytest.raises(InputError, match=r"'embed' of \['x'\] has 6 .*mesh.fsdp=2, so .* to 4$"):
        tree_shardings(abstract, axes, mesh)
    abstract, axes = _described((5, 8), "vocab", "embed")
    assert tree_shardings(abstract, axes, mesh)["x"].spec == Spec(None, "fsdp")
    abstract, axes = _described((6, 8), "vocab", "embed")
    assert tree_shardings(abstract, axes, mesh)["x"].spec == Spec("tensor", "fsdp")


def test_heads_stay_whole_and_grouped_ones_are_copied_where_they_are_too_few():
    mesh = make_mesh(1, 2, 4)
    units = {"heads": 6, "kv_heads": 6}
    abstract, axes = _described((8, 24), "embed", "heads")
    sharding = tree_shardings(abstract, axes, mesh, units=units)["x"]
    assert sharding.spec == Spec("fsdp", "tensor")
    abstract, axes = _described((8, 12), "embed", "heads")  # two heads, twelve features
    with pytest.raises(InputError, match=r"'heads' of \['x'\] has 2 .*mesh.tensor=2, so"):
        tree_shardings(abstract, axes, mesh, units=units)
    abstract, axes = _described((8, 12), "embed", "kv_heads")
    assert tree_shardings(abstract, axes, mesh, units=units)["x"].spec == Spec("fsdp", None)


@pytest.mark.parametrize(
    ("count", "ways", "said"),
    [
        (12, 8, "4, so that the other axes multiply to 2"),  # 6 would leave devices over
        (25, 8, "1, so that the other axes multiply to 8"),
        (24, 3, "2, so that the other axes multiply to 4"),
        (16, 5, "4, so that the other axes multiply to 2"),
        (16, 7, "8"),
    ],
)
def test_the_size_that_is_proposed_divides_the_devices_too(count, ways, said):
    assert nearest(count, ways, make_mesh()) == said


def test_what_is_copied_for_it_does_not_divide_is_said():
    mesh = make_mesh(1, 2, 4)
    assert kept_whole({"vocab": 512, "kv_heads": 4}, mesh) == []
    ids, heads = kept_whole({"vocab": 50257, "kv_heads": 2}, mesh)
    assert ids.startswith("50257 entries of axis 'vocab' are no multiple of mesh tensor=4: every")
    assert ids.endswith(
        "the nearest that divides is tensor=1, so that the other axes multiply to 8"
    )
    assert "2 entries of axis 'kv_heads'" in heads and "is tensor=2, so" in heads


def test_array_without_its_axes_is_refused():
    mesh = make_mesh()
    abstract, _ = _described((3, 6))
    with pytest.raises(ValueError, match=r"\['x'\] of shape \(3, 6\)"):
        tree_shardings(abstract, {"x": ("embed",)}, mesh)
    with pytest.raises(ValueError):
        tree_shardings(abstract, {"y": ("embed", "mlp")}, mesh)


def test_place_splits_rows_and_keeps_values():
    mesh = make_mesh(2, 2, 2)
    batch = {"a": np.arange(24).reshape(8, 3), "b": np.arange(8) % 2 == 0}
    placed = place(batch, batch_sharding(mesh))
    assert {part.data.shape for part in placed["a"].addressable_shards} == {(2, 3)}
    assert {part.data.shape for part in placed["b"].addressable_shards} == {(2,)}
    jax.tree.map(np.testing.assert_array_equal, placed, batch)
    assert placed["b"].dtype == bool
    whole = place(batch, {"a": replicated(mesh), "b": batch_sharding(mesh)})
    assert whole["a"].sharding.is_fully_replicated


def test_placed_arrays_may_be_donated_without_harm_to_the_host_copy():
    host = np.ones((8, 4096), np.float32)
    placed = place(host, batch_sharding(make_mesh()))
    jax.jit(lambda x: x * 2.0, donate_argnums=0)(placed).block_until_ready()
    assert (host == 1.0).all()


def test_place_refuses_a_batch_that_does_not_split():
    with pytest.raises(InputError, match=r"\['a'\] of shape \(6, 2\).*multiple of 8"):
        place({"a": np.zeros((6, 2))}, batch_sharding(make_mesh()))
