"""Vocabularies of the paper's pairs: one list of tokens, heads with rows that stand for none."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from minillm_jax.data.tokenizer import Tokenizer, compare_vocabularies, load_tokenizer
from minillm_jax.models import DecoderConfig, init_params
from minillm_jax.rollout import Mixing, Warp, collect, generate
from minillm_jax.types import InputError
from tests.toy_models import prompts


@pytest.fixture(scope="module")
def gpt2(shared: Path) -> Tokenizer:
    return load_tokenizer(shared / "tokenizers/gpt2")


def with_added(shared: Path, folder: Path, texts: list[str], *, special: bool) -> Tokenizer:
    """GPT-2's tokenizer and more tokens, added after the learned ones."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(shared / "tokenizers/gpt2" / name, folder / name)
    pipeline = json.loads((folder / "tokenizer.json").read_text())
    one = pipeline["added_tokens"][0]
    for index, text in enumerate(texts, 50257):
        pipeline["added_tokens"].append({**one, "id": index, "content": text, "special": special})
    (folder / "tokenizer.json").write_text(json.dumps(pipeline))
    return load_tokenizer(folder)


def test_the_fillers_of_gptj_are_cut_away(shared: Path, gpt2: Tokenizer, tmp_path: Path):
    fillers = [f"<|extratoken_{i}|>" for i in range(1, 144)]
    gptj = with_added(shared, tmp_path, fillers, special=False)
    assert (gptj.vocab_size, gpt2.vocab_size) == (50400, 50257)
    assert compare_vocabularies(gptj, gpt2) == compare_vocabularies(gpt2, gptj) == 50257
    text = "Teacher and student read <|endoftext|> alike."
    assert gptj.encode(text) == gpt2.encode(text)


def test_the_true_size_is_that_of_the_tokens(shared: Path, gpt2: Tokenizer, tmp_path: Path):
    """OPT's head has 50272 rows; Qwen's heads have 151936 or 152064 by the size of the model."""
    opt = load_tokenizer(shared / "tokenizers/opt")
    assert compare_vocabularies(opt, opt) == opt.vocab_size == 50265
    turns = ["<|im_start|>", "<|im_end|>", "<|vision_start|>"]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    base = with_added(shared, tmp_path / "a", turns[:2], special=True)
    more = with_added(shared, tmp_path / "b", turns, special=True)
    assert compare_vocabularies(base, more) == compare_vocabularies(more, base) == 50259


def test_two_vocabularies_are_refused_with_the_first_ids_that_differ(
    shared: Path, gpt2: Tokenizer, tmp_path: Path
):
    opt = load_tokenizer(shared / "tokenizers/opt")
    with pytest.raises(InputError) as error:
        compare_vocabularies(gpt2, opt)
    message = str(error.value)
    assert "first 0 ('!' and '<s>'), 1 ('\"' and '<pad>'), 2 ('#' and '</s>')" in message
    assert "gpt2" in message and "opt" in message and "\n" not in message
    assert message.endswith("teacher and student must share one vocabulary: choose another pair")

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    one = with_added(shared, tmp_path / "a", ["<|im_start|>", "<|im_end|>"], special=True)
    two = with_added(shared, tmp_path / "b", ["<|im_start|>", "<|end|>"], special=True)
    with pytest.raises(InputError, match=r"1 token ids, first 50258 \('<\|im_end\|>' and '<\|end"):
        compare_vocabularies(one, two)


def tempting(rows: int, true: int):
    """A decoder whose head has `rows` ids and prefers those that stand for no token."""
    config = DecoderConfig(
        vocab_size=rows,
        layers=1,
        width=8,
        heads=2,
        mlp_width=8,
        max_positions=32,
        tied_head=False,
        head_bias=True,
    )
    params = init_params(config, jax.random.key(rows))
    bias = jnp.where(jnp.arange(rows) < true, 0.0, 30.0)
    params["head"]["bias"] = bias.at[true - 1].set(8.0)  # the last true id has its share
    return config, params


@pytest.mark.parametrize(
    ("teacher", "student", "true"),
    [(50400, 50304, 50257), (152064, 151936, 151665)],
    ids=["gptj and gpt2", "qwen"],
)
def test_ids_beyond_the_true_size_are_never_drawn(teacher: int, student: int, true: int):
    """By neither sampler, though both models would: with one id more they do."""
    (p_config, p), (q_config, q) = tempting(teacher, true), tempting(student, true)
    prompt, mask = prompts(4, 3, 100)
    for size, beyond in ((true, False), (true + 1, True)):
        mixing = Mixing(slots=6, alpha=0.5, chunk=2, eos_id=0, pad_id=0, vocab=size)
        found = collect(q_config, p_config, q, p, prompt, mask, jax.random.key(0), mixing)
        assert bool((found.response >= true).any()) == beyond
        assert beyond or bool((found.response == true - 1).any())
    answers = generate(
        *(q_config, q, prompt, mask, jax.random.key(1)),
        **{"slots": 6, "eos_id": 0, "pad_id": 0, "vocab": true, "warp": Warp()},
    )
    assert bool((answers.tokens < true).all())


def test_a_head_of_another_size_changes_no_token():
    """The padding rows of a student take no part in what is drawn."""
    config, params = tempting(520, 500)
    prompt, mask = prompts(4, 3, 100)
    small = {**params, "head": jax.tree.map(lambda x: x[:500], params["head"])}
    small["embed"] = {"tokens": params["embed"]["tokens"][:500]}
    options = {"slots": 8, "warp": Warp(), "eos_id": 0, "pad_id": 0, "vocab": 500}
    key = jax.random.key(2)
    wide = generate(config, params, prompt, mask, key, **options)
    cut = dataclasses.replace(config, vocab_size=500)
    narrow = generate(cut, small, prompt, mask, key, **options)
    assert (wide.tokens == narrow.tokens).all() and len(set(wide.tokens.ravel().tolist())) > 3
