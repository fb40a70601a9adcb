"""What goes wrong in training without being an error: spikes, and a student that collapses.

`Watch.add` takes the metrics of each update, and the scores of each validation, and answers with
warnings that say what to change. It remembers them alone, so a run that goes on reads them again
and warns as it would have.
"""

import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from minillm_jax.reporting.formats import is_number

WINDOW = 50  # updates that a gradient norm is compared with
QUIET = 50  # updates in which a warning is not said again
_FIRST = 10  # updates whose mean is where a run began


@dataclass(frozen=True)
class Sign:
    """A metric that may not fall below, or rise above, `factor` times what it was at first (or,
    with `bound`, that number)."""

    metric: str
    factor: float | None = None
    bound: float | None = None
    above: bool = False
    says: str = ""
    change: str = ""

    def shows(self, value: float, first: float | None) -> bool:
        """Whether the value is a sign of it."""
        limits = [] if self.bound is None else [self.bound]
        if self.factor is not None and first is not None:
            limits.append(self.factor * first)
        return any(value > limit if self.above else value < limit for limit in limits)


SIGNS = (
    Sign("response_length", factor=0.25, says="answers have shrunk",
         change="lower {0}.learning_rate, or set {0}.length_norm"),
    Sign("response_length", factor=4.0, above=True, says="answers have grown",
         change="lower {0}.learning_rate, or set {0}.length_norm"),
    Sign("entropy", factor=0.1, says="the student is sure of every token",
         change="lower {0}.learning_rate, or raise {0}.alpha"),
    Sign("repetition", bound=0.5, above=True, says="answers repeat themselves",
         change="lower {0}.learning_rate, or raise {0}.alpha"),
    Sign("valid_rouge_l", bound=1e-9,
         says="no answer has a word of its reference, of which Rouge-L sees a-z and digits alone",
         change="choose by {0}.keep=loss if that goes on, or if the text is of another script"),
    Sign("ess", bound=0.3, says="few tokens carry the importance weights",
         change="lower {0}.alpha, or {0}.inner_epochs"),
)  # fmt: skip


class Watch:
    """Looks at the updates of one stage; `section` is where its settings are."""

    def __init__(self, section: str):
        self._section = f"config.{section}"
        self._norms: deque[float] = deque(maxlen=WINDOW)
        self._first: dict[str, list[float]] = {}
        self._said: dict[Any, int] = {}

    def add(self, step: int, metrics: Mapping[str, Any]) -> list[str]:
        """Take the metrics after update `step`; warnings, most often none."""
        found = []
        norm: Any = metrics.get("grad_norm")
        if is_number(norm):
            usual = statistics.median(self._norms) if len(self._norms) >= _FIRST else None
            if usual is not None and norm > 10 * usual:
                found.append(
                    self._warn(
                        step,
                        "grad_norm",
                        f"gradient norm {norm:.3g}, usually {usual:.3g}",
                        "lower {0}.clip_norm or {0}.learning_rate if that goes on",
                    )
                )
            self._norms.append(norm)
        for sign in SIGNS:
            value: Any = metrics.get(sign.metric)
            if not is_number(value):
                continue
            began = self._first.setdefault(sign.metric + sign.says, [])
            first = sum(began) / len(began) if len(began) == _FIRST else None
            if first is None:
                began.append(value)
            if sign.shows(value, first):
                at_first = "" if sign.factor is None else f", {first:.3g} at first"
                what = f"{sign.says}: {sign.metric} {value:.3g}{at_first}"
                found.append(self._warn(step, sign, what, sign.change))
        return [warning for warning in found if warning]

    def _warn(self, step: int, kind: Any, what: str, change: str) -> str:
        if step - self._said.get(kind, -QUIET) < QUIET:
            return ""
        self._said[kind] = step
        return f"update {step}: {what}; {change.format(self._section)}"


def of_run(rows: Iterable[Mapping[str, Any]], sections: Mapping[str, str]) -> list[dict[str, Any]]:
    """What was warned of in `metrics.jsonl`, skipped updates too, as stage, step and text.

    Args:
        sections: the section of the settings of each training stage; other stages are left out.
    """
    found: dict[str, list[dict[str, Any]]] = {stage: [] for stage in sections}
    watches = {stage: Watch(section) for stage, section in sections.items()}
    skipped: dict[str, tuple[int, dict[str, Any]]] = {}  # the last one, and the warning of it
    for row in rows:
        stage, step = row.get("stage", ""), row.get("step", 0)
        if stage not in sections:
            continue
        place = {"stage": stage, "step": step}
        found[stage] += [place | {"text": text} for text in watches[stage].add(step, row)]
        if row.get("skipped"):
            last, warning = skipped.get(stage, (None, place))
            if last != step - 1:
                warning = place
                found[stage].append(warning)
            skipped[stage] = step, warning
            warning["text"] = _skipped(warning["step"], step)
    return [warning for several in found.values() for warning in several]


def _skipped(first: int, last: int) -> str:
    which = f"update {first}: it was" if first == last else f"updates {first} to {last}: they were"
    return f"{which} skipped, loss or gradient not finite; --replay says where that begins"
