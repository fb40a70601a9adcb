"""The layers of the decoder as Linen modules, each kernel with its logical axes beside it.

`Block` is the one layer of training (scanned over stacked parameters) and of generation (over a
cache: unrolled, but for prompts on one CPU). No mesh and no rule for the axis names is here.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from minillm_jax.axes import constrain
from minillm_jax.models import native
from minillm_jax.models.attention import attend, attend_side_by_side, rotate, side_by_side
from minillm_jax.models.config import DecoderConfig
from minillm_jax.models.kernels import attend_packed, window_of
from minillm_jax.models.ragged import Real, gather, spread

_INIT_STDDEV = 0.02  # GPT-2
_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


# Rows over the devices, features whole: the compiler may not follow a kernel's split instead.
STATES = ("batch", "length", None)


@flax.struct.dataclass
class Slots:
    """The cached keys and values of one layer, and the slot where the next token goes.

    g heads may lie side by side (`cache.heads_together`); it is 1 but on a TPU.
    """

    keys: jax.Array  # [B, K / g, S, g h]
    values: jax.Array  # [B, K / g, S, g h]
    index: jax.Array  # int32 scalar

    def write(self, k: jax.Array, v: jax.Array) -> "Slots":
        """Return the slots with `k` and `v` at `index`, in place inside a loop.

        They are [B, K, C, h], or lie side by side already.
        """
        together, start = k.shape[1] // self.keys.shape[1], (0, 0, self.index, 0)
        k, v = (side_by_side(new, together) for new in (k, v))
        return Slots(
            jax.lax.dynamic_update_slice(self.keys, k.astype(self.keys.dtype), start),
            jax.lax.dynamic_update_slice(self.values, v.astype(self.values.dtype), start),
            self.index,
        )


def _param(module: Any, name: str, init: Callable, axes: tuple, shape: tuple) -> jax.Array:
    """Declare one parameter of `module` with its logical axes, in `param_dtype`."""
    return module.param(name, nn.with_logical_partitioning(init, axes), shape, module.param_dtype)


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
        # As one matrix: the gradient of a kernel, which contracts both leading axes, is then a
        # plain x^T dy, which on CPU is faster than the product of two three-dimensional arrays.
        flat = x.reshape(-1, x.shape[-1])
        if isinstance(packed := self.variables.get("params", {}).get("kernel"), native.Packed):
            y = native.dot(flat, packed)
        else:
            init, shape = nn.initializers.normal(self.stddev), (x.shape[-1], self.features)
            kernel = _param(self, "kernel", init, self.axes, shape)
            y = flat @ kernel.astype(x.dtype)
        if self.use_bias:
            bias = _param(self, "bias", nn.initializers.zeros, self.axes[1:], (self.features,))
            y = y + bias.astype(x.dtype)[None]
        return y.reshape(*x.shape[:-1], self.features)


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
        vector = _param(self, name, init, ("norm",), y.shape[-1:])
        return vector.astype(jnp.float32).reshape((1,) * (y.ndim - 1) + (-1,))


class Attention(nn.Module):
    """Grouped-query self-attention over this chunk, or over the cache it is written to."""

    config: DecoderConfig
    param_dtype: DTypeLike = jnp.float32
    train: bool = False
    kernel: str = "xla"

    @nn.compact
    def __call__(self, x, angles, mask, slots: Slots | None = None, real: Real | None = None):
        """Return the output [B, T, D] and the updated slots.

        Another `kernel` than "xla" reads packed rows and no `mask`. With `real`, `x` and the output
        are [1, R, D], the real slots alone.
        """
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
        scale = c.head_dim**-0.5 if c.attention_scale is None else c.attention_scale
        if self.kernel != "xla":
            y = attend_packed(self.kernel, q, k, v, scale, window_of(c, x.shape[1]))
        else:
            if real is not None:
                # Side by side, for a program with fewer operations is compiled sooner.
                together = spread(jnp.concatenate([q, k, v], axis=2), real)
                q, k, v = jnp.split(together, (c.heads, c.heads + c.kv_heads), axis=2)
            q = q.reshape(*q.shape[:2], c.kv_heads, -1, c.head_dim).transpose(0, 2, 3, 1, 4)
            k, v = (y.transpose(0, 2, 1, 3) for y in (k, v))
            if slots is not None:
                slots = slots.write(k, v)
                if mask.shape[2] == mask.shape[1]:  # the first chunk, which sees itself alone
                    y = attend(q, k, v, mask, scale)
                else:
                    k, v = slots.keys.astype(q.dtype), slots.values.astype(q.dtype)
                    filled = slots.index + mask.shape[1]
                    y = attend_side_by_side(q, k, v, mask, scale, filled)
            else:
                drop = nn.Dropout(c.attention_dropout, deterministic=not self.train)
                y = attend(q, k, v, mask, scale, drop)
            y = y.transpose(0, 3, 1, 2, 4)
            y = y if real is None else gather(y, real)
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
    """One layer; `nn.scan` runs it over the stacked parameters, `cache.extend` with a cache."""

    config: DecoderConfig
    param_dtype: DTypeLike = jnp.float32
    train: bool = False  # draw dropout from the `dropout` stream
    kernel: str = "xla"  # of the attention

    @nn.compact
    def __call__(self, x, angles, sight, window=None, slots: Slots | None = None):
        """Return the layer's output [B, T, D] and the updated slots.

        `sight` is the mask [B, T, S], [B, T, T] of a first chunk, which sees itself alone; where
        layers have windows, the distance from each key to the query, of the same shape, which
        `window` bounds here, None where the mask already does; and where only the real slots are
        read, which these are: `x` is [1, R, D] then.
        """
        c = self.config
        norm = functools.partial(Norm, c.norm, c.norm_eps, self.param_dtype)
        drop = nn.Dropout(c.dropout, deterministic=not self.train)
        attn = Attention(c, self.param_dtype, self.train, self.kernel, name="attn")
        mlp = Mlp(c, self.param_dtype, name="mlp")
        mask, distance, real = sight
        if window is not None:
            mask = mask & (distance < window)

        attn_norm = norm(name="attn_norm")
        with jax.named_scope("attention"):
            y, slots = attn(attn_norm(x) if c.norm_first else x, angles, mask, slots, real)
        if c.parallel_residual:
            return constrain(x + drop(y) + drop(mlp(attn_norm(x))), *STATES), slots
        x = constrain(x + drop(y), *STATES)
        mlp_norm = norm(name="mlp_norm")
        if c.norm_first:
            return constrain(x + drop(mlp(mlp_norm(x))), *STATES), slots
        x = attn_norm(x)
        return constrain(mlp_norm(x + drop(mlp(x))), *STATES), slots


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
        table = _param(self, "tokens", init, axes, (c.vocab_size, c.embed_width))
        # Gathered along the features, each device looks its own tokens up; and cast after the
        # look-up, so that the gradient of a frequent token is added up in full precision.
        x = constrain(table, "vocab", None)[tokens].astype(dtype)
        if c.embed_width != c.width:
            axes = ("projection", "embed")
            x = Linear(c.width, axes, param_dtype=self.param_dtype, name="project_in")(x)
        if c.positions == "learned":
            shape = (c.max_positions + c.position_offset, c.width)
            rows = _param(self, "positions", init, ("positions", "embed"), shape)
            # Gathered first, too: what is looked up along split features is copied to be split
            # over the batch.
            x = x + constrain(rows, "positions", None)[positions + c.position_offset].astype(dtype)
        return constrain(x, *STATES)


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
            init = nn.initializers.normal(_INIT_STDDEV)
            _param(self, "weight", init, axes, (c.vocab_size, c.embed_width))
        if c.head_bias:
            _param(self, "bias", nn.initializers.zeros, ("vocab",), (c.vocab_size,))
