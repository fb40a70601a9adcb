"""Products of a few rows and attention over a cache on one CPU, in C++ (`native.cc`).

A decoding step on a CPU takes twice the time that its bytes and products need where XLA's libraries
multiply: they lay each kernel out anew for every few rows (benchmarks/README.md, "Decoding"). So
the kernels are laid out once, before the loop, and read by a loop of our own. The file is compiled
when it is first needed, by the compiler of this machine and for its instructions, and kept in the
cache. Where there is no compiler, or MINILLM_NATIVE=0, all goes by XLA, with the same results but
for rounding. What runs on several devices or is not in float32 does not come here, nor does
training: of all this the logits alone have a gradient.
"""

import atexit
import contextlib
import ctypes
import functools
import hashlib
import os
import platform as system
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from minillm_jax.axes import platform
from minillm_jax.models import fetch

_SOURCE = Path(__file__).with_suffix(".cc")
_FLAGS = "-O3", "-std=c++17", "-fPIC", "-shared", "-w"
_COMPILERS = "c++", "g++", "clang++"
_HANDLERS = "pack", "dot", "scores", "attend"

# Most queries of a chunk that are attended by a loop over the cache, up to which that is known to
# be faster than XLA's products; all of a teacher's chunk at alpha = 0.2.
FEW = 16


@flax.struct.dataclass
class Packed:
    """A kernel [K, N] laid out for `dot`."""

    tiles: jax.Array  # [ceil(N / columns), K, columns] float32, 0 beyond N
    real: jax.Array | None  # [M] bool, the rows that are multiplied; None: all of them
    features: int = flax.struct.field(pytree_node=False)  # N


# A part of what a trace is kept under: a program traced without is not taken for one with.
_wanted = jax.make_user_context(True)


def without() -> contextlib.AbstractContextManager[None]:
    """Trace programs as if there were no compiler: for other machines, or to be counted."""
    return _wanted(False)


def usable(*arrays: jax.Array) -> bool:
    """Whether a program that is traced now may call what is here with `arrays`."""
    mesh = jax.sharding.get_abstract_mesh()
    alone = mesh.empty or mesh.size == 1
    floats = all(x.dtype == jnp.float32 for x in arrays)
    return _wanted.value and floats and alone and platform() == "cpu" and _library() is not None


def packs(kernels: jax.Array) -> bool:
    """Whether `pack` takes these parameters of all layers: kernels in float32, and no vectors."""
    return kernels.ndim == 3 and usable(kernels)


def pack(kernels: jax.Array, layer: int) -> Packed:
    """Return kernel `layer` of `kernels` [L, K, N], laid out."""
    _, rows, features = kernels.shape
    columns = _loaded().minillm_columns()
    shape = (-(-features // columns), rows, columns)
    return Packed(_call("pack", shape)(kernels, layer=np.int64(layer)), None, features)


def only(params: Any, real: jax.Array) -> Any:
    """Return `params` with kernels that multiply the `real` rows [M] alone."""
    is_packed = lambda leaf: isinstance(leaf, Packed)  # noqa: E731
    mark = lambda leaf: leaf.replace(real=real) if is_packed(leaf) else leaf  # noqa: E731
    return jax.tree.map(mark, params, is_leaf=is_packed)


def dot(x: jax.Array, kernel: Packed) -> jax.Array:
    """Return x W, [M, N] for `x` [M, K]; 0 in rows that are not real."""
    real = jnp.ones(x.shape[0], bool) if kernel.real is None else kernel.real
    return _call("dot", (x.shape[0], kernel.features))(x, kernel.tiles, real)


@jax.custom_jvp
def scores(x: jax.Array, words: jax.Array) -> jax.Array:
    """Return x W^T, [M, V] for `x` [M, E] and `words` [V, E], which are read where they lie."""
    return _call("scores", (x.shape[0], words.shape[0]))(x, words)


@scores.defjvp
def _scores_jvp(primals, tangents):
    (x, words), (dx, dwords) = primals, tangents
    return scores(x, words), dx @ words.T + x @ dwords.T


def attend(
    q: jax.Array,  # [B, K, G, T, h]
    k: jax.Array,  # [B, K, S, h]
    v: jax.Array,  # [B, K, S, h]
    mask: jax.Array,  # [B, T, S]
    scale: float,
    filled: jax.Array,  # int32 scalar
) -> jax.Array:
    """`attention.attend` to the first `filled` slots; 0 where a query may see none of them."""
    return _call("attend", q.shape)(q, k, v, mask, filled, scale=np.float32(scale))


def _loaded() -> ctypes.CDLL:
    library = _library()
    assert library is not None, "ask `usable` first"
    return library


def _call(name: str, shape: tuple[int, ...]) -> Any:
    _loaded()
    result = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.ffi.ffi_call(f"minillm_{name}", result, vmap_method="sequential")


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The compiled file, its handlers known to XLA; None where it is not to be had."""
    if os.environ.get("MINILLM_NATIVE") == "0":
        return None
    try:
        library = ctypes.CDLL(str(_compiled()))
        library.minillm_columns.restype = ctypes.c_int64
        for name in _HANDLERS:
            handler = jax.ffi.pycapsule(getattr(library, f"minillm_{name}"))
            jax.ffi.register_ffi_target(f"minillm_{name}", handler, platform="cpu")
    except (OSError, AttributeError, jax.errors.JaxRuntimeError) as error:
        print(f"decoding goes by XLA alone, which is slower: {error}", file=sys.stderr, flush=True)
        return None
    return library


def _compiled() -> Path:
    """Where the compiled file is; it is compiled here if it is not there yet.

    Raises OSError: no compiler, or all of them fail, or no place for the result.
    """
    # One home may serve several kinds of machines, and several environments.
    told = (_processor(), jax.__version__, os.environ.get("CXX", ""), *_FLAGS)
    digest = hashlib.sha256(b"\0".join((_SOURCE.read_bytes(), *map(str.encode, told)))).hexdigest()
    name = f"native-{digest[:16]}.so"
    try:
        kept = fetch.cache().absolute() / name
        if kept.is_file():
            return kept
        kept.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(prefix=".native-", dir=kept.parent)
    except (OSError, RuntimeError):  # nobody's home, or not to be written: for this process alone
        kept, folder = None, tempfile.mkdtemp(prefix="native-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    built = Path(folder, name)
    try:
        _compile(built)
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    if kept is None:
        return built
    os.replace(built, kept)  # whichever of several processes comes last
    os.rmdir(folder)
    return kept


def _compile(built: Path) -> None:
    """Compile with the first compiler that can."""
    own = os.environ.get("CXX")
    why = "no C++ compiler on this machine; install g++ or clang++"
    for words in ([shlex.split(own)] if own else []) + [[name] for name in _COMPILERS]:
        if not words or (compiler := shutil.which(words[0])) is None:
            continue
        command = [compiler, *words[1:], *_FLAGS, "-isystem", jax.ffi.include_dir()]
        command += [str(_SOURCE), "-o", str(built)]
        # Older compilers for ARM know their own machine by -mcpu alone.
        for machine in ("-march=native", "-mcpu=native"):
            done = subprocess.run([*command, machine], capture_output=True, text=True, check=False)
            if done.returncode == 0:
                return
        lines = [line for line in done.stderr.splitlines() if "error" in line] or ["it failed"]
        why = f"{compiler} does not compile {_SOURCE.name}: {lines[0].strip()}"
    raise OSError(why)


def _processor() -> str:
    """What the machine can do, as far as it says."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{system.machine()} {system.processor()}"
    told = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(told)}))
