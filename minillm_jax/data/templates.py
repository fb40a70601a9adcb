"""How an instruction becomes a prompt: the Alpaca text of the paper, or the model's chat form."""

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
TEMPLATES = ("alpaca", "chat")


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

    `alpaca` is plain text. `chat` is the model's template with one user message: the instruction,
    and after a blank line the input, if there is one. In both, special-token text in a pair stays
    text.

    Raises:
        InputError: an unknown template, or a model without a chat template.
    """
    if template == "alpaca":
        return tokenizer.encode_batch([alpaca(*pair) for pair in pairs])
    if template == "chat":
        return tokenizer.chat_prompts(["\n\n".join(filter(None, pair)) for pair in pairs])
    raise InputError(f"unknown template {template!r}; choose one of {', '.join(TEMPLATES)}")
