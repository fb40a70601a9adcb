"""A whole experiment in seconds: a random llama of two layers, a few prompts, and a config."""

import contextlib
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache as compilation

from configs.common import base
from minillm_jax import build, program
from minillm_jax.models import DecoderConfig, abstract_params, hf
from tests.toy_tokenizer import write_toy_tokenizer

HF_CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
"""A teacher's `config.json`."""

PROMPTS = (
    "what is red", "why is the sun big", "name two birds", "the cat is small", "yes or no",
    "name one dog", "what is not good", "blue and green moon",
)  # fmt: skip


def write_teacher(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A teacher in the Hugging Face layout, with weights large enough to prefer some words."""
    hf_config = HF_CONFIG | changes
    config = DecoderConfig(
        vocab_size=hf_config["vocab_size"],
        layers=hf_config["num_hidden_layers"],
        width=hf_config["hidden_size"],
        heads=hf_config["num_attention_heads"],
        kv_heads=hf_config["num_key_value_heads"],
        mlp_width=hf_config["intermediate_size"],
        max_positions=hf_config["max_position_embeddings"],
        gated=True,
        tied_head=False,
    )
    rng = np.random.default_rng(seed)

    def values(path: Any, leaf: Any) -> np.ndarray:
        if len(leaf.shape) == 1 or "norm" in jax.tree_util.keystr(path):
            return np.ones(leaf.shape, np.float32)
        return (0.3 * rng.standard_normal(leaf.shape)).astype(np.float32)

    params = jax.tree_util.tree_map_with_path(values, abstract_params(config))
    hf.save(folder, config, params, hf_config)
    write_toy_tokenizer(folder)
    return folder


def one_device(monkeypatch: pytest.MonkeyPatch, devices: int = 1) -> None:
    """Let runs in this process use one of the eight devices, or so many: less to compile."""
    make, few = build.make_mesh, jax.devices()[:devices]

    def mesh(*sizes, devices=None, **named):
        return make(*sizes, devices=devices or few, **named)

    monkeypatch.setattr(build, "make_mesh", mesh)


@contextlib.contextmanager
def compilation_cache(folder: Path) -> Iterator[None]:
    """Keep compiled programs in `folder`: the second run in a process compiles nothing."""
    settings = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    try:
        compilation.reset_cache()  # whether there is one is looked up once
        for name, value in settings.items():
            jax.config.update(name, value)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation.reset_cache()


def command(monkeypatch: pytest.MonkeyPatch, name: str, *words: Any) -> int:
    """Run `python -m minillm_jax.NAME WORDS...` in this process; returns the exit code."""
    module = importlib.import_module(f"minillm_jax.{name}")
    module = importlib.reload(module)  # with flags that nobody has set yet
    sys.modules.pop("config_config", None)  # the file of an earlier call
    argv = [name, *map(str, words)]
    monkeypatch.setattr(sys, "argv", argv)  # where ml_collections finds the overrides
    return program.call(module.main, module.FLAGS, argv)


def write_prompts(file: Path, prompts: tuple[str, ...] = PROMPTS) -> Path:
    """A JSONL file with a row per prompt."""
    file.write_text("".join(json.dumps({"instruction": p}) + "\n" for p in prompts))
    return file


def toy_config(folder: Path) -> Any:
    """The settings of a run on files that are written into `folder`."""
    teacher = folder / "teacher"
    if not teacher.exists():
        write_teacher(teacher)
        write_prompts(folder / "train.jsonl")
        write_prompts(folder / "validation.jsonl", PROMPTS[:2])
        write_prompts(folder / "test.jsonl", PROMPTS[2:4])
    config: Any = base()
    config.name = "toy"
    config.teacher.path = str(teacher)
    config.student.keep_layers = (0,)
    config.data.train = str(folder / "train.jsonl")
    config.data.validation = str(folder / "validation.jsonl")
    config.data.test = str(folder / "test.jsonl")
    config.data.max_prompt = 16
    config.data.max_response = 8
    config.answers.batch_size = config.evaluate.batch_size = 8
    for stage in (config.sft, config.distill):
        stage.steps, stage.batch_size = 4, 8
        stage.learning_rate = 1e-3
        stage.evaluate_every = stage.save_every = 2
    config.distill.rollouts, config.distill.inner_epochs = 8, 3
    return config


def write_config(folder: Path) -> Path:
    """The same settings as a file for `--config`, which takes no argument."""
    toy_config(folder)
    file = folder / "toy.py"
    file.write_text(
        "from pathlib import Path\n\n"
        "from tests.toy_run import toy_config\n\n\n"
        "def get_config(arg=''):\n"
        "    if arg:\n"
        "        raise ValueError(f'toy.py takes no argument, not `{arg}`')\n"
        "    return toy_config(Path(__file__).parent)\n"
    )
    return file
