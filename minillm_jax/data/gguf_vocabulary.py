"""The tokenizer inside a GGUF file: its metadata, rebuilt as a `tokenizers` pipeline.

Only the metadata is read: 0.05 s, where `gguf.GGUFReader` takes seconds for a vocabulary.
Format: github.com/ggml-org/ggml/blob/master/docs/gguf.md. The tensors are read elsewhere.
"""

import mmap
import struct
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
)

from minillm_jax.types import InputError

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5  # tokenizer.ggml.token_type
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
_SCALARS[12] = "d"

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"


def read(path: Path) -> tuple[Tokenizer, dict[str, Any]]:
    """The pipeline of a GGUF file and the settings of its `tokenizer_config.json`.

    Raises:
        InputError: not a GGUF file, or a kind of vocabulary that is not supported.
    """
    fields = metadata(path)
    try:
        kind = fields["tokenizer.ggml.model"]
        tokens = list(fields["tokenizer.ggml.tokens"])
    except KeyError as error:
        raise InputError(f"{path}: no {error} inside; convert the model again") from error
    types = fields.get("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
    while tokens and types[len(tokens) - 1] == _UNUSED:  # rows that pad the embedding
        tokens.pop()
    if len(set(tokens)) != len(tokens):
        raise InputError(f"{path}: the vocabulary repeats a token; convert the model again")
    if kind == "gpt2":
        tokenizer = _byte_level(fields, tokens, path)
    elif kind == "llama":
        tokenizer = _sentencepiece(fields, tokens, types)
    else:
        raise InputError(f"{path}: tokenizer kind {kind!r} is not supported; use the HF folder")
    typed = list(zip(tokens, types, strict=False))
    tokenizer.add_special_tokens(
        [AddedToken(t, normalized=False, special=True) for t, y in typed if y == _CONTROL]
    )
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t, y in typed if y == _USER_DEFINED])
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings["clean_up_tokenization_spaces"] = False
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        index = fields.get(f"tokenizer.ggml.{key}_token_id")
        settings[f"{name}_token"] = tokens[index] if index is not None else None
    if "tokenizer.chat_template" in fields:
        settings["chat_template"] = fields["tokenizer.chat_template"]
    return tokenizer, settings


def metadata(path: Path) -> dict[str, Any]:
    """The key-value part of a GGUF file, versions 2 and 3, little-endian."""
    if not path.stat().st_size:  # which cannot be mapped
        raise InputError(f"{path}: an empty file; download it again")
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        if data[:4] != b"GGUF" or int.from_bytes(data[4:8], "little") not in (2, 3):
            raise InputError(f"{path}: not a GGUF file of version 2 or 3; convert it again")
        try:
            return _Reader(data).fields()
        except (struct.error, KeyError, ValueError, OverflowError, RecursionError) as error:
            raise InputError(f"{path}: broken metadata ({error}); download it again") from error


class _Reader:
    def __init__(self, data: mmap.mmap):
        self.data, self.position = data, 8

    def numbers(self, code: str, count: int) -> tuple[Any, ...]:
        layout = f"<{count}{code}"
        found = struct.unpack_from(layout, self.data, self.position)
        self.position += struct.calcsize(layout)
        return found

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            (length,) = self.numbers("Q", 1)
            self.position += length
            return self.data[self.position - length : self.position].decode()
        if kind == _ARRAY:
            (inner,) = self.numbers("I", 1)
            (count,) = self.numbers("Q", 1)
            if inner in _SCALARS:
                return self.numbers(_SCALARS[inner], count)
            return [self.value(inner) for _ in range(count)]
        return self.numbers(_SCALARS[kind], 1)[0]

    def fields(self) -> dict[str, Any]:
        _, count = self.numbers("Q", 2)
        found = {}
        for _ in range(count):
            key = self.value(_STRING)
            found[key] = self.value(self.numbers("I", 1)[0])
        return found


def _byte_level(fields: dict[str, Any], tokens: list[str], path: Path) -> Tokenizer:
    """Byte-level BPE; the file names its way of cutting text into words, `tokenizer.ggml.pre`."""
    default = "gpt-2" if fields.get("general.architecture") == "gpt2" else "none"
    pre = fields.get("tokenizer.ggml.pre", default)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = {
        "gpt-2": [byte_level],
        "smollm": [pre_tokenizers.Digits(individual_digits=True), byte_level],
        "llama-bpe": [pre_tokenizers.Split(Regex(_LLAMA3), "isolated"), bytes_only],
        "qwen2": [pre_tokenizers.Split(Regex(_QWEN2), "isolated"), bytes_only],
    }
    if pre not in words:
        known = ", ".join(words)
        raise InputError(f"{path}: pre-tokenizer {pre!r} is not one of {known}; use the HF folder")
    merges = []
    for merge in fields.get("tokenizer.ggml.merges", ()):
        cut = merge.index(" ", 1)
        merges.append((merge[:cut], merge[cut + 1 :]))
    vocabulary = {token: i for i, token in enumerate(tokens)}
    try:
        model = models.BPE(vocabulary, merges, ignore_merges=pre == "llama-bpe")
    except Exception as error:  # the library raises nothing narrower
        raise InputError(f"{path}: vocabulary and merges disagree ({error})") from error
    tokenizer = Tokenizer(model)
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()  # type: ignore[reportAttributeAccessIssue]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(words[pre])  # type: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[reportAttributeAccessIssue]
    return tokenizer


def _sentencepiece(fields: dict[str, Any], tokens: list[str], types: list[int]) -> Tokenizer:
    """SentencePiece BPE of LLaMA 1 and 2: merges follow from the scores of the pieces.

    Merging the pair with the best scored union is BPE whose merges are sorted by that score. Only
    normal pieces are merged into, so no text can spell a control or byte token.
    """
    scores = fields["tokenizer.ggml.scores"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges: list[tuple[float, int, str, str]] = []
    for i, token in enumerate(tokens):
        if types[i] not in (_NORMAL, _USER_DEFINED):
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                merges.append((-scores[i], i, left, right))
    merges.sort(key=lambda merge: merge[:2])
    unknown = [t for t, y in zip(tokens, types, strict=False) if y == _UNKNOWN]
    model = models.BPE(
        vocabulary,
        [(left, right) for *_, left, right in merges],
        unk_token=unknown[0] if unknown else None,
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    prefix = fields.get("tokenizer.ggml.add_space_prefix", True)
    steps = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])  # type: ignore[reportAttributeAccessIssue]
    undo = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence([*undo, *strip])  # type: ignore[reportAttributeAccessIssue]
    return tokenizer
