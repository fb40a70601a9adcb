"""The words that every layer shares: aliases, the batch layout, and the error for bad input.

Letters of the shape comments: `B` batch, `T` time, `P` prompt slots, `N` response slots, `V`
vocabulary, `D` embedding width, `F` MLP width, `H` heads, `K` key-value heads, `h` head width,
`L` layers, `S` cache slots, `C` chunk. `p` is the teacher, `q` the student, as in the paper.
"""

from typing import Any

import flax.struct
import jax
import numpy as np

Params = Any  # a nested dict of arrays, the `params` collection of a Linen module
Array = jax.Array | np.ndarray


class InputError(Exception):
    """Bad input from the user: one line that names the culprit and the cure; exit code 2."""


@flax.struct.dataclass
class Sequences:
    """Prompts and responses, the one batch layout of training, rollout and evaluation.

    ```
    slot       0 ... P-1 | P ... P+N-1
    prompt     . . a b c |                left-padded
    response             | x y E . .      right-padded, E = end of sequence
    ```
    The hidden state at slot `P - 1 + t` predicts response token `t`. The mask of the response
    includes the first end-of-sequence token and nothing after it.
    """

    prompt: Array  # [B, P] int32
    prompt_mask: Array  # [B, P] bool
    response: Array  # [B, N] int32
    response_mask: Array  # [B, N] bool
