"""The stage in which the teacher reads the given answers once, for all epochs and methods.

What it keeps is exact, its hidden states, or with `distill.cache_teacher=topK` the K likeliest ids
of every token with their log-probabilities and that of all others together (`objectives.top_k`).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from minillm_jax import hosts, recipe
from minillm_jax.data.targets import Given, Targets
from minillm_jax.models import DecoderConfig, head, logits
from minillm_jax.objectives import top_k
from minillm_jax.objectives.top_k import Cut
from minillm_jax.reporting.progress import Progress
from minillm_jax.rollout import Taught, response_states
from minillm_jax.sharding import batch_sharding, place
from minillm_jax.stages import Outcome, Run
from minillm_jax.stages.answers import PUSHED_EVERY, answered
from minillm_jax.types import Params, Sequences


def teacher_targets(run: Run) -> Outcome:
    """Keep what the teacher says of the answers that `distill` is given."""
    build, targets = run.build, _targets(run)
    teacher, missing, read = build.teacher, targets.missing(), _reader(run)
    shards, tokens = targets.shards(), 0
    with Progress("teacher_targets", len(shards), start=len(shards) - len(missing)) as bar:
        for done, index in enumerate(missing, 1 + len(shards) - len(missing)):
            batch, real = build.data.ordered(shards[index], targets.size)[0]
            kept, mask = read(teacher.params, batch), batch.response_mask
            if hosts.is_main():
                targets.write(index, [kept[row][mask[row]] for row in range(real)])
            run.keep(every=PUSHED_EVERY)
            written = int(mask[:real].sum())
            tokens += written
            bar.update(done, tokens=written)
    hosts.barrier("targets are written")
    return {"tokens": tokens, "updates": 0}


def with_targets(run: Run, batches: Any) -> Given:
    """The batches of `distill` with what was kept beside them.

    Raises:
        InputError: kept targets that are missing, damaged, or of other answers.
    """
    dtype, cuts = run.build.config.teacher.dtype, _cut_to(run)

    def wrap(batch: Sequences, kept: np.ndarray) -> Sequences:
        known = {name: getattr(batch, name) for name in batch.__dataclass_fields__}
        if cuts:
            fields = {name: np.ascontiguousarray(kept[name]) for name in ("ids", "log_p")}
            return Cut(**known, **fields)
        return Taught(**known, teacher_hidden=kept.view(dtype))

    return Given(batches, _targets(run).read(), wrap)


def _reader(run: Run) -> Callable[[Params, Sequences], np.ndarray]:
    """What is kept of a batch, [B, N, ...] on the host."""
    build, k = run.build, _cut_to(run)
    options = {"dtype": build.config.teacher.dtype, "max_tokens": build.data.max_tokens}
    teacher, rows = build.teacher.config, batch_sharding(build.mesh)
    if not k:
        states = jax.jit(partial(response_states, teacher, **options))
        return lambda params, batch: hosts.fetch(states(params, place(batch, rows)))
    likeliest = jax.jit(partial(_likeliest, teacher, k=k, size=build.vocab, **options))

    def read(params: Params, batch: Sequences) -> np.ndarray:
        ids, log_p = map(hosts.fetch, likeliest(params, place(batch, rows)))
        fields = [("ids", np.int32, ids.shape[2:]), ("log_p", np.float32, log_p.shape[2:])]
        kept = np.empty(ids.shape[:2], fields)
        kept["ids"], kept["log_p"] = ids, log_p
        return kept

    return read


def _likeliest(
    teacher: DecoderConfig, params: Params, batch: Sequences, *, k: int, size: int, **options: Any
) -> tuple[jax.Array, jax.Array]:
    """`top_k.likeliest` at every token [B, N, ...]; the logits of one position exist at a time."""
    states = response_states(teacher, params, batch, **options)
    top = head(teacher, params, states.dtype)

    def at(hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        return top_k.likeliest(logits(top, hidden)[:, :size], k)

    found = jax.lax.map(at, jnp.moveaxis(states, 1, 0))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), found)


def _cut_to(run: Run) -> int:
    """How many ids of a token are kept; 0: hidden states are."""
    return min(recipe.kept_ids(run.build.config.distill.cache_teacher), run.build.vocab)


def _targets(run: Run) -> Targets:
    build, k = run.build, _cut_to(run)
    examples = answered(run, "train", build.outline.given)
    teacher = f"{build.teacher_checkpoint.path} {build.config.teacher.dtype}"
    if k:
        teacher += f" {k} of {build.vocab} at {build.config.teacher.temperature}"
    folder = run.folder("teacher_targets") / "states"
    return Targets(folder, examples, build.config.answers.batch_size, teacher)
