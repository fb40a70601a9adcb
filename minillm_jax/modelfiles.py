"""Models on disk: folders in the Hugging Face layout with weights, config and tokenizer."""

import shutil
from pathlib import Path

import jax

from minillm_jax.build import Model
from minillm_jax.data.tokenizer import Tokenizer
from minillm_jax.models import hf
from minillm_jax.models.fetch import resolve
from minillm_jax.types import InputError


def save_model(folder: Path, model: Model, tokenizer: Tokenizer) -> None:
    """Replace `folder` by the model; a killed run leaves the old one or the new one."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    hf.save(part, model.config, jax.device_get(model.params), model.hf_config)
    tokenizer.save(part)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def model_path(spec: str) -> Path:
    """The model that `spec` means: a work directory's newest student, else `spec` itself."""
    if spec.startswith("pip:"):
        return resolve(spec)
    path = Path(spec).expanduser()
    if not path.exists():
        raise InputError(f"{spec}: no such file or folder; give one that holds a model")
    for stage in ("distill", "student_sft"):
        student = path / "stages" / stage / "model"
        if student.is_dir():
            return student
    return path
