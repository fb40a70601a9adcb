"""The stage in which the teacher reads the given answers once, for all epochs and methods."""

from functools import partial
from typing import Any

import jax
import numpy as np

from minillm_jax import hosts
from minillm_jax.data.targets import Given, Targets
from minillm_jax.reporting.progress import Progress
from minillm_jax.rollout import Taught, response_states
from minillm_jax.sharding import batch_sharding, place
from minillm_jax.stages import Outcome, Run
from minillm_jax.stages.answers import PUSHED_EVERY, answered


def teacher_targets(run: Run) -> Outcome:
    """Keep the teacher's hidden states of the answers that `distill` is given."""
    build, targets = run.build, _targets(run)
    teacher, missing = build.teacher, targets.missing()
    options = {"dtype": build.config.teacher.dtype, "max_tokens": build.data.max_tokens}
    read = jax.jit(partial(response_states, teacher.config, **options))
    shards, tokens = targets.shards(), 0
    with Progress("teacher_targets", len(shards), start=len(shards) - len(missing)) as bar:
        for done, index in enumerate(missing, 1 + len(shards) - len(missing)):
            batch, real = build.data.ordered(shards[index], targets.size)[0]
            states = read(teacher.params, place(batch, batch_sharding(build.mesh)))
            states, mask = hosts.fetch(states), batch.response_mask
            if hosts.is_main():
                targets.write(index, [states[row][mask[row]] for row in range(real)])
            run.keep(every=PUSHED_EVERY)
            written = int(mask[:real].sum())
            tokens += written
            bar.update(done, tokens=written)
    hosts.barrier("targets are written")
    return {"tokens": tokens, "updates": 0}


def with_targets(run: Run, batches: Any) -> Given:
    """The batches of `distill` with the teacher's states beside them.

    Raises:
        InputError: kept states that are missing, damaged, or of other answers.
    """

    def wrap(batch, hidden: np.ndarray) -> Taught:
        names = batch.__dataclass_fields__
        return Taught(**{name: getattr(batch, name) for name in names}, teacher_hidden=hidden)

    return Given(batches, _targets(run).read(), run.build.config.teacher.dtype, wrap)


def _targets(run: Run) -> Targets:
    build = run.build
    examples = answered(run, "train", build.outline.given)
    teacher = f"{build.teacher_checkpoint.path} {build.config.teacher.dtype}"
    folder = run.folder("teacher_targets") / "states"
    return Targets(folder, examples, build.config.answers.batch_size, teacher)
