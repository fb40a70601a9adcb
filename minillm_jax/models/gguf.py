"""GGUF files of llama.cpp, as the `config.json` and the tensors of the same model in HF's words.

Only the `gguf` package and numpy; a tensor is dequantised when it is read. The tokenizer inside
the file is the business of `data/tokenizer.py`.
"""

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFEndian, GGUFReader, GGUFValueType, ReaderTensor, quants

from minillm_jax.models.attention import rotary_frequencies
from minillm_jax.models.weights import Tensor, read_config
from minillm_jax.types import InputError

_PERMUTED = {"llama": True, "qwen2": False, "qwen3": False}  # are the rows of q and k shuffled?

_ATTRIBUTES = {
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "rope.freq_base": "rope_theta",
}
# Accepted beside those, read from elsewhere or checked: anything else of the architecture raises.
_CHECKED = {"attention.value_length", "rope.dimension_count", "vocab_size"}

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CURE = "use the HF folder of the model"
_LONG = 64  # entries of an array in the header; no setting of a model has as many


class _Reader(GGUFReader):
    """The reader of the `gguf` package, which by itself reads past the end without a word."""

    def _get(self, offset, dtype, count=1, override_order=None):
        self.data = np.asarray(self.data)  # slices of a memmap took half of the loading time
        end = int(offset) + np.dtype(dtype).itemsize * int(count)
        if end > self.data.size:
            raise ValueError(f"its {self.data.size:,} bytes should be {end:,} or more")
        return super()._get(offset, dtype, count, override_order)

    def _get_field_parts(self, orig_offs, raw_type):
        """Step over long arrays: those are the tokenizer's, and most of the reading time."""
        if raw_type == GGUFValueType.ARRAY and self.byte_order != "S":
            kind = GGUFValueType(self._get(orig_offs, np.uint32)[0])
            count, end = int(self._get(orig_offs + 4, np.uint64)[0]), int(orig_offs) + 12
            if count > _LONG and kind in self.gguf_scalar_to_np:
                end += count * np.dtype(self.gguf_scalar_to_np[kind]).itemsize
                self._get(end - 1, np.uint8)
                return end - int(orig_offs), [], [], [GGUFValueType.ARRAY, kind]
            if count > _LONG and kind == GGUFValueType.STRING:
                for _ in range(count):
                    if end + 8 > self.data.size:
                        break
                    end += 8 + int.from_bytes(self.data[end : end + 8].tobytes(), "little")
                self._get(end - 1, np.uint8)
                return end - int(orig_offs), [], [], [GGUFValueType.ARRAY, kind]
        return super()._get_field_parts(orig_offs, raw_type)


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the `config.json` of a GGUF file and its tensors under their HF names.

    Raises `InputError` for a damaged file, and for an architecture, a quantisation or a setting
    that is not known here.
    """
    try:
        reader = _Reader(path)
        little = reader.endianess == GGUFEndian.LITTLE
        # The token strings of the tokenizer are most of the file's header, and slow to decode.
        metadata = {
            name: field.contents()
            for name, field in reader.fields.items()
            if not name.startswith("tokenizer.") or name.endswith("_token_id")
        }
    except Exception as error:  # foreign bytes can break the foreign parser anywhere
        raise InputError(
            f"{path} is no GGUF file, or a damaged one ({error}); fetch it again"
        ) from error
    architecture = metadata.get("general.architecture")
    if architecture not in _PERMUTED or not little:
        known = ", ".join(_PERMUTED)
        raise InputError(
            f"{path}: architecture {architecture!r} is not one of {known} (little-endian); {_CURE}"
        )
    found = {tensor.name: tensor for tensor in reader.tensors}
    frequencies = found.pop("rope_freqs.weight", None)
    hf_config = _hf_config(path, architecture, metadata, found)
    if frequencies is not None:
        hf_config["rope_scaling"] = _llama3_scaling(path, frequencies, hf_config)
    heads = {}
    if _PERMUTED[architecture]:
        heads["attn_q"] = hf_config["num_attention_heads"]
        heads["attn_k"] = hf_config["num_key_value_heads"]
    tensors = dict(_tensor(path, tensor, heads) for tensor in found.values())
    return hf_config, tensors


def _hf_config(
    path: Path, architecture: str, metadata: dict[str, Any], found: dict[str, ReaderTensor]
) -> dict[str, Any]:
    prefix = f"{architecture}."
    values = {
        name.removeprefix(prefix): value
        for name, value in metadata.items()
        if name.startswith(prefix)
    }
    for name, value in values.items():
        if name not in _ATTRIBUTES and name not in _CHECKED:
            raise InputError(f"{path}: setting {prefix}{name} = {value!r} is not known; {_CURE}")
    for name in ("attention.head_count", "attention.head_count_kv", "embedding_length"):
        value = values.setdefault(name, values.get("attention.head_count"))
        if not isinstance(value, int) or value < 1:
            raise InputError(f"{path}: {prefix}{name} is {value!r}, not a number from 1; {_CURE}")
    heads = values["attention.head_count"]
    head_dim = values.setdefault("attention.key_length", values["embedding_length"] // heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if values.get(name, head_dim) != head_dim:
            raise InputError(
                f"{path}: {prefix}{name} is {values[name]}, not the head width {head_dim}; {_CURE}"
            )
    if "token_embd.weight" not in found:
        raise InputError(f"{path}: no tensor token_embd.weight; fetch the file again")
    hf_config = {theirs: values[ours] for ours, theirs in _ATTRIBUTES.items() if ours in values}
    # Stored as float32: 1e-5 reads 9.99999974e-06.
    for name in ("rms_norm_eps", "rope_theta"):
        if name in hf_config:
            hf_config[name] = float(str(np.float32(hf_config[name])))
    for name in ("bos", "eos"):
        token = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if token is not None:
            hf_config[f"{name}_token_id"] = token
    if architecture != "qwen2":
        hf_config["attention_bias"] = "blk.0.attn_q.bias" in found
    if architecture == "llama":
        hf_config["mlp_bias"] = "blk.0.ffn_up.bias" in found
    return {
        **hf_config,
        "model_type": architecture,
        "hidden_act": "silu",
        "vocab_size": int(found["token_embd.weight"].shape[-1]),
        "tie_word_embeddings": "output.weight" not in found,
    }


def _llama3_scaling(path: Path, tensor: ReaderTensor, hf_config: dict[str, Any]) -> dict[str, Any]:
    """Recover the parameters of LLaMA 3 from the divisors of the frequencies, [h / 2].

    Only the divisors are in the file; 1, 4 and 8192 are those of every LLaMA 3.x model.
    """
    divisors = quants.dequantize(tensor.data, tensor.tensor_type)
    scaling = {
        "rope_type": "llama3",
        "factor": float(divisors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    _, config = read_config({**hf_config, "rope_scaling": scaling}, path)
    plain = rotary_frequencies(replace(config, rope_scaling=None))
    expected = plain / rotary_frequencies(config)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4):
        raise InputError(f"{path}: rope_freqs.weight is not that of a LLaMA 3 model; {_CURE}")
    return scaling


def _tensor(path: Path, tensor: ReaderTensor, heads: dict[str, int]) -> tuple[str, Tensor]:
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", tensor.name)
    layer, part, kind = match.groups() if match else (None, tensor.name, "")
    name = _NAMES.get(part)
    if name is None:  # left to the caller to complain about
        return tensor.name, Tensor(path, (), lambda: np.zeros(()))
    name = f"{name}.{kind}" if layer is None else f"model.layers.{layer}.{name}.{kind}"

    # Not the mapped array itself: its pages would stay in memory with the whole file.
    kind, offset = tensor.tensor_type, int(tensor.data_offset)
    dtype, stored = tensor.data.dtype, tensor.data.shape

    def values() -> np.ndarray:
        data = np.fromfile(path, dtype, math.prod(stored), offset=offset).reshape(stored)
        try:
            array = quants.dequantize(data, kind)
        except NotImplementedError as error:
            raise InputError(f"{path}: tensor {tensor.name}: {error}; {_CURE}") from error
        return _unpermute(array, heads[part]) if part in heads else array

    return name, Tensor(path, tuple(int(n) for n in reversed(tensor.shape)), values, _kind(kind))


def _kind(kind: GGMLQuantizationType) -> str:
    """The dtype for `Tensor`: what dequantises is F32, integers keep their name."""
    return kind.name if re.fullmatch(r"I\d+", kind.name) else "F32"


def _unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's order of the rows [heads * h, ...]: it has rotary pairs side by side."""
    width = rows.shape[0] // heads
    pairs = rows.reshape(heads, width // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)
