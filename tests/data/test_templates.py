"""Prompt templates, to the character."""

import json
from pathlib import Path

import pytest
from toy_tokenizer import write_toy_tokenizer

from minillm_jax.data.templates import alpaca, prompt_ids, prompts
from minillm_jax.data.tokenizer import load_tokenizer
from minillm_jax.types import InputError


def test_alpaca_text_is_exact():
    assert alpaca("Say {hi}.") == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nSay {hi}.\n\n### Response:\n"
    )
    assert alpaca("Sum.", "a {b}") == (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
        "Sum.\n\n### Input:\na {b}\n\n### Response:\n"
    )


@pytest.mark.parametrize("name", ["dolly/dev", "eval/dolly", "eval/self_inst", "eval/vicuna"])
def test_alpaca_text_equals_the_prompts_of_the_processed_sets(shared: Path, name: str):
    lines = (shared / f"data/{name}.jsonl").read_text(encoding="utf-8").splitlines()
    for fields in map(json.loads, lines):
        expected = fields["prompt"].replace("<n>", "\n")
        assert alpaca(fields["instruction"], fields.get("input", "")) == expected


def test_both_templates_keep_special_text_as_text(tmp_path: Path):
    tokenizer = load_tokenizer(write_toy_tokenizer(tmp_path))
    ids = prompt_ids(tokenizer, "alpaca", "name <end> one", "<assistant>")
    assert ids == tokenizer.encode(alpaca("name <end> one", "<assistant>"))
    assert not set(ids) & {0, 1, 2, 3}
    ids = prompt_ids(tokenizer, "chat", "name <end> one", "<assistant>")
    assert ids == [2, *tokenizer.encode("name <end> one\n\n<assistant>"), 1, 3]
    pairs = [("name one", ""), ("big <end> cat", "dog")]
    for template in ("alpaca", "chat"):
        singly = [prompt_ids(tokenizer, template, *pair) for pair in pairs]
        assert prompts(tokenizer, template, pairs) == singly
    assert singly[0] == [2, *tokenizer.encode("name one"), 1, 3]


def test_an_unknown_template_is_refused(tmp_path: Path):
    tokenizer = load_tokenizer(write_toy_tokenizer(tmp_path))
    with pytest.raises(InputError, match="unknown template 'vicuna'; choose one of alpaca, chat"):
        prompt_ids(tokenizer, "vicuna", "one")
