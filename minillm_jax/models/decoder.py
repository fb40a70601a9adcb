"""The one decoder: its layers as Linen modules, and the pure functions that the rest calls.

Parameters are a plain nested dict with the layers stacked on axis 0, as `nn.scan` has them. Each
kernel declares its logical axes where it is made; no mesh and no rule for those names is here.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from minillm_jax.models.attention import attend, causal_mask, positions_of, rotary_angles, rotate
from minillm_jax.models.config import DecoderConfig
from minillm_jax.types import Params

_INIT_STDDEV = 0.02  # GPT-2
_UNBOUNDED = 2**30  # the window of a layer without one
_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


@flax.struct.dataclass
class Slots:
    """The cached keys and values of one layer, and the slot where the next token goes."""

    keys: jax.Array  # [B, K, S, h]
    values: jax.Array  # [B, K, S, h]
    index: jax.Array  # int32 scalar

    def write(self, k: jax.Array, v: jax.Array) -> "Slots":
        """Return the slots with `k` and `v` [B, K, C, h] at `index`, in place inside a loop."""
        start = (0, 0, self.index, 0)
        return self.replace(
            keys=jax.lax.dynamic_update_slice(self.keys, k.astype(self.keys.dtype), start),
            values=jax.lax.dynamic_update_slice(self.values, v.astype(self.values.dtype), start),
        )


class Linear(nn.Module):
    """x W + b, the kernel cast to the dtype of `x`."""

    features: int
    axes: tuple[str, str]  # logical names of input and output
    use_bias: bool = False
    stddev: float = _INIT_STDDEV
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `x` [B, T, in] to [B, T, features]."""
        init = nn.with_logical_partitioning(nn.initializers.normal(self.stddev), self.axes)
        kernel = self.param("kernel", init, (x.shape[-1], self.features), self.param_dtype)
        y = x @ kernel.astype(x.dtype)
        if self.use_bias:
            init = nn.with_logical_partitioning(nn.initializers.zeros, self.axes[1:])
            bias = self.param("bias", init, (self.features,), self.param_dtype)
            y = y + bias.astype(x.dtype)[None, None]
        return y


class Norm(nn.Module):
    """RMS or layer normalisation of the last axis, in float32."""

    kind: str
    eps: float
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise `x` [..., D]; the result has the dtype of `x`."""
        y = x.astype(jnp.float32)
        if self.kind == "layer":
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        y = y * self._vector("scale", nn.initializers.ones, y)
        if self.kind == "layer":
            y = y + self._vector("bias", nn.initializers.zeros, y)
        return y.astype(x.dtype)

    def _vector(self, name: str, init: Callable, y: jax.Array) -> jax.Array:
        init = nn.with_logical_partitioning(init, ("norm",))
        vector = self.param(name, init, y.shape[-1:], self.param_dtype)
        return vector.astype(jnp.float32).reshape((1,) * (y.ndim - 1) + (-1,))


class Attention(nn.Module):
    """Grouped-query self-attention over this chunk, or over the cache it is written to."""

    config: DecoderConfig
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x, angles, mask, slots: Slots | None = None):
        """Return the output [B, T, D] and the updated slots."""
        c = self.config
        linear = functools.partial(Linear, param_dtype=self.param_dtype)
        inward = functools.partial(linear, use_bias=c.qkv_bias)
        q = inward(c.heads * c.head_dim, ("embed", "heads"), name="q")(x)
        k = inward(c.kv_heads * c.head_dim, ("embed", "kv_heads"), name="k")(x)
        v = inward(c.kv_heads * c.head_dim, ("embed", "kv_heads"), name="v")(x)
        q, k, v = (y.reshape(*y.shape[:2], -1, c.head_dim) for y in (q, k, v))
        if c.qk_norm:
            q = Norm("rms", c.norm_eps, self.param_dtype, name="q_norm")(q)
            k = Norm("rms", c.norm_eps, self.param_dtype, name="k_norm")(k)
        if angles is not None:
            q, k = (rotate(y, angles, c.rope_interleaved) for y in (q, k))
        q = q.reshape(*q.shape[:2], c.kv_heads, -1, c.head_dim).transpose(0, 2, 3, 1, 4)
        k, v = (y.transpose(0, 2, 1, 3) for y in (k, v))
        if slots is not None:
            slots = slots.write(k, v)
            k, v = slots.keys.astype(q.dtype), slots.values.astype(q.dtype)
        scale = c.head_dim**-0.5 if c.attention_scale is None else c.attention_scale
        y = attend(q, k, v, mask, scale).transpose(0, 3, 1, 2, 4)
        y = y.reshape(*x.shape[:2], c.heads * c.head_dim)
        stddev = _INIT_STDDEV / (2 * c.layers) ** 0.5
        out = linear(c.width, ("heads", "embed"), use_bias=c.out_bias, stddev=stddev, name="o")
        return out(y), slots


class Mlp(nn.Module):
    """act(x W_up) W_down, or (act(x W_gate) * x W_up) W_down."""

    config: DecoderConfig
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `x` [B, T, D] to [B, T, D]."""
        c = self.config
        linear = functools.partial(Linear, use_bias=c.mlp_bias, param_dtype=self.param_dtype)
        act = _ACTIVATIONS[c.activation]
        up = linear(c.mlp_width, ("embed", "mlp"), name="up")(x)
        if c.gated:
            up = act(linear(c.mlp_width, ("embed", "mlp"), name="gate")(x)) * up
        else:
            up = act(up)
        stddev = _INIT_STDDEV / (2 * c.layers) ** 0.5
        return linear(c.width, ("mlp", "embed"), stddev=stddev, name="down")(up)


class Block(nn.Module):
    """One layer; `nn.scan` runs it over the stacked parameters, `cache.extend` layer by layer."""

    config: DecoderConfig
    param_dtype: DTypeLike = jnp.float32
    train: bool = False  # draw dropout from the `dropout` stream

    @nn.compact
    def __call__(self, x, angles, sight, window=None, slots: Slots | None = None):
        """Return the layer's output [B, T, D] and the updated slots.

        `sight` is the mask [B, T, S] and, where layers have windows, the distance [B, T, S] from
        each key to the query; `window` bounds that distance here, None where the mask already does.
        """
        c = self.config
        norm = functools.partial(Norm, c.norm, c.norm_eps, self.param_dtype)
        drop = nn.Dropout(c.dropout, deterministic=not self.train)
        attn = Attention(c, self.param_dtype, name="attn")
        mlp = Mlp(c, self.param_dtype, name="mlp")
        mask, distance = sight
        if window is not None:
            mask = mask & (distance < window)

        attn_norm = norm(name="attn_norm")
        with jax.named_scope("attention"):
            y, slots = attn(attn_norm(x) if c.norm_first else x, angles, mask, slots)
        if c.parallel_residual:
            return x + drop(y) + drop(mlp(attn_norm(x))), slots
        x = x + drop(y)
        mlp_norm = norm(name="mlp_norm")
        if c.norm_first:
            return x + drop(mlp(mlp_norm(x))), slots
        x = attn_norm(x)
        return mlp_norm(x + drop(mlp(x))), slots


class Embed(nn.Module):
    """Token rows, plus position rows where positions are learned, at the width of the layers."""

    config: DecoderConfig
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array, positions: jax.Array, dtype: DTypeLike) -> jax.Array:
        """Map `tokens` and `positions` [B, T] to [B, T, D]."""
        c = self.config
        init = nn.initializers.normal(_INIT_STDDEV)
        axes = ("vocab", "embed" if c.embed_width == c.width else "projection")
        table = nn.with_logical_partitioning(init, axes)
        table = self.param("tokens", table, (c.vocab_size, c.embed_width), self.param_dtype)
        x = table[tokens].astype(dtype)
        if c.embed_width != c.width:
            axes = ("projection", "embed")
            x = Linear(c.width, axes, param_dtype=self.param_dtype, name="project_in")(x)
        if c.positions == "learned":
            rows = nn.with_logical_partitioning(init, ("positions", "embed"))
            shape = (c.max_positions + c.position_offset, c.width)
            rows = self.param("positions", rows, shape, self.param_dtype)
            x = x + rows[positions + c.position_offset].astype(dtype)
        return x


class HeadParams(nn.Module):
    """The parameters of the output head that are not those of the embedding."""

    config: DecoderConfig
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self):
        """Make the untied weight [V, E] and the bias [V], each where the config has it."""
        c = self.config
        if not c.tied_head:
            axes = ("vocab", "embed" if c.embed_width == c.width else "projection")
            init = nn.with_logical_partitioning(nn.initializers.normal(_INIT_STDDEV), axes)
            self.param("weight", init, (c.vocab_size, c.embed_width), self.param_dtype)
        if c.head_bias:
            init = nn.with_logical_partitioning(nn.initializers.zeros, ("vocab",))
            self.param("bias", init, (c.vocab_size,), self.param_dtype)


