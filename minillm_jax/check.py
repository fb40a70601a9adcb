"""Which settings cannot be right, judged before anything is loaded; `build` reads the rest."""

from typing import Any

from minillm_jax.data.templates import TEMPLATES
from minillm_jax.models.fetch import is_remote, resolve
from minillm_jax.scratch import PREFIX
from minillm_jax.types import InputError

_FROM_0 = ("epochs", "micro_batch", "evaluate_every")
_SECTIONS = ("teacher_sft", "sft", "distill")
_LEAST = (
    {f"{stage}.steps": 1 for stage in ("sft", "distill")}
    | {f"{stage}.save_every": 0 for stage in ("sft", "distill")}
    | {f"{stage}.weight_decay": 0 for stage in ("sft", "distill")}
    | {f"{stage}.batch_size": 1 for stage in _SECTIONS}
    | {f"{stage}.{name}": 0 for stage in _SECTIONS for name in _FROM_0}
    | {f"distill.{name}": 1 for name in ("rollouts", "inner_epochs", "chunk")}
    | {
        "distill.collect_batch": 0,
        "answers.batch_size": 1,
        "evaluate.batch_size": 1,
        "teacher_sft.steps": 0,
    }
    | {"data.max_prompt": 1, "data.max_response": 1, "data.limit": 0, "answers.limit": 0}
    | {"data.max_answer": 0}
    | {"evaluate.prompts": 0, "evaluate.validation_prompts": 0, "evaluate.seeds": 1}
    | {f"evaluate.{name}": 0 for name in ("no_repeat_ngram", "exposure_samples", "overlap")}
    | {"corpus.coefficient": 0}
)
_REMAT = {f"{stage}.remat": ("none", "dots", "full") for stage in _SECTIONS}
_KEEP = ("loss", "rouge_l", "reverse_kl")
_CHOICES = {
    "attention": ("auto", "xla", "cudnn", "splash"),
    "method": ("minillm", "sft", "kd", "seqkd"),
    "data.template": TEMPLATES,
    "data.long_prompts": ("error", "drop"),
    "answers.source": ("teacher", "data"),
    "teacher.dtype": ("float32", "bfloat16"),
    "student.dtype": ("float32", "bfloat16", "float16"),
    "teacher_sft.keep": _KEEP[:2],
    "sft.keep": _KEEP,
    "distill.keep": _KEEP,
    **_REMAT,
}


def check(config: Any, ways: int = 1) -> None:
    """Refuse what cannot run or cannot learn on `ways` devices, before anything is loaded.

    Raises:
        InputError: naming the setting and the cure.
    """
    for name, least in _LEAST.items():
        value = _setting(config, name)
        if value < least:
            raise InputError(f"config.{name}={value}: give a number of at least {least}")
    for name, allowed in _CHOICES.items():
        value = _setting(config, name)
        if value not in allowed:
            raise InputError(f"config.{name}={value!r}: choose from {', '.join(allowed)}")
    for stage in ("sft", "distill"):
        c = config[stage]
        if not 0 <= c.b2 < 1:
            raise InputError(f"config.{stage}.b2={c.b2}: give a number from 0 to below 1")
    d = config.distill
    if config.method == "minillm" and d.rollouts % d.batch_size:
        raise InputError(
            f"config.distill.rollouts={d.rollouts} is not a multiple of "
            f"config.distill.batch_size={d.batch_size}: change one of them"
        )
    if config.method == "minillm" and d.collect_batch and d.rollouts % d.collect_batch:
        raise InputError(
            f"config.distill.rollouts={d.rollouts} is not a multiple of "
            f"config.distill.collect_batch={d.collect_batch}: change one of them"
        )
    if config.method == "minillm" and d.rollouts % ways:
        raise InputError(
            f"config.distill.rollouts={d.rollouts} does not split over {ways} devices: make it a "
            f"multiple of {ways}"
        )
    if not 0.0 <= d.alpha <= 1.0:
        raise InputError(f"config.distill.alpha={d.alpha}: the teacher's share is between 0 and 1")
    for name, ratio in (("distill", d.kd_ratio), ("corpus", config.corpus.kd_ratio)):
        if not 0.0 <= ratio <= 1.0:
            raise InputError(
                f"config.{name}.kd_ratio={ratio}: the teacher's share is between 0 and 1"
            )
    if not 0.01 <= config.teacher.temperature <= 100.0:
        raise InputError(
            f"config.teacher.temperature={config.teacher.temperature}: give a number from 0.01 to "
            "100"
        )
    if not (config.teacher.path or config.teacher.fine_tuned):
        raise InputError("config.teacher.path is empty: give an HF folder or a GGUF file")
    if config.student.fine_tuned and config.method != "minillm":
        raise InputError(
            f"config.student.fine_tuned is where minillm starts, and config.method="
            f"{config.method!r}: give the student as config.student.path"
        )
    for name in ("teacher", "student"):
        for path in (config[name].path, config[name].fine_tuned):
            if path and not path.startswith(PREFIX) and not is_remote(path):
                resolve(path)
    for setting, specs in (
        ("data.more_tests", config.data.more_tests),
        ("evaluate.calibration", config.evaluate.calibration),
    ):
        for spec in specs:
            name, has_file, file = str(spec).partition("=")
            if not (name.isidentifier() and has_file and file):
                raise InputError(f"config.{setting}: {spec!r} is not of the form NAME=FILE.jsonl")
    if any(str(spec).startswith("test=") for spec in config.data.more_tests):
        raise InputError("config.data.more_tests: `test` is config.data.test; choose another name")
    kept = config.student.keep_layers
    if not all(isinstance(layer, int) and layer >= 0 for layer in kept):
        raise InputError(
            f"config.student.keep_layers={tuple(kept)}: give numbers of layers, such as '(0, 1, 3)'"
        )


def check_slots(config: Any, who: str, positions: int) -> None:
    """Refuse batches that are wider than a model of so many positions reads."""
    c = config.data
    if c.max_prompt + c.max_response > positions:
        raise InputError(
            f"config.data.max_prompt={c.max_prompt} and max_response={c.max_response} make more "
            f"than the {positions} positions of the {who}: lower one of them"
        )


def check_ids(who: str, path: Any, ids: int, largest: int) -> None:
    """Refuse a tokenizer that makes the id `largest`, of a model with so many `ids`."""
    if largest >= ids:
        raise InputError(
            f"the tokenizer makes the id {largest}, the {who} has {ids} ids: {path} and its "
            "tokenizer do not belong together"
        )


def _setting(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = config[part]
    return config
