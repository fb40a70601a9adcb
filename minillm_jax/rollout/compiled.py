"""How the programs of decoding are compiled: on a CPU not as all others are.

A decoding step multiplies a few rows by every kernel. XLA hands the products of a CPU to YNNPACK,
and Eigen's were faster for 8 and 32 rows (benchmarks/README.md), while reductions are faster with
YNNPACK. So decoding asks for YNNPACK in reductions alone. On an accelerator nothing changes.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.core import Tracer

_CPU_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}


def decoding(
    static_argnames: Sequence[str], donate_argnames: Sequence[str] = ()
) -> Callable[[Callable], Any]:
    """`jax.jit` for a decode loop, with the options of the platform; plain within another jit."""

    def decorate(function: Callable) -> Any:
        plain = jax.jit(function, static_argnames=static_argnames)

        @functools.cache
        def tuned() -> Any:
            return jax.jit(
                function,
                static_argnames=static_argnames,
                donate_argnames=donate_argnames,
                compiler_options=compiler_options(),
            )

        @functools.wraps(function)
        def call(*args, **kwargs):
            leaves = jax.tree.leaves((args, kwargs))
            nested = any(isinstance(x, Tracer) for x in leaves)
            return (plain if nested else tuned())(*args, **kwargs)

        call.lower = plain.lower  # type: ignore[attr-defined]
        return call

    return decorate


@functools.cache
def compiler_options() -> dict[str, str]:
    """The options of a decode loop; none where this XLA does not know them."""
    if jax.default_backend() != "cpu":
        return {}
    try:
        jax.jit(lambda x: x, compiler_options=_CPU_OPTIONS).lower(1.0).compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return _CPU_OPTIONS
