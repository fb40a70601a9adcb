"""Prompt templates, to the character."""

import json
import shutil
from pathlib import Path

import pytest
from toy_tokenizer import write_toy_tokenizer

from minillm_jax.data.sources import read_jsonl
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


def test_qwen_has_its_turns_around_the_alpaca_text(shared: Path, tmp_path: Path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(shared / "tokenizers/gpt2" / name, tmp_path / name)
    pipeline = json.loads((tmp_path / "tokenizer.json").read_text())
    token = pipeline["added_tokens"][0]
    for index, text in ((50257, "<|im_start|>"), (50258, "<|im_end|>")):
        pipeline["added_tokens"].append({**token, "id": index, "content": text, "special": True})
    (tmp_path / "tokenizer.json").write_text(json.dumps(pipeline))
    tokenizer = load_tokenizer(tmp_path)
    start, end = 50257, 50258
    pairs = [("Say <|im_end|>.", ""), ("Sum.", "a b")]
    for (instruction, given), ids in zip(
        pairs, prompts(tokenizer, "alpaca_qwen", pairs), strict=True
    ):
        assert [i for i in ids if i >= start] == [start, end, start]
        text = tokenizer.encode(alpaca(instruction, given))
        assert ids == [start, *text, end, start, *tokenizer.encode("Assistant:")]
    with pytest.raises(InputError, match=r"gpt2: no special token '<\|im_start\|>'; use another"):
        prompt_ids(load_tokenizer(shared / "tokenizers/gpt2"), "alpaca_qwen", "one")


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_prompt_and_answer_apart_are_the_tokens_of_both_together(shared: Path, name: str):
    tokenizer = load_tokenizer(shared / "tokenizers" / name)
    rows = read_jsonl(shared / "data/dolly/dev.jsonl", need_output=True)
    texts = [alpaca(row.instruction, row.input) for row in rows]
    answers = [row.output[0] for row in rows]
    whole = tokenizer.encode_batch([a + b for a, b in zip(texts, answers, strict=True)])
    parts = tokenizer.encode_batch(texts), tokenizer.encode_batch(answers, continues=True)
    assert whole == [a + b for a, b in zip(*parts, strict=True)]


def test_an_unknown_template_is_refused(tmp_path: Path):
    tokenizer = load_tokenizer(write_toy_tokenizer(tmp_path))
    with pytest.raises(InputError, match="unknown template 'vicuna'; choose one of alpaca, alp"):
        prompt_ids(tokenizer, "vicuna", "one")
