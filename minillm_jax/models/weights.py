"""A model on disk, one in memory, and the way of tensors into the stacked arrays and back.

File formats are in `hf` and `gguf`; both hand over tensors by their HF name, so that one table per
family serves every format. Where the arrays live is the business of `placing`.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from minillm_jax import hosts
from minillm_jax.models import placing
from minillm_jax.models.config import DecoderConfig
from minillm_jax.models.decoder import abstract_params
from minillm_jax.models.families import Family, Weight, family_of
from minillm_jax.types import InputError, Params

_CURE = "use the weights and the config.json of one and the same model"
_FLOATS = ("F64", "F32", "F16", "BF16")
_BLOCK = 1 << 20  # numbers looked at together


@dataclass(frozen=True)
class Checkpoint:
    """A model that was read: `params` is the tree of `abstract_params(config)`."""

    config: DecoderConfig
    params: Params
    hf_config: dict[str, Any]  # as read, or as transformers would have written it
    path: Path


@dataclass(frozen=True)
class Tensor:
    """A tensor of a file that is read when it is its turn, and then let go."""

    file: Path
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    dtype: str = "F32"  # in the words of safetensors


@dataclass(frozen=True)
class Stored:
    """A model on disk of which names, shapes and kinds are checked and no weight is read yet."""

    config: DecoderConfig
    hf_config: dict[str, Any]  # as read, or as transformers would have written it
    path: Path
    layers: tuple[int, ...]  # of the file, those that are kept
    tensors: Mapping[str, Tensor]  # by HF name, of all layers

    def keep(self, kept: Sequence[int]) -> "Stored":
        """Return the same model with only the layers `kept`, in that order; nothing is copied.

        Raises `InputError` for a layer that is not there, named twice, or out of order.
        """
        config, hf_config = _kept(self.config, self.hf_config, self.path, kept)
        layers = tuple(self.layers[layer] for layer in kept)
        return replace(self, config=config, hf_config=hf_config, layers=layers)

    def read(self, dtype: DTypeLike = np.float32, shardings: Params | None = None) -> Params:
        """Read the parameters, the tree of `abstract_params(config)`, as arrays of `dtype`.

        With `shardings`, a tree of the same shape, they are made on the devices: the host then
        holds one tensor at a time. Without, they are numpy arrays. Layers that are not kept are
        not read. Raises `InputError` for bytes that cannot be read and for NaN and infinity.
        """
        family = family_of(self.hf_config)
        leaves = _leaves(abstract_params(self.config))
        shapes = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
        homes = {} if shardings is None else _leaves(shardings)
        self._compare_tied(family)
        arrays: dict[str, Any] = {}
        # Whole tensors first, the largest in front: the copy of one does not come on top of all.
        order = lambda weight: ("{}" in weight.name, -math.prod(weight.shape(shapes)))  # noqa: E731
        for weight in sorted(_weights(family, shapes), key=order):
            widths = [shapes[leaf][-1] for leaf in weight.leaves]
            stacked = "{}" in weight.name
            for place, layer in enumerate(self.layers if stacked else (0,)):
                name = weight.name.format(layer)
                parts = weight.split(_read(name, self.tensors[name]), widths)
                for leaf, part in zip(weight.leaves, parts, strict=True):
                    home = homes.get(leaf)
                    if not stacked:
                        arrays[leaf] = placing.put(part, dtype, home)
                        continue
                    if leaf not in arrays:
                        arrays[leaf] = placing.allocate(shapes[leaf], dtype, home)
                    arrays[leaf] = placing.write(arrays[leaf], place, part)
        return _tree({path: arrays[path] for path in shapes})

    def _compare_tied(self, family: Family):
        for name, original in _tied_copies(family, self.config, self.tensors).items():
            pair = (self.tensors[name], self.tensors[original])
            if not np.array_equal(_read(name, pair[0]), _read(original, pair[1])):
                raise InputError(
                    f"{pair[0].file}: {name} differs from {original}, but the model ties them; "
                    "set tie_word_embeddings to false in config.json"
                )


def read_config(hf_config: Mapping[str, Any], source: Path) -> tuple[Family, DecoderConfig]:
    """Return the family and the decoder of a `config.json`; errors name `source`."""
    try:
        family = family_of(hf_config)
        return family, family.read(hf_config)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error


def check(hf_config: dict[str, Any], tensors: Mapping[str, Tensor], source: Path) -> Stored:
    """Return the model that the tensors are, by their names, shapes and kinds.

    Raises `InputError` for a tensor that is missing, left over, misshapen or not of floats.
    """
    family, config = read_config(hf_config, source)
    leaves = _leaves(abstract_params(config))
    shapes = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
    plan = {
        name: weight
        for weight in _weights(family, shapes)
        for name, _ in weight.names(config.layers)
    }
    tensors = _named(tensors, family, plan)
    tied = _tied_copies(family, config, tensors)
    _check(family, plan, tensors, shapes, tied, source)
    return Stored(config, dict(hf_config), source, tuple(range(config.layers)), tensors)


def disassemble(config: DecoderConfig, params: Params, family: Family) -> Iterator[tuple[str, Any]]:
    """Yield the HF name and the array of every tensor of `params`, a leaf of it at a time."""
    leaves = _leaves(params)
    for path, leaf in _leaves(abstract_params(config)).items():
        found = leaves.pop(path).shape if path in leaves else "nothing"
        if found != leaf.shape:
            raise InputError(f"params/{path} is {found}, not {leaf.shape}; match it to the config")
    if leaves:
        raise InputError(f"params/{min(leaves)} is unknown to the config; match it to the config")
    leaves = _leaves(params)
    for weight in _weights(family, leaves):
        # A leaf whole where it is within reach, else a layer of it at a time from all processes.
        found = [leaves[leaf] for leaf in weight.leaves]
        arrays = [hosts.fetch(x) if hosts.reaches(x) else x for x in found]
        for name, layer in weight.names(config.layers):
            parts = [array if layer is None else array[layer] for array in arrays]
            yield name, weight.join([hosts.fetch(part) for part in parts])


def keep_layers(checkpoint: Checkpoint, kept: Sequence[int]) -> Checkpoint:
    """Return the checkpoint with only the layers `kept`, in that order.

    Raises `InputError` for a layer that is not there, named twice, or out of order.
    """
    config, hf_config = _kept(checkpoint.config, checkpoint.hf_config, checkpoint.path, kept)
    params = {
        name: _cut(subtree, list(kept)) if name == "layers" else subtree
        for name, subtree in checkpoint.params.items()
    }
    return replace(checkpoint, config=config, params=params, hf_config=hf_config)


def _kept(
    config: DecoderConfig, hf_config: Mapping[str, Any], path: Path, kept: Sequence[int]
) -> tuple[DecoderConfig, dict[str, Any]]:
    kept = list(kept)
    if not kept or kept != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= config.layers:
        raise InputError(
            f"kept layers {kept} do not fit {path}: list rising numbers from 0 to "
            f"{config.layers - 1}, each once"
        )
    family, _ = read_config(hf_config, path)
    found = family.keep(hf_config, kept)
    return family.read(found), found


def _cut(tree: Params, kept: list[int]) -> Params:
    if isinstance(tree, Mapping):
        return {name: _cut(subtree, kept) for name, subtree in tree.items()}
    return tree[np.array(kept)]


def _weights(family: Family, shapes: Mapping[str, Any]) -> list[Weight]:
    """Return the weights that this member of the family has; together they are all leaves."""
    found = [weight for weight in family.weights if weight.leaves[0] in shapes]
    missing = set(shapes) - {leaf for weight in found for leaf in weight.leaves}
    if missing:
        raise ValueError(f"the table of {family.model_type} has no name for {min(missing)}")
    return found


def _named(
    tensors: Mapping[str, Tensor], family: Family, plan: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Complete names without the prefix of the base model, and drop the buffers."""
    buffers = [re.compile(pattern) for pattern in family.buffers]
    named = {}
    for name, tensor in tensors.items():
        if name not in plan and family.prefix + name in plan:
            name = family.prefix + name
        if name in plan or not any(pattern.fullmatch(name) for pattern in buffers):
            named[name] = tensor
    return named


