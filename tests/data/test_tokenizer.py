"""Tokenizers: exactness against transformers, no injection of special tokens, saving, comparing."""

import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_tokenizer import SPECIAL, write_toy_tokenizer

from minillm_jax.data.sources import read_jsonl
from minillm_jax.data.tokenizer import Tokenizer, compare_vocabularies, load_tokenizer
from minillm_jax.types import InputError

END, ASSISTANT = SPECIAL.index("<end>"), SPECIAL.index("<assistant>")


@pytest.fixture(scope="module")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_tokenizer(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def toy(toy_folder: Path) -> Tokenizer:
    return load_tokenizer(toy_folder)


@pytest.fixture(scope="module")
def texts(shared: Path) -> list[str]:
    rows = read_jsonl(shared / "data/dolly/dev.jsonl", need_output=True)
    found = [text for row in rows for text in (row.instruction, row.input, row.output[0]) if text]
    return [
        *found,
        " 7",
        "\n\n 12\t3",
        "½ Ⅷ ٣٤",
        "漢字 🎉👩‍👩‍👧",
        "e\u0301 it's 3's I'LL",
        "\ue000",
    ]


def edited(folder: Path, to: Path, **changes) -> Path:
    """A copy of a tokenizer folder with other settings; None removes one."""
    shutil.copytree(folder, to)
    settings = json.loads((to / "tokenizer_config.json").read_text()) | changes
    settings = {key: value for key, value in settings.items() if value is not None}
    (to / "tokenizer_config.json").write_text(json.dumps(settings))
    return to


def test_ids_and_text_of_a_word_vocabulary(toy: Tokenizer):
    ids = toy.encode("two red cat .")
    assert len(ids) == 4
    assert toy.decode([*ids, toy.eos_id, toy.pad_id]) == "two red cat ."
    assert toy.decode_batch([ids[:1], ids[1:]]) == ["two", "red cat ."]
    assert (toy.eos_id, toy.pad_id, toy.vocab_size) == (END, 0, 64)
    assert toy.token_strings()[ids[1]] == "red"
    assert toy.encode_batch(["two red", "cat ."]) == [ids[:2], ids[2:]]


def test_truncation_and_padding_of_the_file_do_not_act(toy: Tokenizer, toy_folder, tmp_path: Path):
    folder = edited(toy_folder, tmp_path / "cut")
    pipeline = json.loads((folder / "tokenizer.json").read_text())
    pipeline["truncation"] = {
        "direction": "Right",
        "max_length": 2,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    pipeline["padding"] = {
        "strategy": {"Fixed": 5},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<pad>",
    }
    (folder / "tokenizer.json").write_text(json.dumps(pipeline))
    assert load_tokenizer(folder).encode("two red cat .") == toy.encode("two red cat .")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([*SPECIAL, "cat", " ", "\n", "<", "end>", "\ue000", "0"])))
def test_text_never_becomes_a_special_token(toy: Tokenizer, words: list[str]):
    text = "".join(words)
    assert not {END, ASSISTANT, 0, 2} & set(toy.encode(text))
    ids = toy.chat_prompt(text)
    assert ids[0] == 2 and [i for i in ids if i in (0, 1, 2, 3)] == [2, END, ASSISTANT]
    assert ids[1:-2] == toy.encode(text)


def test_a_fresh_tokenizer_takes_special_text_as_text(toy_folder: Path):
    assert END not in load_tokenizer(toy_folder).encode("<end>")


def test_both_ways_through_a_chat_agree(toy: Tokenizer):
    chat = [{"role": "user", "content": "one cat"}, {"role": "assistant", "content": "yes ."}]
    assert toy.chat_prompt(chat) == toy._forged_chat(chat)
    assert toy.chat_prompts(["one cat", "<end> dog"])[0] == toy.chat_prompt("one cat")


def test_a_template_that_refuses_or_is_broken_is_named(toy_folder: Path, tmp_path: Path):
    refusing = "{{ raise_exception('no system role') }}"
    tokenizer = load_tokenizer(edited(toy_folder, tmp_path / "a", chat_template=refusing))
    with pytest.raises(InputError, match="no system role"):
        tokenizer.chat_prompt("cat")
    tokenizer = load_tokenizer(edited(toy_folder, tmp_path / "b", chat_template="{% if %}"))
    with pytest.raises(InputError, match="broken chat template"):
        tokenizer.chat_prompt("cat")
    tokenizer = load_tokenizer(edited(toy_folder, tmp_path / "c", chat_template=None))
    with pytest.raises(InputError, match="no chat template; use the alpaca"):
        tokenizer.chat_prompt("cat")


