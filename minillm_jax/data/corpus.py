"""Plain text in blocks of equal length, for the corpus loss: documents, tokens, packing, order.

Documents are joined with an end of sequence after each, runs of newlines are one newline, and the
whole is cut into blocks; what is left over at the end is dropped. A block may hold parts of
several documents, which see each other, as in the reference. Prompts with answers can be the text
instead: one in a block, the rest of it padding.
"""

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grain
import numpy as np

from minillm_jax.data import hub
from minillm_jax.data.examples import Example
from minillm_jax.data.sources import decoded, lines
from minillm_jax.data.tokenizer import Tokenizer
from minillm_jax.types import InputError

INSTEAD = "give files of plain text"
PADDING = -1  # in a block
MOST_BLOCKS = 320_000  # what the paper's 5000 updates of 64 blocks read, less than one epoch
_PIECE = 2**16  # characters that are tokenised at a time: a long document in parts, on all cores
_PIECES = 64


@dataclass(frozen=True)
class Batches:
    """An endless, randomly accessible stream of token blocks; `batches` and `of_examples` make it.

    Epochs follow each other without a gap, each in its own order.
    """

    blocks: (
        np.ndarray
    )  # [blocks, T], the smallest type that holds the vocabulary; int32 with PADDING
    order: grain.MapDataset[int]
    batch_size: int

    @property
    def epoch_length(self) -> int:
        """Batches after which every block has been seen: blocks / batch size, rounded up."""
        return -(-len(self.blocks) // self.batch_size)

    def __getitem__(self, i: int) -> np.ndarray:
        """The rows of batch `i`, [B, T] int32."""
        if i < 0:
            raise IndexError(f"batch {i}: batches are numbered from 0")
        start = i * self.batch_size
        rows = np.array([self.order[j] for j in range(start, start + self.batch_size)])
        return self.blocks[rows].astype(np.int32)


def batches(
    paths: Sequence[str | Path],
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    length: int,
    seed: int,
    most_blocks: int = MOST_BLOCKS,
    kept: Path | None = None,
) -> Batches:
    """Tokenise text once, keep its blocks, and shuffle them anew in every epoch.

    Args:
        paths: files of `documents`, or `hub:OWNER/NAME[@REVISION]` with a field `text`, which is
            read as far as it is needed (OpenWebText is the paper's for GPT-2).
        batch_size: blocks of an update.
        length: tokens of a block.
        most_blocks: reading stops there.
        kept: a file for the blocks. What it holds is taken as it is: a run that goes on needs
            neither the text nor a network, and sees the same blocks.

    Raises:
        InputError: as `documents` and `hub.records`; no field `text`; less text than one block.
    """
    if length < 2 or batch_size < 1:
        raise InputError(
            f"corpus: batch size {batch_size} and length {length}; they must be at least 1 and 2"
        )
    if kept is not None and kept.exists():
        blocks = np.load(kept, mmap_mode="r", allow_pickle=False)
    else:
        blocks = pack(_all_documents(paths, tokenizer), tokenizer, length, most_blocks)
    if not len(blocks):
        names = ", ".join(map(str, paths)) or "no file"
        raise InputError(
            f"corpus: {names} holds less than one block of {length} tokens; give more text, or "
            "lower the length of a block"
        )
    if kept is not None and not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        part = kept.with_name(kept.name + ".part")
        with part.open("wb") as file:
            np.save(file, blocks)
        part.replace(kept)
    return Batches(blocks, _order(blocks, seed), batch_size)


def of_examples(examples: Sequence[Example], *, batch_size: int, length: int, seed: int) -> Batches:
    """Blocks of `length` of one prompt with its answer each, in a new order in every epoch.

    An answer that ends without an end of sequence was cut off, and nothing is said of what follows.
    """
    blocks = np.full((len(examples), length), PADDING, np.int32)
    for block, example in zip(blocks, examples, strict=True):
        ids = (*example.prompt, *example.response)[:length]
        block[: len(ids)] = ids
    return Batches(blocks, _order(blocks, seed), batch_size)


def _order(blocks: np.ndarray, seed: int) -> Any:
    # Seeded through `seed`, as in `loader.batches`.
    return grain.MapDataset.range(len(blocks)).seed(seed).shuffle().repeat()


def documents(path: str | Path, end: str) -> Iterator[str]:
    """The documents of a `.txt` or `.txt.gz` file in UTF-8.

    A file is one document; lines that hold the end of sequence `end` and no more divide it into
    several.

    Raises:
        InputError: a missing, unreadable or empty file, or invalid UTF-8 with its line.
    """
    text: list[str] = []
    some = False
    for number, line in enumerate(lines(Path(path)), 1):
        line = decoded(line, f"{path}:{number}", first=number == 1)
        if line.strip() != end:
            text.append(line)
        elif text:
            yield "".join(text)
            text = []
        some = some or bool(text and text[-1].strip())
    if not some:
        raise InputError(f"{path}: no text; give a file that has some")
    yield "".join(text)


def pack(
    texts: Iterable[str], tokenizer: Tokenizer, length: int, most_blocks: int = MOST_BLOCKS
) -> np.ndarray:
    """Tokens of the texts, an end of sequence after each, in full blocks [blocks, length]."""
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32
    rows: list[np.ndarray] = []
    rest, found = np.empty(0, dtype), 0
    pieces = _pieces(texts)
    while found < most_blocks and (group := list(itertools.islice(pieces, _PIECES))):
        ids = _encode(group, tokenizer)
        stream = np.concatenate([rest, np.fromiter(itertools.chain(*ids), dtype)])
        count = len(stream) // length
        rows.append(stream[: count * length].reshape(count, length))
        rest, found = stream[count * length :], found + count
    return np.concatenate(rows or [np.empty((0, length), dtype)])[:most_blocks]


def _all_documents(paths: Sequence[str | Path], tokenizer: Tokenizer) -> Iterator[str]:
    end = tokenizer.token_strings()[tokenizer.eos_id]
    for path in paths:
        if not hub.is_hub(path):
            yield from documents(path, end)
            continue
        for number, fields in enumerate(hub.records(str(path), instead=INSTEAD, streaming=True), 1):
            if not isinstance(fields.get("text"), str):
                raise InputError(
                    f"{path} row {number}: no field `text`; choose another data set, or {INSTEAD}"
                )
            yield fields["text"]


def _pieces(texts: Iterable[str]) -> Iterator[tuple[str, bool, bool]]:
    """Parts of the texts that have some, cut after newlines: (text, is first, is last)."""
    for text in texts:
        text = re.sub(r"(\r?\n)+", "\n", text).strip()
        start = 0
        while start < len(text):
            cut = text.find("\n", start + _PIECE) + 1 or len(text)
            yield text[start:cut], start == 0, cut == len(text)
            start = cut


def _encode(group: list[tuple[str, bool, bool]], tokenizer: Tokenizer) -> list[list[int]]:
    """Ids of every piece; a first one starts a text, the others continue it."""
    ids: list[list[int]] = [[]] * len(group)
    for continues in (False, True):
        which = [i for i, (_, first, _) in enumerate(group) if first is not continues]
        encoded = tokenizer.encode_batch([group[i][0] for i in which], continues=continues)
        for i, found in zip(which, encoded, strict=True):
            ids[i] = found + [tokenizer.eos_id] * group[i][2]
    return ids