def _tied_copies(
    family: Family, config: DecoderConfig, tensors: Mapping[str, Tensor]
) -> dict[str, str]:
    names = {weight.leaves[0]: weight.name for weight in family.weights}
    head = names["head/weight"]
    return {head: names["embed/tokens"]} if config.tied_head and head in tensors else {}


def _check(family, plan, tensors, shapes, tied, source):
    missing = [name for name in plan if name not in tensors]
    if missing:
        raise InputError(
            f"{source}: no tensor {missing[0]} of shape {plan[missing[0]].shape(shapes)}"
            f"{_more(missing)}, which its config asks for; {_CURE}"
        )
    extra = sorted(set(tensors) - set(plan) - set(tied))
    if extra:
        raise InputError(
            f"{tensors[extra[0]].file}: tensor {extra[0]}{_more(extra)} has no place in a "
            f"{family.architecture} of this config; {_CURE}"
        )
    for name in (*plan, *tied):
        if tensors[name].dtype not in _FLOATS:
            raise InputError(
                f"{tensors[name].file}: tensor {name} is of {tensors[name].dtype}, not of floats; "
                "use weights that are not quantised"
            )
    for name, weight in plan.items():
        expected = weight.shape(shapes)
        if tensors[name].shape != expected:
            raise InputError(
                f"{tensors[name].file}: tensor {name} has the shape {tensors[name].shape}, "
                f"not {expected} as its config says; {_CURE}"
            )


def _more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _read(name: str, tensor: Tensor) -> np.ndarray:
    try:
        array = tensor.read()
    except InputError:
        raise
    except Exception as error:  # the reader is foreign code on foreign bytes
        reason = " ".join(str(error).split())
        raise InputError(
            f"{tensor.file}: cannot read tensor {name} ({reason}); fetch the file again"
        ) from error
    if not _finite(array):
        raise InputError(f"{tensor.file}: tensor {name} holds NaN or infinity; fetch it again")
    return array


def _finite(array: np.ndarray) -> bool:
    """Whether no exponent is all ones; on the bits, as numpy is slow on bfloat16."""
    bits = array.reshape(-1).view(f"u{array.itemsize}")
    infinity = np.array(np.inf, array.dtype).view(bits.dtype)
    magnitude = bits.dtype.type(np.iinfo(bits.dtype).max >> 1)
    for start in range(0, bits.size, _BLOCK):
        if ((bits[start : start + _BLOCK] & magnitude) >= infinity).any():
            return False
    return True


def _leaves(tree: Params, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, Mapping):
        return {prefix[:-1]: tree}
    items = [_leaves(subtree, f"{prefix}{name}/") for name, subtree in tree.items()]
    return {path: leaf for part in items for path, leaf in part.items()}


def _tree(leaves: Mapping[str, np.ndarray]) -> Params:
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree
