"""The one decoder, and the pure functions that the rest of the package calls.

Parameters are a plain nested dict with the layers stacked on axis 0, as `nn.scan` has them.
"""

import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from minillm_jax.axes import constrain, platform
from minillm_jax.models import native
from minillm_jax.models.attention import causal_mask, positions_of, rotary_angles
from minillm_jax.models.config import DecoderConfig
from minillm_jax.models.kernels import choose, pack, take
from minillm_jax.models.layers import Block, Embed, HeadParams, Linear, Norm
from minillm_jax.models.ragged import find, gather, spread
from minillm_jax.types import Params

_UNBOUNDED = 2**30  # the window of a layer without one


def window_sizes(config: DecoderConfig) -> jax.Array | None:
    """Return the window of each layer, [L]; None where none has one."""
    if config.windows is None:
        return None
    return jnp.array([window or _UNBOUNDED for window in config.windows], jnp.int32)


# What a layer keeps for its backward pass beside its input.
_KEPT = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "full": None}


def _recomputed(remat: str) -> Any:
    return nn.remat(Block, prevent_cse=False, policy=_KEPT[remat])


class Decoder(nn.Module):
    """Embedding, scanned layers, final norm; `embed` and `finish` alone for the cached path."""

    config: DecoderConfig
    param_dtype: DTypeLike = jnp.float32
    train: bool = False
    remat: str = "none"
    kernel: str = "xla"  # any other reads packed rows

    def setup(self):
        """Declare the modules under the names of the parameter tree."""
        c = self.config
        self.embed = Embed(c, self.param_dtype)
        self.layers = nn.scan(
            Block if self.remat == "none" else _recomputed(self.remat),
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, nn.broadcast, 0),  # pyright: ignore[reportArgumentType]
            length=c.layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c, self.param_dtype, self.train, self.kernel)
        self.drop = nn.Dropout(c.embed_dropout, deterministic=not self.train)
        if c.norm_first:
            self.final_norm = Norm(c.norm, c.norm_eps, self.param_dtype)
        if c.embed_width != c.width:
            axes = ("embed", "projection")
            self.project_out = Linear(c.embed_width, axes, param_dtype=self.param_dtype)
        self.head = HeadParams(c, self.param_dtype)

    def __call__(
        self, tokens: jax.Array, mask: jax.Array, dtype: DTypeLike, most: int | None = None
    ) -> jax.Array:
        """Map `tokens` [B, T] to hidden states [B, T, E].

        With `most`, at least the distinct tokens of all rows, each of them is read once (`ragged`).
        """
        c = self.config
        positions = positions_of(mask)
        sees, distance, windows = None, None, None
        if self.kernel == "xla":
            sees = causal_mask(mask)
        if self.kernel == "xla" and c.windows is not None:
            distance = positions[:, :, None] - positions[:, None, :]
            windows = window_sizes(c)
        real = None if most is None else find(tokens, mask, most)
        if real is not None:
            tokens, positions = gather(tokens, real), gather(positions, real)
        with jax.named_scope("embed"):
            x, angles = self.start(tokens, positions, dtype)
            x = self.drop(x)
        with jax.named_scope("layers"):
            x, _ = self.layers(x, angles, (sees, distance, real), windows)
        if self.is_initializing():
            self.head()
        x = self.finish(x)
        return x if real is None else spread(x, real)

    def start(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        dtype: DTypeLike,
        below: int | None = None,
    ):
        """Return the input of the layers [B, T, D] and the rotary angles, None if learned.

        `below` is that of `rotary_angles`.
        """
        c, angles = self.config, None
        if c.positions == "rope":
            angles = rotary_angles(c, positions, below)
        return self.embed(tokens, positions, dtype), angles

    def finish(self, x: jax.Array) -> jax.Array:
        """Map the output of the layers [B, T, D] to hidden states [B, T, E]."""
        with jax.named_scope("final_norm"):
            x = self.final_norm(x) if self.config.norm_first else x
            x = self.project_out(x) if self.config.embed_width != self.config.width else x
            # Here and in the bias of `head`, so that whoever multiplies the two has scaled logits.
            # In float32: in bfloat16 the scale itself would be rounded, by up to 0.4 %.
            scale = jnp.float32(self.config.logit_scale)
            return x if self.config.logit_scale == 1 else (x * scale).astype(x.dtype)


@flax.struct.dataclass
class Head:
    """The map from hidden states to logits."""

    weight: jax.Array  # [V, E]
    bias: jax.Array | None  # [V]


def _init(config: DecoderConfig, key: jax.Array, dtype: DTypeLike) -> Params:
    tokens = jnp.zeros((1, 1), jnp.int32)
    model = Decoder(config, param_dtype=dtype)
    return model.init(key, tokens, tokens == 0, dtype)["params"]


def init_params(config: DecoderConfig, key: jax.Array, dtype: DTypeLike = jnp.float32) -> Params:
    """Return random parameters: normal(0.02), outputs of both branches scaled by 1/sqrt(2 L)."""
    return nn.meta.unbox(_init(config, key, dtype))


