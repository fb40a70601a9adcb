"""Tokenised examples under length limits, and their padding into `Sequences`."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from minillm_jax.data import templates
from minillm_jax.data.sources import Row
from minillm_jax.data.tokenizer import Tokenizer
from minillm_jax.types import InputError, Sequences


@dataclass(frozen=True)
class Example:
    """A prompt and its response as ids; `row` is its index among the rows it was made from."""

    prompt: tuple[int, ...]
    response: tuple[int, ...] = ()
    row: int = 0


def make_examples(
    tokenizer: Tokenizer,
    rows: Sequence[Row],
    *,
    template: str,
    max_prompt: int,
    max_response: int,
    max_tokens: int | None = None,
    answers: bool = True,
    long_prompts: str = "error",
) -> list[Example]:
    """Tokenise rows: the prompt by itself, then the first reference and the end of sequence.

    A response of more than `max_response` tokens, or with its prompt of more than `max_tokens`, is
    cut there and then has no end of sequence, so that nothing teaches the model to stop in the
    middle. With `answers=False` responses are empty.

    Args:
        long_prompts: `error`, or `drop` to leave rows with an over-long prompt out.

    Raises:
        InputError: an over-long prompt (with `error`), an empty prompt or answer, or nothing left.
    """
    if long_prompts not in ("error", "drop"):
        raise ValueError(f"long_prompts is {long_prompts!r}; choose error or drop")
    named = [row.where or f"row {index}" for index, row in enumerate(rows)]
    prompts = templates.prompts(tokenizer, template, [(row.instruction, row.input) for row in rows])
    for prompt, where in zip(prompts, named, strict=True):
        if not prompt:
            raise InputError(f"{where}: the prompt has no tokens; fill it or remove the row")
    long = [index for index, prompt in enumerate(prompts) if len(prompt) > max_prompt]
    if long and long_prompts == "error":
        raise InputError(
            f"{named[long[0]]}: a prompt of {len(prompts[long[0]])} tokens, the limit is "
            f"{max_prompt} ({len(long)} of {len(rows)} rows are over it); raise "
            "config.data.max_prompt, or shorten them"
        )
    if len(long) == len(rows):
        raise InputError(
            f"no prompt is within {max_prompt} tokens; raise config.data.max_prompt"
            if rows
            else "no rows to make examples of; give a file that has some"
        )
    left_out = set(long)
    kept = [index for index in range(len(rows)) if index not in left_out]
    responses: list[list[int]] = [[] for _ in kept]
    if answers:
        for index in kept:
            if not any(rows[index].output[:1]):
                raise InputError(f"{named[index]}: no output; fill it or remove the row")
        texts = [rows[index].output[0] for index in kept]
        responses = tokenizer.encode_batch(texts, continues=True)
        for index, response in zip(kept, responses, strict=True):
            if not response:
                raise InputError(f"{named[index]}: the output has no tokens; remove the row")
            response.append(tokenizer.eos_id)
    found = []
    for index, response in zip(kept, responses, strict=True):
        most = min(max_response, (max_tokens or sys.maxsize) - len(prompts[index]))
        found.append(Example(tuple(prompts[index]), tuple(response[:most]), index))
    return found


def pad(
    examples: Sequence[Example], prompt_slots: int, response_slots: int, pad_id: int
) -> Sequences:
    """Left-pad prompts [B, P] and right-pad responses [B, N], as numpy arrays.

    Raises:
        InputError: an example that is longer than its slots.
    """
    rows = len(examples)
    prompt = np.full((rows, prompt_slots), pad_id, np.int32)
    response = np.full((rows, response_slots), pad_id, np.int32)
    prompt_lengths = np.array([len(e.prompt) for e in examples], np.int32)
    response_lengths = np.array([len(e.response) for e in examples], np.int32)
    for b, example in enumerate(examples):
        if len(example.prompt) > prompt_slots or len(example.response) > response_slots:
            raise InputError(
                f"row {example.row}: {len(example.prompt)} prompt and {len(example.response)} "
                f"response tokens in {prompt_slots} and {response_slots} slots; raise "
                "config.data.max_prompt, max_response or max_answer"
            )
        # not [-length:], which for an empty prompt would be every slot
        prompt[b, prompt_slots - len(example.prompt) :] = example.prompt
        response[b, : len(example.response)] = example.response
    slot = np.arange(prompt_slots)[None, :]
    return Sequences(
        prompt=prompt,
        prompt_mask=slot >= prompt_slots - prompt_lengths[:, None],
        response=response,
        response_mask=np.arange(response_slots)[None, :] < response_lengths[:, None],
    )
