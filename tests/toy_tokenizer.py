"""A tokenizer of 64 words, written as a Hugging Face folder, for tests without real data."""

import json
from pathlib import Path

import tokenizers
from tokenizers import models, pre_tokenizers

SPECIAL = ["<pad>", "<end>", "<user>", "<assistant>", "<unk>"]
WORDS = (
    "Below is an instruction that describes a task paired with input provides further context "
    "Write response appropriately completes the request ### Instruction Input Response : . , "
    "system You are helpful what why name one two three red green blue cat dog bird sun moon "
    "good bad yes no and or not big small"
).split()
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def write_toy_tokenizer(folder: Path) -> Path:
    """Write `tokenizer.json` and `tokenizer_config.json` (end of sequence `<end>`, id 1)."""
    fillers = [f"w{i}" for i in range(64 - len(SPECIAL) - len(WORDS))]
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS, *fillers])}
    assert len(vocabulary) == 64
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[reportAttributeAccessIssue]
    backend.add_special_tokens(SPECIAL)
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<end>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
