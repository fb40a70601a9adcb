"""Students on disk: a folder in the Hugging Face layout with weights, config and tokenizer."""

import shutil
from pathlib import Path

import jax

from minillm_jax.build import Model
from minillm_jax.data.tokenizer import Tokenizer
from minillm_jax.models import hf


def save_model(folder: Path, model: Model, tokenizer: Tokenizer) -> None:
    """Replace `folder` by the model; a killed run leaves the old one or the new one."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    hf.save(part, model.config, jax.device_get(model.params), model.hf_config)
    tokenizer.save(part)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
