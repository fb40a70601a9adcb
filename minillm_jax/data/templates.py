"""How an instruction becomes a prompt: the Alpaca text of the paper, or the model's chat form.

A prompt is tokenised by itself and its answer after it, not both as one text as the reference
does: a sampled answer continues exactly these ids. With the tokenizers of GPT-2 and OPT the two
agree on all of databricks-dolly-15k, since the Alpaca text ends in a newline.
"""

from collections.abc import Sequence

from minillm_jax.data.tokenizer import Tokenizer
from minillm_jax.types import InputError

ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
TEMPLATES = ("alpaca", "alpaca_qwen", "chat")


def alpaca(instruction: str, input: str = "") -> str:
    """The prompt text of the paper; it ends in a newline."""
    template = ALPACA_WITH_INPUT if input else ALPACA
    return template.format(instruction=instruction, input=input)


def prompt_ids(tokenizer: Tokenizer, template: str, instruction: str, input: str = "") -> list[int]:
    """Ids of one prompt, without BOS; see `prompts`."""
    return prompts(tokenizer, template, [(instruction, input)])[0]


def prompts(
    tokenizer: Tokenizer, template: str, pairs: Sequence[tuple[str, str]]
) -> list[list[int]]:
    """Ids of the prompts of (instruction, input) pairs.

    `alpaca` is plain text. `alpaca_qwen` is what the reference gives Qwen2 and Qwen2.5: the same
    text as `<|im_start|>TEXT<|im_end|><|im_start|>Assistant:`, which is not their chat template.
    `chat` is the model's template with one user message: the instruction, and after a blank line
    the input, if there is one. In all three, special-token text in a pair stays text.

    Raises:
        InputError: an unknown template, or a model without a chat template or those tokens.
    """
    if template == "alpaca":
        return tokenizer.encode_batch([alpaca(*pair) for pair in pairs])
    if template == "alpaca_qwen":
        start, end = (tokenizer.special_id(f"<|im_{name}|>") for name in ("start", "end"))
        plain = tokenizer.encode_batch([alpaca(*pair) for pair in pairs], continues=True)
        answer = [end, start, *tokenizer.encode("Assistant:", continues=True)]
        return [[start, *ids, *answer] for ids in plain]
    if template == "chat":
        return tokenizer.chat_prompts(["\n\n".join(filter(None, pair)) for pair in pairs])
    raise InputError(f"unknown template {template!r}; choose one of {', '.join(TEMPLATES)}")
