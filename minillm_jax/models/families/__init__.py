"""The families of models that can be read and written, by the `model_type` of `config.json`.

A family is a table: it imports neither jax nor flax.
"""

from collections.abc import Mapping
from typing import Any

from minillm_jax.models.families import gpt2, gpt_neo, gptj, llama, mistral, opt, qwen
from minillm_jax.models.families._hf import Family, Weight
from minillm_jax.types import InputError

FAMILIES = {
    family.model_type: family
    for family in (
        gpt2.FAMILY,
        gpt_neo.FAMILY,
        gptj.FAMILY,
        llama.FAMILY,
        mistral.FAMILY,
        opt.FAMILY,
        qwen.QWEN2,
        qwen.QWEN3,
    )
}


def family_of(hf_config: Mapping[str, Any]) -> Family:
    """Return the family of a `config.json`, or say which ones there are."""
    model_type = hf_config.get("model_type")
    if model_type is None:
        raise InputError("no model_type in config.json; it must be that of a transformers model")
    if model_type not in FAMILIES:
        raise InputError(
            f"model_type {model_type!r} is not supported; choose one of {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]


__all__ = ["FAMILIES", "Family", "Weight", "family_of"]
