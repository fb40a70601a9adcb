"""What every benchmark needs: calls timed in turn, and what this machine can do at best."""

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp


def in_turn(calls: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, `repeats` times, A B A B ..., after one of each that is not counted.

    Only what is timed in turn may be compared: the speed of a shared machine drifts.
    """
    for call in calls.values():
        jax.block_until_ready(call())
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            began = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - began)
    return seconds


def ratio(above: list[float], below: list[float]) -> float:
    """Median of the ratios pair by pair."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def matmul_rate(dtype: Any = jnp.float32) -> float:
    """FLOP/s of a square product, the best of five; of random numbers, for on zeros or ones a GPU
    is faster."""
    size, times = (2048, 1) if on_cpu() else (8192, 4)  # a call of 1 ms would time its launch
    x = jax.random.normal(jax.random.key(0), (size, size), dtype) / size**0.5
    product = jax.jit(lambda y: [y := x @ y for _ in range(times)][-1])
    return 2 * times * size**3 / min(in_turn({"": lambda: product(x)}, 5)[""])


def bandwidth() -> float:
    """Bytes per second of reading an array that no cache holds, the best of five."""
    x = jnp.ones((512 if on_cpu() else 8192, 2**18), jnp.float32)
    total = jax.jit(jnp.sum)
    return x.nbytes / min(in_turn({"": lambda: total(x)}, 5)[""])


def on_cpu() -> bool:
    """Whether sizes are to be those of a CPU."""
    return jax.default_backend() == "cpu"


def machine() -> dict[str, Any]:
    """Where and of what a figure is: hardware, versions, commit, date."""
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return {
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "commit": git.stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
    }
