"""The divergences by name, each with its parameter: what `config.distill.divergence` chooses from.

Every function is `(student's logits [..., V], teacher's [..., V], parameter) -> [...]`, as in
`token`; the gradient to the student is jax's own, formed block by block (`vocab.loss_sum`), or that
of `vocab`'s scores for what those have already. One more is a function and an entry here:
docs/add_a_method.md.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from minillm_jax.objectives import taid, token
from minillm_jax.objectives.vocab import Scores
from minillm_jax.types import InputError


@dataclass(frozen=True)
class Divergence:
    """A divergence: its function, and the name, default and bounds of its parameter, if any.

    `scored`: the same from the scores of `vocab`, which have a gradient in closed form: a pass less
    over the vocabulary. `scheduled`: the parameter moves while training goes on, by a
    `taid.Schedule`.
    """

    function: Callable[[jax.Array, jax.Array, Any], jax.Array]
    parameter: str = ""
    default: float = 0.0
    bounds: tuple[float, float] = (0.0, 1.0)
    scored: Callable[[Scores], jax.Array] | None = None
    scheduled: bool = False

    def checked(self, name: str, value: float | None) -> float:
        """The parameter: `value`, or the default where that is None.

        Raises:
            InputError: out of bounds, or given to a divergence that has none.
        """
        if value is None:
            return self.default
        if not self.parameter:
            raise InputError(f"parameter={value}: {name} has none, leave it at None")
        low, high = self.bounds
        if not low <= value <= high:
            raise InputError(
                f"parameter={value}: {self.parameter} of {name} lies from {low:g} to {high:g}"
            )
        return float(value)


DIVERGENCES = {
    "forward_kl": Divergence(
        lambda q, p, _: token.forward_kl(q, p), scored=lambda scores: scores["forward_kl"]
    ),
    # -sum p log q, which is KL[p || q] and the entropy of p: the same gradient.
    "cross_entropy": Divergence(
        lambda q, p, _: token.soft_cross_entropy(q, p),
        scored=lambda scores: scores["forward_kl"] + scores["teacher_entropy"],
    ),
    "reverse_kl": Divergence(
        lambda q, p, _: token.reverse_kl(q, p), scored=lambda scores: scores["reverse_kl"]
    ),
    "jsd": Divergence(token.jsd, "beta", 0.5),
    # At 1 the skew leaves the student out of one side, or the teacher out of both.
    "skew_forward_kl": Divergence(token.skew_forward_kl, "skew", 0.1, (0.0, 0.99)),
    "skew_reverse_kl": Divergence(token.skew_reverse_kl, "skew", 0.1, (0.0, 0.99)),
    "total_variation": Divergence(lambda q, p, _: token.total_variation(q, p)),
    "adaptive_kl": Divergence(token.adaptive_kl, "mu", 0.5),
    "interpolated_kl": Divergence(taid.interpolated_kl, "t", 0.4, (0.0, 0.99), scheduled=True),
}


def find(name: str) -> Divergence:
    """The divergence of that name.

    Raises:
        InputError: naming those there are.
    """
    if name not in DIVERGENCES:
        raise InputError(f"divergence={name!r}: choose from {', '.join(DIVERGENCES)}")
    return DIVERGENCES[name]