class Decoder(nn.Module):
    """Embedding, scanned layers, final norm; `embed` and `finish` alone for the cached path."""

    config: DecoderConfig
    param_dtype: DTypeLike = jnp.float32
    train: bool = False
    remat: bool = False

    def setup(self):
        """Declare the modules under the names of the parameter tree."""
        c = self.config
        self.embed = Embed(c, self.param_dtype)
        self.layers = nn.scan(
            nn.remat(Block, prevent_cse=False) if self.remat else Block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, nn.broadcast, 0),
            length=c.layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c, self.param_dtype, self.train)
        self.drop = nn.Dropout(c.dropout, deterministic=not self.train)
        if c.norm_first:
            self.final_norm = Norm(c.norm, c.norm_eps, self.param_dtype)
        if c.embed_width != c.width:
            axes = ("embed", "projection")
            self.project_out = Linear(c.embed_width, axes, param_dtype=self.param_dtype)
        self.head = HeadParams(c, self.param_dtype)

    def __call__(self, tokens: jax.Array, mask: jax.Array, dtype: DTypeLike) -> jax.Array:
        """Map `tokens` [B, T] to hidden states [B, T, E]."""
        c = self.config
        positions = positions_of(mask)
        distance, windows = None, None
        if c.windows is not None:
            distance = positions[:, :, None] - positions[:, None, :]
            windows = jnp.array([window or _UNBOUNDED for window in c.windows], jnp.int32)
        with jax.named_scope("embed"):
            x, angles = self.start(tokens, positions, dtype)
            x = self.drop(x)
        with jax.named_scope("layers"):
            x, _ = self.layers(x, angles, (causal_mask(mask), distance), windows)
        if self.is_initializing():
            self.head()
        return self.finish(x)

    def start(self, tokens: jax.Array, positions: jax.Array, dtype: DTypeLike):
        """Return the input of the layers [B, T, D] and the rotary angles, None if learned."""
        angles = rotary_angles(self.config, positions) if self.config.positions == "rope" else None
        return self.embed(tokens, positions, dtype), angles

    def finish(self, x: jax.Array) -> jax.Array:
        """Map the output of the layers [B, T, D] to hidden states [B, T, E]."""
        with jax.named_scope("final_norm"):
            x = self.final_norm(x) if self.config.norm_first else x
            return self.project_out(x) if self.config.embed_width != self.config.width else x


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


def _boxes(config: DecoderConfig, dtype: DTypeLike) -> Any:
    return jax.eval_shape(lambda key: _init(config, key, dtype), jax.random.key(0))


def hidden_states(
    config: DecoderConfig,
    params: Params,
    tokens: jax.Array,  # [B, T] int32
    mask: jax.Array,  # [B, T] bool
    *,
    dtype: DTypeLike = jnp.float32,
    remat: bool = False,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Return the hidden states that `head` reads, [B, T, E] in `dtype`.

    Padding may stand on either side of a row: positions count the real tokens and no query sees a
    padded key. The states at padded slots are finite and mean nothing. Dropout only with a key.

    Raises ValueError where learned positions are fewer than the slots.
    """
    if config.positions == "learned" and tokens.shape[1] > config.max_positions:
        raise ValueError(f"{tokens.shape[1]} slots, but {config.max_positions} positions")
    rngs = {} if dropout_key is None else {"dropout": dropout_key}
    model = Decoder(config, train=dropout_key is not None, remat=remat)
    return model.apply({"params": params}, tokens, mask, dtype, rngs=rngs)  # type: ignore


def head(config: DecoderConfig, params: Params) -> Head:
    """Return the output head, which shares the token embedding when `tied_head`."""
    own = params.get("head", {})
    weight = params["embed"]["tokens"] if config.tied_head else own["weight"]
    return Head(weight, own.get("bias"))


def logits(head: Head, hidden: jax.Array) -> jax.Array:
    """Return hidden W^T + b in float32, [..., V], for `hidden` [..., E]."""
    weight = head.weight.astype(hidden.dtype)
    axes = (((hidden.ndim - 1,), (1,)), ((), ()))
    scores = jax.lax.dot_general(hidden, weight, axes, preferred_element_type=jnp.float32)
    if head.bias is None:
        return scores
    return scores + head.bias.astype(jnp.float32).reshape((1,) * (scores.ndim - 1) + (-1,))
