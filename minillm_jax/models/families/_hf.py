"""What a family is: a reader of `config.json`, and the two names of every weight.

A `Weight` works in both directions, so import and export cannot disagree. Nothing here knows files
or model code.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from minillm_jax.models.config import DecoderConfig, RopeScaling
from minillm_jax.types import InputError

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_new",
    "gelu_fast": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}

# Of no consequence for the maths of a causal decoder: bookkeeping, generation, initialisation.
IGNORED = (
    "_attn_implementation_autoset _name_or_path architectures attn_implementation bos_token_id "
    "chunk_size_feed_forward do_sample dtype eos_token_id gradient_checkpointing id2label "
    "initializer_range is_decoder label2id max_length model_type output_attentions "
    "output_hidden_states pad_token_id pretraining_tp problem_type return_dict "
    "task_specific_params tokenizer_class torch_dtype transformers.js_config "
    "transformers_version use_cache"
).split()

_REQUIRED: Any = object()


class Attributes:
    """A `config.json` of which every entry has to be accounted for before `finish`."""

    def __init__(self, values: Mapping[str, Any]):
        self._values = dict(values)
        self._left = set(values)

    def take(self, name: str, kind: type, default: Any = _REQUIRED, null: Any = _REQUIRED) -> Any:
        """Return an attribute of the stated type, or `default` where it is missing.

        A null one is `null`, which without a word is the default as well.
        """
        self._left.discard(name)
        value = self._values.get(name)
        if value is None:
            if name in self._values and null is not _REQUIRED:
                return null
            if default is _REQUIRED:
                raise InputError(f"attribute {name} is missing; restore it")
            return default
        fits = isinstance(value, (int, float) if kind is float else kind)
        if not fits or (isinstance(value, bool) and kind is not bool):
            raise InputError(f"attribute {name} must be {kind.__name__}, not {_short(value)}")
        return kind(value)

    def expect(self, **defaults: Any):
        """Accept the named attributes at the value that this code implements, and no other."""
        for name, default in defaults.items():
            self._left.discard(name)
            value = self._values.get(name)
            if value is not None and value != default:
                raise InputError(
                    f"attribute {name} = {_short(value)} is not supported, only {default!r} is"
                )

    def ignore(self, *names: str):
        """Accept the named attributes at any value: they do not change the logits."""
        self._left.difference_update(names)

    def activation(self, name: str, default: str) -> Any:
        """Return our name of an activation function."""
        value = self.take(name, str, default)
        if value not in ACTIVATIONS:
            raise InputError(f"attribute {name} = {value!r} is not one of {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[value]

    def rope(self) -> dict[str, Any]:
        """Return `rope_theta` and `rope_scaling` from where any transformers version puts them.

        Before 5.0 they are `rope_theta` and `rope_scaling` (whose kind is `type`, later
        `rope_type`); since 5.0 everything is in `rope_parameters`.
        """
        theta = self.take("rope_theta", float, 10000.0)
        old = self.take("rope_scaling", dict, {})
        found = {**old, **self.take("rope_parameters", dict, {})}
        values = Attributes(found)
        theta = values.take("rope_theta", float, theta)
        kind = values.take("rope_type", str, found.get("type") or "default")
        values.ignore("type")
        values.expect(partial_rotary_factor=1.0)
        scaling = None
        if kind == "linear":
            scaling = RopeScaling(kind="linear", factor=values.take("factor", float))
            values.ignore("original_max_position_embeddings")
        elif kind == "llama3":
            scaling = RopeScaling(
                kind="llama3",
                factor=values.take("factor", float),
                low_freq_factor=values.take("low_freq_factor", float),
                high_freq_factor=values.take("high_freq_factor", float),
                original_max_positions=values.take("original_max_position_embeddings", int),
            )
        elif kind != "default":
            raise InputError(f"rope_type {kind!r} is not supported: default, linear, llama3 are")
        values.finish("the rope parameters")
        return {"rope_theta": theta, "rope_scaling": scaling}

    def finish(self, what: str):
        """Refuse what nobody took, expected or ignored: a new option is never dropped silently."""
        self.ignore(*IGNORED)
        self.expect(is_encoder_decoder=False, add_cross_attention=False, pruned_heads={})
        left = sorted(name for name in self._left if self._values[name] is not None)
        if left:
            value = _short(self._values[left[0]])
            raise InputError(
                f"attribute {left[0]} = {value} of {what} is not supported; "
                "remove it if it changes no logits"
            )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def dtype_name(hf_config: Mapping[str, Any]) -> str | None:
    """Return the stored dtype: `dtype` since transformers 5.0, `torch_dtype` before."""
    return hf_config.get("dtype") or hf_config.get("torch_dtype")


@dataclass(frozen=True)
class Weight:
    """One HF tensor and the leaf, or the leaves side by side on the last axis, that it fills.

    `{}` in the HF name is the layer; the leaves of such a weight have the layers on axis 0.
    """

    name: str
    leaves: tuple[str, ...]
    transpose: bool = False

    def names(self, layers: int) -> list[tuple[str, int | None]]:
        """Return the HF name, one per layer where there is a layer in it."""
        if "{}" in self.name:
            return [(self.name.format(layer), layer) for layer in range(layers)]
        return [(self.name, None)]

    def shape(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """Return the shape of the HF tensor from those of our leaves."""
        parts = [shapes[leaf][1:] if "{}" in self.name else shapes[leaf] for leaf in self.leaves]
        shape = (*parts[0][:-1], sum(part[-1] for part in parts))
        return shape[::-1] if self.transpose else shape

    def split(self, tensor: np.ndarray, widths: Sequence[int]) -> list[np.ndarray]:
        """Turn an HF tensor into the parts of our leaves, of the given last axes."""
        tensor = tensor.T if self.transpose else tensor
        return np.split(tensor, np.cumsum(widths)[:-1], axis=-1)

    def join(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """Turn the parts of our leaves into the HF tensor; the inverse of `split`."""
        tensor = np.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]
        return np.ascontiguousarray(tensor.T if self.transpose else tensor)


def linear(name: str, *leaves: str, transpose: bool = True) -> tuple[Weight, Weight]:
    """A `torch.nn.Linear` [out, in]; `transpose=False` for the `Conv1D` of GPT-2 [in, out]."""
    return (
        Weight(f"{name}.weight", tuple(f"{leaf}/kernel" for leaf in leaves), transpose),
        Weight(f"{name}.bias", tuple(f"{leaf}/bias" for leaf in leaves)),
    )


def norm(name: str, leaf: str) -> tuple[Weight, Weight]:
    """A norm's scale, and its bias where the norm has one."""
    return Weight(f"{name}.weight", (f"{leaf}/scale",)), Weight(f"{name}.bias", (f"{leaf}/bias",))


