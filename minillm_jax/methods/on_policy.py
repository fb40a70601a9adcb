"""Whose answers an update learns from: the given ones, or those that the student writes itself.

GKD (Agarwal et al., arXiv 2306.13649, algorithm 1): with probability `share` (its lambda) the
student answers the prompts of the batch, else the given answers are taken. Nothing flows back
through the sampling.

DistiLLM (Ko et al., arXiv 2402.03898, as in its code) keeps what the student wrote and
raises the probability only when it is needed. With r uniform and the threshold phi, per update:

    r < phi (1 - step / steps), or r < phi while the buffer fills    the student writes; it is kept
    r < phi otherwise                                                a draw from the buffer
    else                                                             the given answers

phi starts at `share`; a validation loss that is `tolerance` or more above the last one to do so
(the first one at the start) raises it by `rise`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from minillm_jax.models import DecoderConfig
from minillm_jax.rollout import Warp, generate
from minillm_jax.train_state import TrainState
from minillm_jax.types import Array, InputError, Params, Sequences


@flax.struct.dataclass
class Buffer:
    """What the student wrote, the oldest overwritten first, and DistiLLM's threshold."""

    rows: Sequences  # [C, ...]
    written: Array  # int32, rows ever put in
    threshold: Array  # float32, phi
    previous: Array  # float32, the validation loss that counts; inf before the first


@dataclass(frozen=True)
class Replay:
    """DistiLLM's adaptive replay over `steps` updates, with the numbers of its code."""

    capacity: int
    steps: int
    rise: float = 0.1
    tolerance: float = 0.1

    def begin(self, share: float, prompt_slots: int, response_slots: int, pad_id: int) -> Buffer:
        """An empty buffer of host arrays, with the threshold at `share`."""
        sizes = (self.capacity, prompt_slots), (self.capacity, response_slots)
        ids = [np.full(size, pad_id, np.int32) for size in sizes]
        real = [np.zeros(size, bool) for size in sizes]
        return Buffer(
            Sequences(ids[0], real[0], ids[1], real[1]),
            np.zeros((), np.int32),
            np.asarray(share, np.float32),
            np.asarray(np.inf, np.float32),
        )

    def observe(self, state: TrainState, scores: Mapping[str, float]) -> TrainState:
        """The state after a validation: phi may have risen."""
        buffer: Any = state.memory["replay"]
        loss, previous = scores["loss"], float(buffer.previous)
        phi = float(buffer.threshold)
        if np.isinf(previous):
            previous = loss
        elif loss >= previous + self.tolerance:
            phi, previous = min(phi + self.rise, 1.0), loss
        changed = {"threshold": phi, "previous": previous}
        values = {
            name: jax.device_put(np.float32(value), getattr(buffer, name).sharding)
            for name, value in changed.items()
        }
        memory = state.memory | {"replay": replace(buffer, **values)}
        return replace(state, memory=memory)


@dataclass(frozen=True)
class OnPolicy:
    """Who writes how often: `share` is lambda, or where phi starts with `replay`.

    The student writes up to `slots` tokens at temperature 1 over the first `vocab` ids, in `dtype`.

    Raises:
        InputError: a share outside [0, 1].
    """

    share: float
    slots: int
    eos_id: int
    pad_id: int
    vocab: int
    dtype: str = "float32"
    replay: Replay | None = None

    def __post_init__(self):
        if not 0 <= self.share <= 1:
            raise InputError(f"on_policy={self.share}: the student's share is from 0 to 1")

    @property
    def writes(self) -> bool:
        """Whether the student may ever write."""
        return self.share > 0 or self.replay is not None

    def source(
        self,
        student: DecoderConfig,
        params: Params,
        buffer: Buffer | None,
        given: Sequences,
        key: jax.Array,
        step: jax.Array,
    ) -> tuple[Sequences, Buffer | None, jax.Array]:
        """What this update learns from, the buffer after it, and who wrote it.

        Who: 0 for given answers, 1 for the student just now, 2 for its earlier self.
        """
        coin_key, key = jax.random.split(key)
        coin = jax.random.uniform(coin_key)

        def keep(buffer):
            return given, buffer

        def fresh(buffer):
            rows = write(self, student, params, given, key)
            if buffer is None:
                return rows, buffer
            where = (buffer.written + jnp.arange(len(given.prompt))) % len(buffer.rows.prompt)
            stored = jax.tree.map(lambda old, new: old.at[where].set(new), buffer.rows, rows)
            return rows, replace(buffer, rows=stored, written=buffer.written + len(given.prompt))

        def again(buffer):
            size = len(buffer.rows.prompt)
            drawn = jax.random.choice(key, size, (len(given.prompt),), replace=False)
            return jax.tree.map(lambda x: x[drawn], buffer.rows), buffer

        if self.replay is None or buffer is None:
            who = (coin < self.share).astype(jnp.int32)
            rows, buffer = jax.lax.switch(who, (keep, fresh), buffer)
        else:
            phi = buffer.threshold
            full = buffer.written >= self.replay.capacity
            now = coin < phi * (1 - (step + 1) / self.replay.steps)
            now |= (coin < phi) & ~full
            who = jnp.where(now, 1, jnp.where(coin < phi, 2, 0))
            rows, buffer = jax.lax.switch(who, (keep, fresh, again), buffer)
        return rows, buffer, who


def write(
    how: OnPolicy, student: DecoderConfig, params: Params, given: Sequences, key: jax.Array
) -> Sequences:
    """The student's answers to the prompts of `given`, in as many slots as those have."""
    answer = generate(
        student,
        params,
        given.prompt,
        given.prompt_mask,
        key,
        slots=how.slots,
        warp=Warp(),
        eos_id=how.eos_id,
        pad_id=how.pad_id,
        vocab=how.vocab,
        dtype=how.dtype,
    )
    more = ((0, 0), (0, given.response.shape[1] - how.slots))
    tokens: Any = jnp.pad(answer.tokens, more, constant_values=how.pad_id)
    return Sequences(given.prompt, given.prompt_mask, tokens, jnp.pad(answer.mask, more))
