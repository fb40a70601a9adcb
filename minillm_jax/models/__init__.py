"""The decoder of every supported family, its key-value cache and its weights."""

from minillm_jax.models.cache import (
    Cache,
    DecodeParams,
    extend,
    heads_together,
    init_cache,
    unstack,
)
from minillm_jax.models.config import DecoderConfig, RopeScaling
from minillm_jax.models.decoder import (
    Head,
    abstract_params,
    head,
    hidden_states,
    init_params,
    logical_axes,
    logits,
    with_temperature,
)

__all__ = [
    "Cache",
    "DecodeParams",
    "DecoderConfig",
    "Head",
    "RopeScaling",
    "abstract_params",
    "extend",
    "head",
    "heads_together",
    "hidden_states",
    "init_cache",
    "init_params",
    "logical_axes",
    "logits",
    "unstack",
    "with_temperature",
]
