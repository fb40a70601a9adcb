"""Which settings cannot be right, judged before anything is loaded; `build` reads the rest."""

import math
import re
from collections.abc import Iterator
from typing import Any

from minillm_jax import recipe
from minillm_jax.data.templates import TEMPLATES
from minillm_jax.methods import registry
from minillm_jax.methods.registry import Entry
from minillm_jax.models.fetch import is_remote, resolve
from minillm_jax.objectives import divergences
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
    | {f"distill.{name}": 1 for name in ("rollouts", "inner_epochs")}
    | {
        "distill.collect_batch": 0,
        "distill.chunk": 0,
        "answers.batch_size": 1,
        "evaluate.batch_size": 1,
        "teacher_sft.steps": 0,
    }
    | {"data.max_prompt": 1, "data.max_response": 1, "data.limit": 0, "answers.limit": 0}
    | {"data.max_answer": 0}
    | {"evaluate.prompts": 0, "evaluate.validation_prompts": 0, "evaluate.seeds": 1}
    | {f"evaluate.{name}": 0 for name in ("no_repeat_ngram", "exposure_samples", "overlap")}
    | {"corpus.coefficient": 0, "seed": 0}
)
_REMAT = {f"{stage}.remat": ("none", "dots", "full") for stage in _SECTIONS}
_KEEP = ("loss", "rouge_l", "reverse_kl")
_CHOICES = {
    "attention": ("auto", "xla", "cudnn", "splash"),
    "data.template": TEMPLATES,
    "data.long_prompts": ("error", "drop"),
    "answers.source": ("teacher", "data"),
    "distill.answers": ("teacher", "data"),
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
        if not least <= value < math.inf:  # nor NaN
            raise InputError(f"config.{name}={value}: give a number of at least {least}")
    for name in _not_numbers(config):
        raise InputError(f"{name}=nan: give a number")
    for name, allowed in _CHOICES.items():
        value = _setting(config, name)
        if value is not None and value not in allowed:
            raise InputError(f"config.{name}={value!r}: choose from {', '.join(allowed)}")
    for stage in ("sft", "distill"):
        c = config[stage]
        if not 0 <= c.b2 < 1:
            raise InputError(f"config.{stage}.b2={c.b2}: give a number from 0 to below 1")
    d = config.distill
    entry = registry.find(config.method)
    if entry.kind == "minillm":
        _check_collection(d, ways)
    if entry.kind == "divergence":
        _check_divergence(config)
    check_learning(config, entry)
    if not 0.0 <= d.alpha <= 1.0:
        raise InputError(f"config.distill.alpha={d.alpha}: the teacher's share is between 0 and 1")
    for name, ratio in (("distill", d.kd_ratio), ("corpus", config.corpus.kd_ratio)):
        if ratio is not None and not 0.0 <= ratio <= 1.0:
            raise InputError(
                f"config.{name}.kd_ratio={ratio}: the teacher's share is between 0 and 1"
            )
    recipe.learns_from_answers(config.corpus.files)
    for name in ("teacher.temperature", "distill.start_temperature"):
        value = _setting(config, name)
        if not 0.01 <= value <= 100.0:
            raise InputError(f"config.{name}={value}: give a number from 0.01 to 100")
    if not (config.teacher.path or config.teacher.fine_tuned):
        raise InputError("config.teacher.path is empty: give an HF folder or a GGUF file")
    if config.student.fine_tuned and entry.start != "sft":
        raise InputError(
            f"config.student.fine_tuned is for methods that start from SFT, which config.method="
            f"{config.method!r} does not: give the student as config.student.path"
        )
    for name in ("teacher", "student"):
        for path in (config[name].path, config[name].fine_tuned):
            if path and not path.startswith(PREFIX) and not is_remote(path):
                resolve(path)
    for setting, specs, form in (
        ("data.more_tests", config.data.more_tests, r"\w+=.+"),
        ("evaluate.calibration", config.evaluate.calibration, r"\w+(:[1-9]\d*)?=.+"),
    ):
        for spec in specs:
            if not re.fullmatch(form, str(spec)):
                rows = " or NAME:ROWS=FILE.jsonl" if ":" in form else ""
                raise InputError(
                    f"config.{setting}: {spec!r} is not of the form NAME=FILE.jsonl{rows}"
                )
    if any(str(spec).startswith("test=") for spec in config.data.more_tests):
        raise InputError("config.data.more_tests: `test` is config.data.test; choose another name")
    kept = config.student.keep_layers
    if not all(isinstance(layer, int) and layer >= 0 for layer in kept):
        raise InputError(
            f"config.student.keep_layers={tuple(kept)}: give numbers of layers, such as '(0, 1, 3)'"
        )


def _check_collection(d: Any, ways: int) -> None:
    if d.rollouts % d.batch_size:
        raise InputError(
            f"config.distill.rollouts={d.rollouts} is not a multiple of "
            f"config.distill.batch_size={d.batch_size}: change one of them"
        )
    if d.collect_batch and d.rollouts % d.collect_batch:
        raise InputError(
            f"config.distill.rollouts={d.rollouts} is not a multiple of "
            f"config.distill.collect_batch={d.collect_batch}: change one of them"
        )
    if d.rollouts % ways:
        raise InputError(
            f"config.distill.rollouts={d.rollouts} does not split over {ways} devices: make it a "
            f"multiple of {ways}"
        )


def _check_divergence(config: Any) -> None:
    d = config.distill
    try:
        divergences.find(d.divergence).checked(d.divergence, d.parameter)
    except InputError as error:
        raise InputError(f"config.distill.{error}") from error
    if not 0.0 <= d.on_policy <= 1.0:
        raise InputError(
            f"config.distill.on_policy={d.on_policy}: the student's share is between 0 and 1"
        )
    if d.replay and d.replay < d.batch_size:
        raise InputError(
            f"config.distill.replay={d.replay}: keep at least the answers of one update, "
            f"config.distill.batch_size={d.batch_size}"
        )


def check_learning(config: Any, entry: Entry) -> None:
    """Refuse settings with which no update moves the student towards the teacher.

    Raises:
        InputError: naming the setting and the cure.
    """
    d, own = config.distill, "sft" in (entry.start, entry.kind) and not config.student.fine_tuned
    for name in ("sft",) * own + ("distill",) * (entry.kind != "sft"):
        if config[name].learning_rate == 0:
            raise InputError(f"config.{name}.learning_rate=0: nothing is learnt at it, raise it")
    # SeqKD's teacher is in the answers.
    if entry.kind == "divergence" and not d.kd_ratio and d.answers != "teacher":
        raise InputError(
            f"config.distill.kd_ratio=0 leaves the teacher out of {config.method}: raise it, or "
            "use --config.method=sft"
        )
    if entry.kind == "divergence" and d.kd_ratio < 1 and (d.on_policy or d.replay):
        raise InputError(
            f"config.distill.kd_ratio={d.kd_ratio} with answers of the student's own: the "
            "cross-entropy of what it wrote itself only makes it surer of that; set it to 1, or "
            "config.distill.on_policy and replay to 0"
        )
    if d.cache_teacher and not meets_on_given(config):
        raise InputError(
            f"config.distill.cache_teacher={d.cache_teacher}: {config.method} does not meet the "
            "teacher on given answers alone, so nothing can be kept; leave it empty"
        )
    recipe.kept_ids(d.cache_teacher)
    copy = not (config.student.path or config.student.fine_tuned or config.student.keep_layers)
    if entry.kind == "divergence" and entry.start == "base" and copy:
        if config.teacher.temperature == 1 and d.kd_ratio == 1:
            raise InputError(
                f"the student is the teacher itself, so {config.method} has nothing to teach: give "
                "config.student.path, or leave out layers by config.student.keep_layers"
            )
    late = d.estimator != "lmops" and (config.data.max_response == 1)
    if entry.kind == "minillm" and d.single_step is False and late:
        raise InputError(
            "config.distill.single_step=False with config.data.max_response=1: the long-term term "
            "begins at the second token, so there is none; allow longer answers"
        )


def meets_on_given(config: Any) -> bool:
    """Whether a method, with its settings filled in, meets the teacher on given answers alone."""
    d = config.distill
    reads = registry.find(config.method).kind == "divergence" and d.kd_ratio
    return bool(reads and not d.on_policy and not d.replay)


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


def _not_numbers(config: Any, name: str = "config") -> Iterator[str]:
    """Settings that are NaN, which passes every comparison with a bound."""
    if hasattr(config, "items"):
        for key, value in config.items():
            yield from _not_numbers(value, f"{name}.{key}")
    elif isinstance(config, float) and math.isnan(config):
        yield name


def _setting(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = config[part]
    return config
