"""The plan of an experiment on a machine: whether it fits, its time, its cost, what would help."""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from minillm_jax.axes import kept_whole
from minillm_jax.build import SECTIONS
from minillm_jax.planning.chips import GIB
from minillm_jax.planning.estimate import Figures, hurried, measure
from minillm_jax.planning.programs import meshes, programs
from minillm_jax.planning.shapes import Shapes
from minillm_jax.planning.targets import Target
from minillm_jax.types import InputError


@dataclass(frozen=True)
class Plan:
    """What was found, in the units of `Figures`: one device, once."""

    target: Target
    mesh: dict[str, int]
    settings: dict[str, Any]  # that a search changes, as they are here
    figures: tuple[Figures, ...]
    notes: tuple[str, ...]
    updates: int = 0
    updates_per_rollout: int = 0  # 0: of a method that does not sample

    @property
    def fits(self) -> bool:
        """Whether every program fits."""
        return all(f.fits for f in self.figures)

    @property
    def distilling(self) -> list[Figures]:
        """The programs of distillation, or of the last stage that trains."""
        found = [f for f in self.figures if f.name in ("collect", "distill update")]
        return found or list(self.figures[-1:])

    @property
    def seconds(self) -> float:
        """Of all updates of distillation and the collections between them."""
        total = 0.0
        for f in self.distilling:
            rounds = self.updates
            if f.name == "collect":
                rounds = math.ceil(self.updates / self.updates_per_rollout)
            total += rounds * f.seconds
        return total

    @property
    def chip_hours(self) -> float:
        """Chip-hours of `seconds`."""
        return self.seconds * len(self.target.devices) / 3600


def builder(config: Any, workdir: Path, target: Target) -> tuple[Shapes, list[str]]:
    """The experiment on the devices of `target`, and what had to be changed for it.

    A config that leaves its mesh to the number of devices gets the first mesh over which its
    batches and models divide; one that sets it is taken at its word.

    Raises:
        InputError: a mesh that the devices do not make, or that does not divide the models.
    """
    try:
        build = Shapes(config, workdir, target.devices)
        divides(build)
        return build, []
    except InputError as error:
        first = error
    if -1 not in config.mesh.to_dict().values():
        raise first
    for sizes in meshes(len(target.devices)):
        if sizes["data"] != 1:
            continue
        try:
            build = Shapes(changed(config, {"mesh": sizes}), workdir, target.devices)
            divides(build)
        except InputError:
            continue
        return build, [f"{flags({'mesh': sizes})} in place of the config's mesh: {first}"]
    raise first


def divides(build: Shapes) -> None:
    """Refuse a mesh over which the models do not divide.

    Raises:
        InputError: with the axis and a size that would do.
    """
    for stored in (build.teacher_checkpoint, build.student_checkpoint):
        build.shardings(stored.config)


def changed(config: Any, changes: dict[str, dict[str, Any]]) -> Any:
    """A copy of a config with some settings changed, by section."""
    copy = config.copy_and_resolve_references()
    for section, values in changes.items():
        for name, value in values.items():
            copy[section][name] = value
    return copy


def flags(changes: dict[str, dict[str, Any]]) -> str:
    """Changes as they are written on the command line."""
    return " ".join(
        f"--config.{section}.{name}={value}"
        for section, values in changes.items()
        for name, value in values.items()
    )


Measured = Callable[..., Figures]

# Whose settings an update is compiled with; `collect` is no update.
SECTION_OF = {f"{stage} update": section for stage, section in SECTIONS.items()}


