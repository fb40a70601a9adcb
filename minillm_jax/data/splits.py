"""How the paper divides databricks-dolly-15k, as a function of its rows alone."""

from collections.abc import Sequence
from dataclasses import dataclass

from minillm_jax.data import templates
from minillm_jax.data.sources import Row
from minillm_jax.data.tokenizer import Tokenizer
from minillm_jax.types import InputError

# Of the paper. With its authors' test and validation rows held out of databricks-dolly-15k, and the
# prompts counted with GPT-2's tokenizer, 11,429 rows are left to train on.
SIZES = {"train": 11_435, "validation": 1_000, "test": 500}


@dataclass(frozen=True)
class Split:
    """Rows that no two parts share, in the order they were given."""

    train: list[Row]
    validation: list[Row]
    test: list[Row]


def prompt_lengths(tokenizer: Tokenizer, template: str, rows: Sequence[Row]) -> list[int]:
    """Tokens of every row's prompt, the template's own included."""
    pairs = [(row.instruction, row.input) for row in rows]
    return [len(ids) for ids in templates.prompts(tokenizer, template, pairs)]


def paper_split(
    rows: Sequence[Row],
    lengths: Sequence[int],
    *,
    validation: Sequence[Row] = (),
    test: Sequence[Row] = (),
    max_prompt: int = 256,
    sizes: dict[str, int] = SIZES,
) -> Split:
    """Drop rows whose prompt is over `max_prompt` tokens, then divide the rest.

    A given `test` or `validation` set is kept as it is, and its rows, found by instruction and
    input whatever their white space, are taken out of the training rows. One that is not given is
    made of the first rows: test, then validation, as many as `sizes` says. All else is for
    training. Answers are not looked at: `make_examples` cuts the long ones.

    Args:
        lengths: of the prompts of `rows`, as `prompt_lengths` counts them.

    Raises:
        InputError: no rows are left to train on.
    """
    held_out = {_key(row) for row in (*validation, *test)}
    kept = [
        row
        for row, length in zip(rows, lengths, strict=True)
        if length <= max_prompt and _key(row) not in held_out
    ]
    made: dict[str, list[Row]] = {"test": list(test), "validation": list(validation)}
    for name, part in made.items():
        if not part:
            made[name], kept = _take(kept, sizes[name])
    if not kept:
        raise InputError(
            f"of {len(rows)} rows none is left to train on: {len(held_out)} are held out, prompts "
            f"over {max_prompt} tokens dropped, and {sizes['test']} and {sizes['validation']} rows "
            "go to test and validation; give more rows, or files for those two"
        )
    return Split(train=kept, **made)


def _take(rows: list[Row], count: int) -> tuple[list[Row], list[Row]]:
    """The first `count` rows with prompts of their own, and the rows that have other prompts."""
    taken: dict[tuple[str, ...], Row] = {}
    for row in rows:
        if len(taken) < count:
            taken.setdefault(_key(row), row)
    return list(taken.values()), [row for row in rows if _key(row) not in taken]


def _key(row: Row) -> tuple[str, ...]:
    return (*row.instruction.split(), "\0", *row.input.split())
