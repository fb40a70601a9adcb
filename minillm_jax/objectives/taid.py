"""TAID: a teacher that begins near the student and moves away (Shing et al., arXiv 2501.16937).

    p_t = softmax((1 - t) z_q + t z_p)      loss = KL[p_t || q], p_t without gradient

t rises from `start` to 1: at least as fast as the updates go by, and faster while the loss falls.
"""

from dataclasses import dataclass

import flax.struct
import jax
import jax.numpy as jnp

from minillm_jax.objectives import token
from minillm_jax.types import Array, InputError


def interpolated_kl(logits_q: Array, logits_p: Array, t: Array | float) -> jax.Array:
    """KL[p_t || q] of logits [..., V] with t a number or [...]; t = 1: KL[p || q].

    d/dz_v = q_v - p_t,v for student logits z: p_t is a target, though z is in it.
    """
    t = jnp.asarray(t, jnp.promote_types(logits_q.dtype, jnp.float32))
    t = jnp.broadcast_to(t, logits_q.shape[:-1])[..., None]
    return token.forward_kl(logits_q, jax.lax.stop_gradient((1 - t) * logits_q + t * logits_p))


@flax.struct.dataclass
class Progress:
    """What the schedule remembers; `previous` is inf before the first loss."""

    t: jax.Array
    momentum: jax.Array
    previous: jax.Array


@dataclass(frozen=True)
class Schedule:
    """How t rises over `steps` updates (with the defaults of its code).

        m <- beta m + (1 - beta) (previous - loss) / previous
        t <- min(1, max(start + (1 - start) step / steps, t + alpha sigmoid(m) (1 - t)))

    Raises:
        InputError: a start outside [0, 1).
    """

    steps: int
    start: float = 0.4
    alpha: float = 5e-4
    beta: float = 0.99

    def __post_init__(self):
        if not 0 <= self.start < 1:
            raise InputError(f"parameter={self.start}: t of taid starts from 0 to below 1")

    def begin(self) -> Progress:
        """Before the first update."""
        return Progress(jnp.float32(self.start), jnp.float32(0), jnp.float32(jnp.inf))

    def advance(self, progress: Progress, loss: Array, step: Array) -> Progress:
        """After update number `step`, counted from 0, had this loss; one not finite is ignored.

        The first loss only starts the comparison, as in the reference.
        """
        first = jnp.isinf(progress.previous)
        previous = jnp.where(first, loss, progress.previous)
        change = (previous - loss) / (previous + 1e-15)
        momentum = self.beta * progress.momentum + (1 - self.beta) * change
        least = self.start + (1 - self.start) * step / self.steps
        t = progress.t + self.alpha * jax.nn.sigmoid(momentum) * (1 - progress.t)
        t = jnp.clip(jnp.maximum(least, t), max=1)
        moved = Progress(t, momentum, jnp.asarray(loss))
        started = Progress(progress.t, progress.momentum, jnp.asarray(loss))
        good = jnp.isfinite(loss)
        return jax.tree.map(
            lambda m, s, old: jnp.where(good, jnp.where(first, s, m), old).astype(old.dtype),
            moved,
            started,
            progress,
        )