def plan(
    config: Any,
    workdir: Path,
    target: Target,
    *,
    only: tuple[str, ...] = (),
    measured: Measured = measure,
) -> Plan:
    """Compile and count the programs of an experiment, those named `only` where some are.

    Raises:
        InputError: settings that do not fit the machine, or a model that is not known.
    """
    build, notes = builder(config, workdir, target)
    figures = []
    for program in programs(build):
        if program.name in only or not only:
            print(f"compiling {program.name} for {target.name}", file=sys.stderr, flush=True)
            figures.append(measured(program, target))
    section = "sft" if build.outline.method == "sft" else "distill"
    schedule = build.schedule(section)
    for who, model in (
        ("teacher", build.teacher_checkpoint.config),
        ("student", build.student_checkpoint.config),
    ):
        notes += [f"{who}: {line}" for line in kept_whole(model.axis_sizes, build.mesh)]
    if hurried():
        notes.append("compiled with --quick: memory and seconds may be some percent too high")
    if target.note:
        notes.append(target.note)
    if any(f.extrapolated for f in figures):
        notes.append(
            "collect unrolls its layers: compiled with 2 and 4 of each model and extrapolated, "
            "linearly in the layers of both"
        )
    if any(f.assumed for f in figures):
        notes.append(
            f"every response is {build.config.data.max_response} tokens long, and the teacher "
            "takes as many turns as its coin is expected to give"
        )
    return Plan(
        target=target,
        mesh=dict(build.mesh.shape),
        settings=settings(build),
        figures=tuple(figures),
        notes=tuple(notes),
        updates=schedule.steps,
        updates_per_rollout=schedule.updates_per_round if schedule.rollouts else 0,
    )


def settings(build: Shapes) -> dict[str, Any]:
    """The settings that decide how much memory a step takes."""
    c = build.config.distill
    return {"micro_batch": c.micro_batch, "remat": c.remat, "collect_batch": c.collect_batch}


def cures(config: Any, found: Plan) -> list[str]:
    """What would make the programs fit that do not, the change that costs least first."""
    said = []
    memory = found.target.chip.memory
    for f in found.figures:
        if f.fits:
            continue
        fixed = sum(f.parts.values()) + f.held
        over = f"{f.name} needs {f.peak / GIB:.1f} GiB of {memory / GIB:.1f}"
        if fixed > memory:
            then = _split(config, found, f)
            least = math.ceil(then * len(found.target.devices) / memory)
            cure = f"take at least {least} such chips, for parameters and moments alone"
            if found.mesh["fsdp"] * found.mesh["tensor"] < len(found.target.devices):
                split = "split the models: --config.mesh.data=1 --config.mesh.fsdp=-1, which leaves"
                split += f" about {then / GIB:.1f} GiB of parameters and moments"
                cure = f"{split}; and {cure}" if then > memory else split
            said.append(f"{over}: {cure}")
            continue
        steps = list(_smaller(config, found, f))
        more = "more chips, or --config.mesh.tensor above " + str(found.mesh["tensor"])
        said.append(f"{over}: try {', then '.join([*steps, more])}")
    return said


def _split(config: Any, found: Plan, f: Figures) -> float:
    """Bytes, about, of what a program has and holds, were the devices of `data` those of `fsdp`."""
    names = ("parameters", "optimizer", *(["teacher"] if config.teacher.fsdp else []))
    ways = found.mesh["data"]
    given = sum(size / (ways if name in names else 1) for name, size in f.parts.items())
    # Moments but for some rows, which are split over both axes already.
    return given + (f.held / ways if f.name == "collect" else f.held)


def gathered(config: Any, found: Plan, f: Figures) -> float:
    """Bytes of the kernels that a collection gathers over `fsdp` for its loops (`unstack`)."""
    ways, cast = found.mesh["fsdp"], jnp.dtype(config.student.dtype).itemsize / 4
    teacher = f.parts["teacher"] if config.teacher.fsdp else 0.0
    return ways * (teacher + cast * f.parts["parameters"]) if ways > 1 else 0.0


def _smaller(config: Any, found: Plan, f: Figures):
    """Changes of settings that lower the work space of a program, one at a time."""
    ways = found.mesh["data"] * found.mesh["fsdp"]
    if f.name == "collect":
        kernels, memory = gathered(config, found, f), found.target.chip.memory
        for more in (2, 4, 8):  # devices more along `tensor` that share them
            if found.mesh["fsdp"] % more == 0 and f.peak - kernels * (1 - 1 / more) <= memory:
                mesh = {"fsdp": found.mesh["fsdp"] // more, "tensor": found.mesh["tensor"] * more}
                yield flags({"mesh": mesh})
                break
        rows = config.distill.collect_batch or config.distill.rollouts
        if rows // 2 >= ways and (rows // 2) % ways == 0:
            yield flags({"distill": {"collect_batch": rows // 2}})
        return
    section = SECTION_OF[f.name]
    c = config[section]
    if c.remat != "full":
        yield flags({section: {"remat": "full"}})
    rows = min(c.micro_batch or c.batch_size, max(c.batch_size // ways, 1))
    if rows > 1:
        yield flags({section: {"micro_batch": rows // 2}})
