"""Responses written by the models: plain generation, teacher-mixed collection, and re-reading."""

from minillm_jax.rollout.generate import Response, generate
from minillm_jax.rollout.mixed import Mixing, Rollout, collect
from minillm_jax.rollout.score import (
    Taught,
    Written,
    most_tokens,
    own_states,
    response_states,
    teacher_states,
)
from minillm_jax.rollout.shrinking import generate_shrinking
from minillm_jax.rollout.warp import Warp

__all__ = [
    "Mixing", "Response", "Rollout", "Taught", "Warp", "Written", "collect", "generate",
    "generate_shrinking", "most_tokens", "own_states", "response_states", "teacher_states",
]  # fmt: skip
