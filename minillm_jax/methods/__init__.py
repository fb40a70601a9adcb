"""Training methods: each a record of pure functions that one trainer runs.

`update(state, frozen, batch) -> (state, metrics)` makes one step; `collect(params, frozen,
prompts, key) -> rollout` is what MiniLLM adds: it writes the batch that the next updates read.
`registry` names the methods and says what each is; `assemble.py` makes them from a config.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from minillm_jax.train_state import TrainState
from minillm_jax.types import Params, Sequences

Update = Callable[..., tuple[TrainState, Mapping[str, jax.Array]]]
Collect = Callable[[Params, Any, Sequences, jax.Array], Any]
Observe = Callable[[TrainState, Mapping[str, float]], TrainState]


def compiled(update: Callable, shardings: Any = None) -> Update:
    """Jit an update: its state is donated and returned as a state laid out by `shardings`.

    `shardings` is that of `train_state.state_shardings`; None leaves the layout to the compiler.
    """
    out = (shardings, None)
    return jax.jit(update, static_argnames="most", donate_argnames="state", out_shardings=out)


@dataclass(frozen=True)
class Method:
    """How a student learns; update and collect are jitted and know no config and no file.

    `memory` is what `TrainState.memory` begins with, `observe(state, scores)` what the method makes
    of a validation. `most(batch)`, on the host, is what the update of a batch is given as `most`:
    a static size, of a program that reads each distinct token once.
    """

    update: Update
    collect: Collect | None = None
    memory: Any = ()
    observe: Observe | None = None
    most: Callable[[Any], Any] | None = None
