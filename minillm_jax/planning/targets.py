"""The machine that is planned for: devices to compile for, and the chip that they are.

A TPU's devices come from its compiler alone, which `libtpu` brings along; a GPU's are simulated on
the CPU; `cpu` is this machine, whose speed is measured.
"""

import contextlib
import itertools
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from minillm_jax.planning.chips import GPUS, TPUS, Chip
from minillm_jax.types import InputError

PIP = (
    'pip install ".[plan]" in the checkout (or libtpu alone, in the version that jax[tpu] asks for)'
)

# So that the TPU compiler asks no metadata server for a machine, says nothing of it, and shares
# this one with others: it locks a TPU, and here is none.
_ALONE = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}


@dataclass(frozen=True)
class Target:
    """Devices, what they are, and how they are connected."""

    name: str
    chip: Chip
    devices: tuple[Any, ...]
    shape: tuple[int, ...] = ()  # of a TPU's slice
    note: str = ""  # what its compiler leaves out

    def link(self, groups: Sequence[Sequence[int]], ring: bool = True) -> float:
        """Bytes/s at which a device sends in a collective over these groups of devices.

        Where one of them goes beyond a node of GPUs it is the network's. On a torus a `ring` over
        all devices uses every axis, any other a single one, and an axis has two directions where it
        closes; what is sent to one other device goes over one link.
        """
        if node := self.chip.node:
            within = all(len({place // node for place in group}) == 1 for group in groups)
            return self.chip.link if within else self.chip.network
        if not (self.shape and ring):
            return self.chip.link
        ways = [2 if n % self.chip.ring == 0 else 1 for n in self.shape if n > 1] or [1]
        everyone = len(groups[0]) >= len(self.devices)
        return self.chip.link * (sum(ways) if everyone else min(ways))


def known() -> str:
    """The names that `target` takes, in words."""
    slices = [f"{name}:{{{','.join(chip.shapes)}}}" for name, chip in TPUS.items()]
    return ", ".join([*slices, *(f"{name}:N" for name in GPUS), "cpu"])


def target(topology: str) -> Target:
    """The machine of that name: `v5p:4x4x4`, `h100:8`, `cpu`.

    Raises:
        InputError: no such name, with those there are; no TPU compiler.
    """
    name, _, size = topology.partition(":")
    if topology == "cpu":
        return _here()
    if name in GPUS and size.isdecimal() and int(size) > 0:
        return _simulated(topology, GPUS[name], int(size))
    parts = size.split("x")
    if name not in TPUS or not all(part.isdecimal() and int(part) for part in parts):
        raise InputError(f"no topology {topology!r}: choose from {known()}")
    if find_spec("libtpu") is None:
        raise InputError(f"the TPU compiler is missing: {PIP}")
    shape = tuple(map(int, parts))
    return Target(topology, TPUS[name], _compile_only(topology, name, shape), shape)


def _compile_only(topology: str, name: str, shape: tuple[int, ...]) -> tuple[Any, ...]:
    from jax.experimental import topologies

    for key, value in _ALONE.items():
        os.environ.setdefault(key, value)
    options: dict[str, Any] = {}
    if set(shape) == {1}:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if name == "v4":  # one device per chip, as on a real v4: by default the compiler has two
        options["chip_config_name"] = "megacore"
    try:
        return tuple(topologies.get_topology_desc(topology, platform="tpu", **options).devices)
    except (RuntimeError, ValueError) as error:
        if busy(error):
            raise InputError(BUSY) from error
        raise InputError(
            f"the TPU compiler does not know {topology} ({first_line(error)}): "
            f"choose from {known()}"
        ) from error


BUSY = (
    "another process uses the TPU compiler and does not share it: wait for it to end, or set "
    "ALLOW_MULTIPLE_LIBTPU_LOAD=1 (or, if no such process is left, remove /tmp/libtpu_lockfile)"
)


def busy(error: BaseException) -> bool:
    """Whether the TPU compiler was held by another process."""
    return "lockfile" in str(error) or "already in use" in str(error)


def first_line(error: BaseException) -> str:
    """The first line of what an error says."""
    return str(error).strip().split("\n", 1)[0]


def _simulated(topology: str, chip: Chip, count: int) -> Target:
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise InputError(f"{topology}: only {len(devices)} devices are simulated here")
    note = (
        "compiled for as many simulated CPU devices: partitioning, operations and collectives are "
        "those of the program, memory is that of the CPU's compiler, which keeps bfloat16 products "
        "in float32: an upper bound"
    )
    return Target(topology, chip, tuple(devices[:count]), note=note)


def _here() -> Target:
    flops, bandwidth = _speed()
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    chip = Chip(f"this CPU, {count} cores", flops, 0.9 * host_memory(), bandwidth, bandwidth)
    note = "speed measured just now on a product of 1,024^2 floats and a copy; 90 % of the memory"
    return Target("cpu", chip, (jax.devices("cpu")[0],), note=note)


def host_memory(root: Path = Path("/")) -> float:
    """Bytes of memory that this process may use: the machine's, or what its container has of it."""
    found = [float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))]
    groups = root / "sys/fs/cgroup"
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, kind, path = line.split(":", 2)
            if kind not in ("", "memory"):
                continue
            name = "memory.limit_in_bytes" if kind else "memory.max"
            # Within a container the path is often that outside of it; the limit is then at the top.
            inner = groups / kind / path.strip("/")
            for folder in {inner, *inner.parents}:
                with contextlib.suppress(OSError, ValueError):  # "max" where there is none
                    found.append(float(int((folder / name).read_text())))
    return min(found)


def _speed() -> tuple[float, float]:
    """FLOP/s of a float32 product and bytes/s of a copy, the best of three."""
    a = jnp.ones((1024, 1024))
    b = jnp.ones((1 << 24,))
    product, copy = jax.jit(jnp.matmul), jax.jit(lambda x: x + 1)
    found = []
    for run, work in ((lambda: product(a, a), 2.0 * 1024**3), (lambda: copy(b), 8.0 * (1 << 24))):
        jax.block_until_ready(run())
        seconds = []
        for _ in itertools.repeat(None, 3):
            start = time.perf_counter()
            jax.block_until_ready(run())
            seconds.append(time.perf_counter() - start)
        found.append(work / min(seconds))
    return found[0], found[1]
