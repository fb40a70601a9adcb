"""Which settings cannot be right, judged before anything is loaded; `build` reads the rest."""

from typing import Any

from minillm_jax.data.templates import TEMPLATES
from minillm_jax.models.fetch import is_remote, resolve
from minillm_jax.types import InputError

_TRAINING = ("steps", "batch_size", "accumulate", "evaluate_every", "save_every")
_LEAST = (
    {f"{stage}.{name}": 1 for stage in ("sft", "distill") for name in _TRAINING}
    | {f"distill.{name}": 1 for name in ("rollouts", "inner_epochs", "chunk")}
    | {"answers.batch_size": 1, "evaluate.batch_size": 1}
    | {"data.max_prompt": 1, "data.max_response": 1, "data.limit": 0, "answers.limit": 0}
    | {"evaluate.prompts": 0, "evaluate.validation_prompts": 0, "answers.temperature": 0}
    | {"sft.weight_decay": 0, "distill.weight_decay": 0}
)
_CHOICES = {
    "data.template": TEMPLATES,
    "student.dtype": ("float32", "bfloat16", "float16"),
}


def check(config: Any) -> None:
    """Refuse what cannot run or cannot learn, before anything is loaded.

    Raises:
        InputError: naming the setting and the cure.
    """
    for name, least in _LEAST.items():
        section, _, key = name.rpartition(".")
        value = config[section][key]
        if value < least:
            raise InputError(f"config.{name}={value}: give a number of at least {least}")
    for name, allowed in _CHOICES.items():
        section, _, key = name.rpartition(".")
        if config[section][key] not in allowed:
            raise InputError(
                f"config.{name}={config[section][key]!r}: choose from {', '.join(allowed)}"
            )
    for stage in ("sft", "distill"):
        c = config[stage]
        if c.batch_size % c.accumulate:
            raise InputError(
                f"config.{stage}.accumulate={c.accumulate} does not divide "
                f"config.{stage}.batch_size={c.batch_size}: change one of them"
            )
        if not 0 <= c.b2 < 1:
            raise InputError(f"config.{stage}.b2={c.b2}: give a number from 0 to below 1")
    d = config.distill
    if d.rollouts % d.batch_size:
        raise InputError(
            f"config.distill.rollouts={d.rollouts} is not a multiple of "
            f"config.distill.batch_size={d.batch_size}: change one of them"
        )
    if not 0.0 <= d.alpha <= 1.0:
        raise InputError(f"config.distill.alpha={d.alpha}: the teacher's share is between 0 and 1")
    if not 0.0 < config.answers.top_p <= 1.0:
        raise InputError(
            f"config.answers.top_p={config.answers.top_p}: give more than 0, at most 1"
        )
    if not config.teacher.path:
        raise InputError("config.teacher.path is empty: give an HF folder or a GGUF file")
    for name in ("teacher", "student"):
        path = config[name].path
        if path and not is_remote(path):
            resolve(path)
    kept = config.student.keep_layers
    if not all(isinstance(layer, int) and layer >= 0 for layer in kept):
        raise InputError(
            f"config.student.keep_layers={tuple(kept)}: give numbers of layers, such as '(0, 1, 3)'"
        )
