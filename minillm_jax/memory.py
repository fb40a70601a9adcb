"""Out of memory: what the plan of the stage says it needs, and which setting to try."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from minillm_jax.planning import verdict
from minillm_jax.planning.chips import Chip
from minillm_jax.planning.estimate import Figures, measure
from minillm_jax.planning.programs import Program
from minillm_jax.planning.targets import Target, host_memory

PROGRAMS = {
    "teacher_sft": ("teacher_sft update",),
    "student_sft": ("student_sft update",),
    "distill": ("collect", "distill update"),
}  # of the stages that train
_ELSEWHERE = "python -m minillm_jax.plan says what fits, for any machine"


def exhausted(error: BaseException) -> bool:
    """Whether an error says that memory is used up, that of a device or that of the host."""
    return isinstance(error, MemoryError) or (
        isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
    )


def explain(config: Any, workdir: Path, stage: str) -> str:
    """One line: that the memory is used up in a stage, what it needs, what to set.

    The programs of the stage are compiled for the devices here and counted, without an array.
    """
    said = f"{stage}: out of memory on {jax.devices()[0].device_kind}"
    if stage not in PROGRAMS:
        section = "answers" if stage == "teacher_answers" else "evaluate"
        size = config[section].batch_size
        return f"{said}: lower --config.{section}.batch_size={size}; {_ELSEWHERE}"
    if jax.process_count() > 1:  # which would compile for devices that are not its own
        return f"{said}: {_ELSEWHERE}"
    try:
        found = verdict.plan(config, workdir, _here(), only=PROGRAMS[stage], measured=_too_much)
        return f"{said}: {'; '.join(verdict.cures(config, found))}"
    except Exception as error:  # whatever it is, the memory is what the user must hear of
        return f"{said}: {_ELSEWHERE} ({type(error).__name__} in the plan for this one)"


def _here() -> Target:
    devices = tuple(jax.devices())
    stats = devices[0].memory_stats() or {}
    memory = float(stats.get("bytes_limit", host_memory() / len(devices)))
    return Target("here", Chip(devices[0].device_kind, 1.0, memory, 1.0, 1.0), devices)


def _too_much(program: Program, target: Target) -> Figures:
    # It did not fit, whatever is counted: something else may hold a part of the memory.
    return dataclasses.replace(measure(program, target), fits=False)
