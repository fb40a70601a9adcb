"""Models and data made on the spot, for runs without weights, network or data.

`scratch:FAMILY-LxD` is a random model of L layers of width D, built like the real ones of its
family with whatever is odd about them, in the Hugging Face layout; it is loaded as any other model
is. Its tokenizer is the family's real one where that is at hand (the folder `tokenizers` in
`$MINILLM_SHARED`, or in `shared` beside the checkout), else one that the packaged prompts train.
`scratch:answers` are the packaged prompts with made-up answers, `scratch:text` is their text.
"""

import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from minillm_jax.data.sources import Row, packaged_prompts
from minillm_jax.data.templates import alpaca
from minillm_jax.models import hf, init_params
from minillm_jax.models.weights import read_config
from minillm_jax.types import InputError

PREFIX = "scratch:"
_END = "<|endoftext|>"
_HEADS = 4
_REAL_TOKENIZERS = {"gpt2": "gpt2", "gpt_neo": "gpt2", "gptj": "gpt2", "opt": "opt"}


def _gpt2(layers: int, width: int) -> dict[str, Any]:
    return {"n_embd": width, "n_layer": layers, "n_head": _HEADS, "n_positions": 1024}


def _llama(layers: int, width: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _HEADS // 2,
        "max_position_embeddings": 1024,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
    }


def _opt(layers: int, width: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "word_embed_proj_dim": width,
        "ffn_dim": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": _HEADS,
        "max_position_embeddings": 1024,
    }


def _hf_config(family: str, layers: int, width: int) -> dict[str, Any]:
    """The `config.json` of a model without its vocabulary: what is odd in real ones is in it."""
    gpt2, llama, opt = _gpt2(layers, width), _llama(layers, width), _opt(layers, width)
    kinds = [[["global", "local"], layers // 2], [["global"], layers % 2]]
    configs: dict[str, dict[str, Any]] = {
        "gpt2": {"model_type": "gpt2", **gpt2},
        "gptj": {"model_type": "gptj", **gpt2, "rotary_dim": width // _HEADS // 2},
        "gpt_neo": {
            "model_type": "gpt_neo",
            "hidden_size": width,
            "num_layers": layers,
            "num_heads": _HEADS,
            "max_position_embeddings": 1024,
            "attention_types": kinds,
            "window_size": 16,
        },
        "opt": {"model_type": "opt", **opt},
        # The 350m: norms after, embeddings half as wide as the layers.
        "opt_350m": {
            "model_type": "opt",
            **opt,
            "word_embed_proj_dim": width // 2,
            "do_layer_norm_before": False,
        },
        "llama": {"model_type": "llama", **llama},
        "qwen2": {"model_type": "qwen2", **llama, "tie_word_embeddings": width < 64},
        "qwen3": {
            "model_type": "qwen3",
            **llama,
            "head_dim": 2 * width // _HEADS,
            "tie_word_embeddings": width < 64,
        },
    }
    if family not in configs:
        raise InputError(f"no family {family!r} from scratch: choose from {', '.join(configs)}")
    return configs[family]


def _ids(model_type: str, true_size: int, width: int) -> int:
    """Rows of the embedding: those beyond the vocabulary are as many as real models have."""
    if model_type == "gptj":
        return true_size + 143  # 50400
    if model_type == "opt":
        return true_size + 7  # 50272
    if model_type.startswith("qwen"):  # padded, and teacher and student not alike
        return true_size + width
    return true_size


def model(spec: str, folder: Path) -> Path:
    """The folder of the model `spec` in `folder`, written if it is not there yet.

    Raises:
        InputError: a spec of another form, or no such family.
    """
    found = re.fullmatch(PREFIX + r"(\w+)-(\d+)x(\d+)", spec)
    if not found:
        raise InputError(f"model {spec!r} is not of the form scratch:FAMILY-LxD; correct it")
    family, layers, width = found[1], int(found[2]), int(found[3])
    target = folder / spec.removeprefix(PREFIX)
    if layers < 1 or width < 16 or width % 16:
        raise InputError(f"model {spec!r}: at least one layer, and a width in steps of 16")
    hf_config = _hf_config(family, layers, width)
    if target.is_dir():
        return target
    from minillm_jax.data.tokenizer import load_tokenizer

    tokenizer = _tokenizer(hf_config["model_type"], folder)
    true = load_tokenizer(tokenizer)
    hf_config["vocab_size"] = _ids(hf_config["model_type"], true.vocab_size, width)
    hf_config["bos_token_id"] = hf_config["eos_token_id"] = true.eos_id
    _, config = read_config(hf_config, target)
    key = jax.random.fold_in(jax.random.key(0), layers * width)
    part = target.with_name(target.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    params = jax.device_get(init_params(config, key))
    hf.save(part, config, params, hf_config, everywhere=True)  # who finds none has his own disk
    true.save(part)
    part.rename(target)
    return target


def _tokenizer(model_type: str, folder: Path) -> Path:
    """A folder with the tokenizer of a family."""
    beside = Path(__file__).parents[2] / "shared"
    shared = Path(os.environ.get("MINILLM_SHARED") or beside) / "tokenizers"
    real = shared / _REAL_TOKENIZERS.get(model_type, "none")
    if (real / "tokenizer.json").is_file():
        return real
    made = folder / "tokenizer"
    if not made.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=".tokenizer-", dir=folder))
        _train_tokenizer(part)
        part.rename(made)
    return made


def _train_tokenizer(folder: Path) -> None:
    """Byte-level BPE of 1,024 tokens at most, on the packaged prompts in the Alpaca template."""
    import tokenizers

    backend: Any = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=[_END, "<|im_start|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [alpaca(row.instruction, row.input) for row in packaged_prompts("train")]
    backend.train_from_iterator(texts, trainer)
    backend.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": _END}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def answered_rows(split: str) -> list[Row]:
    """The packaged prompts of a split, each with the answer "The answer is" and words of its own.

    The words are drawn, so that nothing can be learnt of them but where they come from.
    """
    rng = np.random.default_rng(0)
    rows = []
    for row in packaged_prompts(split):
        words = row.instruction.split()
        drawn = rng.choice(words, min(len(words), 4), replace=False)
        rows.append(
            Row(row.instruction, row.input, (f"The answer is {' '.join(drawn)}.",), row.where)
        )
    return rows


def text(folder: Path) -> Path:
    """A file in `folder` with the text of the packaged prompts, written if it is not there yet."""
    file = folder / "text.txt"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        part = file.with_name(file.name + ".part")
        lines = [f"{row.instruction} {row.input}".strip() for row in packaged_prompts("train")]
        part.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
        part.rename(file)
    return file
