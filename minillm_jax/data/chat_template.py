"""Rendering a model's own chat template, a jinja program that comes with its tokenizer."""

import functools
import json
from collections.abc import Mapping, Sequence

import jinja2
import jinja2.sandbox

from minillm_jax.types import InputError

Message = Mapping[str, str]  # {"role": ..., "content": ...}


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


class ChatTemplate:
    """A compiled template; `source` names its file in messages.

    The environment is that of transformers' `apply_chat_template`, sandboxed, but without the
    clock `strftime_now`: a prompt must not depend on the day it is made.
    """

    def __init__(self, text: str, tokens: Mapping[str, str], source: str):
        """Compile `text`; `tokens` are the special tokens that it may name, as `bos_token`."""
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
        environment.globals["raise_exception"] = _refuse
        self._tokens, self._source = dict(tokens), source
        try:
            self._template = environment.from_string(text)
        except jinja2.TemplateError as error:
            raise InputError(f"{source}: broken chat template ({error}); correct it") from error

    def render(self, messages: Sequence[Message]) -> str:
        """The conversation as text, up to where the assistant's answer begins."""
        try:
            return self._template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self._tokens,
            )
        except jinja2.TemplateError as error:
            raise InputError(
                f"{self._source}: the chat template refused the conversation ({error}); use the "
                "alpaca template or correct the conversation"
            ) from error
