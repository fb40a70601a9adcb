"""A model on the devices; and on disk, in the Hugging Face layout with config and tokenizer."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from minillm_jax import hosts
from minillm_jax.data.tokenizer import Tokenizer
from minillm_jax.models import DecoderConfig, hf
from minillm_jax.models.fetch import is_remote, resolve
from minillm_jax.types import InputError, Params


@dataclass(frozen=True)
class Model:
    """A decoder with its parameters on the devices; `hf_config` is what an export needs."""

    config: DecoderConfig
    params: Params
    hf_config: dict[str, Any]

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(self.params))


def save_model(folder: Path, model: Model, tokenizer: Tokenizer) -> None:
    """Replace `folder` by the model; a run killed here leaves the old one or the new one.

    Of several processes, all of which must call this, the first writes.

    Raises:
        InputError: it cannot be written; the old one stays.
    """
    part, old = _part(folder), _old(folder)
    if not hosts.is_main():
        return hf.save(part, model.config, model.params, model.hf_config)
    recover(folder)
    try:
        hf.save(part, model.config, model.params, model.hf_config)
        tokenizer.save(part)
        if folder.exists():
            folder.rename(old)
        part.rename(folder)
    except OSError as error:
        raise InputError(
            f"cannot write {folder}: {error.strerror}; free some space or choose another folder"
        ) from error
    finally:
        recover(folder)


def recover(folder: Path) -> None:
    """Undo what a killed `save_model` left: the old model comes back, remains go."""
    old = _old(folder)
    if old.exists() and not folder.exists():
        old.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(_part(folder), ignore_errors=True)


def _part(folder: Path) -> Path:
    return folder.with_name(folder.name + ".part")


def _old(folder: Path) -> Path:
    return folder.with_name(folder.name + ".old")


def model_path(spec: str) -> Path:
    """The model that `spec` means: that of a work directory (its newest student) or of one of its
    stages, else `spec` itself."""
    if is_remote(spec):
        return resolve(spec)
    path = Path(spec).expanduser()
    if not path.exists():
        raise InputError(f"{spec}: no such file or folder; give one that holds a model")
    for part in ("stages/distill/model", "stages/student_sft/model", "model"):
        if (path / part).is_dir():
            return path / part
    if path.parent.name == "checkpoints" and (path / "state").is_dir():
        stage = path.parent.parent
        raise InputError(
            f"{spec} is a checkpoint of training; its stage's model is {stage / 'model'}"
        )
    if (path / "metrics.jsonl").is_file():
        raise InputError(f"{spec} is a work directory without a student yet: run student_sft first")
    return path