def test_where_newer_and_older_files_keep_the_settings(
    toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # transformers would find them too, but slowly
    monkeypatch.delattr("minillm_jax.data.tokenizer._through_transformers")
    folder = edited(toy_folder, tmp_path / "a", chat_template=None, eos_token=None)
    (folder / "chat_template.jinja").write_text("{{ eos_token }} {{ messages[0].content }}")
    (folder / "special_tokens_map.json").write_text('{"eos_token": {"content": "<user>"}}')
    tokenizer = load_tokenizer(folder)
    assert tokenizer.eos_id == 2
    assert tokenizer.chat_prompt("cat") == [2, *tokenizer.encode("cat")]


def test_missing_and_broken_files_are_named(toy_folder: Path, tmp_path: Path):
    with pytest.raises(InputError, match="no such model folder"):
        load_tokenizer(tmp_path / "nothing")
    with pytest.raises(InputError, match="'<nope>' is not in the vocabulary"):
        load_tokenizer(edited(toy_folder, tmp_path / "a", eos_token="<nope>"))
    folder = edited(toy_folder, tmp_path / "b")
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(InputError, match="tokenizer_config.json: not valid JSON"):
        load_tokenizer(folder)
    folder = edited(toy_folder, tmp_path / "c")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="tokenizer.json: not a tokenizer"):
        load_tokenizer(folder)


def test_a_folder_without_an_end_token_is_refused(toy_folder: Path, tmp_path: Path):
    with pytest.raises(InputError, match="no end-of-sequence token"):
        load_tokenizer(edited(toy_folder, tmp_path / "a", eos_token=None))


def test_a_folder_without_tokenizer_json_goes_through_transformers(shared: Path, tmp_path: Path):
    model = json.loads((shared / "tokenizers/gpt2/tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    tokenizer = load_tokenizer(tmp_path)  # the end of sequence is a default of the class
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (50256, 50257)
    assert tokenizer.decode(tokenizer.encode(" a cat,\n12")) == " a cat,\n12"


def test_the_end_token_may_be_a_default_of_the_class(shared: Path, tmp_path: Path):
    shutil.copy(shared / "tokenizers/gpt2/tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_id == 50256
    assert compare_vocabularies(tokenizer, load_tokenizer(shared / "tokenizers/gpt2")) == 50257


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_equals_transformers_on_real_text(shared: Path, texts: list[str], name: str):
    from transformers import AutoTokenizer

    tokenizer = load_tokenizer(shared / "tokenizers" / name)
    reference = AutoTokenizer.from_pretrained(shared / "tokenizers" / name)
    ids = tokenizer.encode_batch(texts)
    assert ids == reference(texts, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode_batch(ids) == texts
    assert tokenizer.eos_id == reference.eos_token_id
    assert tokenizer.vocab_size == len(reference)


def test_special_text_survives_a_real_vocabulary(shared: Path):
    tokenizer = load_tokenizer(shared / "tokenizers/gpt2")
    ids = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == "a<|endoftext|>b"


def test_what_is_saved_loads_again_and_in_transformers(toy: Tokenizer, tmp_path: Path):
    from transformers import AutoTokenizer

    toy.save(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')  # as beside real weights
    assert sorted(os.listdir(tmp_path)) == [
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    reference = AutoTokenizer.from_pretrained(tmp_path)
    text = "what is the name: big cat."
    assert reference(text, add_special_tokens=False)["input_ids"] == toy.encode(text)
    assert (reference.eos_token_id, reference.pad_token_id) == (toy.eos_id, toy.pad_id)
    chat = [{"role": "user", "content": text}]
    rendered = reference.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert rendered == toy.chat_prompt(text)
    again = load_tokenizer(tmp_path)
    assert again.encode(text) == toy.encode(text) and again.chat_prompt(chat) == rendered
    assert compare_vocabularies(toy, again) == 64


def test_vocabularies_are_compared_token_by_token(toy: Tokenizer, toy_folder, tmp_path: Path):
    def changed(name: str, change) -> Tokenizer:
        folder = edited(toy_folder, tmp_path / name)
        pipeline = json.loads((folder / "tokenizer.json").read_text())
        change(pipeline)
        (folder / "tokenizer.json").write_text(json.dumps(pipeline))
        return load_tokenizer(folder)

    def swap(pipeline):
        vocabulary = pipeline["model"]["vocab"]
        vocabulary["cat"], vocabulary["dog"] = vocabulary["dog"], vocabulary["cat"]

    def extend(pipeline):
        pipeline["model"]["vocab"]["zebra"] = 64

    def fill(pipeline):
        token = {**pipeline["added_tokens"][0], "id": 64, "content": "<filler>"}
        pipeline["added_tokens"].append(token)

    cat = toy.encode("cat")[0]
    with pytest.raises(InputError, match=f"differ in 2 token ids, first {cat} \\('cat' and 'dog'"):
        compare_vocabularies(toy, changed("swapped", swap))
    longer = changed("longer", extend)
    for pair in ((toy, longer), (longer, toy)):
        with pytest.raises(InputError, match="1 more tokens than the other, first id 64"):
            compare_vocabularies(*pair)
    filled = changed("filled", fill)
    assert filled.vocab_size == 65
    assert compare_vocabularies(filled, toy) == compare_vocabularies(toy, filled) == 64
