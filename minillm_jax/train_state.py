"""The state of training, one frozen pytree, and the only place where parameters change.

    abstract -> shardings -> arrays

`abstract_state` describes shapes, dtypes and shardings of everything with nothing allocated; a
checkpoint is restored into it, or `init_state` fills it from parameters that are already placed.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.typing import ArrayLike

from minillm_jax.optim import global_norm, skipping
from minillm_jax.sharding import place, replicated
from minillm_jax.types import Params


@flax.struct.dataclass
class TrainState:
    """Parameters, optimizer state and the counters of updates.

    `step` counts the updates that were tried, skipped ones included, so that it addresses the
    data and the random keys; the optimizer's own count leaves out the skipped ones.
    """

    step: jax.Array  # int32
    params: Params
    opt_state: Any
    skipped: jax.Array  # int32, updates refused since the start
    consecutive_skipped: jax.Array  # int32, of those the ones since the last good update
    memory: Any = ()  # what the method remembers from update to update, whole on every device

    def apply_gradients(
        self, optimizer: optax.GradientTransformation, grads: Params, loss: ArrayLike
    ) -> tuple["TrainState", dict[str, jax.Array]]:
        """Return the state after one update, and its metrics `grad_norm` and `skipped` (0 or 1).

        If `loss` or the norm of the gradients is not finite, parameters and optimizer state stay
        bit for bit what they were and the counters rise. `grad_norm` is that before clipping.
        """
        norm = global_norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        # An elementwise choice, not lax.cond: it fuses into the update and copies nothing.
        update = skipping(optimizer).update
        updates, opt_state = update(grads, self.opt_state, self.params, finite=finite)
        skip = (~finite).astype(jnp.int32)
        state = TrainState(
            step=self.step + 1,
            params=optax.apply_updates(self.params, updates),
            opt_state=opt_state,
            skipped=self.skipped + skip,
            consecutive_skipped=(self.consecutive_skipped + 1) * skip,
            memory=self.memory,
        )
        return state, {"grad_norm": norm, "skipped": skip}


def abstract_state(
    abstract_params: Params,
    by_param: Any,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    memory: Any = (),
) -> TrainState:
    """Describe the state of `abstract_params`, laid out `by_param`, a sharding on every leaf.

    What the optimizer keeps per parameter is sharded as the parameter is; the rest is replicated.
    """
    whole = replicated(mesh)
    opt_state = jax.eval_shape(optimizer.init, abstract_params)
    opt_state = optax.tree.map_params(
        optimizer, _on, opt_state, by_param, transform_non_params=lambda leaf: _on(leaf, whole)
    )
    counter: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    return TrainState(
        step=counter,
        params=jax.tree.map(_on, abstract_params, by_param),
        opt_state=opt_state,
        skipped=counter,
        consecutive_skipped=counter,
        memory=jax.tree.map(lambda leaf: _on(leaf, whole), memory),
    )


def init_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    abstract: TrainState,
    memory: Any = (),
) -> TrainState:
    """Return the state at step 0 around `params`, made with the shardings of `abstract`.

    The arrays of `params` are taken, not copied: a step that donates the state consumes them.
    """
    shardings = state_shardings(abstract)

    def start(params):
        return (jnp.int32(0), jnp.int32(0), jnp.int32(0)), optimizer.init(params)

    counters = (shardings.step, shardings.skipped, shardings.consecutive_skipped)
    out_shardings = (counters, shardings.opt_state)
    (step, skipped, consecutive), opt_state = jax.jit(start, out_shardings=out_shardings)(params)
    return TrainState(
        step=step,
        params=jax.tree.map(jax.device_put, params, shardings.params),
        opt_state=opt_state,
        skipped=skipped,
        consecutive_skipped=consecutive,
        memory=place(memory, shardings.memory),
    )


def state_shardings(abstract: TrainState) -> Any:
    """Return the shardings of `abstract`, for `out_shardings` of the step."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def _on(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
