"""Fused attention for reading whole sequences: which implementation, and how it is called.

`choose` decides once per pass, when it is traced; decoding over a cache is always plain XLA. The
fused kernels know causality and windows and no padding, so `pack` moves the real slots of a row to
its front: what a causal kernel lets a real slot see is then what the mask would. No score matrix
[B, H, T, T] is held by either. cuDNN's kernel is jax's own, Splash is that of jax's Pallas library.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from minillm_jax.axes import local_spec, platform, ways_of
from minillm_jax.models.config import DecoderConfig
from minillm_jax.types import InputError

# Splash is "auto" from here on: docs/architecture.md has the figures.
SPLASH_FROM = 512

_LANES = 128  # Splash: slots are read in multiples of this
_BLOCK = 512  # Splash: most slots of a block of queries or keys; a score tile is then 1 MiB
_FUSED_BLOCKS = 2  # Splash: most key blocks for which one kernel finds all three gradients


def choose(
    config: DecoderConfig, rows: int, slots: int, dtype: DTypeLike, *, dropout: bool = False
) -> str:
    """Return "xla", "cudnn" or "splash" for a pass over [rows, slots] in `dtype`.

    `config.attention` "auto" is cuDNN's on NVIDIA GPUs and, from `SPLASH_FROM` slots on, Splash on
    TPUs, where they can, and else XLA. The devices are those of the mesh in use, so that a program
    can be compiled for devices that are not here; without a mesh, the default backend's.
    `dropout`: the pass draws it.

    Raises:
        InputError: a kernel that was asked for by name cannot take this pass.
    """
    asked, here = config.attention, platform()
    name = {"gpu": "cudnn", "tpu": "splash"}.get(here, "xla") if asked == "auto" else asked
    if name == "xla":
        return name
    if asked == "auto" and name == "splash" and slots < SPLASH_FROM:
        return "xla"
    limit = _limit(name, here, config, rows, slots, jnp.dtype(dtype), dropout)
    if limit and asked != "auto":
        raise InputError(f"config.attention={name}: {limit}; --config.attention=auto avoids it")
    return "xla" if limit else name


def window_of(config: DecoderConfig, slots: int) -> int | None:
    """Return the one window of all layers, None where no layer's is shorter than `slots`.

    Raises ValueError where layers differ.
    """
    bound = {None if w is None or w >= slots else w for w in config.windows or (None,)}
    if len(bound) > 1:
        raise ValueError("layers have different windows")
    return bound.pop()


def pack(mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return `order` and `place`, int32 [B, T]: slot order[i] goes to i, slot i to place[i].

    The real slots of `mask` come first in each row, in their order, then the padded ones.
    """
    order = jnp.argsort(~mask, axis=1, stable=True).astype(jnp.int32)
    real = jnp.cumsum(mask, axis=1, dtype=jnp.int32)
    padded = jnp.cumsum(~mask, axis=1, dtype=jnp.int32) + real[:, -1:]
    return order, jnp.where(mask, real, padded) - 1


def take(x: jax.Array, index: jax.Array) -> jax.Array:
    """Return the slots `index` [B, T] of `x` [B, T, ...], each of them once."""
    pick = lambda row, i: row.at[i].get(unique_indices=True, mode="promise_in_bounds")  # noqa: E731
    return jax.vmap(pick)(x, index)


def attend_packed(
    name: str,
    q: jax.Array,  # [B, T, H, h]
    k: jax.Array,  # [B, T, K, h]
    v: jax.Array,  # [B, T, K, h]
    scale: float,
    window: int | None,
) -> jax.Array:
    """Return softmax(scale q k^T) v over the slots up to each query's own, [B, T, H, h] like `q`.

    Query head i reads key-value head i // (H / K), without a copy. The softmax is in float32.
    `window` bounds the slots seen, the query's own included.
    """
    if name == "cudnn":
        local = None if window is None else (window - 1, 0)
        body = functools.partial(
            jax.nn.dot_product_attention, scale=scale, is_causal=True, local_window_size=local,
            implementation="cudnn",
        )  # fmt: skip
        return _on_each_device(body, "batch", "length", "heads", "head_dim")(q, k, v)
    # Splash has no scale; the product is rounded to the dtype of q, as every projection is.
    heads = (y.transpose(0, 2, 1, 3) for y in (q * jnp.asarray(scale, q.dtype), k, v))
    body = functools.partial(_splash, window=window, interpret=platform() == "cpu")
    return _on_each_device(body, "batch", "heads", "length", "head_dim")(*heads).transpose(
        0, 2, 1, 3
    )


