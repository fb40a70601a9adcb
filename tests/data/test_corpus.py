"""Plain text as blocks: what a document is, packing without loss, order, and bad input."""

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_tokenizer import write_toy_tokenizer

from minillm_jax.data import corpus
from minillm_jax.data.corpus import batches, documents, pack
from minillm_jax.data.examples import Example
from minillm_jax.data.tokenizer import Tokenizer, load_tokenizer
from minillm_jax.types import InputError

SIZES: dict[str, Any] = {"batch_size": 2, "length": 4, "seed": 0}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_toy_tokenizer(tmp_path_factory.mktemp("toy")))


def write(path: Path, text: str | bytes) -> Path:
    data = text.encode() if isinstance(text, str) else text
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_a_line_of_the_end_token_divides_documents(tmp_path: Path, name: str):
    path = write(tmp_path / name, "\ufeffone\n\ntwo\n<end>\n<end>\nthree <end>\n <end> \ncat")
    assert list(documents(path, "<end>")) == ["one\n\ntwo\n", "three <end>\n", "cat"]


def test_text_is_packed_without_loss(toy: Tokenizer):
    texts = ["one two\n\n\nthree", "\n", "cat " * 7, "dog"]
    ids = [toy.encode(text) + [toy.eos_id] for text in ("one two\nthree", "cat " * 7, "dog")]
    stream = sum(ids, [])
    for length in (3, 4, len(stream)):
        blocks = pack(texts, toy, length)
        kept = len(stream) // length
        assert blocks.shape == (kept, length) and blocks.dtype == np.uint16
        assert blocks.ravel().tolist() == stream[: kept * length]
    assert pack(texts, toy, 3, most_blocks=2).tolist() == [stream[:3], stream[3:6]]
    assert pack(texts, toy, 100).shape == (0, 100)


