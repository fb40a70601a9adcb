"""The order of training data, as a function of the batch index alone, and of evaluation data.

Resuming needs no loader state: batch `i` is the same after a restart and for any number of hosts.
Every host makes all of it, some kilobytes of ids, and `sharding.place` gives each device its rows:
which these are follows from the mesh, where several processes may hold the same ones.
"""

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import grain
import numpy as np

from minillm_jax.data.examples import Example, pad
from minillm_jax.types import InputError, Sequences


@dataclass(frozen=True)
class Batches:
    """An endless, randomly accessible stream of batches; make it with `batches`.

    Epochs follow each other without a gap, each in its own order: every example comes once per
    epoch, and a batch may hold the end of one epoch and the start of the next.
    """

    stream: grain.MapDataset[Example]
    epoch_examples: int
    batch_size: int
    prompt_slots: int
    response_slots: int
    pad_id: int

    @property
    def epoch_length(self) -> int:
        """Batches after which every example has been seen: examples / batch size, rounded up."""
        return -(-self.epoch_examples // self.batch_size)

    def examples(self, i: int) -> list[Example]:
        """The examples of batch `i`."""
        if i < 0:
            raise IndexError(f"batch {i}: batches are numbered from 0")
        start = i * self.batch_size
        found = (self.stream[j] for j in range(start, start + self.batch_size))
        return [example for example in found if example is not None]  # None only after a filter

    def __getitem__(self, i: int) -> Sequences:
        """The rows of batch `i`, padded."""
        return pad(self.examples(i), self.prompt_slots, self.response_slots, self.pad_id)


def batches(
    examples: Sequence[Example],
    batch_size: int,
    seed: int,
    *,
    prompt_slots: int,
    response_slots: int,
    pad_id: int,
) -> Batches:
    """Shuffle examples (or prompts without responses) anew in every epoch, in batches.

    Raises:
        InputError: no examples, or a batch of none.
    """
    _check(examples, batch_size)
    # The seed goes through `seed`, which hashes it: `shuffle(seed)` would use seed + epoch, and
    # runs with neighbouring seeds would see each other's epochs.
    stream = grain.MapDataset.source(examples).seed(seed).shuffle().repeat()
    return Batches(
        stream=stream,
        epoch_examples=len(examples),
        batch_size=batch_size,
        prompt_slots=prompt_slots,
        response_slots=response_slots,
        pad_id=pad_id,
    )


def ordered(
    examples: Sequence[Example],
    batch_size: int,
    *,
    prompt_slots: int,
    response_slots: int,
    pad_id: int,
) -> Iterator[tuple[Sequences, int]]:
    """Go through the examples once, in order: (batch, how many of its first rows are real).

    The last batch is filled up with rows whose responses are masked out. Their prompt repeats the
    last example's: an empty one would leave attention nothing to attend to.

    Raises:
        InputError: no examples, or a batch of none.
    """
    _check(examples, batch_size)
    filler = Example(prompt=examples[-1].prompt, row=examples[-1].row)
    for start in range(0, len(examples), batch_size):
        real = list(examples[start : start + batch_size])
        filled = real + [filler] * (batch_size - len(real))
        yield pad(filled, prompt_slots, response_slots, pad_id), len(real)


def digest(examples: Sequence[Example]) -> int:
    """A number of 31 bits that other examples would hardly have."""
    found = 0
    for example in examples:
        for part in (example.prompt, example.response):
            found = zlib.crc32(np.array([len(part), *part], np.int64).tobytes(), found)
    return found >> 1


def _check(examples: Sequence[Example], batch_size: int) -> None:
    if not examples:
        raise InputError("no examples to load; give a file that has rows")
    if batch_size < 1:
        raise InputError(f"batch size {batch_size}: give at least 1")
