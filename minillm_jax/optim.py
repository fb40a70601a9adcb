"""Learning-rate schedules, AdamW, and the test that guards an update. Built on optax.

The decision to skip an update is made in `train_state`, which sees the loss as well.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from minillm_jax.types import InputError, Params


def schedule(
    kind: Literal["constant", "cosine"],
    learning_rate: float,
    *,
    warmup: int = 0,
    steps: int = 0,
    final: float = 0.0,
) -> optax.Schedule:
    """Return lr(t) for the update of index t, after a linear warm-up over `warmup` updates.

    Warm-up: lr (t + 1) / (warmup + 1), so that the first update is not wasted on a rate of zero.
    Then `constant`, or `cosine`: final + (lr - final) (1 + cos(pi s)) / 2 with
    s = (t - warmup) / (steps - warmup), which is `final` from t = steps on.
    """
    if not (math.isfinite(learning_rate) and learning_rate >= 0):
        raise InputError(f"learning_rate={learning_rate}: give a number of at least 0")
    if warmup < 0:
        raise InputError(f"warmup={warmup}: give a number of updates, 0 for none")
    if kind not in ("constant", "cosine"):
        raise InputError(f"schedule={kind!r}: choose constant or cosine")
    if kind == "cosine" and steps <= warmup:
        raise InputError(f"warmup={warmup} leaves no update of steps={steps}: lower warmup")

    def rate(count: Any) -> Any:
        t = jnp.asarray(count, jnp.float32)
        after = jnp.float32(learning_rate)
        if kind == "cosine":
            s = jnp.clip((t - warmup) / (steps - warmup), 0.0, 1.0)
            after = final + (learning_rate - final) * (1.0 + jnp.cos(jnp.pi * s)) / 2.0
        return jnp.where(t < warmup, learning_rate * (t + 1) / (warmup + 1), after)

    return rate


class Skipping(optax.GradientTransformationExtraArgs):
    """An optimizer whose `update` is told by `finite`, a bool scalar, whether there is to be one.

    If not, its state stays bit for bit what it was, and so do parameters that its updates are
    added to.
    """


def skipping(optimizer: optax.GradientTransformation) -> Skipping:
    """Any optimizer as one that skips; `adamw` is one already, and copies nothing for it."""
    if isinstance(optimizer, Skipping):
        return optimizer

    def update(updates, state, params=None, *, finite: Any = True, **_: Any):
        updates, new = optimizer.update(updates, state, params)
        updates = jax.tree.map(lambda x: jnp.where(finite, x, _NOTHING), updates)
        return updates, jax.tree.map(lambda x, old: jnp.where(finite, x, old), new, state)

    return Skipping(optimizer.init, update)


# Added to a parameter it leaves every bit: -0 + 0 would be 0.
_NOTHING = -0.0


def adamw(
    learning_rate: float | optax.Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decay_mask: Callable[[Params], Any] | None = None,
    clip_norm: float | None = 1.0,
) -> Skipping:
    """Return AdamW with decoupled weight decay, behind a clip of the gradients' global norm.

        m' = b1 m + (1 - b1) g,  v' = b2 v + (1 - b2) g^2       g clipped: g min(1, clip_norm / |g|)
        x' = x - lr (m' / (1 - b1^t) / (sqrt(v' / (1 - b2^t)) + eps) + weight_decay x)

    with |g| over all parameters together; `clip_norm` None is no clip. Without `decay_mask` every
    parameter decays, as in MiniLLM's reference; see `matrices`. State and result are those of
    `optax.adamw` behind `optax.clip_by_global_norm`. Optax's own update cannot be skipped in place:
    x' is made of moments that are not kept when the update is skipped, so the old ones are copied
    first. On a CPU that is most of the update's time.
    """
    if clip_norm is not None and not clip_norm > 0:
        raise InputError(
            f"clip_norm={clip_norm}: give a number above 0, or None in the file for no clip"
        )
    decay = {"weight_decay": weight_decay, "mask": decay_mask}
    plain = optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, **decay)
    if clip_norm is not None:
        plain = optax.chain(optax.clip_by_global_norm(clip_norm), plain)

    def update(updates, state, params=None, *, finite: Any = True, **_: Any):
        grads = updates
        # A factor, not a quotient per element, which XLA would write to memory for its three uses.
        factor = 1.0 if clip_norm is None else jnp.minimum(1.0, clip_norm / global_norm(grads))
        adam = optax.tree.get(state, "ScaleByAdamState")
        count = adam.count + jnp.asarray(finite, adam.count.dtype)
        t = jnp.maximum(count, 1).astype(jnp.float32)
        rate: Any = learning_rate(adam.count) if callable(learning_rate) else learning_rate
        decays = decay_mask(params) if decay_mask else jax.tree.map(lambda _: True, grads)

        def moment(old, g, b, power):
            new = b * old + (1 - b) * (g * factor).astype(old.dtype) ** power
            return jnp.where(finite, new, old)

        def change(m, v, x, decayed):
            step = m / (1 - b1**t) / (jnp.sqrt(v / (1 - b2**t)) + eps)
            step = step + weight_decay * x if decayed and weight_decay else step
            return jnp.where(finite, -rate * step, _NOTHING).astype(m.dtype)

        mu = jax.tree.map(lambda old, g: moment(old, g, b1, 1), adam.mu, grads)
        nu = jax.tree.map(lambda old, g: moment(old, g, b2, 2), adam.nu, grads)
        updates = jax.tree.map(change, mu, nu, params, decays)
        return updates, optax.tree.set(state, count=count, mu=mu, nu=nu)

    return Skipping(plain.init, update)


def matrices(params: Params) -> Any:
    """Return True where weight decay applies if biases and norms are spared.

    By name: in stacked layers a bias has two dimensions, as a matrix has.
    """

    def decays(path, _):
        return path[-1].key not in ("bias", "scale")

    return jax.tree_util.tree_map_with_path(decays, params)


def global_norm(tree: Any) -> jax.Array:
    """sqrt(sum x^2) over all arrays of `tree`, summed in float32 at least.

    Not finite if any element is not, nor if the sum of squares is beyond float32.
    """

    def squares(x):
        return jnp.sum(jnp.square(x.astype(jnp.promote_types(x.dtype, jnp.float32))))

    return jnp.sqrt(sum(map(squares, jax.tree.leaves(tree)), jnp.float32(0)))
