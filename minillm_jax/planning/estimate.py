"""From a compiled program to bytes, operations and seconds of one device.

Time is a roofline: each instruction takes what its products or its bytes take at the chip's peak,
whichever is longer; collectives take their bytes over the links and a microsecond per hop. Nothing
overlaps in `seconds`; in `best` all collectives hide behind the rest. Real programs are slower
than a roofline: instructions that neither compute nor move much are free here.
"""

import math
import re
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import jax

from minillm_jax.planning import counting
from minillm_jax.planning.programs import Layers, Program
from minillm_jax.planning.targets import BUSY, Target, busy
from minillm_jax.types import InputError

HOP = 1e-6  # seconds from a chip to its neighbour, for a collective of any size
EFFORT, LEAST_EFFORT = "jax_optimization_level", "O0"  # of O0 to O3
FEW = (2, 4)  # layers with which an unrolled program is compiled
_TRIES, _WAIT = 10, 30.0  # for the TPU compiler's lock


@dataclass(frozen=True)
class Figures:
    """One program on one device, once: bytes, operations, seconds."""

    name: str
    parts: dict[str, float]  # of the arguments
    held: float
    cache: float
    work_space: float  # temporaries without the cache, outputs and code
    flops: float
    collectives: dict[str, float]
    compute_seconds: float
    network_seconds: float
    needed: float  # operations of the method on this device
    times: int
    fits: bool
    peak: float
    extrapolated: bool
    assumed: tuple[str, ...]  # loops whose trips were assumed

    @property
    def seconds(self) -> float:
        """With no overlap."""
        return self.times * (self.compute_seconds + self.network_seconds)

    @property
    def best(self) -> float:
        """With all collectives hidden."""
        return self.times * max(self.compute_seconds, self.network_seconds)

    def utilisation(self, target: Target) -> float:
        """MFU: the method's own operations by those of the chip's peak, in `seconds`."""
        done = self.needed * self.times
        return done / (self.seconds * target.chip.flops) if self.seconds else math.nan


def hurry() -> None:
    """Have the compiler spend the least effort, for all that this process compiles from now on."""
    jax.config.update(EFFORT, LEAST_EFFORT)


def hurried() -> bool:
    """Whether `hurry` was asked for."""
    return getattr(jax.config, EFFORT) == LEAST_EFFORT


def measure(program: Program, target: Target) -> Figures:
    """Compile a program and count it; one that unrolls many layers with few, and extrapolated.

    Such a program is f + g q + h p in its layers q and p of the two models: three compilations.

    Raises:
        InputError: the TPU compiler is in use.
    """
    layers = program.layers
    fixed = sum(program.parts.values()) + program.held
    if fixed > target.chip.memory:  # that needs no compiler
        return _too_large(program, fixed, len(target.devices))
    extrapolated = bool(layers) and max(layers or ()) > FEW[1]
    if extrapolated and layers:
        total, assumed = _extrapolated(program, target, layers)
    else:
        total, assumed = _counted(program, target, None)
    # Arguments are known exactly, whatever was compiled.
    peak = fixed + total.get("work_space", 0.0) + total["cache"]
    peak = peak if "flops" in total else total["needs"] + program.held
    collectives = {k: v for k, v in total.items() if k in counting.COLLECTIVES and v > 0}
    return Figures(
        name=program.name,
        parts=program.parts,
        held=program.held,
        cache=total["cache"],
        work_space=total.get("work_space", peak - fixed),
        flops=total.get("flops", math.nan),
        collectives=collectives,
        compute_seconds=total.get("compute", math.nan),
        network_seconds=total.get("network", math.nan),
        needed=program.needed / len(target.devices),
        times=program.times,
        fits=peak <= target.chip.memory,
        peak=peak,
        extrapolated=extrapolated,
        assumed=assumed,
    )


def _too_large(program: Program, fixed: float, devices: int) -> Figures:
    return Figures(
        name=program.name,
        parts=program.parts,
        held=program.held,
        cache=math.nan,
        work_space=math.nan,
        flops=math.nan,
        collectives={},
        compute_seconds=math.nan,
        network_seconds=math.nan,
        needed=program.needed / devices,
        times=program.times,
        fits=False,
        peak=fixed,
        extrapolated=False,
        assumed=(),
    )


def _extrapolated(program: Program, target: Target, layers: Layers) -> tuple[dict, tuple]:
    low, assumed = _counted(program, target, (FEW[0], FEW[0]))
    total = dict(low)
    for place, more in enumerate(((FEW[1], FEW[0]), (FEW[0], FEW[1]))):
        high = low if "needs" in low else _counted(program, target, more)[0]
        if "needs" in high:  # too large already
            return high, assumed
        slope = (layers[place] - FEW[0]) / (FEW[1] - FEW[0])
        for name in low.keys() | high.keys():
            rise = high.get(name, 0.0) - low.get(name, 0.0)
            total[name] = total.get(name, 0.0) + slope * rise
    return total, assumed


def _counted(program: Program, target: Target, layers: Any) -> tuple[dict[str, float], tuple]:
    lowered = program.lower(layers)
    try:
        compiled = _compile(lowered)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        # Of fewer layers it is a lower bound.
        return {"needs": _asked(str(error), program), "cache": 0.0}, ()
    found = counting.counter(compiled.as_text(), len(target.devices))
    total: dict[str, float] = defaultdict(float)
    total["flops"] = total["compute"] = total["network"] = 0.0
    for work in found.work(program.trips):
        total["flops"] += work.times * work.flops
        least = max(work.flops / target.chip.flops, work.bytes / target.chip.bandwidth)
        total["compute"] += work.times * least
        if work.collective:
            total[work.collective] += work.times * work.moved
            total["network"] += work.times * network_seconds(work, target)
    memory = compiled.memory_analysis()
    total["cache"] = float(found.carried(program.slots))
    made = memory.output_size_in_bytes - memory.alias_size_in_bytes
    code = memory.generated_code_size_in_bytes
    total["work_space"] = made + memory.temp_size_in_bytes + code - total["cache"]
    return dict(total), tuple(dict.fromkeys(found.unknown))


def network_seconds(work: counting.Work, target: Target) -> float:
    """Seconds of one collective: rings in which every device sends (n - 1) / n of the bytes."""
    n = len(work.groups[0])
    if n < 2:
        return 0.0
    if work.collective.startswith("collective-"):
        return work.moved / target.link(work.groups, ring=False) + HOP
    rounds = 2 if work.collective == "all-reduce" else 1
    return rounds * (work.moved * (n - 1) / n / target.link(work.groups) + HOP * (n // 2))


def _compile(lowered: Any) -> Any:
    for _ in range(_TRIES):
        try:
            return lowered.compile()
        except (jax.errors.JaxRuntimeError, RuntimeError) as error:
            if not busy(error):
                raise
            time.sleep(_WAIT)
    raise InputError(BUSY)


_UNITS = {"K": 1024.0, "M": 1024.0**2, "G": 1024.0**3, "T": 1024.0**4, "": 1.0}


def _asked(message: str, program: Program) -> float:
    """Bytes that a program needs, from the compiler's refusal."""
    if found := re.search(r"Used ([\d.]+)([KMGT]?) of", message):
        return float(found[1]) * _UNITS[found[2]]
    if found := re.search(r"HLO temporaries \(([\d.]+)([KMGT]?)\)", message):
        return float(found[1]) * _UNITS[found[2]] + sum(program.parts.values())
    return math.inf
