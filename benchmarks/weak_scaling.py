"""What devices send each other when the batch grows with their number, from compiled programs.

    python -m benchmarks.weak_scaling --devices 8,64,256 --json weak_scaling.json

Compiles the update and the collection of GPT-2 XL into GPT-2 for so many simulated devices, with as
many rows on each, and counts the bytes of their collectives as `minillm_jax.plan` does. Nothing is
run. Seconds are those of a roofline of the chip that is named, nothing overlapped.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import jax

from configs.gpt2_xl_to_gpt2 import get_config
from minillm_jax.planning.estimate import Figures, measure
from minillm_jax.planning.programs import programs
from minillm_jax.planning.targets import Target, target
from minillm_jax.planning.verdict import builder, changed
from minillm_jax.reporting.writers import write_json

PROGRAMS = ("collect", "distill update")
MESHES = {
    "data": {"data": -1, "fsdp": 1, "tensor": 1},
    "fsdp of 8": {"data": -1, "fsdp": 8, "tensor": 1},
}


def main() -> None:
    """Compile for every number of devices and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_options(parser)
    parser.add_argument("--json", default="", help="write the figures here, too")
    asked = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", max(map(int, asked.devices.split(","))))
    found = counted(asked)
    show(found)
    if asked.json:
        write_json(asked.json, {"weak_scaling": found})


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of a count."""
    parser.add_argument("--devices", default="8,64,256", help="numbers, comma-separated")
    parser.add_argument("--argument", default="", help="of configs/gpt2_xl_to_gpt2.py")
    parser.add_argument("--chip", default="h100", help="one of those that `plan` knows")
    parser.add_argument("--rows", type=int, default=8, help="of a batch, on each device")


def counted(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """Figures of both programs, for every mesh and number of devices."""
    found = []
    for name in MESHES:
        for devices in map(int, asked.devices.split(",")):
            for figures in compiled(name, target(f"{asked.chip}:{devices}"), asked):
                found.append(
                    {
                        "mesh": name,
                        "devices": devices,
                        "program": figures.name,
                        "collective_bytes": sum(figures.collectives.values()),
                        "collectives": figures.collectives,
                        "compute_seconds": figures.compute_seconds,
                        "network_seconds": figures.network_seconds,
                    }
                )
    for one in found:
        least = next(x for x in found if x["mesh"] == one["mesh"] and same(x, one))
        one["efficiency"] = seconds(least) / seconds(one)
    return found


def same(one: dict, other: dict) -> bool:
    """Whether two rows are of one program."""
    return one["program"] == other["program"]


def seconds(one: dict) -> float:
    """Of a run of the program, nothing overlapped."""
    return one["compute_seconds"] + one["network_seconds"]


def compiled(name: str, machine: Target, asked: argparse.Namespace) -> list[Figures]:
    """The figures of the two programs on one mesh."""
    config = get_config(asked.argument)
    rows = asked.rows * len(machine.devices)
    batches = {"batch_size": rows, "rollouts": rows, "collect_batch": 0, "micro_batch": asked.rows}
    others = {stage: {"batch_size": rows} for stage in ("teacher_sft", "sft")}  # must divide, too
    config = changed(config, {"mesh": MESHES[name], "distill": batches} | others)
    with tempfile.TemporaryDirectory() as made:
        build, _ = builder(config, Path(made), machine)
        wanted = [p for p in programs(build) if p.name in PROGRAMS]
        return [measure(program, machine) for program in wanted]


def show(found: list[dict[str, Any]]) -> None:
    """Print the table."""
    print("| program | mesh | devices | collective MB per device | of the smallest | efficiency |")
    print("|---|---|---|---|---|---|")
    for one in sorted(found, key=lambda one: (one["program"], one["mesh"], one["devices"])):
        least = next(x for x in found if x["mesh"] == one["mesh"] and same(x, one))
        grown = (
            one["collective_bytes"] / least["collective_bytes"] if least["collective_bytes"] else 1
        )
        print(
            f"| {one['program']} | {one['mesh']} | {one['devices']}"
            f" | {one['collective_bytes'] / 1e6:,.0f} | {grown:.2f} | {one['efficiency']:.2f} |"
        )


if __name__ == "__main__":
    main()
