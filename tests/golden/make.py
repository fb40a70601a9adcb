"""Makes the golden arrays of the model tests with torch and transformers.

    python tests/golden/make.py                                       every tiny model
    python tests/golden/make.py --stories FOLDER --smollm2 GGUF       and the real ones

Transformers wants `accelerate` for the second.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
_SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 40,
    "max_position_embeddings": 64,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 2.0,
    "original_max_position_embeddings": 16,
}
_GPT2 = {"n_embd": 16, "n_layer": 3, "n_head": 4, "vocab_size": 40, "n_positions": 64}
_OPT = {
    "hidden_size": 16,
    "ffn_dim": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 40,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 16,
}
# Each with the odd attributes of real checkpoints: name -> (config class, arguments).
CASES = {
    "llama": ("LlamaConfig", {**_SIZES, "tie_word_embeddings": True}),
    "llama_odd": (
        "LlamaConfig",
        {
            **_SIZES,
            "head_dim": 6,
            "attention_bias": True,
            "mlp_bias": True,
            "rms_norm_eps": 1e-3,
            "rope_parameters": _LLAMA3,
        },
    ),
    "llama_linear": (
        "LlamaConfig",
        {**_SIZES, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "mistral": ("MistralConfig", {**_SIZES, "head_dim": 6, "sliding_window": 4}),
    "qwen2": (
        "Qwen2Config",
        {**_SIZES, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", {**_SIZES, "head_dim": 6, "tie_word_embeddings": True}),
    "gpt2": ("GPT2Config", _GPT2),
    "gpt_neo": (
        "GPTNeoConfig",
        {
            "hidden_size": 16,
            "num_layers": 3,
            "num_heads": 4,
            "intermediate_size": 24,
            "vocab_size": 40,
            "max_position_embeddings": 64,
            "attention_types": [[["global", "local"], 1], [["local"], 1]],
            "window_size": 4,
        },
    ),
    "gptj": ("GPTJConfig", {**_GPT2, "n_head": 2, "rotary_dim": 4, "n_inner": 24}),
    "opt": ("OPTConfig", _OPT),
    "opt_350m": ("OPTConfig", {**_OPT, "word_embed_proj_dim": 12, "do_layer_norm_before": False}),
}
# Families that are not shipped: the worked example of docs/add_a_model.md.
EXAMPLES = {
    "starcoder2": (
        "Starcoder2Config",
        {**_SIZES, "sliding_window": 4, "norm_epsilon": 1e-3, "hidden_act": "gelu_pytorch_tanh"},
    ),
}
_TOKENS = [
    [0, 0, 0, 5, 17, 3, 22, 9, 31, 2],  # padded on the left
    [7, 1, 12, 30, 4, 4, 19, 8, 25, 11],
    [13, 6, 28, 2, 39, 10, 0, 0, 0, 0],  # on the right
]
_LENGTHS = [(3, 10), (0, 10), (0, 6)]

_TEXTS = [
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\nThe",
    "Once upon a time, there was a little girl who liked to",
]


def batch() -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens and the mask of every case, [3, 10]."""
    slots = np.arange(10)
    mask = np.stack([(slots >= start) & (slots < stop) for start, stop in _LENGTHS])
    return np.array(_TOKENS, np.int32), mask


def build(name: str, seed: int = 0, attention: str | None = None, **changes: Any):
    """Return a torch model of which no bias and no norm is where it is initialised.

    `attention` is one of transformers' implementations, `changes` are to the configuration.
    """
    import torch
    import transformers

    kind, arguments = {**CASES, **EXAMPLES}[name]
    torch.manual_seed(seed)
    config = getattr(transformers, kind)(**{**arguments, **changes})
    chosen = {} if attention is None else {"attn_implementation": attention}
    model = transformers.AutoModelForCausalLM.from_config(config, **chosen).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model


def torch_logits(model, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return the logits [B, T, V] of a torch model; those at padded slots mean nothing."""
    import torch

    attention = torch.tensor(mask).long()
    positions = (attention.cumsum(-1) - 1).clamp(min=0)
    # OPT counts its own positions from the mask.
    given = {} if model.config.model_type == "opt" else {"position_ids": positions}
    with torch.no_grad():
        out = model(torch.tensor(tokens).long(), attention_mask=attention, **given)
    return out.logits.float().numpy()


def save(model, folder: Path) -> None:
    """Write a torch model as transformers does."""
    model.save_pretrained(folder)


def write_folder(name: str, folder: Path) -> dict[str, np.ndarray]:
    """Write the HF folder of a golden case, and return its `tokens`, `mask` and `logits`."""
    from safetensors.numpy import save_file

    arrays = dict(np.load(HERE / f"{name}.npz"))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(str(arrays.pop("config")))
    outputs = {key: arrays.pop(key) for key in ("tokens", "mask", "logits")}
    save_file(arrays, folder / "model.safetensors", {"format": "pt"})
    return outputs


def _make(name: str) -> None:
    from safetensors.numpy import load_file

    model = build(name)
    tokens, mask = batch()
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder))
        tensors = load_file(Path(folder) / "model.safetensors")
        config = json.loads((Path(folder) / "config.json").read_text())
    outputs = {"tokens": tokens, "mask": mask, "logits": torch_logits(model, tokens, mask)}
    arrays: dict[str, Any] = {"config": json.dumps(config), **outputs, **tensors}
    np.savez_compressed(HERE / f"{name}.npz", **arrays)


def _make_stories(folder: Path) -> None:
    import torch
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = np.array([[1, 403, 407, 261, 378]])  # "Once upon a time"
    answer = model.generate(
        torch.tensor(prompt), do_sample=False, max_new_tokens=96, eos_token_id=None
    )
    np.savez_compressed(
        HERE / "stories260K.npz", prompt=prompt[0], answer=answer[0, prompt.shape[1] :].numpy()
    )


def _make_smollm2(gguf: Path) -> None:
    import torch
    import transformers

    # The reference in float64: with 30 layers the rounding of float32 alone is 9e-5.
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    ).double()
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    rows = [tokenizer(text)["input_ids"] for text in _TEXTS]
    width = max(map(len, rows))
    mask = np.stack([np.arange(width) >= width - len(row) for row in rows])
    rows = np.stack([[0] * (width - len(row)) + row for row in rows])
    logits = torch_logits(model, rows, mask)
    columns = np.arange(0, 49152, 97)
    np.savez_compressed(
        HERE / "smollm2.npz", tokens=rows, mask=mask, columns=columns, logits=logits[..., columns]
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--stories", type=Path, help="the folder of stories260K")
    parser.add_argument("--smollm2", type=Path, help="SmolLM2-135M-Instruct.Q4_1.gguf")
    flags = parser.parse_args()
    for case in (*CASES, *EXAMPLES):
        _make(case)
    if flags.stories:
        _make_stories(flags.stories)
    if flags.smollm2:
        _make_smollm2(flags.smollm2)
