"""The methods by name, as data: what each learns from, where it starts, and which settings make it.

`config.method` chooses. `kind` is the file in `methods/` that does the work; `defaults` are used
where the config leaves a setting at None, `fixed` are what the name means, whatever the config
says. One more method is an entry here: docs/add_a_method.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from minillm_jax.types import InputError


@dataclass(frozen=True)
class Entry:
    """One method.

    Attributes:
        source: where it comes from.
        kind: the file of `methods/`.
        start: the student as it is, or after SFT, which those need that let it write.
        defaults, fixed: settings by dotted name.
    """

    source: str
    kind: Literal["sft", "divergence", "minillm"]
    start: Literal["base", "sft"] = "base"
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)


def by(divergence: str, source: str, start: Literal["base", "sft"] = "base", **more: Any) -> Entry:
    """A method that is a divergence and, perhaps, answers of the student's own."""
    given = {"divergence": divergence, "kd_ratio": 1.0, "on_policy": 0.0, "replay": 0} | more
    defaults = {f"distill.{name}": value for name, value in given.items()}
    return Entry(source, "divergence", start, defaults)


def _without(what: str, **fixed: Any) -> Entry:
    """MiniLLM with a part left out; `__` in a name is a dot."""
    settings = {name.replace("__", "."): value for name, value in fixed.items()}
    return Entry(f"MiniLLM without {what}", "minillm", "sft", fixed=settings)


METHODS: dict[str, Entry] = {
    "minillm": Entry("Gu et al., arXiv 2306.08543", "minillm", "sft"),
    "sft": Entry("cross-entropy on the answers", "sft"),
    "kd": by("cross_entropy", "Hinton et al., arXiv 1503.02531", kd_ratio=0.5),
    "seqkd": by("cross_entropy", "Kim & Rush, arXiv 1606.07947", kd_ratio=0.0, answers="teacher"),
    "seqkd_kd": by(
        "cross_entropy", "SeqKD of MiniLLM's code: with KD", kd_ratio=0.5, answers="teacher"
    ),
    "gkd": by("jsd", "Agarwal et al., arXiv 2306.13649", "sft", on_policy=0.5),
    "jsd": by("jsd", "Agarwal et al., arXiv 2306.13649, lambda 0"),
    "opd": by(
        "reverse_kl", "on-policy distillation: GKD with lambda 1, beta 1", "sft", on_policy=1.0
    ),
    "skew_kl": by("skew_forward_kl", "Ko et al., arXiv 2402.03898"),
    "skew_reverse_kl": by("skew_reverse_kl", "Ko et al., arXiv 2402.03898"),
    "distillm": by("skew_forward_kl", "Ko et al., arXiv 2402.03898", "sft", replay=1000),
    "distillm_srkl": by("skew_reverse_kl", "Ko et al., arXiv 2402.03898", "sft", replay=1000),
    "tvd": by("total_variation", "Wen et al., arXiv 2307.15190"),
    "akl": by("adaptive_kl", "Wu et al., arXiv 2404.02657"),
    "taid": by("interpolated_kl", "Shing et al., arXiv 2501.16937"),
    "minillm_no_single_step": _without("the single-step term", distill__single_step=False),
    "minillm_no_length_norm": _without("length normalisation", distill__length_norm=False),
    "minillm_no_mixing": _without("teacher-mixed sampling", distill__alpha=0.0),
    "minillm_no_corpus": _without("the corpus loss", corpus__files=()),
}


def find(name: str) -> Entry:
    """The method of that name.

    Raises:
        InputError: naming those there are.
    """
    if name not in METHODS:
        raise InputError(f"config.method={name!r}: choose from {', '.join(METHODS)}")
    return METHODS[name]


def resolved(config: Any) -> Any:
    """A copy of a config in which the settings of its method are filled in."""
    entry, config = find(config.method), config.copy_and_resolve_references()
    for name, value in {**entry.defaults, **entry.fixed}.items():
        section, _, key = name.rpartition(".")
        if name in entry.fixed or config[section][key] is None:
            config[section][key] = value
    return config
