"""The key-value cache and the cached forward pass of generation.

```
slot         0  1  2  3  4  5  6  7
row 0 valid  .  .  a  b  x  y  .  .      rows share `index`, the slot of the next token (6 here);
row 1 valid  c  d  e  f  z  .  .  .      each has its own `length`, the position of that token.
                               ^ index   A padded or finished row writes slots that stay invalid.
```
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from minillm_jax.axes import constrain, parts, platform
from minillm_jax.models import native
from minillm_jax.models.attention import positions_of
from minillm_jax.models.config import DecoderConfig
from minillm_jax.models.decoder import Decoder, logical_axes, window_sizes
from minillm_jax.models.layers import Block, Slots
from minillm_jax.models.ragged import find, gather, spread
from minillm_jax.types import Params

# What is cast to the dtype of the arithmetic wherever it is used; norms and biases are not.
_CAST = ("kernel", "tokens", "positions", "weight")

_ROW = 128  # numbers in a row of a TPU's memory
_MOST = 8  # heads side by side, as many times more operations: still none that a step waits for


@flax.struct.dataclass
class Cache:
    """Keys and values of every layer, and what of them is real.

    One pair of arrays per layer, not one stacked pair: a loop carries each in place, whereas a
    slice of a stacked array is copied at every token.
    """

    keys: tuple[jax.Array, ...]  # L of [B, K / g, S, g h], g `heads_together`
    values: tuple[jax.Array, ...]  # L of [B, K / g, S, g h]
    valid: jax.Array  # [B, S] bool
    length: jax.Array  # [B] int32, valid slots, hence the position of the next token
    index: jax.Array  # int32 scalar, next slot


@flax.struct.dataclass
class DecodeParams:
    """The parameters with the layers apart, as the unrolled forward reads them."""

    outer: Params  # everything but the layers
    layers: tuple[Params, ...]  # L


def heads_together(config: DecoderConfig) -> int:
    """Return how many key-value heads g lie side by side in the cache: 1 but on a TPU.

    Where each head has a query of its own, the TPU's compiler makes of the products with it sums
    across a row of memory, which the units are slow at; heads that lie side by side have several
    queries. And such a row is 128 numbers, of which a head of 64 may leave half empty
    (benchmarks/README.md, "Decoding on a TPU"). Grouped heads gain nothing.
    """
    if platform() != "tpu" or config.heads > config.kv_heads:
        return 1
    here = config.kv_heads // parts("kv_heads", config.kv_heads)  # on each device

    def filled(heads: int) -> float:
        numbers = heads * config.head_dim
        return numbers / (-(-numbers // _ROW) * _ROW)

    ways = [heads for heads in range(2, _MOST + 1) if here % heads == 0]
    return max(ways, key=filled, default=1)  # the first of those that waste least


def init_cache(
    config: DecoderConfig, batch: int, slots: int, dtype: DTypeLike = jnp.float32
) -> Cache:
    """Return an empty cache of `slots` slots for `batch` rows."""
    heads = heads_together(config)
    shape = (batch, config.kv_heads // heads, slots, heads * config.head_dim)
    axes = ("batch", "kv_heads", None, None)
    keys, values = (
        tuple(constrain(jnp.zeros(shape, dtype), *axes) for _ in range(config.layers))
        for _ in ("keys", "values")
    )
    valid, length = jnp.zeros((batch, slots), bool), jnp.zeros((batch,), jnp.int32)
    valid, length = constrain(valid, "batch", None), constrain(length, "batch")
    return Cache(keys, values, valid, length, jnp.zeros((), jnp.int32))


def unstack(config: DecoderConfig, params: Params, dtype: DTypeLike | None = None) -> DecodeParams:
    """Return `params` with the layers sliced apart; once, outside the loop, for it copies them.

    Matrices are cast to `dtype`, that of the arithmetic, and gathered along the embedding, over
    which training has them split: a token's step would else cast and gather them all again.
    """

    def ready(path, x, names):
        if dtype is not None and path[-1].key in _CAST:
            x = x.astype(dtype)
        names = (None if name == "embed" else name for name in names)
        return constrain(x, *names, units=config.axis_units)

    axes = dict(logical_axes(config))
    inner = jax.tree.map(lambda names: names[1:], axes.pop("layers"), is_leaf=_is_names)
    outer = {name: value for name, value in params.items() if name != "layers"}
    outer = jax.tree.map_with_path(ready, outer, axes)

    def layer(i: int) -> Params:
        def apart(path, x, names):
            if dtype is not None and jnp.dtype(dtype) == x.dtype and native.packs(x):
                return native.pack(x, i)
            return ready(path, x[i], names)

        return jax.tree.map_with_path(apart, params["layers"], inner)

    return DecodeParams(outer, tuple(map(layer, range(config.layers))))


def _is_names(node: Any) -> bool:
    return isinstance(node, tuple)


def extend(
    config: DecoderConfig,
    params: DecodeParams,
    tokens: jax.Array,  # [B, C] int32
    mask: jax.Array,  # [B, C] bool
    cache: Cache,
    *,
    advance: jax.Array | int | None = None,
    first: bool = False,
    most: int | None = None,
    stacked: Params | None = None,
    dtype: DTypeLike = jnp.float32,
) -> tuple[jax.Array, Cache]:
    """Return the hidden states [B, C, E] of the next C slots and the cache that holds them.

    Each query sees the valid slots up to its own. The index moves by `advance` (C by default): a
    caller that pads a chunk passes the slots it means, and False in `mask` for the rest, which the
    next chunk overwrites. `index + C` must not exceed the slots: the write would be shifted.

    The `first` chunk finds the cache empty, and attends to nothing but itself. Two options are for
    it alone. `most` is that of `hidden_states`: what follows depends on more than the tokens of its
    own chunk. With `stacked`, the layers as they were before `unstack`, these are scanned: a
    program of one layer is compiled sooner than one of all, and a chunk that is read once can spare
    the copies.
    """
    if stacked is not None and not first:
        raise ValueError("only the first chunk of a cache is scanned")
    chunk = tokens.shape[1]
    valid = jax.lax.dynamic_update_slice(cache.valid, mask, (0, cache.index))
    positions = jnp.maximum(cache.length[:, None] + jnp.cumsum(mask, 1, dtype=jnp.int32) - 1, 0)
    before, keys = (0, mask) if first else (cache.index, valid)
    slot = jnp.arange(keys.shape[1])[None, None, :]
    query = (before + jnp.arange(chunk))[None, :, None]
    seen = keys[:, None, :] & (slot <= query) & mask[:, :, None]
    distance = None
    if config.windows is not None:
        distance = positions[:, :, None] - positions_of(keys)[:, None, :]

    outer = Decoder(config)
    with jax.named_scope("embed"):
        real = None if most is None else find(tokens, mask, most)
        if real is not None:
            tokens, positions = gather(tokens, real), gather(positions, real)
        inputs = tokens, positions, dtype, valid.shape[1]
        x, angles = outer.apply({"params": params.outer}, *inputs, method="start")
    sight = seen, distance, real
    if stacked is None:
        # What is padding, or belongs to a row that has ended, is not multiplied.
        layers = params.layers if real is not None else native.only(params.layers, mask.reshape(-1))
        x, keys, values = _unrolled(config, layers, x, angles, sight, cache)
    else:
        x, keys, values = _scanned(config, stacked, x, angles, sight, cache)
    hidden: Any = outer.apply({"params": params.outer}, x, method="finish")
    hidden = hidden if real is None else spread(hidden, real)
    return hidden, Cache(
        keys,
        values,
        valid,
        cache.length + jnp.sum(mask, 1, dtype=jnp.int32),
        cache.index + (chunk if advance is None else advance),
    )


def _unrolled(config, layers, x, angles, sight, cache):
    """The output of the layers, one after another, and their keys and values."""
    seen, distance, real = sight
    by_window: dict[int | None, jax.Array] = {None: seen}
    for window in set(config.windows or ()) - {None}:
        by_window[window] = seen & (distance < window)
    block, keys, values = Block(config), [], []
    for i, layer in enumerate(layers):
        with jax.named_scope(f"layer_{i}"):
            window = None if config.windows is None else config.windows[i]
            slots = Slots(cache.keys[i], cache.values[i], cache.index)
            inputs = x, angles, (by_window[window], None, real), None, slots
            x, slots = block.apply({"params": layer}, *inputs)
            keys.append(slots.keys)
            values.append(slots.values)
    return x, tuple(keys), tuple(values)


def _scanned(config, stacked, x, angles, sight, cache):
    """The same by a scan over the stacked layers; `cache` is empty, this is its first chunk."""
    block, chunk = Block(config), sight[0].shape[1]

    def body(x: Any, layer: Any) -> Any:
        weights, window = layer
        keys, values = (
            jnp.zeros_like(part[0][:, :, :chunk]) for part in (cache.keys, cache.values)
        )
        empty = Slots(keys, values, jnp.int32(0))
        out: Any = block.apply({"params": weights}, x, angles, sight, window, empty)
        x, slots = out
        return x, (slots.keys, slots.values)

    x, (keys, values) = jax.lax.scan(body, x, (stacked, window_sizes(config)))
    written = [
        Slots(cache.keys[i], cache.values[i], cache.index).write(keys[i], values[i])
        for i in range(config.layers)
    ]
    return x, tuple(slots.keys for slots in written), tuple(slots.values for slots in written)
