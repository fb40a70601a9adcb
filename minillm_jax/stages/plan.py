"""Which stages an experiment has, each with what it does, reads and trains on.

    teacher_sft -> teacher_answers -> student_sft -> teacher_targets -> distill -> evaluate
    -> report

An experiment has those that its settings ask for: the quickstart's teacher is fine-tuned already
and writes the answers, so there is no `teacher_sft`; in the paper's pairs the answers are those of
the data, so there is no `teacher_answers` (but for SeqKD, which is SFT on them).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from minillm_jax.recipe import Outline
from minillm_jax.stages import Outcome, Run
from minillm_jax.stages.answers import teacher_answers
from minillm_jax.stages.evaluation import evaluate
from minillm_jax.stages.targets import teacher_targets
from minillm_jax.stages.training import distill, student_sft, teacher_sft


@dataclass(frozen=True)
class Stage:
    """A stage: its function, the stages that it reads, and its section if it trains.

    Of `inputs` those in `optional` may be missing: the stage then does what is left to do.
    """

    function: Callable[[Run], Outcome]
    inputs: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    section: str = ""


@dataclass(frozen=True)
class Plan:
    """The stages of an experiment in order, and why others that one might expect are left out."""

    stages: Mapping[str, Stage]
    skipped: Mapping[str, str]


def plan(outline: Outline, report: Callable[[Run], Outcome]) -> Plan:
    """The stages of an experiment; `report` is the function of the last."""
    stages: dict[str, Stage] = {}
    skipped: dict[str, str] = {}

    def there(*names: str) -> tuple[str, ...]:
        return tuple(name for name in names if name in stages)

    if outline.fine_tuned_teacher:
        skipped["teacher_sft"] = f"config.teacher.fine_tuned={outline.fine_tuned_teacher}"
    elif outline.tunes_teacher:
        stages["teacher_sft"] = Stage(teacher_sft, section="teacher_sft")
    if outline.by_teacher:
        stages["teacher_answers"] = Stage(teacher_answers, there("teacher_sft"))
    learned = there("teacher_answers") or there("teacher_sft")
    if outline.fine_tuned_student:
        skipped["student_sft"] = f"config.student.fine_tuned={outline.fine_tuned_student}"
    elif outline.entry.start == "sft" or outline.entry.kind == "sft":
        made = there("teacher_sft") if outline.student_of_teacher else ()
        read = there("teacher_answers") if outline.answers == "teacher" else ()
        stages["student_sft"] = Stage(student_sft, read + made, section="sft")
    if outline.entry.kind != "sft":
        inputs = there("student_sft") + there("teacher_sft")
        if not outline.policy_gradient or "student_sft" not in stages:
            inputs += there("teacher_answers")
        if outline.caches:
            made = there("teacher_sft", "teacher_answers")
            stages["teacher_targets"] = Stage(teacher_targets, made)
            inputs += ("teacher_targets",)
        stages["distill"] = Stage(distill, inputs, section="distill")
    students = there("student_sft", "distill")
    stages["evaluate"] = Stage(evaluate, (*learned, *students), students)
    stages["report"] = Stage(report, ("evaluate",), ("evaluate",))
    return Plan(stages, skipped)
