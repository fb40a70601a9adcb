"""The data of an experiment, as its config has it: rows, prompts, answers, batches of them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from minillm_jax import scratch
from minillm_jax.data import examples as examples_lib
from minillm_jax.data import loader, sources
from minillm_jax.data.examples import Example
from minillm_jax.data.sources import Row
from minillm_jax.data.tokenizer import Tokenizer
from minillm_jax.types import InputError, Sequences

SPLITS = ("train", "validation", "test")


class Data:
    """Reads and tokenises each thing once, when it is first asked for."""

    def __init__(self, config: Any, tokenizer: Callable[[], Tokenizer], seed: int, workdir: Path):
        """`tokenizer` makes it when it is needed; texts from scratch are kept in `workdir`."""
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

    def rows(self, split: str) -> list[Row]:
        """The rows of a split, from the config's file or the packaged prompts."""

        def make():
            c, evaluate = self.config.data, self.config.evaluate
            if c[split].startswith(scratch.PREFIX):
                rows = scratch.answered_rows(split)
            else:
                rows = sources.read_jsonl(c[split]) if c[split] else sources.packaged_prompts(split)
            limits = {"validation": evaluate.validation_prompts, "test": evaluate.prompts}
            limit = limits.get(split, c.limit)
            return rows[:limit] if limit else rows

        return self._once(f"rows/{split}", make)

    def count(self, split: str) -> int | str:
        """Rows of a split, over-long ones included; in words for what is yet to be fetched."""
        spec = self.config.data[split]
        return f"of {spec}" if spec.startswith("hub:") else len(self.rows(split))

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
                rows = sources.read_jsonl(file, need_output=True)
                rows = rows[: self.config.evaluate.prompts or None]
                found[name] = rows, self._examples(rows, False)
            return found

        return self._once("more_tests", make)

    def _examples(self, rows: Sequence[Row], answers: bool) -> list[Example]:
        c = self.config.data
        return examples_lib.make_examples(
            self.tokenizer,
            rows,
            template=c.template,
            max_prompt=c.max_prompt,
            max_response=c.max_response,
            answers=answers,
            long_prompts=c.long_prompts,
        )

    def padding(self) -> dict[str, int]:
        """The geometry of a batch, for `pad` and the loaders."""
        c = self.config.data
        return {
            "prompt_slots": c.max_prompt,
            "response_slots": c.max_response,
            "pad_id": self.tokenizer.pad_id,
        }

    def batches(self, examples: Sequence[Example], batch_size: int) -> loader.Batches:
        """Endless shuffled batches."""
        return loader.batches(examples, batch_size, self.seed, **self.padding())

    def ordered(self, examples: Sequence[Example]) -> list[tuple[Sequences, int]]:
        """The examples once, in order, in batches of evaluation."""
        size = min(self.config.evaluate.batch_size, len(examples))
        return list(loader.ordered(examples, size, **self.padding()))
