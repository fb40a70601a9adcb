"""What the numbers of a training section mean: updates, micro-batches, rates, the estimator.

Functions of a part of the config that `build` hands over; nothing here knows models or data.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import optax

from minillm_jax import optim
from minillm_jax.methods import registry
from minillm_jax.methods.registry import Entry
from minillm_jax.objectives.policy import PRESETS, Policy
from minillm_jax.trainer import Schedule
from minillm_jax.types import InputError

_SWITCHES = (
    "gamma", "reward_scaling", "reward_clip", "cliprange", "length_norm", "whiten", "single_step"
)  # fmt: skip
NARROW, ALIGNED = 128, 64  # tokens: the least window, and what all but the last are multiples of


@dataclass(frozen=True)
class Outline:
    """What decides which stages an experiment has.

    `tunes_teacher` and `fine_tuned_*`: a stage that is wanted, and a model that replaces it.
    """

    method: str
    answers: str  # teacher or data: who wrote what SFT and KD learn from
    tunes_teacher: bool
    fine_tuned_teacher: str
    fine_tuned_student: str
    student_of_teacher: bool  # made of the teacher's layers
    given: str  # teacher or data: who wrote what `distill` learns from, where it reads answers
    caches: bool  # whether what the teacher says of given answers is kept on disk
    needs_teacher: bool  # whether its loss has the teacher's distribution in it

    @property
    def entry(self) -> Entry:
        """What the method is."""
        return registry.find(self.method)

    @property
    def policy_gradient(self) -> bool:
        """Whether `distill` collects responses, and reads no given ones."""
        return self.entry.kind == "minillm"

    @property
    def by_teacher(self) -> bool:
        """Whether the teacher writes answers, for any stage."""
        reads = self.entry.kind == "divergence"
        return self.answers == "teacher" or (reads and self.given == "teacher")


def outline(config: Any) -> Outline:
    """The outline of an experiment, from its whole config, resolved."""
    return Outline(
        method=config.method,
        answers=config.answers.source,
        tunes_teacher=config.teacher_sft.steps > 0 or config.teacher_sft.epochs > 0,
        fine_tuned_teacher=config.teacher.fine_tuned,
        fine_tuned_student=config.student.fine_tuned,
        student_of_teacher=not (config.student.path or config.student.fine_tuned),
        given=config.distill.answers or config.answers.source,
        caches=bool(config.distill.cache_teacher),
        needs_teacher=not (
            registry.find(config.method).kind == "divergence" and not config.distill.kd_ratio
        ),
    )


def kept_ids(cache_teacher: str) -> int:
    """How many of the teacher's likeliest ids are kept of a token; 0: its hidden state, or nothing.

    Raises:
        InputError: neither empty, `states` nor `topK`.
    """
    if cache_teacher in ("", "states"):
        return 0
    number = cache_teacher.removeprefix("top")
    if cache_teacher.startswith("top") and number.isdecimal() and int(number):
        return int(number)
    raise InputError(
        f"config.distill.cache_teacher={cache_teacher!r}: use states (exact), or as top50 the "
        "number of likeliest ids to keep"
    )


def learns_from_answers(files: Sequence[str]) -> bool:
    """Whether the text of the corpus loss is what SFT reads, and no file.

    Raises:
        InputError: it is to be both.
    """
    if "answers" in files and len(files) > 1:
        raise InputError(
            f"config.corpus.files={tuple(files)}: 'answers' stands alone; leave it or the files out"
        )
    return tuple(files) == ("answers",)


def schedule(section: Mapping[str, Any], examples: int, *, on_policy: bool = False) -> Schedule:
    """Sizes and intervals of a stage that has `examples` to learn from.

    `epochs` passes are epochs * floor(examples / batch_size) updates, as where the last part of a
    batch is left out; a stage has one update at least.
    """
    epoch = max(examples // section["batch_size"], 1)
    epochs = section["epochs"]
    steps = max(round(epochs * epoch), 1) if epochs else section["steps"]
    evaluate_every = section["evaluate_every"] or (min(epoch, steps) if epochs else steps)
    collected = ("rollouts", "inner_epochs") if on_policy else ()
    return Schedule(
        steps=steps,
        batch_size=section["batch_size"],
        evaluate_every=evaluate_every,
        save_every=section["save_every"] or evaluate_every,
        **{name: section[name] for name in collected},
    )


def micro_batches(batch_size: int, most: int, ways: int) -> int:
    """The fewest equal micro-batches of which a device has at most `most` rows (0: no bound).

    Raises:
        InputError: `batch_size` rows do not split over `ways` devices.
    """
    if batch_size % ways:
        raise InputError(
            f"batch_size={batch_size} does not split over {ways} devices: "
            f"make it a multiple of {ways}"
        )
    rows = batch_size // ways
    return next(n for n in range(1, rows + 1) if rows % n == 0 and rows // n <= (most or rows))


def windows(most: int) -> tuple[int, ...]:
    """Widths in which a micro-batch is read, of which it gets the first that holds its rows.

    A quarter and a half of the `most` tokens that a row can have, and those; each is a program of
    its own, so what is narrow already is not divided.
    """
    parts = [-(-most // (n * ALIGNED)) * ALIGNED for n in (4, 2)]
    return (*(part for part in parts if NARROW <= part <= 0.75 * most), most)


def optimizer(
    section: Mapping[str, Any], steps: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """AdamW of a stage and its learning rate by update."""
    rate = optim.schedule(
        section["schedule"], section["learning_rate"], warmup=section["warmup"], steps=steps
    )
    decay = {"weight_decay": section["weight_decay"], "decay_mask": optim.matrices}
    return optim.adamw(rate, b2=section["b2"], clip_norm=section["clip_norm"], **decay), rate


def policy(section: Mapping[str, Any]) -> Policy:
    """The estimator's preset, with the switches that the section sets.

    Raises:
        InputError: no such preset, or a switch out of its range.
    """
    given = {name: section[name] for name in _SWITCHES if section[name] is not None}
    for name in ("reward_clip", "cliprange"):
        if given.get(name) == 0:
            given[name] = None
    if section["estimator"] not in PRESETS:
        raise InputError(f"estimator={section['estimator']!r}: choose from {', '.join(PRESETS)}")
    return replace(PRESETS[section["estimator"]], **given)


def in_full(config: Any) -> dict[str, Any]:
    """The settings with what the method and the estimator's preset say where a config is silent."""
    found = config.to_dict()
    if outline(config).policy_gradient:
        used = policy(found["distill"])
        found["distill"] |= {name: getattr(used, name) for name in _SWITCHES}
    return found


def judge(name: str, section: Mapping[str, Any], ways: int):
    """Look at a section before anything is loaded, and not when its stage begins.

    Raises:
        InputError: what one of the functions above refuses, with the setting's whole name.
    """
    try:
        micro_batches(section["batch_size"], section["micro_batch"], ways)
        # With epochs the updates are known when the data is.
        optimizer(section, 10**9 if section["epochs"] else section["steps"])
        if name == "distill":
            policy(section)
    except InputError as error:
        raise InputError(f"config.{name}.{error}") from error
