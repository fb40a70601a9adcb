"""The experiment without weights and data: models are what their `config.json` says."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minillm_jax import scratch
from minillm_jax.build import Builder
from minillm_jax.models import fetch
from minillm_jax.models.weights import Stored, read_config


@dataclass(frozen=True)
class _Ids:
    """What is asked of a tokenizer: the vocabulary is then that of the models."""

    vocab_size: int = 1 << 30
    eos_id: int = 0
    pad_id: int = 0


class Shapes(Builder):
    """A builder for `devices` whose models have shapes and no tensors."""

    def __init__(self, config: Any, workdir: Path, devices: Sequence[Any]):
        """Take the config; models from scratch are made in `workdir`."""
        super().__init__(config, workdir, devices)

    def _open(self, who: str) -> Stored:
        c = self.config[who]
        spec = c.fine_tuned or c.path
        if spec.startswith(scratch.PREFIX):
            return super()._open(who)
        found = fetch.config(spec)
        if isinstance(found, Path):
            return self.open(found)
        _, model = read_config(found, Path(spec))
        stored = Stored(model, found, Path(spec), tuple(range(model.layers)), {})
        return self._read_with_kernel(stored)

    @property
    def tokenizer(self) -> Any:
        """Ids that no model is asked about: they decide no shape."""
        return _Ids()

    def answer_slots(self) -> int:
        """Slots of given answers: those of the data may be longer than sampled ones get."""
        data = self.config.data
        return max(data.max_response, min(data.max_answer, self.data.max_tokens))

    @property
    def windows(self) -> tuple[int, ...]:
        """The widest: every row is planned as long as it can be."""
        return super().windows[-1:]

    def _learns_from(self, name: str) -> int:
        # Sets the length of the learning rate's schedule, which is no part of a program's size.
        return self.config[name].batch_size if name in self.config else 1
