"""How the cost of a step grows with its work: batch, response, vocabulary, teacher; and devices.

    python -m benchmarks.scaling --json scaling.json --plot scaling.png

Small made-up models. One size at a time grows; the seconds of a collection and of an update, and
their FLOPs, are fitted by powers of it. A cost that grows faster than its work has the larger
exponent, and the verdict names it. Weak scaling is counted, not measured: `weak_scaling`.
"""

import argparse
import functools
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import pair as models
from benchmarks.timing import in_turn, machine
from minillm_jax import optim
from minillm_jax.methods import minillm
from minillm_jax.models import DecoderConfig, init_params
from minillm_jax.objectives.policy import PRESETS
from minillm_jax.reporting.writers import write_json
from minillm_jax.rollout import Mixing

TOLERANCE = 0.1  # of an exponent: what a shared machine's timings leave open
PHASES = ("collection", "update")


@dataclass(frozen=True)
class Size:
    """Of one step: rows, tokens of prompt and response, ids, and the teacher's layers."""

    batch: int = 8
    response: int = 64
    vocabulary: int = 8192
    teacher: int = 1  # times four layers
    prompt: int = 32
    width: int = 256


BASE = Size()
AXES = {
    "batch": (1, 8, 64),
    "response": (32, 128, 512),
    "vocabulary": (8192, 32768, 131072),
    "teacher": (1, 2, 8),
}


def main() -> None:
    """Measure, fit, count, and print tables and verdict."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--width", type=int, default=BASE.width, help="of both models")
    parser.add_argument("--most", type=int, default=0, help="leave out larger sizes of every axis")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--devices", default="8,64,256", help="simulated ones; empty: none")
    parser.add_argument("--plot", default="", help="draw the measurements in this file")
    parser.add_argument("--json", default="", help="write the figures here, too")
    asked = parser.parse_args()
    found = {}
    print("| grows | phase | seconds | exponent of time | of FLOPs |\n|---|---|---|---|---|")
    for axis, values in AXES.items():
        values = [v for v in values if not asked.most or v <= asked.most]
        found[axis] = measure(axis, values, replace(BASE, width=asked.width), asked.repeats)
        for phase, one in found[axis].items():
            seconds = ", ".join(f"{s:.2g}" for s in one["seconds"])
            grown = f"{one['time_exponent']:.2f} | {one['work_exponent']:.2f}"
            print(f"| {axis} {values} | {phase} | {seconds} | {grown} |", flush=True)
    faster = [
        f"{phase} with {axis}"
        for axis, phases in found.items()
        for phase, one in phases.items()
        if one["time_exponent"] > one["work_exponent"] + TOLERANCE
    ]
    print(f"faster than its work grows: {', '.join(faster) or 'nothing'}")
    if asked.plot:
        draw(found, asked.plot)
    weak = weak_scaling(asked.devices) if asked.devices else []
    if asked.json:
        write_json(asked.json, machine() | {"axes": found, "faster": faster, "weak_scaling": weak})


def measure(axis: str, values: list[int], base: Size, repeats: int) -> dict[str, Any]:
    """Seconds and FLOPs of both phases at every value of one size, and their exponents."""
    calls: dict[str, Callable[[], Any]] = {}
    work: dict[str, list[float]] = {phase: [] for phase in PHASES}
    for value in values:
        size = replace(base, **{axis: value})
        for phase, call, flops in zip(PHASES, *step(size), strict=True):
            calls[f"{phase} {value}"] = call
            work[phase].append(flops)
    seconds = in_turn(calls, repeats)
    found = {}
    for phase in PHASES:
        times = [statistics.median(seconds[f"{phase} {value}"]) for value in values]
        found[phase] = {
            "values": values,
            "seconds": times,
            "flops": work[phase],
            "time_exponent": exponent(values, times),
            "work_exponent": exponent(values, work[phase]),
        }
    return found


def exponent(values: list[int], costs: list[float]) -> float:
    """The power of `values` that fits `costs` best, in logarithms."""
    return float(np.polyfit(np.log(values), np.log(costs), 1)[0])


def step(size: Size) -> tuple[tuple[Callable[[], Any], ...], tuple[float, ...]]:
    """Calls that collect and update at one size, and their FLOPs."""
    student, teacher = decoder(size, 2), decoder(size, 4 * size.teacher)
    params, frozen = weights(student, 0), weights(teacher, 1)
    rate = optim.schedule("constant", 1e-5)
    optimizer = optim.adamw(rate)
    mixing = Mixing(
        slots=size.response, alpha=0.2, eos_id=size.vocabulary, pad_id=0,
        vocab=size.vocabulary,
    )  # fmt: skip
    method = minillm.method(
        student, teacher, optimizer, rate, policy=PRESETS["corrected"], mixing=mixing
    )
    assert method.collect
    given = models.prompts(size.batch, size.prompt, size.vocabulary)
    state = models.state(student, jax.tree.map(jnp.copy, params), optimizer)  # an update takes it
    key = jax.random.key(2)
    rollout = method.collect(state.params, frozen, given, key)

    def collection():
        assert method.collect
        return method.collect(state.params, frozen, given, key)

    def update():
        nonlocal state
        state, _ = method.update(state, frozen, rollout)
        return state

    rows, prompt, slots = size.batch, size.prompt, size.response
    written = sum(
        models.forward_flops(c, rows, prompt + slots) + models.head_flops(c, rows * slots)
        for c in (student, teacher)
    )
    return (collection, update), (
        written,
        models.update_flops(student, teacher, rows, prompt, slots),
    )


def decoder(size: Size, layers: int) -> DecoderConfig:
    """A model of so many layers."""
    return DecoderConfig(
        vocab_size=size.vocabulary, layers=layers, width=size.width, heads=4, kv_heads=2,
        mlp_width=3 * size.width, max_positions=1024, gated=True,
    )  # fmt: skip


@functools.cache  # of batches and responses of any size the models are the same
def weights(config: DecoderConfig, seed: int) -> Any:
    """Random parameters."""
    return jax.jit(init_params, static_argnums=0)(config, jax.random.key(seed))


def draw(found: dict[str, Any], path: str) -> None:
    """Plot seconds against FLOPs, both logarithmic, an axis a panel."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(found), figsize=(4 * len(found), 3.5))
    for panel, (axis, phases) in zip(np.atleast_1d(panels), found.items(), strict=True):
        for phase, one in phases.items():
            exponents = f"{one['time_exponent']:.2f} / {one['work_exponent']:.2f}"
            panel.loglog(one["values"], one["seconds"], "o-", label=f"{phase} {exponents}")
            scale = one["seconds"][-1] / one["flops"][-1]
            panel.loglog(one["values"], [scale * f for f in one["flops"]], ":", color="grey")
        values = next(iter(phases.values()))["values"]
        panel.set_xticks(values, [f"{value:,}" for value in values])
        panel.xaxis.minorticks_off()
        panel.set(xlabel=axis, ylabel="seconds" if axis == "batch" else None)
        panel.legend(title="exponent of time / FLOPs", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def weak_scaling(devices: str) -> list[dict[str, Any]]:
    """The figures of `weak_scaling`, which simulates devices and so is a process of its own."""
    with tempfile.TemporaryDirectory() as made:
        path = Path(made) / "weak.json"
        words = ["-m", "benchmarks.weak_scaling", f"--devices={devices}", f"--json={path}"]
        subprocess.run([sys.executable, *words], check=True)
        return json.loads(path.read_text(encoding="utf-8"))["weak_scaling"]


if __name__ == "__main__":
    main()
