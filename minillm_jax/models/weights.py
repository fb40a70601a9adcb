"""A checkpoint in memory, and the way of its tensors into the stacked arrays and back.

File formats are in `hf` and `gguf`; both hand over tensors by their HF name, so that one table per
family serves every format. Numpy only.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from minillm_jax.models.config import DecoderConfig
from minillm_jax.models.decoder import abstract_params
from minillm_jax.models.families import Family, Weight, family_of
from minillm_jax.types import InputError, Params

_CURE = "use the weights and the config.json of one and the same model"


@dataclass(frozen=True)
class Checkpoint:
    """A model on the host: `params` is the tree of `abstract_params(config)` in numpy."""

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


def read_config(hf_config: Mapping[str, Any], source: Path) -> tuple[Family, DecoderConfig]:
    """Return the family and the decoder of a `config.json`; errors name `source`."""
    try:
        family = family_of(hf_config)
        return family, family.read(hf_config)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error


def assemble(
    hf_config: dict[str, Any], tensors: Mapping[str, Tensor], source: Path, dtype: DTypeLike
) -> Checkpoint:
    """Fill the stacked arrays one tensor at a time; names and shapes are checked before.

    Raises `InputError` for a tensor that is missing, left over or misshapen.
    """
    family, config = read_config(hf_config, source)
    leaves = _leaves(abstract_params(config))
    shapes = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
    plan = {
        name: (weight, layer)
        for weight in _weights(family, shapes)
        for name, layer in weight.names(config.layers)
    }
    tensors = _named(tensors, family, plan)
    tied = _tied_copies(family, config, tensors)
    _check(family, plan, tensors, shapes, tied, source)

    arrays = {path: np.empty(shape, dtype) for path, shape in shapes.items()}
    for name, (weight, layer) in plan.items():
        widths = [shapes[leaf][-1] for leaf in weight.leaves]
        parts = weight.split(_read(name, tensors[name]), widths)
        for leaf, part in zip(weight.leaves, parts, strict=True):
            arrays[leaf][... if layer is None else layer] = part
    for name, original in tied.items():
        if not np.array_equal(_read(name, tensors[name]), _read(original, tensors[original])):
            raise InputError(
                f"{tensors[name].file}: {name} differs from {original}, but the model ties them; "
                "set tie_word_embeddings to false in config.json"
            )
    return Checkpoint(config, _tree(arrays), dict(hf_config), source)


def disassemble(config: DecoderConfig, params: Params, family: Family) -> Iterator[tuple[str, Any]]:
    """Yield the HF name and the array of every tensor of `params`."""
    leaves = _leaves(params)
    for path, leaf in _leaves(abstract_params(config)).items():
        found = leaves.pop(path).shape if path in leaves else "nothing"
        if found != leaf.shape:
            raise InputError(f"params/{path} is {found}, not {leaf.shape}; match it to the config")
    if leaves:
        raise InputError(f"params/{min(leaves)} is unknown to the config; match it to the config")
    arrays = {path: np.asarray(leaf) for path, leaf in _leaves(params).items()}
    for weight in _weights(family, arrays):
        for name, layer in weight.names(config.layers):
            parts = [arrays[leaf][... if layer is None else layer] for leaf in weight.leaves]
            yield name, weight.join(parts)


def keep_layers(checkpoint: Checkpoint, kept: Sequence[int]) -> Checkpoint:
    """Return the checkpoint with only the layers `kept`, in that order.

    Raises `InputError` for a layer that is not there, named twice, or out of order.
    """
    layers = checkpoint.config.layers
    kept = list(kept)
    if not kept or kept != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= layers:
        raise InputError(
            f"kept layers {kept} do not fit {checkpoint.path}: list rising numbers from 0 to "
            f"{layers - 1}, each once"
        )
    family, _ = read_config(checkpoint.hf_config, checkpoint.path)
    hf_config = family.keep(checkpoint.hf_config, kept)
    params = {
        name: _cut(subtree, kept) if name == "layers" else subtree
        for name, subtree in checkpoint.params.items()
    }
    config = replace(family.read(hf_config), dropout=checkpoint.config.dropout)
    return replace(checkpoint, config=config, params=params, hf_config=hf_config)


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
            f"{source}: no tensor {missing[0]} of shape {plan[missing[0]][0].shape(shapes)}"
            f"{_more(missing)}, which its config asks for; {_CURE}"
        )
    extra = sorted(set(tensors) - set(plan) - set(tied))
    if extra:
        raise InputError(
            f"{tensors[extra[0]].file}: tensor {extra[0]}{_more(extra)} has no place in a "
            f"{family.architecture} of this config; {_CURE}"
        )
    for name, (weight, _) in plan.items():
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
        return tensor.read()
    except InputError:
        raise
    except Exception as error:  # the reader is foreign code on foreign bytes
        raise InputError(
            f"{tensor.file}: cannot read tensor {name} ({error}); fetch the file again"
        ) from error


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
