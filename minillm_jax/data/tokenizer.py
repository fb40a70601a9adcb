"""One tokenizer for Hugging Face folders and GGUF files, on the `tokenizers` library alone.

Plain text never becomes a special token: only a chat template writes those. Importing
transformers takes seconds, so it happens only for a folder without a `tokenizer.json`.
"""

import functools
import json
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from minillm_jax.data import gguf_vocabulary
from minillm_jax.data.chat_template import ChatTemplate, Message
from minillm_jax.types import InputError

_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
_FIRST_PRIVATE, _LAST_PRIVATE = 0xE000, 0xF8FF  # code points that Unicode gives no meaning


class Tokenizer:
    """Text to ids and back, the special ids, and the chat template of one model.

    Attributes:
        eos_id: end of sequence.
        pad_id: padding; `eos_id` where the model names none.
        vocab_size: the true size, without the padding rows of an embedding.
        source: where it was read, for messages.
    """

    def __init__(self, backend: tokenizers.Tokenizer, settings: dict[str, Any], source: str):
        """Wrap a `tokenizers` pipeline; `settings` is what `tokenizer_config.json` holds."""
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # "special token" text is text
        self._backend = backend
        self._settings = settings
        self.source = source
        self._added = backend.get_added_tokens_decoder()
        self._special = {str(t.content): i for i, t in self._added.items() if t.special}
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        eos = self._special_id("eos_token")
        if eos is None:
            raise InputError(f'{source}: no end-of-sequence token; set "eos_token" in its config')
        pad = self._special_id("pad_token")
        self.eos_id: int = eos
        self.pad_id: int = eos if pad is None else pad

    def _special_id(self, name: str) -> int | None:
        token = self._settings.get(name)
        index = None if token is None else self._backend.token_to_id(token)
        if token is not None and index is None:
            raise InputError(
                f"{self.source}: {name} {token!r} is not in the vocabulary; correct it"
            )
        return index

    def special_id(self, token: str) -> int:
        """Id of a special token by its text.

        Raises:
            InputError: the vocabulary has no such special token.
        """
        if token not in self._special:
            raise InputError(f"{self.source}: no special token {token!r}; use another template")
        return self._special[token]

    @functools.cached_property
    def _prefixes_space(self) -> bool:
        """Whether text at the start gets a space, as SentencePiece vocabularies have it."""
        start = len(self._ids("\n"))
        return self._ids("\na")[start:] != self._ids("a")

    def _ids(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode(self, text: str, *, continues: bool = False) -> list[int]:
        """Token ids of plain text: no BOS, and the text of a special token stays text.

        `continues` says that the text follows other text (an answer after its prompt): a
        SentencePiece vocabulary then puts no space in front.
        """
        return self.encode_batch([text], continues=continues)[0]

    def encode_batch(self, texts: Sequence[str], *, continues: bool = False) -> list[list[int]]:
        """`encode` of many texts, on all cores."""
        cut = 0
        if continues and self._prefixes_space:
            cut, texts = len(self._ids("\n")), ["\n" + text for text in texts]
        encoded = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [e.ids[cut:] for e in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; special tokens and ids beyond the vocabulary are dropped."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def decode_batch(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """`decode` of many rows."""
        plain = [[int(i) for i in row] for row in rows]
        return self._backend.decode_batch(plain, skip_special_tokens=True)

    def token_strings(self) -> list[str]:
        """The vocabulary by id; an id that no token has is the empty string."""
        strings = [""] * self.vocab_size
        for token, index in self._backend.get_vocab(with_added_tokens=True).items():
            strings[index] = token
        return strings

    def added_ids(self) -> frozenset[int]:
        """Ids of the tokens that were added to the learned vocabulary, special or not."""
        return frozenset(self._added)

    def chat_prompt(self, messages: str | Sequence[Message]) -> list[int]:
        """Ids of a conversation in the model's own chat template, up to the assistant's turn.

        Whatever the template adds stays, a default system message included. A string is one user
        message. Special tokens written inside a message are encoded as text.

        Raises:
            InputError: there is no template, or the template refuses the conversation.
        """
        return self.chat_prompts([messages])[0]

    def chat_prompts(self, conversations: Sequence[str | Sequence[Message]]) -> list[list[int]]:
        """`chat_prompt` of many conversations, on all cores."""
        chats = [
            [{"role": "user", "content": c}] if isinstance(c, str) else list(c)
            for c in conversations
        ]
        found: list[list[int] | None] = [
            self._forged_chat(chat) if self._names_special(chat) else None for chat in chats
        ]
        honest = [self._template.render(c) for c, f in zip(chats, found, strict=True) if f is None]
        self._backend.encode_special_tokens = False
        try:
            encoded = iter(self._backend.encode_batch_fast(honest, add_special_tokens=False))
        finally:
            self._backend.encode_special_tokens = True
        return [next(encoded).ids if ids is None else ids for ids in found]

    @functools.cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        longest_first = sorted(filter(None, self._special), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def _names_special(self, chat: Sequence[Message]) -> bool:
        return any(self._special_pattern.search(m["content"]) for m in chat)

    def _forged_chat(self, chat: Sequence[Message]) -> list[int]:
        """A chat whose messages hold the text of special tokens.

        1. Those texts are replaced by marks, and the template is rendered.
        2. The special tokens found now are the template's own: cut there.
        3. Between the cuts the marks become text again, and all of it is encoded as text.
        """
        text = "".join(m["content"] for m in chat)
        private = map(chr, range(_FIRST_PRIVATE, _LAST_PRIVATE + 1))
        mark = next(character for character in private if character not in text)
        names = list(self._special)

        def hide(content: str) -> str:
            return self._special_pattern.sub(
                lambda found: f"{mark}{names.index(found[0])}{mark}", content
            )

        def show(piece: str) -> str:
            return re.sub(f"{mark}(\\d+){mark}", lambda found: names[int(found[1])], piece)

        rendered = self._template.render([{**m, "content": hide(m["content"])} for m in chat])
        ids: list[int] = []
        position = 0
        for found in self._special_pattern.finditer(rendered):
            ids += self.encode(show(rendered[position : found.start()]), continues=bool(ids))
            ids.append(self._special[found[0]])
            position = found.end()
        return ids + self.encode(show(rendered[position:]), continues=bool(ids))

    @functools.cached_property
    def _template(self) -> ChatTemplate:
        text = self._settings.get("chat_template")
        if not text:
            raise InputError(f"{self.source}: no chat template; use the alpaca template instead")
        tokens = {name: self._settings[name] for name in _SPECIAL if self._settings.get(name)}
        return ChatTemplate(text, tokens, self.source)

    def save(self, directory: str | Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, as `AutoTokenizer` loads them."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        # no code of the original repository is shipped, so no reference to it
        settings = {k: v for k, v in self._settings.items() if k != "auto_map"}
        _write(directory / "tokenizer.json", self._backend.to_str(pretty=True))
        _write(
            directory / "tokenizer_config.json",
            json.dumps(settings, ensure_ascii=False, indent=2) + "\n",
        )


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read the tokenizer of a Hugging Face folder, a `.gguf` file, or a hub id `hf:owner/name`.

    Raises:
        InputError: nothing is there, it cannot be read, or it names no end-of-sequence token.
    """
    source = str(path)
    if source.startswith("hf:"):
        return _through_transformers(source.removeprefix("hf:"), source, local=False)
    path = Path(path)
    if path.suffix == ".gguf" and path.is_file():
        return Tokenizer(*gguf_vocabulary.read(path), source=source)
    if not path.is_dir():
        raise InputError(f"{path}: no such model folder or .gguf file; correct the path")
    if (path / "tokenizer.json").is_file():
        settings = _settings(path)
        if settings.get("eos_token"):
            return Tokenizer(_backend(path), settings, source)
    return _through_transformers(source, source, local=True)


def compare_vocabularies(a: Tokenizer, b: Tokenizer) -> int:
    """Check that two tokenizers give every id the same token; return the size they share.

    One may be longer by added tokens (the 143 fillers of GPT-J, a pad token), which are cut away.

    Raises:
        InputError: naming the first ids that differ.
    """
    left, right = a.token_strings(), b.token_strings()
    shared = min(len(left), len(right))
    differing = [i for i in range(shared) if left[i] != right[i]]
    longer, strings = (a, left) if len(left) > shared else (b, right)
    real = [i for i in range(shared, len(strings)) if strings[i] and i not in longer.added_ids()]
    cure = "teacher and student must share one vocabulary: choose another pair"
    if differing:
        shown = ", ".join(f"{i} ({left[i]!r} and {right[i]!r})" for i in differing[:3])
        raise InputError(
            f"{a.source} and {b.source} differ in {len(differing)} token ids, first {shown}; {cure}"
        )
    if real:
        raise InputError(
            f"{longer.source} has {len(real)} more tokens than the other, first id {real[0]} "
            f"({strings[real[0]]!r}); {cure}"
        )
    return shared


def _write(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}); download it again") from error


def _backend(folder: Path) -> tokenizers.Tokenizer:
    path = folder / "tokenizer.json"
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise InputError(f"{path}: not a tokenizer ({error}); download it again") from error


def _settings(folder: Path) -> dict[str, Any]:
    """`tokenizer_config.json` with plain strings, and what older and newer files keep elsewhere."""
    settings = _json(folder / "tokenizer_config.json")
    older = _json(folder / "special_tokens_map.json")
    for name in _SPECIAL:
        token = settings.get(name) or older.get(name)
        settings[name] = token["content"] if isinstance(token, dict) else token
    template = settings.get("chat_template")
    if (newer := folder / "chat_template.jinja").is_file():
        template = newer.read_text(encoding="utf-8")
    if isinstance(template, list):  # several named templates
        template = {t["name"]: t["template"] for t in template}.get("default")
    if template:
        settings["chat_template"] = template
    return settings


def _through_transformers(name: str, source: str, *, local: bool) -> Tokenizer:
    """Let transformers convert what is not a `tokenizer.json`, or lacks its class's defaults."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        try:
            AutoTokenizer.from_pretrained(name, local_files_only=local).save_pretrained(folder)
        except (OSError, ValueError, ImportError, KeyError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise InputError(
                f"{source}: no tokenizer could be read ({reason}); add its tokenizer.json"
            ) from error
        if not (Path(folder) / "tokenizer.json").is_file():
            raise InputError(f"{source}: this tokenizer has no fast form; add its tokenizer.json")
        return Tokenizer(_backend(Path(folder)), _settings(Path(folder)), source)
