"""Classification data as instructions, for calibration: SST-2 and BoolQ with their label words.

The paper asks both zero-shot, as instructions of its template. It quotes that of SST-2; the wording
for BoolQ is ours.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from minillm_jax.data import hub
from minillm_jax.data.sources import Row, objects
from minillm_jax.types import InputError

_SENTIMENT = (
    "Determine the sentiment of the input sentence. Please respond as positive or negative."
)
_QUESTION = "Read the input passage and answer the question: {question}? Please respond as {words}."


@dataclass(frozen=True)
class Task:
    """A task: its label words, and what makes (instruction, input, label) of a row's fields."""

    labels: tuple[str, ...]
    ask: Callable[[Mapping[str, Any]], tuple[str, str, int]]


def _sst2(fields: Mapping[str, Any]) -> tuple[str, str, int]:
    return _SENTIMENT, fields["sentence"].strip(), int(fields["label"])


def _boolq(fields: Mapping[str, Any]) -> tuple[str, str, int]:
    question = fields["question"].strip().rstrip("?")
    asked = _QUESTION.format(question=question, words="yes or no")
    return asked, fields["passage"].strip(), int(fields["answer"])


TASKS = {
    "sst2": Task(("negative", "positive"), _sst2),
    "boolq": Task(("no", "yes"), _boolq),
}


def read(name: str, source: str) -> tuple[list[Row], list[int]]:
    """Rows without output and their labels, of a JSONL file or split `validation` of a `hub:` name.

    SST-2 has `sentence` and `label` (0 or 1), BoolQ `question`, `passage` and `answer` (a boolean).

    Raises:
        InputError: no such task, a row without its fields, or without a label that the task has.
    """
    if name not in TASKS:
        raise InputError(f"no calibration data {name!r}: choose from {', '.join(TASKS)}")
    task, rows, labels = TASKS[name], [], []
    if hub.is_hub(source):
        instead = f"give the file: config.evaluate.calibration={name}=FILE.jsonl"
        found = hub.records(source, instead=instead, split="validation")
        numbered = ((f"{source} row {n}", fields) for n, fields in enumerate(found, 1))
    else:
        numbered = objects(source)
    for where, fields in numbered:
        try:
            instruction, text, label = task.ask(fields)
            task.labels[label]
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise InputError(
                f"{where}: not a labelled row of {name} ({error!r}); give its validation set"
            ) from error
        if label < 0:
            raise InputError(f"{where}: label {label} is none; give the validation set of {name}")
        rows.append(Row(instruction, text, where=where))
        labels.append(label)
    if not rows:
        raise InputError(f"{source}: no rows; give the validation set of {name}")
    return rows, labels
