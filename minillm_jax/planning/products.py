"""Operations of the matrix products of one compiled instruction, those inside a kernel included."""

import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from minillm_jax.planning.hlo import Instruction

# Products [block, h] x [h, block], or of that size, that Splash computes for each pair of a query
# and a key block: S and O forward; for the gradients S and dP again, with dV and dK, or dQ.
_SPLASH = re.compile(r"splash_m[hq]a_(fwd|dkv|dq)_")
_PAIRS = {"fwd": 2, "dkv": 4, "dq": 3}


def operations(computation: Mapping[str, Instruction], i: Instruction) -> float:
    """FLOPs of a `dot`, a `convolution` or a Splash kernel among its neighbours; 0 of all else."""
    if i.op == "dot":
        left = computation[i.operands[0]].shapes[0].dims
        contracted = re.findall(r"\d+", i.attribute("lhs_contracting_dims"))
        return 2.0 * math.prod(i.shapes[0].dims) * math.prod(left[int(d)] for d in contracted)
    if i.op == "convolution":
        left, right = (computation[name].shapes[0].dims for name in i.operands[:2])
        return _convolution(i, left, right)
    if i.op == "custom-call" and (found := _SPLASH.match(i.name)):
        return _splash(computation, i, found[1])
    return 0.0


def _splash(computation: Mapping[str, Instruction], i: Instruction, kind: str) -> float:
    """FLOPs of a Splash kernel (`models/kernels.py`), whose body is not in the text.

    Its first operand [1, n, n] is the grid of pairs of blocks, of which those behind the causal
    diagonal are not computed; under a window one side is as short as the window has blocks. The
    third is q [B, H, T, h], and a kernel for the gradients of k and v that gives dq, too, has one
    more array of that size for each block of keys.
    """
    pairs = computation[i.operands[0]].shapes[0].dims
    *batch, slots, width = computation[i.operands[2]].shapes[0].dims
    across, blocks = sorted(pairs[-2:])
    computed = sum(min(i + 1, across) for i in range(blocks))
    with_dq = kind == "dkv" and any(len(s.dims) == len(batch) + 3 for s in i.shapes)
    block = slots // blocks
    return 2.0 * (_PAIRS[kind] + with_dq) * math.prod(batch) * computed * block**2 * width


def _convolution(i: Instruction, left: Sequence[int], right: Sequence[int]) -> float:
    """2 x the products of a convolution, those with padding and with holes left out.

    The TPU compiler writes a product with batch dimensions as a convolution over them, dilated so
    that all but one position of the window meets a hole.
    """
    labels = re.match(r"(\w+)_(\w+)->(\w+)", i.attribute("dim_labels"))
    if not labels:
        raise ValueError(f"{i.name}: no dim_labels")
    lhs, rhs, out = labels.groups()
    result = i.shapes[0].dims
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", i.attribute("window")))
    pairs = 1.0
    for place, label in enumerate(sorted(c for c in lhs if c.isdigit())):

        def option(name: str, default: str, place=place) -> str:
            return window[name].split("x")[place] if name in window else default

        low = int(option("pad", "0_0").split("_")[0])
        dilation = int(option("lhs_dilate", "1"))
        width = (left[lhs.index(label)] - 1) * dilation + 1
        position = np.arange(result[out.index(label)])[:, None] * int(option("stride", "1"))
        within = np.arange(right[rhs.index(label)])[None] * int(option("rhs_dilate", "1"))
        index = position + within - low
        pairs *= np.count_nonzero((index >= 0) & (index < width) & (index % dilation == 0))
    batch = result[out.index("b")]
    return 2.0 * pairs * batch * result[out.index("f")] * right[rhs.index("i")]
