"""The table of chips: what one device computes, holds, reads and sends, as its maker says."""

from dataclasses import dataclass

GIB = 1024**3


@dataclass(frozen=True)
class Chip:
    """One device. `link` is bytes/s of one link in one direction; a TPU has two per torus axis.

    `shapes` are slices that are worth naming; for GPUs, that have a switch in place of a torus,
    `node` devices share links of that speed and talk to others at `network` bytes/s.
    """

    name: str
    flops: float  # bf16 per second
    memory: float  # bytes that a program may use
    bandwidth: float  # bytes/s of that memory
    link: float
    shapes: tuple[str, ...] = ()
    ring: int = 0  # an axis closes to a ring where it is a multiple of this
    node: int = 0
    network: float = 0.0


_CUBES = ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
_SQUARES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")

# Peak, bandwidth and interconnect: docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e ("Bidirectional
# ICI bandwidth (per chip)" / ports / 2 is a link in one direction; v4: 2,400 Gbit/s / 6 links).
# Memory: what libtpu 0.0.42 names as available when it refuses a program that is too large; the
# pages have 32, 16, 95 and 32 GB.
TPUS = {
    "v4": Chip("TPU v4", 275e12, 30.75 * GIB, 1200e9, 50e9, _CUBES, ring=4),
    "v5e": Chip("TPU v5e", 197e12, 15.75 * GIB, 819e9, 50e9, _SQUARES, ring=16),
    "v5p": Chip("TPU v5p", 459e12, 95.74 * GIB, 2765e9, 100e9, _CUBES, ring=4),
    "v6e": Chip("TPU v6e", 918e12, 31.25 * GIB, 1638e9, 100e9, _SQUARES, ring=16),
}

# NVIDIA's data sheets of A100 SXM 80 GB, H100 SXM, H200 SXM and DGX B200 (an eighth): dense bf16,
# NVLink in one direction, one 400 Gbit/s port per GPU between nodes (A100: 200). A tenth of the
# memory is left to the driver and to fragments: jax takes 75 % unless it is told to take more.
_FREE = 0.9
GPUS = {
    "a100": Chip("A100 80 GB", 312e12, 80e9 * _FREE, 2039e9, 300e9, node=8, network=25e9),
    "h100": Chip("H100 80 GB", 989e12, 80e9 * _FREE, 3350e9, 450e9, node=8, network=50e9),
    "h200": Chip("H200 141 GB", 989e12, 141e9 * _FREE, 4800e9, 450e9, node=8, network=50e9),
    "b200": Chip("B200 180 GB", 2250e12, 180e9 * _FREE, 8000e9, 900e9, node=8, network=50e9),
}