def _on_each_device(body: Callable, *axes: str) -> Callable:
    """`body` of q, k, v with these logical axes, each device's part alone.

    The compiler cannot divide a kernel of its own (cuDNN's knows how, but not within a
    `jax.shard_map` over some axes of the mesh). No row and no head needs another: nothing is
    replicated, which is what check_vma looks after.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return body
    spec = local_spec(axes)
    left = set(mesh.axis_names) - set(mesh.manual_axes)
    return jax.shard_map(
        body, in_specs=(spec,) * 3, out_specs=spec, axis_names=left, check_vma=False
    )


def _splash(q, k, v, *, window: int | None, interpret: bool) -> jax.Array:
    """Splash attention of q [B, H, T, h] over k and v [B, K, T, h]."""
    # Seconds to import, and needed on TPUs alone.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    slots = q.shape[2]
    blocks = -(-slots // _BLOCK)
    block = -(-slots // (blocks * _LANES)) * _LANES
    padded = blocks * block  # behind the last slot, where no query looks
    q, k, v = (jnp.pad(y, ((0, 0), (0, 0), (0, padded - slots), (0, 0))) for y in (q, k, v))
    fused = blocks <= _FUSED_BLOCKS
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=None if fused else block,
        block_kv_dq=None if fused else block,
        use_fused_bwd_kernel=fused,
    )
    shape = (padded, padded)
    mask = splash.CausalMask(shape)
    if window is not None:
        mask = splash.LocalMask(shape, (window - 1, 0), 0)
    attention = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * q.shape[1]),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    out: Any = jax.vmap(attention)(q, k, v)
    return out[:, :, :slots]


def _limit(
    name: str,
    here: str,
    config: DecoderConfig,
    rows: int,
    slots: int,
    dtype: jnp.dtype,
    dropout: bool,
) -> str:
    """Why kernel `name` cannot take this pass; empty if it can."""
    if dropout and config.attention_dropout:
        return f"it has no dropout of the weights, and the model's is {config.attention_dropout}"
    try:
        window_of(config, slots)
    except ValueError as error:
        return f"{error}, and it has one for all"
    own = _cudnn_limit(here, config, dtype) if name == "cudnn" else _splash_limit(here, dtype)
    if own:
        return own
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        alone = here != "tpu" or jax.device_count() == 1
        return "" if alone else "it needs a mesh where there are several devices"
    batch, heads = (ways_of(mesh, entry) for entry in local_spec(("batch", "kv_heads")))
    if rows % batch:
        return f"{rows} rows do not split over {batch} devices"
    if config.kv_heads % heads:
        return f"{config.kv_heads} key-value heads do not split over {heads} devices"
    return ""


def _splash_limit(here: str, dtype: jnp.dtype) -> str:
    # On a CPU it is interpreted, which is how it is tested.
    if here not in ("tpu", "cpu"):
        return f"it is for TPUs, and this is a {here}"
    settings: Any = jax.config  # whose attributes are made at run time
    precision = settings.jax_default_matmul_precision
    if dtype.itemsize == 2 and precision not in (None, "default", "bfloat16"):
        return f"its products of {dtype} have no precision {precision!r}"
    return ""


def _cudnn_limit(here: str, config: DecoderConfig, dtype: jnp.dtype) -> str:
    if here != "gpu":
        return f"it is for GPUs, and this is a {here}"
    if dtype not in (jnp.dtype("bfloat16"), jnp.dtype("float16")):
        return f"it computes in bfloat16 or float16, not {dtype}"
    capability = _capability()
    if capability < (8, 0):
        return "it needs an NVIDIA GPU of compute capability 8.0"
    most = 256 if capability >= (9, 0) else 128  # as jax's fused_attention_stablehlo has it
    if config.head_dim > most or config.head_dim % 8:
        return f"heads of width {config.head_dim} are no multiple of 8 up to {most}"
    return ""


def _capability() -> tuple[int, int]:
    """Compute capability of the GPUs here, (0, 0) where there is none of NVIDIA's."""
    try:
        device = jax.local_devices(backend="gpu")[0]
    except RuntimeError:
        return 0, 0
    found = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(device, "compute_capability", "")))
    return (int(found[1]), int(found[2])) if found else (0, 0)