@dataclass(frozen=True)
class Family:
    """A model type of transformers as data.

    `weights` lists every tensor that a member of the family may have; a config without, say,
    biases has no leaf for them, and then the tensor is one too many.
    """

    model_type: str
    architecture: str
    prefix: str  # of the base model; some checkpoints leave it out
    layers: str  # the attribute with the number of layers
    config: Callable[[Attributes], DecoderConfig]
    weights: tuple[Weight, ...]
    buffers: tuple[str, ...] = ()  # patterns of constants that old checkpoints carry along

    def read(self, hf_config: Mapping[str, Any]) -> DecoderConfig:
        """Return the decoder that a `config.json` describes, or say which attribute is wrong."""
        attributes = Attributes(hf_config)
        try:
            config = self.config(attributes)
            attributes.finish(f"a {self.model_type} model")
        except (ValueError, ZeroDivisionError) as error:
            raise InputError(f"impossible sizes: {error}; restore the original file") from error
        return config

    def keep(self, hf_config: Mapping[str, Any], kept: Sequence[int]) -> dict[str, Any]:
        """Return the `config.json` of the model that has only the kept layers."""
        config = self.read(hf_config)
        result = {**hf_config, self.layers: len(kept)}
        for name in ("layer_types", "attention_layers"):
            if result.get(name):
                result[name] = [result[name][layer] for layer in kept]
        windows = tuple(config.windows[layer] if config.windows else None for layer in kept)
        if "attention_types" in result:
            kinds = ["local" if window else "global" for window in windows]
            result["attention_types"] = [[kinds, 1]]
        if self.read(result) != replace(config, layers=len(kept), windows=windows):
            raise InputError(
                f"layers {list(kept)} of a {self.model_type} model cannot be written down in "
                "config.json: its windows follow the layer number; keep another set"
            )
        return result
