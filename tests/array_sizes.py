"""How large the arrays inside a function get, from its jaxpr."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np


def shapes(jaxpr: Any) -> Iterator[tuple[int, ...]]:
    """Shapes of everything computed in `jaxpr`, inner ones included."""
    for equation in jaxpr.eqns:
        yield from (getattr(out.aval, "shape", ()) for out in equation.outvars)
        for inner in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from shapes(inner)


def largest_with(axis: int, function: Any, *args: Any) -> int:
    """Elements of the largest array with an axis of that size that `function` computes."""
    found = shapes(jax.make_jaxpr(function)(*args).jaxpr)
    return max((int(np.prod(shape)) for shape in found if axis in shape), default=0)