def abstract_params(config: DecoderConfig, dtype: DTypeLike = jnp.float32) -> Params:
    """Return the tree of `init_params` as `jax.ShapeDtypeStruct`, with nothing allocated."""
    return nn.meta.unbox(_boxes(config, dtype))


def logical_axes(config: DecoderConfig) -> Params:
    """Return the tree of `init_params` with the tuple of logical axis names of each array."""
    is_box = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)  # noqa: E731
    boxes = _boxes(config, jnp.float32)
    return jax.tree.map(lambda box: tuple(box.names), boxes, is_leaf=is_box)


@functools.cache  # every stage asks for it several times, and it traces the initialisation
def _boxes(config: DecoderConfig, dtype: DTypeLike) -> Any:
    return jax.eval_shape(lambda key: _init(config, key, dtype), jax.random.key(0))


def hidden_states(
    config: DecoderConfig,
    params: Params,
    tokens: jax.Array,  # [B, T] int32
    mask: jax.Array,  # [B, T] bool
    *,
    dtype: DTypeLike = jnp.float32,
    remat: str = "none",
    dropout_key: jax.Array | None = None,
    most: int | None = None,
) -> jax.Array:
    """Return the hidden states that `head` reads, [B, T, E] in `dtype`.

    Padding may stand on either side of a row: positions count the real tokens and no query sees a
    padded key. The states at padded slots are finite and mean nothing. Dropout only with a key.
    `remat` is what the backward pass computes again in each layer: "none", "dots" (all but the
    products with kernels; attention above all), "full" (all from the layer's input). With `most`,
    at least the tokens of all rows that `ragged.distinct` counts, projections read those alone;
    rows must not be split over devices then.

    Raises ValueError where learned positions are fewer than the slots, InputError where
    `config.attention` names a kernel that cannot take this.
    """
    if config.positions == "learned" and tokens.shape[1] > config.max_positions:
        raise ValueError(f"{tokens.shape[1]} slots, but {config.max_positions} positions")
    rngs = {} if dropout_key is None else {"dropout": dropout_key}
    dropping = dropout_key is not None
    rows, slots = tokens.shape
    kernel = choose(config, rows, slots, dtype, dropout=dropping)
    model = Decoder(config, train=dropping, remat=remat, kernel=kernel)
    if kernel == "xla":
        if dropping or (most is not None and most >= tokens.size):
            most = None  # each row has a dropout of its own
        hidden: Any = model.apply({"params": params}, tokens, mask, dtype, most, rngs=rngs)
        return hidden
    order, place = pack(mask)
    tokens, mask = take(tokens, order), take(mask, order)
    hidden = model.apply({"params": params}, tokens, mask, dtype, rngs=rngs)
    return take(hidden, place)


def with_temperature(config: DecoderConfig, params: Params, temperature: float) -> Params:
    """Return parameters with which all logits are divided by `temperature`, in any file format.

    Unlike `config.logit_scale` it stays with the weights: in the last norm, or where there is none
    (OPT-350m) in the projection after the layers, and in the bias of the head.
    """
    last = "final_norm" if config.norm_first else "project_out"
    parts = [name for name in (last, "head") if name in params]
    if last not in parts:
        raise ValueError("no norm or projection after the layers to take the temperature")

    def divided(part: str, name: str, value: jax.Array) -> jax.Array:
        return value if (part, name) == ("head", "weight") else value / temperature

    found = {p: {n: divided(p, n, x) for n, x in params[p].items()} for p in parts}
    return {**params, **found}


def head(config: DecoderConfig, params: Params, dtype: DTypeLike | None = None) -> Head:
    """Return the output head, which shares the token embedding when `tied_head`.

    The weight is cast to `dtype`, by default its own, and gathered along the features, so that the
    logits of a device are those of its rows and its part of the vocabulary.
    """
    own = params.get("head", {})
    weight = params["embed"]["tokens"] if config.tied_head else own["weight"]
    weight = constrain(weight if dtype is None else weight.astype(dtype), "vocab", None)
    bias = own.get("bias")
    return Head(weight, bias if bias is None else bias * config.logit_scale)


def logits(head: Head, hidden: jax.Array) -> jax.Array:
    """Return hidden W^T + b in float32, [..., V], for `hidden` [..., E]."""
    weight = head.weight.astype(hidden.dtype)
    product = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
    axes = (((hidden.ndim - 1,), (1,)), ((), ()))
    if hidden.ndim == 2 and native.usable(hidden, weight):
        scores = native.scores(hidden, weight)
    elif hidden.ndim == 2 and platform() == "cpu":
        # As W x^T, for x W^T lays the whole W out anew. XLA would turn it back but for the barrier.
        scores = jax.lax.optimization_barrier(product(weight, hidden, axes)).T
    else:
        scores = product(hidden, weight, axes)
    if head.bias is None:
        return scores
    return scores + head.bias.astype(jnp.float32).reshape((1,) * (scores.ndim - 1) + (-1,))
