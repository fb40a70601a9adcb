"""Leaves of trees by name: what messages say, and what is compared with what was saved."""

from typing import Any

import jax
import jax.numpy as jnp


def by_name(tree: Any, is_leaf: Any = None) -> dict[str, Any]:
    """Return the leaves of a tree by their dotted names."""
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf)[0]
    return {jax.tree_util.keystr(at, simple=True, separator="."): leaf for at, leaf in leaves}


def settings_by_name(tree: dict[str, Any]) -> dict[str, Any]:
    """Return every setting of nested dicts by its dotted name; a list is one setting."""
    return by_name(tree, lambda node: not isinstance(node, dict))


def arrays_by_name(tree: Any) -> dict[str, str]:
    """Describe every array by name: Orbax forgets classes but keeps names, and keys as words."""

    def describe(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, leaf)
        return f"{leaf.dtype}{list(leaf.shape)}"

    return {name: describe(leaf) for name, leaf in by_name(tree).items()}
