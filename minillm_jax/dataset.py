"""The data of an experiment, as its config has it: rows, prompts, answers, batches of them."""

import hashlib
import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minillm_jax import hosts, recipe, scratch
from minillm_jax.data import classification, hub, loader, sources, splits
from minillm_jax.data import corpus as corpus_lib
from minillm_jax.data import examples as examples_lib
from minillm_jax.data.examples import Example
from minillm_jax.data.sources import Row
from minillm_jax.data.tokenizer import Tokenizer
from minillm_jax.types import InputError, Sequences

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Labelled:
    """Prompts of a classification: [label][row] with the label's words, and the true labels.

    Of `given` rows in the file the first are here that fit into the slots of an answered prompt.
    """

    examples: list[list[Example]]
    labels: list[int]
    given: int


class Data:
    """Reads and tokenises each thing once, when it is first asked for."""

    def __init__(
        self,
        config: Any,
        tokenizer: Callable[[], Tokenizer],
        seed: int,
        workdir: Path,
        ways: int = 1,
    ):
        """`tokenizer` makes it when it is needed; texts from scratch are kept in `workdir`.

        `ways` is the number of devices over which the rows of a batch are split.
        """
        self.ways = ways
        self.config = config
        self.seed = seed
        self.workdir = workdir
        self._tokenizer = tokenizer
        self._made: dict[str, Any] = {}

    @property
    def tokenizer(self) -> Tokenizer:
        """The student's, which agrees with the teacher's."""
        return self._tokenizer()

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    @property
    def max_tokens(self) -> int:
        """Most tokens of a prompt and its response together."""
        return self.config.data.max_prompt + self.config.data.max_response

    def rows(self, split: str) -> list[Row]:
        """The rows of a split, from where the config says, or the packaged prompts.

        Validation and test rows from the same source as the training rows are taken out of those,
        as the paper divides databricks-dolly-15k.
        """
        evaluate = self.config.evaluate
        limits = {"validation": evaluate.validation_prompts, "test": evaluate.prompts}
        limit = limits.get(split, self.config.data.limit)
        rows = getattr(self._divided(), split) if self._shares_source(split) else self._read(split)
        return rows[:limit] if limit else rows

    def _shares_source(self, split: str) -> bool:
        c = self.config.data
        others = ("validation", "test") if split == "train" else (split,)
        return (
            bool(c.train)
            and any(c[name] == c.train for name in others)
            and not (c.train.startswith(scratch.PREFIX))
        )

    def _read(self, split: str) -> list[Row]:
        source = self.config.data[split]

        def make():
            if source.startswith(scratch.PREFIX):
                return scratch.answered_rows(split)
            return sources.read(source) if source else sources.packaged_prompts(split)

        return self._once(f"rows/{split}", make)

    def _divided(self) -> splits.Split:
        c = self.config.data

        def make():
            rows = self._read("train")
            lengths = splits.prompt_lengths(self.tokenizer, c.template, rows)
            validation, test = (
                [] if self._shares_source(name) else self._read(name)
                for name in ("validation", "test")
            )
            return splits.paper_split(
                rows, lengths, validation=validation, test=test, max_prompt=c.max_prompt
            )

        return self._once("divided", make)

    def count(self, split: str) -> int | str:
        """Rows of a split, over-long ones included; in words for what is yet to be fetched."""
        source = self.config.data[split]
        if hub.is_hub(source) or self._shares_source(split):
            return f"of {source}"
        return len(self.rows(split))

    def prompts(self, split: str) -> list[Example]:
        """The prompts of a split as ids, without answers."""
        return self._once(f"prompts/{split}", lambda: self._examples(self.rows(split), False))

    def gold(self, split: str) -> list[Example]:
        """The prompts of a split with the answers of the data, the first of each row."""

        def make():
            rows, name = self.rows(split), f"config.data.{split}"
            for row in rows:
                if not row.output:
                    where = (
                        f"{row.where}: no output"
                        if self.config.data[split]
                        else (f"{name} is empty, and the packaged prompts have no answers")
                    )
                    raise InputError(
                        f"{where}; give {name} a JSONL file of instruction, input and output, or "
                        "hub:databricks/databricks-dolly-15k"
                    )
            return self._examples(rows, True)

        return self._once(f"gold/{split}", make)

    def more_tests(self) -> dict[str, tuple[list[Row], list[Example]]]:
        """The further test sets by name: their rows, with answers, and prompts."""

        def make():
            found = {}
            for spec in self.config.data.more_tests:
                name, _, file = spec.partition("=")
                rows = sources.read(file, need_output=True)
                rows = rows[: self.config.evaluate.prompts or None]
                found[name] = rows, self._examples(rows, False)
            return found

        return self._once("more_tests", make)

    def labelled(self) -> dict[str, Labelled]:
        """The calibration data by name."""

        def make():
            found = {}
            for spec in self.config.evaluate.calibration:
                what, _, file = spec.partition("=")
                name, _, wanted = what.partition(":")
                rows, labels = classification.read(name, file)
                limit = int(wanted or 0) or self.config.evaluate.prompts or len(rows)
                words = classification.TASKS[name].labels
                found[name] = self._labelled(rows, labels, words, limit)
                if not found[name].labels:
                    raise InputError(
                        f"{file}: no row fits into config.data.max_prompt + max_response; raise one"
                    )
            return found

        return self._once("labelled", make)

    def _labelled(
        self, rows: Sequence[Row], labels: Sequence[int], words: Sequence[str], limit: int
    ) -> Labelled:
        c = self.config.data
        asked = [self._worded(rows, word) for word in words]
        fit = [
            number
            for number, same in enumerate(zip(*asked, strict=True))
            if all(len(e.prompt) + len(e.response) <= c.max_prompt + c.max_response for e in same)
        ][:limit]
        kept = [[examples[number] for number in fit] for examples in asked]
        return Labelled(kept, [labels[e.row] for e in kept[0]], len(rows))

    def _worded(self, rows: Sequence[Row], word: str) -> list[Example]:
        """The prompts of rows with one label word as the answer; over-long prompts are left out."""
        rows = [replace(row, output=(word,)) for row in rows]
        c = self.config.data
        found = examples_lib.make_examples(
            self.tokenizer,
            rows,
            template=c.template,
            max_prompt=c.max_prompt + c.max_response - 1,
            max_response=c.max_prompt + c.max_response,  # no word is cut: `_labelled` leaves it out
            long_prompts="drop",
        )
        # Without the end of sequence: the word is asked for, and not whether more would follow.
        return [replace(e, response=e.response[:-1]) for e in found]

    def _examples(self, rows: Sequence[Row], answers: bool) -> list[Example]:
        c = self.config.data
        return examples_lib.make_examples(
            self.tokenizer,
            rows,
            template=c.template,
            max_prompt=c.max_prompt,
            max_response=c.max_answer or c.max_response,
            max_tokens=self.max_tokens,
            answers=answers,
            long_prompts=c.long_prompts,
        )

    def corpus(
        self, answered: Callable[[], Sequence[Example]] | None = None
    ) -> corpus_lib.Batches | None:
        """Blocks of text, as many per update as responses; None without a corpus loss.

        `answered` gives what SFT reads; if that is the text, there is none before.
        """
        c = self.config.corpus
        if not c.files or c.coefficient == 0:
            return None
        order = {
            "batch_size": self.config.distill.batch_size,
            "length": self.max_tokens,
            "seed": self.seed,
        }
        if recipe.learns_from_answers(c.files):
            if not answered:
                return None
            return self._once("corpus", lambda: corpus_lib.of_examples(answered(), **order))

        def make():
            made = f"{scratch.PREFIX}text"
            folder = self.workdir / "scratch"
            with hosts.main_first("text"):
                files = [scratch.text(folder) if file == made else file for file in c.files]
            wanted = self.config.distill.steps * self.config.distill.batch_size
            most = min(wanted, corpus_lib.MOST_BLOCKS)
            models = [self.config[who].path for who in ("teacher", "student")]
            which = json.dumps([list(map(str, files)), self.max_tokens, most, models])
            digest = hashlib.sha256(which.encode()).hexdigest()[:12]
            with hosts.main_first("corpus"):
                found = corpus_lib.batches(
                    files,
                    self.tokenizer,
                    **order,
                    most_blocks=most,
                    kept=self.workdir / f"corpus-{digest}.npy",
                )
            hosts.same(zlib.crc32(found.blocks.data) >> 1, "text")  # of files that each reads
            return found

        return self._once("corpus", make)

    def padding(self, examples: Sequence[Example]) -> dict[str, int]:
        """The geometry of batches of these examples, for `pad` and the loaders.

        The response buffer is that of sampling, unless there are given answers that need more.
        """
        c = self.config.data
        most = min(c.max_answer, self.max_tokens)
        longest = max((len(example.response) for example in examples), default=0)
        return {
            "prompt_slots": c.max_prompt,
            "response_slots": c.max_response if longest <= c.max_response else most,
            "pad_id": self.tokenizer.pad_id,
        }

    def batches(self, examples: Sequence[Example], batch_size: int) -> loader.Batches:
        """Endless shuffled batches; all processes must ask, and have the same examples."""
        hosts.same(loader.digest(examples), "examples")
        return loader.batches(examples, batch_size, self.seed, **self.padding(examples))

    def ordered(
        self, examples: Sequence[Example], batch_size: int = 0
    ) -> list[tuple[Sequences, int]]:
        """The examples once, in order, in batches that split over the devices; 0: evaluation's."""
        size = min(batch_size or self.config.evaluate.batch_size, len(examples))
        size = -(-size // self.ways) * self.ways
        return list(loader.ordered(examples, size, **self.padding(examples)))
