"""MiniLLM's gradient: targets of one update without gradient, then per-token losses.

With p~ = (1 - alpha) q_old + alpha p the sampling mixture and w_t = q_old / p~ (Gu et al., arXiv
2306.08543, section 2.2), per token

    policy_t       = -A_t rho_t,  rho_t = q(y_t) / p~(y_t)      the long-term part, PPO-clipped
    single_step_t  = w_t KL[q || p](. | y_<t)                   exact over the vocabulary

`prepare` sees the whole batch of an update once; `losses` may then run on micro-batches of it.
Where the paper, its reference code and `corrected` differ: docs/method.md.
"""

import dataclasses
from typing import Literal

import chex
import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from minillm_jax.objectives import reduce
from minillm_jax.objectives.reduce import keep
from minillm_jax.types import Array, InputError


@dataclasses.dataclass(frozen=True)
class Policy:
    """Choices of the estimator; `PRESETS` has the three that are tested as they stand.

    `estimator` decides what no switch below does: where the return starts (`lmops` at t, else at
    t + 1), what it is divided by (`lmops`, `paper`: the number of tokens; `corrected`: the sum of
    their discounts), whether `lmops` whitens over padding, and what the loss is a mean of.

    Attributes:
        gamma: discount per token, from the token itself and not from the start of the answer.
        reward_scaling: the reward is (log p - log q_old) / reward_scaling.
        reward_clip: bound of |reward|, None for none.
        cliprange: PPO's epsilon, None for no clip.
        clip_weight: clip rho = ratio * w, as paper and reference do; else clip the ratio and
            multiply by w, so that nothing is clipped before the student has moved.
        length_norm: divide the return as above.
        whiten: subtract the mean of A, or also divide by its standard deviation.
        single_step: add the single-step term to the loss.
        weight_single_step: multiply it by w_t. E[w_t | y_<t] = 1, so this changes no expectation.
        prefix_weights: weigh by the product of all ratios so far instead of the token's own. With
            gamma 1 and nothing normalised or clipped the gradient is then exact for any mixture.

    Raises:
        InputError: an unknown name, or a combination that has no meaning.
    """

    estimator: Literal["lmops", "paper", "corrected"] = "corrected"
    gamma: float = 0.95
    reward_scaling: float = 1.0
    reward_clip: float | None = 100.0
    cliprange: float | None = 0.2
    clip_weight: bool = True
    length_norm: bool = True
    whiten: Literal["none", "center", "full"] = "full"
    single_step: bool = True
    weight_single_step: bool = True
    prefix_weights: bool = False

    def __post_init__(self):
        for name, allowed in (
            ("estimator", ("lmops", "paper", "corrected")),
            ("whiten", ("none", "center", "full")),
        ):
            if getattr(self, name) not in allowed:
                raise InputError(f"{name}={getattr(self, name)!r}: use one of {', '.join(allowed)}")
        if not 0 <= self.gamma <= 1:
            raise InputError(f"gamma={self.gamma}: a discount lies between 0 and 1")
        for name in ("reward_scaling", "reward_clip", "cliprange"):
            value = getattr(self, name)
            if not (value is None and name != "reward_scaling") and not (value and value > 0):
                raise InputError(f"{name}={value}: use a positive number")
        if self.prefix_weights and self.estimator == "lmops":
            raise InputError("prefix_weights: lmops has none; use estimator=paper or corrected")

    @property
    def reduction(self) -> Literal["token", "sequence"]:
        """What `reduce.total` counts: the paper sums over t and averages over sequences."""
        return "sequence" if self.estimator == "paper" else "token"


PRESETS = {
    "lmops": Policy("lmops", reward_scaling=0.5, weight_single_step=False),
    "paper": Policy("paper", gamma=1.0, reward_clip=None, whiten="none"),
    "corrected": Policy("corrected"),
}


@flax.struct.dataclass
class Targets:
    """Constants of one update, one value per token; padding holds advantage 0 and weight 1."""

    advantage: jax.Array  # [B, N]
    weight: jax.Array  # [B, N] w_t, or its product over the prefix
    log_base: jax.Array  # [B, N] the ratio is exp(log_q - log_base)
    reward: jax.Array  # [B, N]


def log_mixture(log_q: Array, log_p: Array, alpha: float | None) -> jax.Array:
    """log p~ = log((1 - alpha) q + alpha p); log q where nothing is mixed (None or <= 0)."""
    chex.assert_equal_shape([log_q, log_p])
    if alpha is None or alpha <= 0:
        return jnp.asarray(log_q)
    if alpha >= 1:
        return jnp.asarray(log_p)
    return jnp.logaddexp(log_q + jnp.log1p(-alpha), log_p + jnp.log(alpha))


def discounted(rewards: Array, decay: float | Array) -> jax.Array:
    """G_t = r_t + decay_t G_{t+1} along the last axis [B, N], in O(log N) steps.

    Only products of `decay` are formed, never quotients or gamma^-t, so a long answer underflows to
    the right value instead of 0 / 0.
    """

    def chain(later, earlier):
        return later[0] * earlier[0], earlier[1] + earlier[0] * later[1]

    decay = jnp.broadcast_to(jnp.asarray(decay, rewards.dtype), rewards.shape)
    return lax.associative_scan(chain, (decay, rewards), reverse=True, axis=rewards.ndim - 1)[1]


def rewards(policy: Policy, log_p: Array, log_q_old: Array, mask: Array) -> jax.Array:
    """r_t = clip((log p - log q_old) / reward_scaling), [B, N], 0 in padding."""
    reward = keep(log_p - log_q_old, mask) / policy.reward_scaling
    if policy.reward_clip is None:
        return reward
    return jnp.clip(reward, -policy.reward_clip, policy.reward_clip)


