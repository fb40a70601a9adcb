"""MiniLLM by this package, a step whenever it is asked for: the other side of `step_of_trl`.

The package's own loop runs, `trainer.fit`, held before each collection; every collection serves
one update.

    python -m benchmarks.step_of_ours FOLDER     with what `against_trl` has written there
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import pair as models
from benchmarks.stepwise import Asked
from minillm_jax import optim, trainer
from minillm_jax.methods import minillm
from minillm_jax.models import hf
from minillm_jax.objectives.policy import PRESETS
from minillm_jax.rollout import Mixing
from minillm_jax.types import Sequences


class OneAtATime:
    """The same prompts as batch after batch, each when a step is asked for."""

    def __init__(self, asked: Asked, prompts: Sequences):
        """Take the end of the conversation and the prompts."""
        self.turns, self.prompts = iter(asked), prompts
        self.waited = 0.0  # seconds before the last step was asked for

    def __getitem__(self, index: int) -> Sequences:
        """Wait; leave when nobody will ask again."""
        began = time.monotonic()
        if next(self.turns, None) is None:
            raise SystemExit
        self.waited = time.monotonic() - began
        return self.prompts


def main() -> None:
    """Load, and train for as long as steps are asked for."""
    asked = Asked()
    folder = Path(sys.argv[1])
    given = json.loads((folder / "steps.json").read_text(encoding="utf-8"))
    (student, params), (teacher, frozen) = (
        models.placed(hf.open_model(folder / name)) for name in ("student", "teacher")
    )
    ids = np.array(given["ids"], np.int32)
    rows = len(ids)
    empty = np.zeros((rows, 0), np.int32)
    prompts = Sequences(ids, np.ones_like(ids, bool), empty, empty.astype(bool))
    rate = optim.schedule("constant", given["learning_rate"])
    optimizer = optim.adamw(rate)
    vocab = student.vocab_size
    mixing = Mixing(
        slots=given["slots"], alpha=given["alpha"], eos_id=vocab, pad_id=0, vocab=vocab
    )  # fmt: skip
    method = minillm.method(
        student, teacher, optimizer, rate, policy=PRESETS["corrected"], mixing=mixing,
        remat=given["remat"],
    )  # fmt: skip
    never = 10**9
    schedule = trainer.Schedule(
        steps=never, batch_size=rows, evaluate_every=never, save_every=never, rollouts=rows
    )

    batches = OneAtATime(asked, prompts)

    def log(step: int, metrics: Any, times: Any) -> None:
        collecting = times["collect_seconds"] - batches.waited
        asked.answer(reverse_kl=metrics["reverse_kl"], collect_seconds=collecting)

    hooks = trainer.Hooks(
        log=log, evaluate=lambda *_: {}, save=lambda *_: None, skipped=lambda *_: None
    )
    asked.answer(versions={"jax": jax.__version__}, threads=len(jax.devices()))
    state = models.state(student, params, optimizer)
    trainer.fit(method, state, frozen, batches, schedule, hooks, seed=0, put=to_device)


def to_device(batch: Any) -> Any:
    """The rows of a batch on the device."""
    return jax.tree.map(jnp.asarray, batch)


if __name__ == "__main__":
    main()
