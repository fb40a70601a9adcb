"""The loop of every method: batch, (collect,) update, log, evaluate, save. No maths is here.

Everything that a step needs follows from its number: the batch, the key, the place in the inner
epochs. A run that starts again from a checkpoint therefore goes on as if it had never stopped.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import numpy as np

from minillm_jax import hosts, stopping
from minillm_jax.evaluation.text import repetition
from minillm_jax.methods import Method
from minillm_jax.methods.accumulate import lengths
from minillm_jax.train_state import TrainState
from minillm_jax.types import Sequences

MAX_SKIPPED = 10  # non-finite updates in a row that end a run


class TrainingStopped(Exception):
    """Training cannot go on; the message says why and which checkpoint is the last good one."""


class Batches(Protocol):
    """Random access to the batches of a stage: the data position is an index."""

    def __getitem__(self, index: int) -> Sequences: ...


class Blocks(Protocol):
    """Random access to blocks of text [B, T], for methods with a corpus loss."""

    def __getitem__(self, index: int) -> np.ndarray: ...


@dataclass(frozen=True)
class Schedule:
    """How many updates, of what size, and how often to look.

    An on-policy method collects `rollouts` responses, then makes `inner_epochs` passes over them
    in batches of `batch_size`; `rollouts` 0 is for methods that only read.
    """

    steps: int
    batch_size: int
    evaluate_every: int
    save_every: int
    rollouts: int = 0
    inner_epochs: int = 1

    @property
    def updates_per_round(self) -> int:
        """Updates between two collections."""
        return self.inner_epochs * (self.rollouts // self.batch_size)

    def place(self, step: int) -> tuple[int, int]:
        """Which collection `step` belongs to, and the place of the step within it."""
        return divmod(step, self.updates_per_round)

    def rows(self, step: int, seed: int) -> np.ndarray:
        """Rows of the collection that update `step` uses: each epoch a new order, none twice."""
        round_, place = self.place(step)
        epoch, batch = divmod(place, self.rollouts // self.batch_size)
        order = np.random.default_rng([seed, round_, epoch]).permutation(self.rollouts)
        return order[batch * self.batch_size : (batch + 1) * self.batch_size]


@dataclass(frozen=True)
class Hooks:
    """What the stage does with what the loop produces."""

    log: Callable[[int, Mapping[str, float], Mapping[str, float]], None]  # step, metrics, times
    evaluate: Callable[[int, TrainState], Mapping[str, float]]
    save: Callable[[int, TrainState, Any, bool], None]  # step, state, rollout or None, evaluated?
    skipped: Callable[[int, Any], None]  # step, the batch whose loss or gradient is not finite


def fit(
    method: Method,
    state: TrainState,
    frozen: Any,
    batches: Batches,
    schedule: Schedule,
    hooks: Hooks,
    *,
    seed: int,
    corpus: Blocks | None = None,
    rollout: Any = None,
    tokens: float = float("inf"),
    spent: int = 0,
    evaluated: bool = True,
    put: Callable[[Any], Any] = lambda batch: batch,
    take: Callable[[Any, np.ndarray], Any] = lambda tree, rows: jax.tree.map(
        lambda leaf: leaf[rows], tree
    ),
    arrange: Callable[[np.ndarray], np.ndarray] | None = None,
) -> TrainState:
    """Train from `state.step` to `schedule.steps` and return the last state.

    It ends before, with an evaluation, once `tokens` have been read, of which `spent` already are.

    Args:
        frozen: what the method reads and never changes, such as the teacher.
        batches: by update for methods that read, by collection for those that collect.
        corpus: by update; its blocks go to the method beside the batch, as (batch, blocks).
        rollout: the collection in use when the checkpoint was made, if there was one.
        evaluated: whether `state` has been; if not, that comes first.
        put: puts the rows of a batch, or of the prompts of a collection, on the devices.
        take: takes rows of a collection, which is there already.
        arrange: an order for the rows of an update by how many tokens each has, which changes the
            time that it takes, not the update.

    Raises:
        TrainingStopped: after `MAX_SKIPPED` non-finite updates in a row.
        Stopped: the run was asked to end; what has been trained is saved.
    """
    key = jax.random.key(seed)
    step = first = int(state.step)

    def evaluate(state):
        scores = hooks.evaluate(step, state)
        return method.observe(state, scores) if method.observe else state

    def save():
        more = method.collect is not None and 0 < schedule.place(step)[1] and step < schedule.steps
        hooks.save(step, state, rollout if more else None, evaluated)

    try:
        if not evaluated:
            state, evaluated = evaluate(state), True
        while step < schedule.steps and spent < tokens:
            stopping.check()
            tick = time.monotonic()
            times: dict[str, float] = {}
            extra: dict[str, float] = {}
            if method.collect is None:
                batch = batches[step]
                read = int(batch.prompt_mask.sum() + batch.response_mask.sum())
                if arrange:
                    order = arrange(np.asarray(lengths(batch)))
                    batch = jax.tree.map(lambda leaf, order=order: leaf[order], batch)
                batch = put(batch)
            else:
                round_, place = schedule.place(step)
                if place == 0:
                    prompts = put(batches[round_])
                    round_key = jax.random.fold_in(key, round_)
                    rollout = method.collect(state.params, frozen, prompts, round_key)
                    drawn = int(jax.block_until_ready(rollout.response_mask).sum())
                    times["collect_seconds"] = time.monotonic() - tick
                    times["collect_tokens_per_second"] = drawn / times["collect_seconds"]
                    extra["repetition"] = _repetition(rollout)
                rows = schedule.rows(step, seed)
                if arrange:
                    rows = rows[arrange(hosts.fetch(lengths(rollout))[rows])]
                batch = take(rollout, rows)
                read = int(batch.prompt_mask.sum() + batch.response_mask.sum())
            if corpus is not None:
                text = corpus[step]
                read += int(np.sum(text >= 0))
                batch = batch, put(text)
            told = {"most": method.most(batch)} if method.most else {}
            state, metrics = method.update(state, frozen, batch, **told)
            step += 1
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
            values = {"tokens": read} | values | extra  # a method that writes knows better
            spent += int(values["tokens"])
            last = step == schedule.steps or spent >= tokens
            due = last or step % schedule.evaluate_every == 0
            evaluated = not due
            times["tokens_per_second"] = values["tokens"] / (time.monotonic() - tick)
            hooks.log(step, values, times)
            if values["skipped"]:
                hooks.skipped(step, batch)
            if int(state.consecutive_skipped) >= MAX_SKIPPED:
                raise TrainingStopped(
                    f"{MAX_SKIPPED} updates in a row were not finite, the last at step {step}; "
                    "lower the learning rate, or look at the data of these steps"
                )
            if due:
                stopping.check()
                state, evaluated = evaluate(state), True
            if not last and step % schedule.save_every == 0:
                save()
    except stopping.Stopped as error:
        if step == first:  # saved already, or nothing to save
            raise
        save()
        raise stopping.Stopped(f"saved after update {step} of {schedule.steps}") from error
    return state


def _repetition(rollout: Any) -> float:
    """Mean share of the 4-grams of a response that occurred earlier in it."""
    ids, mask = hosts.fetch(rollout.response), hosts.fetch(rollout.response_mask)
    return float(
        np.mean([repetition(row[real].tolist()) for row, real in zip(ids, mask, strict=True)])
    )