def returns(policy: Policy, reward: Array, weight: Array, mask: Array) -> jax.Array:
    """A_t before whitening, [B, N]; `weight` is the tokens' own w_t, used by `prefix_weights`.

        lmops      sum_{k>=t} gamma^{k-t} r_k   / #{k >= t}
        paper      sum_{k>t} gamma^{k-t-1} r_k  / #{k > t}
        corrected  sum_{k>t} gamma^{k-t-1} r_k  / sum_{k>t} gamma^{k-t-1}

    The divisor applies with `length_norm`; without a later token the value is 0.
    """
    count = mask.astype(reward.dtype)
    if policy.estimator == "lmops":
        value, divisor = discounted(reward, policy.gamma), discounted(count, 1.0)
    else:
        if policy.prefix_weights:
            # r_k is drawn after t, so it needs w_{t+1} ... w_k besides the weight of token t.
            value = discounted(weight * reward, policy.gamma * weight)
        else:
            value = discounted(reward, policy.gamma)
        unit = policy.gamma if policy.estimator == "corrected" else 1.0
        value, divisor = _after(value), _after(discounted(count, unit))
    if policy.length_norm:
        value = value / jnp.maximum(divisor, 1)
    return keep(value, mask)


def whitened(policy: Policy, advantage: Array, mask: Array) -> jax.Array:
    """A less its mean, over its standard deviation (biased, eps 1e-8), over the whole batch [B, N].

    The statistics are those of the real tokens; `lmops` counts the zeros of padding too, so there
    the result depends on N.
    """
    advantage = jnp.asarray(advantage)
    if policy.whiten == "none":
        return advantage
    counted = jnp.ones_like(mask) if policy.estimator == "lmops" else mask
    centred = advantage - reduce.mean(reduce.total(advantage, counted))
    if policy.whiten == "full":
        variance = reduce.mean(reduce.total(jnp.square(centred), counted))
        centred = centred * lax.rsqrt(variance + 1e-8)
    return keep(centred, counted)


def prepare(
    policy: Policy,
    log_p: Array,  # [B, N]
    log_q_old: Array,  # [B, N]
    log_mix: Array,  # [B, N]
    mask: Array,  # [B, N]
) -> Targets:
    """Rewards, weights and advantages of the GLOBAL batch of an update, without gradient.

    Log-probabilities are those of the drawn tokens when they were drawn. A token that only the
    teacher could draw (log_q_old = -inf) has weight 0; without `reward_clip` its reward is inf.
    """
    chex.assert_rank(mask, 2)
    chex.assert_equal_shape([log_p, log_q_old, log_mix, mask])
    mask = mask.astype(bool)
    log_p, log_q_old, log_mix = (
        keep(lax.stop_gradient(x), mask) for x in (log_p, log_q_old, log_mix)
    )
    log_weight = log_q_old - log_mix
    weight, log_base = jnp.exp(log_weight), log_mix
    reward = rewards(policy, log_p, log_q_old, mask)
    advantage = whitened(policy, returns(policy, reward, weight, mask), mask)
    if policy.prefix_weights:
        product = jnp.cumsum(log_weight, axis=1)
        before = jnp.pad(product[:, :-1], ((0, 0), (1, 0)))
        weight, log_base = jnp.exp(keep(product, mask)), keep(log_mix - before, mask)
    return Targets(advantage, weight, log_base, reward)


def losses(
    policy: Policy,
    log_q: Array,  # [B, N]
    reverse_kl: Array,  # [B, N]
    targets: Targets,
    mask: Array,  # [B, N]
) -> dict[str, jax.Array]:
    """Per-token [B, N] "loss" = "policy" + "single_step" of a micro-batch, 0 in padding.

    Gradient flows through `log_q` (of the drawn tokens) and `reverse_kl` (exact, KL[q || p] at each
    position). "ratio", "clipped" (1.0 where the clip removed the gradient) and "reverse_kl" are
    metrics without gradient. Reduce with `reduce.total(values, mask, policy.reduction)`.
    """
    chex.assert_rank(mask, 2)
    chex.assert_equal_shape([log_q, reverse_kl, targets.advantage, targets.weight, mask])
    mask = mask.astype(bool)
    log_q, reverse_kl = keep(log_q, mask), keep(reverse_kl, mask)
    ratio = jnp.exp(log_q - targets.log_base)
    surrogate = -targets.advantage * ratio
    clipped = jnp.zeros_like(mask)
    if policy.cliprange is not None:
        centre = 1.0 if policy.clip_weight else targets.weight
        bounded = jnp.clip(ratio, centre * (1 - policy.cliprange), centre * (1 + policy.cliprange))
        clipped = -targets.advantage * bounded > surrogate
        surrogate = jnp.where(clipped, -targets.advantage * bounded, surrogate)
    single = reverse_kl * targets.weight if policy.weight_single_step else reverse_kl
    values = {
        "loss": surrogate + single if policy.single_step else surrogate,
        "policy": surrogate,
        "single_step": single,
        "ratio": lax.stop_gradient(ratio),
        "clipped": clipped.astype(ratio.dtype),
        "reverse_kl": lax.stop_gradient(reverse_kl),
    }
    return {name: keep(value, mask) for name, value in values.items()}


def _after(x: jax.Array) -> jax.Array:
    """x_{t+1} at t, 0 at the end."""
    return jnp.pad(x[:, 1:], ((0, 0), (0, 1)))