def test_newlines_are_one_newline(shared: Path):
    """A vocabulary that has newlines; everything else of the text stays as it is."""
    gpt2 = load_tokenizer(shared / "tokenizers/gpt2")
    blocks = pack(["\n a  b\r\n\r\n\n  c \n\n"], gpt2, 2)
    expected = [*gpt2.encode("a  b\n  c"), gpt2.eos_id]
    assert blocks.ravel().tolist() == expected[: len(expected) // 2 * 2]


def test_long_documents_are_tokenised_in_parts(toy: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    text = "one two cat\ndog\nbig sun and moon\n" * 20
    whole = pack([text, "yes"], toy, 7)
    monkeypatch.setattr(corpus, "_PIECE", 30)
    monkeypatch.setattr(corpus, "_PIECES", 3)
    assert len(list(corpus._pieces([text]))) > 10
    np.testing.assert_array_equal(pack([text, "yes"], toy, 7), whole)


def test_parts_of_a_document_continue_it(toy: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    """A vocabulary that puts a space before a text must not do so in the midst of one."""
    given = {}

    def encode_batch(texts, *, continues):
        given.update(dict.fromkeys(texts, continues))
        return [[5] for _ in texts]

    monkeypatch.setattr(toy, "encode_batch", encode_batch)
    monkeypatch.setattr(corpus, "_PIECE", 3)
    assert pack(["one\ntwo\nthree", "cat"], toy, 6).tolist() == [
        [5, 5, 5, toy.eos_id, 5, toy.eos_id]
    ]
    assert given == {"one\n": False, "two\n": True, "three": True, "cat": False}


def test_no_more_is_read_than_is_needed(toy: Tokenizer):
    def texts():
        yield from ["one two three"] * 1000
        raise AssertionError("read on")

    assert pack(texts(), toy, 4, most_blocks=10).shape == (10, 4)


def test_real_text(shared: Path):
    gpt2 = load_tokenizer(shared / "tokenizers/gpt2")
    texts = [shared / f"data/text/{name}.txt.gz" for name in ("tinyshakespeare", "wikitext2_test")]
    made = batches(texts, gpt2, batch_size=4, length=512, seed=7)
    assert made.blocks.shape[1] == 512 and len(made.blocks) > 1000
    assert made[3].shape == (4, 512) and made[3].dtype == np.int32
    assert 0 <= made.blocks.min() and made.blocks.max() == gpt2.eos_id
    assert (made.blocks == gpt2.eos_id).sum() == 1  # of two, the last one is in the rest
    text = gpt2.decode_batch(made.blocks[:2].tolist())
    with gzip.open(texts[0], "rt") as file:
        assert file.read(3000).replace("\n\n", "\n").startswith("".join(text)[:2000])


def numbered(toy: Tokenizer, tmp_path: Path, count: int, **changes) -> corpus.Batches:
    """Blocks of four tokens, each of one token alone."""
    words = [w for w in toy.token_strings() if w.startswith("w") and w[1:].isdigit()]
    text = "\n".join(" ".join([word] * 4) for word in words[:count])
    return batches([write(tmp_path / "n.txt", text)], toy, **SIZES | changes)


def test_order_follows_from_index_and_seed(toy: Tokenizer, tmp_path: Path):
    made, again = (numbered(toy, tmp_path, 5) for _ in range(2))
    assert made.epoch_length == 3
    first = [made[i].tolist() for i in range(5)]
    assert [again[i].tolist() for i in reversed(range(5))] == first[::-1]
    seen = np.concatenate(first)[:, 0]
    assert (np.concatenate(first) == seen[:, None]).all()
    assert len(set(seen[:5])) == 5 and set(seen[5:]) == set(seen[:5])
    assert seen[:5].tolist() != seen[5:].tolist()
    orders = {tuple(numbered(toy, tmp_path, 5, seed=s, batch_size=5)[0][:, 0]) for s in range(4)}
    assert len(orders) > 1
    with pytest.raises(IndexError):
        made[-1]


def test_blocks_that_were_kept_need_no_text(toy: Tokenizer, tmp_path: Path):
    file = write(tmp_path / "text.txt", " ".join(["one two three red green blue cat"] * 9))
    kept = tmp_path / "new" / "blocks.npy"
    first = batches([file], toy, **SIZES, kept=kept)
    file.unlink()
    again = batches([file], toy, **SIZES, kept=kept)
    for i in range(3):
        np.testing.assert_array_equal(first[i], again[i])
    assert [path.name for path in kept.parent.iterdir()] == ["blocks.npy"]
    with pytest.raises(InputError, match="no such file"):
        batches([file], toy, **SIZES, kept=tmp_path / "other.npy")


def test_what_is_no_corpus_is_refused(toy: Tokenizer, tmp_path: Path):
    good = write(tmp_path / "good.txt", "one two three red green blue cat dog bird")
    for path, words in (
        (tmp_path / "none.txt", "none.txt: no such file"),
        (tmp_path, "cannot be read"),
        (write(tmp_path / "empty.txt", " \n<end>\n\n"), "empty.txt: no text; give a file"),
        (write(tmp_path / "bad.txt", b"one\ntwo \xff\n"), "bad.txt:2: invalid UTF-8 at byte 4"),
        (write(tmp_path / "short.txt", "one"), "short.txt holds less than one block of 4 tokens"),
    ):
        with pytest.raises(InputError, match=words) as error:
            batches([good, path] if "short" not in words else [path], toy, **SIZES)
        assert ";" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(InputError, match="no file holds less than one block"):
        batches([], toy, **SIZES)
    for changes in ({"batch_size": 0}, {"length": 1}):
        with pytest.raises(InputError, match="corpus: batch size"):
            batches([good], toy, **{**SIZES, **changes})


def test_answers_are_a_corpus_too():
    rows = [Example((5, 6), (7, 8, 2), 0), Example((9,), (10,), 1), Example((3,) * 4, (4,) * 4, 2)]
    found = corpus.of_examples(rows, batch_size=2, length=6, seed=0)
    assert found.epoch_length == 2
    seen = np.concatenate([found[0], found[1], found[2]])  # two epochs
    want = [[5, 6, 7, 8, 2, -1], [9, 10, -1, -1, -1, -1], [3, 3, 3, 3, 4, 4]]
    assert sorted(map(list, seen)) == sorted(want * 2)
