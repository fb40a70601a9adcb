"""What a teacher says of given answers, kept on disk: its trunk then runs once per row.

    folder/00000.npy    something of every answer token of some rows, one after the other:
                        [tokens, D] hidden states, or [tokens] records of a cut distribution
          /00000.json   of which rows of which teacher they are, and the sha256 of the file

A shard counts when its JSON is there, which is written last, so what was broken off is made again.
bfloat16 is stored as its bits, for numpy has no such type.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from minillm_jax.data.examples import Example
from minillm_jax.types import InputError


@dataclass(frozen=True)
class Targets:
    """The shards of `examples`, `size` rows each, of the teacher that `teacher` identifies."""

    folder: Path
    examples: Sequence[Example]
    size: int
    teacher: str

    def shards(self) -> list[Sequence[Example]]:
        """The rows of each shard."""
        return [
            self.examples[first : first + self.size]
            for first in range(0, len(self.examples), self.size)
        ]

    def missing(self) -> list[int]:
        """Shards that are not there, or not of these rows and this teacher, or damaged."""
        return [index for index in range(len(self.shards())) if self._complaint(index)]

    def write(self, index: int, states: Sequence[np.ndarray]) -> None:
        """Write a shard: what is kept of each of its rows, [tokens, ...]."""
        data = np.concatenate(states)
        if data.dtype == ml_dtypes.bfloat16:
            data = data.view(np.uint16)
        self.folder.mkdir(parents=True, exist_ok=True)
        path, about = self._files(index)
        about.unlink(missing_ok=True)
        with open(path.with_suffix(".tmp"), "wb") as file:
            np.save(file, data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(path.with_suffix(".tmp"), path)
        kept = {"rows": self._digest(index), "sha256": _sha256(path)}
        about.with_suffix(".tmp").write_text(json.dumps(kept))
        os.replace(about.with_suffix(".tmp"), about)

    def read(self) -> dict[int, np.ndarray]:
        """What is kept, [tokens, ...], by the number of the row, mapped from the files.

        Raises:
            InputError: a shard is missing or damaged.
        """
        found: dict[int, np.ndarray] = {}
        for index, rows in enumerate(self.shards()):
            path, _ = self._files(index)
            if complaint := self._complaint(index):
                raise InputError(f"{path}: {complaint}; delete {self.folder.parent} and run again")
            data = np.load(path, mmap_mode="r", allow_pickle=False)
            first = 0
            for row in rows:
                found[row.row] = data[first : first + len(row.response)]
                first += len(row.response)
        return found

    def _files(self, index: int) -> tuple[Path, Path]:
        return self.folder / f"{index:05d}.npy", self.folder / f"{index:05d}.json"

    def _digest(self, index: int) -> str:
        rows: list[Any] = [[list(e.prompt), list(e.response)] for e in self.shards()[index]]
        text = json.dumps([self.teacher, rows], default=int)
        return hashlib.sha256(text.encode()).hexdigest()

    def _complaint(self, index: int) -> str:
        path, about = self._files(index)
        try:
            kept = json.loads(about.read_text())
            if kept["rows"] != self._digest(index):
                return "made of other answers, or of another teacher"
            return "" if kept["sha256"] == _sha256(path) else "it is not what was written"
        except (OSError, ValueError, KeyError):
            return "not there"


@dataclass(frozen=True)
class Given:
    """Batches with what was kept beside them: `wrap(sequences, kept)` makes one."""

    batches: Any  # of `loader`
    kept: dict[int, np.ndarray]
    wrap: Any

    def __getitem__(self, i: int) -> Any:
        """Batch i with what is kept of its tokens [B, N, ...], 0 in padding."""
        batch, rows = self.batches[i], self.batches.examples(i)
        kept = [self.kept[example.row] for example in rows]
        padded = np.zeros((*batch.response.shape, *kept[0].shape[1:]), kept[0].dtype)
        for place, known in enumerate(kept):
            padded[place, : len(known)] = known
        return self.wrap(batch, padded)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
