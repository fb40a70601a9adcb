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


def adamw(
    learning_rate: float | optax.Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decay_mask: Callable[[Params], Any] | None = None,
    clip_norm: float | None = 1.0,
) -> optax.GradientTransformation:
    """Return AdamW with decoupled weight decay, behind a clip of the gradients' global norm.

    Gradients g become g min(1, clip_norm / |g|) over all parameters together; None, no clip.
    Without `decay_mask` every parameter decays, as in MiniLLM's reference; see `matrices`.
    """
    if clip_norm is not None and not clip_norm > 0:
        raise InputError(f"clip_norm={clip_norm}: give a number above 0, or None for no clip")
    update = optax.adamw(
        learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decay_mask
    )
    if clip_norm is None:
        return update
    return optax.chain(optax.clip_by_global_norm(clip_norm), update)


def matrices(params: Params) -> Any:
    """Return True where weight decay applies if biases and norms are spared.

    By name: in stacked layers a bias has two dimensions, as a matrix has.
    """

    def decays(path, _):
        return path[-1].key not in ("bias", "scale")

    return jax.tree_util.tree_map_with_path(decays, params)


def all_finite(tree: Any) -> jax.Array:
    """Return whether no array of `tree` holds an infinity or a NaN, a bool scalar."""
    return jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]).all()
